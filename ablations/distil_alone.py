"""Phase 2 alone: responses are sampled and judged as ever, and phase 1 takes no step. Tests that RL
improves the answer and distillation the scores (Sec. 3.3)."""

import cycle


def no_step(**_):
    return {"kl": None, "logprob_gap": None}


cycle.rl_step = no_step
cycle.main()
