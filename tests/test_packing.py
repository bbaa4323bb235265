"""Shared prefixes: .venv/bin/python -m pytest tests/test_packing.py"""

from types import SimpleNamespace

import pytest
import torch

from backend import packing, parallel
from backend.packing import (
    Row,
    attention_calls,
    common_prefix,
    share_out,
    split_into_packs,
    split_into_rectangles,
)
from backend.policy import PolicyConfig, load_model, load_policy

KINDS = [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False),
         ("mistral", False), ("olmo2", False), ("olmo3", False), ("smollm3", True),
         ("phi3", False)]  # fmt: skip


def numbers(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (count,), generator=generator).tolist()


def responses(prompt: int, lengths, seed: int = 0) -> list[Row]:
    """Rows of one prompt; the responses differ, but all begin with the same token."""
    shared = numbers(prompt, seed)
    return [
        Row([*shared, 7, *numbers(n - 1, seed + n)], [False] * prompt + [True] * n) for n in lengths
    ]


TWO_GROUPS = responses(9, (4, 9, 1), seed=1) + responses(5, (6, 2, 3), seed=2)


def gpu_arguments(batch, heads_per_key, dtype) -> dict:
    on_gpu = batch._replace(ids=SimpleNamespace(device=torch.device("cuda")))
    return packing.attention_arguments(on_gpu, heads_per_key, torch.bfloat16)


def plain_varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Sequence by sequence, with the mask written out: query i of n sees the keys up to number
    m - n + i of m."""
    assert window_size == (-1, 0) and enable_gqa
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q[-1] == len(q)
    assert len(k) == len(v) == ends_k[-1]
    out, lengths = [], []
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        n, m, group = int(b - a), int(d - c), q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))  # (m, H, d)
        scores = torch.einsum("nhd,mhd->hnm", q[a:b], keys) * scale
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hnm,mhd->nhd", probs, values))
        lengths.append((n, m))
    assert max(n for n, _ in lengths) == max_q and max(m for _, m in lengths) == max_k
    return torch.cat(out)


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("queries", [1, 12, 768, "ends", None])
def test_equal_to_one_row_after_the_other(
    random_folder, monkeypatch, kind, tied, checkpointing, queries
):
    """Log-probabilities, entropies and all gradients against plain forwards of single rows. A pack
    attends row by row, two or three rows at a time, or all at once; "ends": as on a GPU, with the
    kernel's documented meaning in place of the kernel; None: padded rows."""
    folder, shared = random_folder(kind, tied), queries is not None
    if queries == "ends":
        monkeypatch.setattr(packing, "varlen_attn", plain_varlen_attn)
        monkeypatch.setattr("backend.policy.attention_arguments", gpu_arguments)
    elif shared:
        monkeypatch.setattr(packing, "MIN_QUERIES", queries)
    config = PolicyConfig(
        "float32", head_tokens=3, gradient_checkpointing=checkpointing, shared_prefix=shared
    )
    policy, plain = load_policy(folder, config), load_model(folder, torch.float32)
    work = share_out(TWO_GROUPS, [0] * 3 + [1] * 3, 1000, shared)
    assert [b.prefix for b in work.batches] == ([9, 5] if shared else [0])
    if isinstance(queries, int):
        products = [[c.tokens for c in attention_calls(b, 2, torch.float32)] for b in work.batches]
        # Rows of 4 9 1 and 6 2 3 tokens; with two heads to a key, 6 tokens are 12 queries.
        assert (
            products
            == {1: [[4, 9, 1], [6, 2, 3]], 12: [[13, 1], [6, 5]], 768: [[14], [11]]}[queries]
        )
    loss = 0.0
    for batch in work.batches:
        ours = 0.0
        got = policy(batch, temperature=0.8)
        assert not got.logp_t1.requires_grad
        for b, i in enumerate(batch.index):
            row = TWO_GROUPS[i]
            logits = plain(input_ids=torch.tensor([row.ids])).logits[0, :-1]  # (T - 1, V)
            targets = torch.tensor(row.ids[1:])
            log_probs = (logits / 0.8).log_softmax(-1)
            want = (
                log_probs.gather(1, targets[:, None])[:, 0],
                -(log_probs.exp() * log_probs).sum(-1),
                logits.log_softmax(-1).gather(1, targets[:, None])[:, 0],
            )
            at = torch.tensor(row.mask[1:])
            column = torch.arange(1, len(row.ids))[at] - batch.prefix
            assert torch.equal(batch.scored[b].nonzero()[:, 0], column)
            for values, expected in zip(got, want, strict=True):
                difference = (values[b, column] - expected[at]).norm() / expected[at].norm()
                assert difference < 1e-5
                assert values[b].count_nonzero() == at.sum()
            # Different weights at each place, of both signs, so that a mix-up would show.
            weight = torch.arange(len(row.ids) - 1)[at] - 8.5 + i
            loss = loss + (weight * want[0][at] + (weight - 0.3) * want[1][at]).sum()
            values = weight * got.logp[b, column] + (weight - 0.3) * got.entropy[b, column]
            ours = ours + values.sum()
        ours.backward()
    loss.backward()
    for (name, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        difference = (parallel.full_tensor(p.grad) - q.grad).norm() / q.grad.norm()
        assert difference < 1e-5, name


def test_a_row_sees_its_prefix_and_itself_only(random_folder):
    """Another neighbour in the pack changes nothing; another prefix or an earlier token does."""
    policy = load_policy(random_folder(), PolicyConfig("float32"), trainable=False)

    def logps(rows, row=1):
        [batch] = share_out(rows, [0] * len(rows), 1000).batches
        with torch.no_grad():
            return policy(batch).logp[row, : len(rows[row].ids) - batch.prefix]

    rows = responses(6, (5, 8, 4))
    before = logps(rows)
    other = [responses(6, (7,), seed=0)[0], rows[1], rows[2]]
    torch.testing.assert_close(logps(other), before)
    assert (logps([Row([9, *row.ids[1:]], row.mask) for row in rows]) - before).abs().min() > 1e-6
    later = Row([*rows[1].ids[:9], 3, *rows[1].ids[10:]], rows[1].mask)
    after = logps([rows[0], later, rows[2]])
    torch.testing.assert_close(after[:3], before[:3])
    assert (after[3:] - before[3:]).abs().min() > 1e-6


def test_the_prefix_ends_before_the_first_scored_token():
    rows = responses(9, (4, 9, 1))  # all three responses begin with a 7
    assert common_prefix(rows) == 9
    assert common_prefix(rows[:1]) == 9
    assert common_prefix([Row([1, 2, 3, 4], [False] * 3 + [True]),
                          Row([1, 2, 5, 4], [False] * 3 + [True])]) == 2  # fmt: skip
    assert common_prefix([Row([1, 2], [False, True]), Row([3, 2], [False, True])]) == 0
    assert common_prefix([Row([1, 2, 3], [False] * 3)]) == 2


@pytest.mark.parametrize("ends", [False, True])
def test_rows_without_a_common_prefix(random_folder, monkeypatch, ends):
    if ends:
        monkeypatch.setattr(packing, "varlen_attn", plain_varlen_attn)
        monkeypatch.setattr("backend.policy.attention_arguments", gpu_arguments)
    policy, plain = (
        load_policy(random_folder(), PolicyConfig("float32", shared_prefix=s), trainable=False)
        for s in (True, False)
    )
    rows = [Row(numbers(7, k), [False] * 3 + [True] * 4) for k in range(3)]
    [batch] = share_out(rows, [0, 0, 0], 1000).batches
    assert batch.prefix == 0 and batch.ids.shape == (1, 21)
    [padded] = share_out(rows, [0, 0, 0], 1000, shared_prefix=False).batches
    with torch.no_grad():
        got, want = policy(batch), plain(padded)
    torch.testing.assert_close(got.logp[batch.scored], want.logp[padded.scored])


def test_packs_hold_every_row_once_within_the_budget():
    groups = [0, 0, 0, 1, 1, 1]  # 9 + 4 + 9 + 1 = 23 tokens and 5 + 6 + 2 + 3 = 16

    def sizes(packs):
        return [
            common_prefix([TWO_GROUPS[i] for i in pack])
            + sum(sum(TWO_GROUPS[i].mask) for i in pack)
            for pack in packs
        ]

    assert split_into_packs(TWO_GROUPS, groups, 23, ranks=1) == [[0, 1, 2], [3, 4, 5]]
    packs = split_into_packs(TWO_GROUPS, groups, 22, ranks=1)
    assert packs == [[1], [0, 2], [3, 4, 5]] and sizes(packs) == [18, 14, 16]
    # Three ranks share two prompts: the larger is split.
    assert split_into_packs(TWO_GROUPS, groups, 100, ranks=3) == packs
    # One row alone may be over the budget, and then packs need not be a multiple of the ranks.
    packs = split_into_packs(TWO_GROUPS, groups, 3, ranks=4)
    assert sorted(packs) == [[0], [1], [2], [3], [4], [5]]
    # One group of six, as in phase 2, over two ranks.
    packs = split_into_packs(TWO_GROUPS, [0] * 6, 100, ranks=2)
    assert sorted(i for pack in packs for i in pack) == [0, 1, 2, 3, 4, 5] and len(packs) == 2


def test_rectangles_hold_every_row_once_within_the_budget():
    for budget in (1, 20, 30, 1000):
        for ranks in (1, 2):
            found = split_into_rectangles(TWO_GROUPS, budget, ranks)
            assert sorted(i for rectangle in found for i in rectangle) == [0, 1, 2, 3, 4, 5]
            for rows in found:
                width = max(len(TWO_GROUPS[i].ids) for i in rows)
                assert len(rows) == 1 or len(rows) * width <= budget


def test_ranks_get_equal_tokens_in_every_round(monkeypatch):
    """Two ranks, five prompts of very different lengths: by hand."""
    rows = [Row([*numbers(p, p), 7], [False] * p + [True]) for p in (99, 49, 39, 9, 4)]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: 2)
        parts.append(share_out(rows, [0, 1, 2, 3, 4], 1000))
    assert [b.index for b in parts[0].batches] == [[0], [2], [4]]
    assert [b.index for b in parts[1].batches] == [[1], [3], []]  # a filler in the last round
    filler = parts[1].batches[2]
    assert filler.scored.sum() == 1 and filler.mask.sum() == 0
    # Rounds last as long as 100, 40 and 5 tokens; an even share of all 205 is 102.5.
    assert parts[0].imbalance == parts[1].imbalance == pytest.approx(145 / 102.5 - 1)
