"""Five tokens and nothing else: .venv/bin/python -m pytest tests/test_sft_masked.py"""

import math

import pytest
import torch
from conftest import make_rollout
from transformers import get_cosine_schedule_with_warmup

import prompts
import sft_masked
from backend.packing import share_out
from backend.policy import PolicyConfig, load_model, load_policy
from sft_masked import (
    SFTConfig,
    distillation_row,
    lr_factor,
    make_optimizer,
    masked_loss,
    sft_step,
    updates,
)

FP32 = PolicyConfig(dtype="float32")


def distil(policy, tokenizer, rollouts, config) -> list[dict]:
    """Phase 2 as cycle.py has it: the figures of each update."""
    targets = [distillation_row(r, tokenizer) for r in rollouts]
    optimizer = make_optimizer(policy, config)
    epoch = updates(targets, config, seed=1)
    return [sft_step(policy, optimizer, update, config, FP32) for update in epoch]


def test_judges_digits_replace_the_models_in_five_places(tokenizer):
    rollout = make_rollout(tokenizer, scores=(8, 8, 8, 1, 1), judge=(2, 3, 8, 5, 6))
    sampled = [*rollout.prompt_ids, *rollout.response_ids]
    row = distillation_row(rollout, tokenizer)
    places = [len(rollout.prompt_ids) + p for p in rollout.score_positions]
    assert [k for k, m in enumerate(row.mask) if m] == places and len(places) == 5
    differing = [k for k, (a, b) in enumerate(zip(sampled, row.ids, strict=True)) if a != b]
    assert differing == [places[0], places[1], places[3], places[4]]  # coherence agrees: 8 and 8
    response = row.ids[len(rollout.prompt_ids) :]
    assert prompts.parse_self_eval(tokenizer.decode(response)).scores == (2, 3, 8, 5, 6)
    assert rollout.response_ids == make_rollout(tokenizer).response_ids  # the record is unchanged


def test_only_judged_rollouts_can_be_distilled(tokenizer):
    for change in ({"judge_scores": None}, {"score_positions": None}):
        with pytest.raises(ValueError, match="cannot be distilled"):
            distillation_row(make_rollout(tokenizer, **change), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_no_other_position_carries_loss_or_gets_gradient(random_folder, tokenizer, tied):
    folder = random_folder("llama", tied)
    policy = load_policy(folder, PolicyConfig(dtype="float32", shared_prefix=False))
    rows = [distillation_row(make_rollout(tokenizer, answer=a), tokenizer)
            for a in ("Fine.", "It is old and good, it is.")]  # fmt: skip
    [batch] = share_out(rows, [0, 0], 10_000, shared_prefix=False).batches
    kept = {}

    def keep(name):
        def hook(module, args, output):
            kept[name] = output if name == "head" else output.last_hidden_state
            kept[name].retain_grad()

        return hook

    policy.model.model.register_forward_hook(keep("hidden"))
    logp = policy(batch).logp
    loss = masked_loss(logp, batch.mask, 10)
    loss.backward()
    touched = (kept["hidden"].grad != 0).any(-1)  # (B, T): positions whose logits got gradient
    assert torch.equal(touched[:, :-1], batch.mask[:, 1:]) and not touched[:, -1].any()
    assert batch.mask.sum(1).tolist() == [5, 5]

    # The same loss from full logits and labels of -100 everywhere else.
    plain = load_model(folder, torch.float32)
    logits = plain(input_ids=batch.ids).logits[:, :-1]
    labels = batch.ids.masked_fill(~batch.mask, -100)[:, 1:]
    usual = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
    torch.testing.assert_close(loss, usual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("total", "warmup"), [(13, 0.03), (100, 0.03), (10, 0.25), (1, 0.03)])
def test_schedule_is_hugging_faces(total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.floor(warmup * total), total)
    for update in range(total):
        assert lr_factor(update, total, warmup) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert lr_factor(total, total, warmup) == pytest.approx(0)


def test_distillation_teaches_the_judges_scores(random_folder, tokenizer):
    policy = load_policy(random_folder("qwen3"), FP32)
    rollouts = [make_rollout(tokenizer, sample=k) for k in range(70)]
    config = SFTConfig(lr=3e-3)
    figures = distil(policy, tokenizer, rollouts, config)
    assert [f["rows"] for f in figures] == [32, 32, 6]  # ceil(70 / 32) updates
    assert [f["lr"] for f in figures] == pytest.approx([3e-3, 3e-3 * 0.75, 3e-3 * 0.25])
    assert figures[-1]["loss"] < figures[0]["loss"] - 1
    assert distil(policy, tokenizer, [], config) == []


def test_each_batch_is_divided_by_its_own_tokens(random_folder, tokenizer, monkeypatch):
    seen = []
    original = sft_masked.masked_loss

    def spy(logp, mask, denominator):
        seen.append((int(mask.sum()), denominator))
        return original(logp, mask, denominator)

    monkeypatch.setattr(sft_masked, "masked_loss", spy)
    policy = load_policy(random_folder("qwen3"), FP32)
    rollouts = [make_rollout(tokenizer, sample=k) for k in range(6)]
    distil(policy, tokenizer, rollouts, SFTConfig(batch=4))
    assert seen == [(20, 20), (10, 10)]
