"""The KL term pulls to the base model, instead of the policy at the start of the cycle. The paper
leaves the reference open (Table 5); the authors' scripts have the second."""

import cycle

cycle.main(options=("--reference", "base"))
