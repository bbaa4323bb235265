"""The whole response is distilled, with the judge's scores in its block. Tests that a loss on the
score tokens alone spares the answer (Sec. 3.2)."""

import cycle

masked = cycle.distillation_row


def whole_response(rollout, tokenizer):
    row = masked(rollout, tokenizer)
    n = len(rollout.prompt_ids)
    return row._replace(mask=[False] * n + [True] * (len(row.ids) - n))


cycle.distillation_row = whole_response
cycle.main()
