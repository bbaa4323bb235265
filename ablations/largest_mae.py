"""The rollouts whose self-scores are farthest from the judge's are distilled, at most 4 a prompt:
the other strategy in the authors' scripts. Tests the balanced selection (Sec. 3.2)."""

from collections import Counter

import cycle
from reward import mean_absolute_error


def select(run, buffer, number):
    chosen, of_prompt = [], Counter()
    for r in sorted(buffer, key=lambda r: -mean_absolute_error(r.self_scores, r.judge_scores)):
        if of_prompt[r.prompt_id] < run.config.sft.per_prompt_limit:
            chosen.append(r)
            of_prompt[r.prompt_id] += 1
    return chosen[: run.config.sft.max_samples]


cycle.Run.select = select
cycle.main()
