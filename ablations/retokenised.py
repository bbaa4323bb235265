"""Distillation rows are tokenised anew from text, as in the authors' scripts, instead of keeping
the sampled ids and exchanging five of them (Sec. 3.2)."""

import cycle
from backend.packing import Row
from prompts import render_response, score_positions


def from_text(rollout, tokenizer):
    text = render_response(rollout.answer, rollout.judge_scores)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] if rollout.response_ids[-1] == tokenizer.eos_token_id else []
    mask = [False] * (len(rollout.prompt_ids) + len(ids))
    for position in score_positions(ids, tokenizer):
        mask[len(rollout.prompt_ids) + position] = True
    return Row([*rollout.prompt_ids, *ids], mask)


cycle.distillation_row = from_text
cycle.main()
