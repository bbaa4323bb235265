"""No KL term in the GRPO loss (Table 5: 0.01)."""

import cycle

cycle.main(options=("--grpo.kl_coef", "0"))
