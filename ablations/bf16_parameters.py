"""Trained parameters in bf16, as in the authors' scripts, instead of fp32 with bf16 compute (App.
E). Tests whether updates of 1e-6 survive the rounding."""

import cycle

cycle.main(options=("--policy.parameters", "bfloat16"))
