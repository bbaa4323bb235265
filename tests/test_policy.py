"""Forward, micro-batches, export: .venv/bin/python -m pytest tests/test_policy.py"""

import json

import pytest
import torch
from conftest import make_rollout
from transformers import AutoModelForCausalLM, AutoTokenizer

import parallel
from grpo import GRPOConfig, make_optimizer, policy_loss, response_row
from policy import (
    PolicyConfig,
    Row,
    check_model_folder,
    export,
    load_model,
    load_policy,
    micro_batches,
)
from sft_masked import masked_loss

FP32 = PolicyConfig(dtype="float32", head_tokens=3)  # several chunks
KINDS = [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False)]


def rows(vocab: int, lengths=((5, 9), (2, 4), (7, 3))) -> list[Row]:
    g = torch.Generator().manual_seed(1)
    out = []
    for prompt, response in lengths:
        ids = torch.randint(0, vocab, (prompt + response,), generator=g).tolist()
        out.append(Row(ids, [False] * prompt + [True] * response))
    return out


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_log_probabilities_and_gradients_equal_plain_ones(random_folder, kind, tied, checkpointing):
    folder = random_folder(kind, tied)
    config = PolicyConfig(dtype="float32", head_tokens=3, gradient_checkpointing=checkpointing)
    policy = load_policy(folder, config)
    plain = load_model(folder, torch.float32)
    sample = rows(plain.config.vocab_size)
    [batch] = micro_batches(sample, 1000)
    got = policy(batch.ids, batch.positions, batch.scored, temperature=0.8)

    loss = 0.0
    for b, i in enumerate(batch.index):
        ids = torch.tensor([sample[i].ids])
        logits = plain(input_ids=ids).logits[0, :-1]  # (T - 1, V), each row alone, no padding
        for t in range(1, ids.shape[1]):
            log_probs = (logits[t - 1] / 0.8).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum()
            raw = logits[t - 1].log_softmax(-1)[ids[0, t]]
            expected = (log_probs[ids[0, t]], entropy, raw)
            if not sample[i].mask[t]:
                expected = (torch.tensor(0.0),) * 3
            else:
                loss = loss + log_probs[ids[0, t]] * (t + 1) + entropy * 0.5
            for value, want in zip(got, expected, strict=True):
                torch.testing.assert_close(value[b, t], want, rtol=1e-4, atol=1e-5)
    assert not got.logp_t1.requires_grad
    weight = torch.arange(1, batch.ids.shape[1] + 1)
    (got.logp * weight + 0.5 * got.entropy).sum().backward()
    loss.backward()
    for (name, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        difference = (parallel.full_tensor(p.grad) - q.grad).norm() / q.grad.norm()
        assert difference < 1e-4, name


def test_micro_batches_hold_every_row_once_within_the_budget():
    sample = rows(50, ((5, 9), (2, 4), (7, 3), (1, 1), (30, 30)))
    for budget in (1, 20, 30, 1000):
        batches = micro_batches(sample, budget)
        assert sorted(i for b in batches for i in b.index) == list(range(5))
        for batch in batches:
            assert batch.ids.numel() <= budget or len(batch.index) == 1
            for b, i in enumerate(batch.index):
                n = len(sample[i].ids)
                assert batch.ids[b, :n].tolist() == list(sample[i].ids)
                assert batch.mask[b].tolist() == list(sample[i].mask) + [False] * (
                    batch.ids.shape[1] - n
                )


def test_parameters_are_fp32_and_compute_is_bf16(random_folder, tokenizer):
    policy = load_policy(random_folder(), PolicyConfig())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    seen = []
    policy.model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    [batch] = micro_batches(rows(len(tokenizer)), 1000)
    out = policy(batch.ids, batch.positions, batch.scored)
    assert seen == [torch.bfloat16] and out.logp.dtype == torch.float32
    out.logp.sum().backward()
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_the_first_step_of_a_cycle_has_ratio_1_and_no_kl(random_folder, tokenizer, dtype, limit):
    config = PolicyConfig(dtype=dtype)
    policy = load_policy(random_folder(), config)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.01)  # the policy has moved since the base model was loaded
    reference = load_policy(random_folder(), config, trainable=False)
    parallel.copy_shards(policy, reference)
    rollouts = [make_rollout(tokenizer, answer="It is fine. " * k) for k in (1, 2, 3)]
    together = micro_batches([response_row(r) for r in rollouts], 10_000)
    alone = {b.index[0]: b for b in micro_batches([response_row(r) for r in rollouts], 1)}
    [batch] = together
    logp = policy(batch.ids, batch.positions, batch.scored, 0.8).logp
    ref = reference(batch.ids, batch.positions, batch.scored, 0.8).logp
    old = torch.zeros_like(logp)  # from a separate pass, one row at a time
    with torch.no_grad():
        for b, i in enumerate(batch.index):
            one = alone[i]
            old[b, : one.ids.shape[1]] = policy(one.ids, one.positions, one.scored, 0.8).logp[0]
    ratio = (logp - old)[batch.mask].exp()
    assert (ratio - 1).abs().max() < (1e-4 if dtype == "float32" else 0.1)
    _, sums = policy_loss(logp, old, ref, torch.ones(3), batch.mask)
    assert sums["clipped"] == 0 and sums["kl"] / sums["tokens"] < limit


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_export_loads_as_it_is(random_folder, tokenizer, tmp_path, kind, tied):
    policy = load_policy(random_folder(kind, tied), FP32)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    export(policy, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert back.dtype == torch.bfloat16 and back.config.tie_word_embeddings == tied
    names = dict(policy.model.named_parameters())
    for name, p in back.named_parameters():
        assert torch.equal(p, parallel.full_tensor(names[name]).bfloat16()), name
    again = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    text = 'naïve {"helpfulness": 8}'
    assert again.encode(text) == tokenizer.encode(text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(back).__name__]


def test_at_the_papers_rate_bf16_parameters_hardly_move(random_folder):
    """Why parameters are fp32 by default, and that preset official takes the authors' type."""
    changed = {}
    for dtype in ("float32", "bfloat16"):
        policy = load_policy(random_folder(), PolicyConfig(parameters=dtype))
        assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
        before = [parallel.full_tensor(p.detach()).clone() for p in policy.parameters()]
        optimizer = make_optimizer(policy, GRPOConfig())
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        after = [parallel.full_tensor(p.detach()) for p in policy.parameters()]
        moved = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
        changed[dtype] = moved / sum(b.numel() for b in before)
    assert changed["float32"] > 0.95 and changed["bfloat16"] < 0.05


def test_unusable_model_folders_are_named(tmp_path, random_folder):
    with pytest.raises(ValueError, match=r"no config.json"):
        check_model_folder(tmp_path, 9)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="type 'gemma2' is not supported"):
        check_model_folder(tmp_path, 9)
    check_model_folder(random_folder(), 1024)
    with pytest.raises(ValueError, match="reads 1024 tokens, fewer than .* = 1025"):
        check_model_folder(random_folder(), 1025)


def test_masked_loss_by_hand():
    logp = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[False, True, False], [True, False, False]])
    assert masked_loss(logp, mask, 5).item() == pytest.approx((2 + 3) / 5)
