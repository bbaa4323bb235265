"""Groups of 16 rollouts instead of 8 (Table 5): twice the samples and the judge's bill."""

import cycle

cycle.main(options=("--rollouts", "16"))
