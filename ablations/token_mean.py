"""The GRPO loss is the mean over all tokens of a step, so that long responses weigh more (Table 5
names this; the authors' micro-batches of one response make it the mean over responses)."""

import cycle

cycle.main(options=("--grpo.loss_mean", "token"))
