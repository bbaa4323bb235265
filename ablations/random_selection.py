"""The distilled rollouts are drawn at random from the buffer. Tests that even coverage of the 25
cells gives rare scores the weight to be learnt (Sec. 3.2)."""

import random

import cycle


def draw(judge_scores, prompt_ids, max_samples, per_prompt_limit, seed):
    n = len(judge_scores)
    return random.Random(seed).sample(range(n), min(n, max_samples))


cycle.select_stratified = draw
cycle.main()
