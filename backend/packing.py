"""Micro-batches behind a shared prefix: a prompt that several responses share is read once.

Phase 1 trains on 8 responses to one prompt of about a thousand tokens (Table 5), phase 2 on 32 rows
behind one template (App. B.1). A pack holds the longest common prefix of its rows once and behind
it what is each row's own:

    prefix | rest of row 1 | rest of row 2 | ...       in each row, positions go on from the prefix

The prefix attends to itself, each row to the prefix and to itself. This is the same computation as
one row after the other, not an approximation: log-probabilities and gradients are equal
(tests/test_packing.py). `--no-shared-prefix` pads rows to a rectangle instead.

Every rank knows all rows of a step. Under FSDP the ranks go through their micro-batches side by
side, so packs are dealt out in order of size and the ranks have about the same number of tokens in
every round.

Shapes: B rows, T tokens, L tokens of a pack, N scored tokens; H heads, K key-value heads, d head
size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from backend import parallel

# Where PyTorch's CPU kernel for attention is fastest (its blocks of 256 queries begin here).
QUERIES = 768


class Row(NamedTuple):
    """One sequence and which of its tokens are scored: prompt + response, and a mask of the same
    length."""

    ids: Sequence[int]
    mask: Sequence[bool]


class Batch(NamedTuple):
    """A micro-batch: a pack, where ids is (1, L) and `lengths` are the rows' own tokens, or padded
    rows, where ids is (B, T) and `lengths` is None."""

    index: list[int]  # which rows stand in it; empty for a filler
    ids: torch.Tensor
    positions: torch.Tensor  # as ids
    prefix: int  # P, tokens that all rows share and that stand once; 0 where rows are padded
    lengths: list[int] | None
    before: torch.Tensor  # (N,) where in ids, flattened, the token before a scored one stands
    targets: torch.Tensor  # (N,) the scored tokens
    scored: torch.Tensor  # (B, T) bool: a grid of the rows from token P on
    mask: torch.Tensor  # (B, T) bool: where they count; as `scored`, but False in a filler


class Work(NamedTuple):
    batches: list[Batch]  # this rank's, as many as any other's: each forward is a collective
    imbalance: float  # 0.1: waiting for the rank with most tokens adds 10 % to an even share


# --------------------------------------------------------------------------------------------------
# Who trains on what


def share_out(
    rows: Sequence[Row], groups: Sequence[int], max_tokens: int, shared_prefix: bool = True
) -> Work:
    """This rank's micro-batches of a step. `rows` are those of all ranks; rows with one group
    number share packs, of at most `max_tokens` tokens unless one row alone is longer. Padded
    micro-batches do not mind groups."""
    rank, ranks = parallel.rank(), parallel.world_size()
    if shared_prefix:
        packs, build = split_into_packs(rows, groups, max_tokens, ranks), _pack
    else:
        packs, build = split_into_rectangles(rows, max_tokens, ranks), _pad
    sizes = [_tokens([rows[i] for i in pack], shared_prefix) for pack in packs]
    order = sorted(range(len(packs)), key=lambda k: (-sizes[k], k))
    mine = [packs[k] for k in order[rank::ranks]]
    batches = [build(pack, [rows[i] for i in pack]) for pack in mine]
    rounds = [sizes[k] for k in order[::ranks]]  # each round lasts as long as its largest pack
    batches += [_filler(build)] * (len(rounds) - len(batches))
    return Work(batches, sum(rounds) * ranks / sum(sizes) - 1)


def split_into_packs(
    rows: Sequence[Row], groups: Sequence[int], max_tokens: int, ranks: int
) -> list[list[int]]:
    """Indices of the rows of each pack. The largest is split until all fit the budget and the ranks
    have the same number of packs, or until no pack has two rows."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pieces = [(group, 1) for group in members.values()]
    while True:
        packs = [(k, pack) for k, piece in enumerate(pieces) for pack in _deal(rows, *piece)]
        sizes = [_tokens([rows[i] for i in pack]) for _, pack in packs]
        large = [
            (size, -k)
            for (k, pack), size in zip(packs, sizes, strict=True)
            if len(pack) > 1 and (size > max_tokens or len(packs) % ranks)
        ]
        if not large:
            return [pack for _, pack in packs]
        group, count = pieces[-max(large)[1]]
        pieces[-max(large)[1]] = (group, count + 1)


def _deal(rows: Sequence[Row], group: Sequence[int], count: int) -> list[list[int]]:
    """The group's rows in `count` packs of about the same number of tokens: the longest first, each
    to the smallest pack so far."""
    packs: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for i in sorted(group, key=lambda i: (-len(rows[i].ids), i)):
        smallest = sizes.index(min(sizes))
        packs[smallest].append(i)
        sizes[smallest] += len(rows[i].ids)
    return [sorted(pack) for pack in packs]


def split_into_rectangles(rows: Sequence[Row], max_tokens: int, ranks: int) -> list[list[int]]:
    """Rows of similar length together, as many as fit a rectangle of `max_tokens`, one at least;
    no more than leave each rank the same number of rows, or one more."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    rectangles: list[list[int]] = []
    for start in range(ranks):
        mine: list[list[int]] = []
        for i in order[start::ranks]:
            if mine and (len(mine[-1]) + 1) * len(rows[mine[-1][0]].ids) <= max_tokens:
                mine[-1].append(i)
            else:
                mine.append([i])
        rectangles += mine
    return rectangles


def common_prefix(rows: Sequence[Row]) -> int:
    """Tokens at the start that all rows share and none scores."""
    length = min(row.mask.index(True) if True in row.mask else len(row.ids) - 1 for row in rows)
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    for t in range(length):
        if first[t] != last[t]:  # then all rows in between agree up to t as well
            return t
    return length


def _tokens(rows: Sequence[Row], shared_prefix: bool = True) -> int:
    if shared_prefix:
        prefix = common_prefix(rows)
        return prefix + sum(len(row.ids) - prefix for row in rows)
    return len(rows) * max(len(row.ids) for row in rows)


# --------------------------------------------------------------------------------------------------
# Tensors


def _pack(index: list[int], rows: Sequence[Row]) -> Batch:
    prefix = common_prefix(rows)
    ids, positions = list(rows[0].ids[:prefix]), list(range(prefix))
    before: list[int] = []
    for row in rows:
        start = len(ids)
        for t in range(prefix, len(row.ids)):
            if row.mask[t]:
                before.append(prefix - 1 if t == prefix else start + t - prefix - 1)
        ids += row.ids[prefix:]
        positions += range(prefix, len(row.ids))
    lengths = [len(row.ids) - prefix for row in rows]
    return _batch(index, rows, [ids], [positions], prefix, lengths, before)


def _pad(index: list[int], rows: Sequence[Row]) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (width - len(row.ids))] for row in rows]
    positions = [list(range(width))] * len(rows)
    before = [b * width + t - 1 for b, row in enumerate(rows) for t, s in enumerate(row.mask) if s]
    return _batch(index, rows, ids, positions, 0, None, before)


def _batch(index, rows, ids, positions, prefix: int, lengths, before) -> Batch:
    to = parallel.device()
    scored = torch.zeros(len(rows), max(len(row.ids) for row in rows) - prefix, dtype=torch.bool)
    for b, row in enumerate(rows):
        scored[b, : len(row.ids) - prefix] = torch.tensor(row.mask[prefix:])
    targets = [i for row in rows for i, s in zip(row.ids, row.mask, strict=True) if s]
    return Batch(
        index,
        torch.tensor(ids, device=to),
        torch.tensor(positions, device=to),
        prefix,
        lengths,
        torch.tensor(before, dtype=torch.long, device=to),
        torch.tensor(targets, dtype=torch.long, device=to),
        scored.to(to),
        scored.to(to),
    )


def _filler(build) -> Batch:
    """Two tokens that count for nothing, for a rank that has no more rows than these rounds."""
    batch = build([], [Row([0, 0], [False, True])])
    return batch._replace(mask=torch.zeros_like(batch.mask))


# --------------------------------------------------------------------------------------------------
# Attention


class Call(NamedTuple):
    """Rows that attend in one product."""

    tokens: int  # R, their own together
    mask: torch.Tensor  # (H / K R, P + R), added to the scores: -inf where a row must not look


def attention_calls(batch: Batch, heads_per_key: int, dtype: torch.dtype) -> list[Call]:
    """A pack's rows, so many at a time that a product has enough queries to be worth its start,
    although rows in one product are computed against each other for nothing."""
    to, calls = batch.ids.device, []
    rows: list[int] = []
    for k, length in enumerate(batch.lengths):
        rows.append(length)
        if heads_per_key * sum(rows) >= QUERIES or k == len(batch.lengths) - 1:
            same_row = torch.block_diag(
                *[torch.ones(n, n, dtype=torch.bool, device=to) for n in rows]
            )
            hidden = torch.zeros(same_row.shape, dtype=dtype, device=to)
            hidden.masked_fill_(~same_row.tril(), float("-inf"))
            mask = F.pad(hidden, (batch.prefix, 0)).repeat(heads_per_key, 1)
            calls.append(Call(sum(rows), mask))
            rows = []
    return calls


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    prefix: int = 0,
    calls: Sequence[Call] = (),
    **_,
) -> tuple[torch.Tensor, None]:
    """query (1, H, L, d), key and value (1, K, L, d) of a pack -> (1, L, H, d). The signature is
    transformers'; prefix and calls come with the policy's forward."""
    heads, keys, d = query.shape[1], key.shape[1], query.shape[3]
    parts = [prefix, *(call.tokens for call in calls)]
    q, k, v = (x.split(parts, dim=2) for x in (query, key, value))
    sdpa, how = F.scaled_dot_product_attention, {"scale": scaling, "dropout_p": dropout}
    out = [sdpa(q[0], k[0], v[0], is_causal=True, enable_gqa=True, **how)]
    for q_own, k_own, v_own, call in zip(q[1:], k[1:], v[1:], calls, strict=True):
        # The H / K heads that share keys stand one under the other, in one large product.
        o = sdpa(
            q_own.reshape(1, keys, -1, d),  # (1, K, H / K R, d)
            torch.cat([k[0], k_own], dim=2),  # (1, K, P + R, d)
            torch.cat([v[0], v_own], dim=2),
            attn_mask=call.mask,
            **how,
        )
        out.append(o.reshape(1, heads, -1, d))  # (1, H, R, d)
    return torch.cat(out, dim=2).transpose(1, 2), None


NAME = "shared_prefix"
AttentionInterface.register(NAME, attend)
