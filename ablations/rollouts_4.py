"""Groups of 4 rollouts instead of 8 (Table 5): half of the samples and of the judge's bill."""

import cycle

cycle.main(options=("--rollouts", "4"))
