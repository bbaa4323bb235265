"""No entropy bonus in the GRPO loss (Table 5: 0.001)."""

import cycle

cycle.main(options=("--grpo.entropy_coef", "0"))
