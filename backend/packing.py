"""Micro-batches with a shared prefix: a prompt that several responses share is computed once.

Phase 1 trains on 8 responses to one prompt of about a thousand tokens (Table 5), phase 2 on 32 rows
with a common template (App. B.1). A pack is one sequence: the longest common prefix of its rows,
then the remaining tokens of each row. The positions of each rest continue from the prefix:

    prefix | rest of row 1 | rest of row 2 | ...

The prefix attends to itself, each rest to the prefix and to itself. This is the same computation as
one forward per row, not an approximation: log-probabilities and gradients are equal
(tests/test_packing.py). `--no-shared-prefix` pads rows to a rectangle instead.

Every rank knows all rows of a step. Under FSDP each forward is a collective, so the ranks process
their micro-batches in lockstep, one per rank in each round. Packs are dealt to the ranks in order
of size, so that the ranks have about the same number of tokens in every round.

Shapes: B rows, T tokens, L tokens of a pack, N scored tokens; H heads, K key-value heads, d head
size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from backend import parallel

# Queries of an attention call, at least. From 768 queries on, PyTorch's CPU attention kernel works
# in blocks of 256 queries, which is fastest.
MIN_QUERIES = 768


class Row(NamedTuple):
    """One training sequence: prompt and response."""

    ids: Sequence[int]
    mask: Sequence[bool]  # as long as ids: which tokens are scored
    name: str = ""  # for messages


class Ends(NamedTuple):
    """Where the sequences of a pack end, for varlen_attn: S of them, the prefix and each row. A
    row's keys are the prefix's and its own."""

    queries: torch.Tensor  # (S + 1,) int32, from 0
    keys: torch.Tensor  # (S + 1,) int32, from 0
    longest_query: int
    longest_key: int


class Batch(NamedTuple):
    """A micro-batch: either a pack or padded rows."""

    index: list[int]  # indices of its rows; empty for a filler
    ids: torch.Tensor  # a pack: (1, L); padded rows: (B, T)
    positions: torch.Tensor  # same shape as ids
    prefix: int  # P, length of the shared prefix; 0 for padded rows
    lengths: list[int] | None  # a pack: tokens of each row after the prefix; padded rows: None
    ends: Ends | None  # of a pack
    # (N,) index into ids.flatten() of the token before each scored token: its hidden state predicts
    # the scored token.
    hidden_index: torch.Tensor
    targets: torch.Tensor  # (N,) ids of the scored tokens
    scored_index: torch.Tensor  # (N,) index of the scored tokens into scored.flatten()
    scored: torch.Tensor  # (B, T) bool: which tokens of each row, from token P on, are scored
    mask: torch.Tensor  # (B, T) bool: which enter the loss: the same tensor, in a filler none


class Work(NamedTuple):
    """A rank's share of a step."""

    batches: list[Batch]  # the same number on every rank, because each forward is a collective
    # 0.1: waiting for the rank with the most tokens makes the step 10 % longer than an even split.
    imbalance: float


# --------------------------------------------------------------------------------------------------
# Dividing the rows of a step


def share_out(
    rows: Sequence[Row], groups: Sequence[int], max_tokens: int, shared_prefix: bool = True
) -> Work:
    """This rank's micro-batches of a step. `rows` are the rows of all ranks. A pack holds rows of
    one group number and at most `max_tokens` tokens, or a single row if that is longer. Padded
    micro-batches ignore the groups."""
    rank, ranks = parallel.rank(), parallel.world_size()
    if shared_prefix:
        packs, build = split_into_packs(rows, groups, max_tokens, ranks), _pack
    else:
        packs, build = split_into_rectangles(rows, max_tokens, ranks), _pad
    sizes = [_tokens([rows[i] for i in pack], shared_prefix) for pack in packs]
    order = sorted(range(len(packs)), key=lambda k: (-sizes[k], k))
    rank_packs = [packs[k] for k in order[rank::ranks]]
    batches = [build(pack, [rows[i] for i in pack]) for pack in rank_packs]
    round_sizes = [sizes[k] for k in order[::ranks]]  # the largest pack of each round
    if len(batches) < len(round_sizes):  # this rank has no pack in the last round
        batches.append(_filler(build))
    return Work(batches, sum(round_sizes) * ranks / sum(sizes) - 1)


def split_into_packs(
    rows: Sequence[Row], groups: Sequence[int], max_tokens: int, ranks: int
) -> list[list[int]]:
    """Indices of the rows of each pack.

    Each group starts as one pack. While a pack is over the budget, or the ranks would have unequal
    numbers of packs, the group of the largest such pack gets one pack more (at equal size the
    first group). A pack of one row cannot be split, so in the end packs may still be over the
    budget or unequal in number."""
    members: dict[int, list[int]] = {}  # group number -> indices of its rows
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pack_counts = dict.fromkeys(members, 1)  # group number -> how many packs it is split into
    while True:
        packs = [
            (group, pack)
            for group, count in pack_counts.items()
            for pack in _split_group(rows, members[group], count)
        ]
        unequal = len(packs) % ranks != 0
        largest, group_to_split = 0, None
        for group, pack in packs:
            size = _tokens([rows[i] for i in pack])
            if len(pack) > 1 and (unequal or size > max_tokens) and size > largest:
                largest, group_to_split = size, group
        if group_to_split is None:
            return [pack for _, pack in packs]
        pack_counts[group_to_split] += 1


def _split_group(rows: Sequence[Row], group: Sequence[int], count: int) -> list[list[int]]:
    """The group's rows in `count` packs of about the same number of tokens: rows are taken from the
    longest to the shortest, and each goes to the pack that is smallest so far."""
    packs: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for i in sorted(group, key=lambda i: (-len(rows[i].ids), i)):
        smallest = sizes.index(min(sizes))
        packs[smallest].append(i)
        sizes[smallest] += len(rows[i].ids)
    return [sorted(pack) for pack in packs]


def split_into_rectangles(rows: Sequence[Row], max_tokens: int, ranks: int) -> list[list[int]]:
    """Indices of the rows of each padded micro-batch. Rows, from the longest to the shortest, are
    dealt into one share per rank (shares differ by at most one row). Each share is cut into
    rectangles of at most `max_tokens` tokens, padding included, and at least one row."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    rectangles: list[list[int]] = []
    for rank in range(ranks):
        share: list[list[int]] = []  # the share's rectangles
        width = 0  # of the last one: its first row is its longest
        for i in order[rank::ranks]:
            if share and (len(share[-1]) + 1) * width <= max_tokens:
                share[-1].append(i)
            else:
                share.append([i])
                width = len(rows[i].ids)
        rectangles += share
    return rectangles


def common_prefix(rows: Sequence[Row]) -> int:
    """Number of tokens at the start that all rows share and that no row scores."""
    length = min(row.mask.index(True) if True in row.mask else len(row.ids) - 1 for row in rows)
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    for t in range(length):
        # first and last in lexicographic order: where these two agree, all rows agree.
        if first[t] != last[t]:
            return t
    return length


def _tokens(rows: Sequence[Row], shared_prefix: bool = True) -> int:
    if shared_prefix:
        prefix = common_prefix(rows)
        return prefix + sum(len(row.ids) - prefix for row in rows)
    return len(rows) * max(len(row.ids) for row in rows)


def chosen_rows(
    batches: Sequence[Batch], chosen: Sequence[torch.Tensor], names: Sequence[str]
) -> list[str]:
    """Names of the rows of which a token is chosen by the (B, T) masks, one mask for each
    micro-batch. `names`: of all rows."""
    return [
        names[i]
        for batch, mask in zip(batches, chosen, strict=True)
        for i, any_token in zip(batch.index, mask.any(1).tolist(), strict=False)
        if any_token
    ]


# --------------------------------------------------------------------------------------------------
# Tensors


def _pack(index: list[int], rows: Sequence[Row]) -> Batch:
    prefix = common_prefix(rows)
    ids, positions = list(rows[0].ids[:prefix]), list(range(prefix))
    hidden_index: list[int] = []
    for row in rows:
        start = len(ids)
        for t in range(prefix, len(row.ids)):
            if row.mask[t]:
                hidden_index.append(prefix - 1 if t == prefix else start + t - prefix - 1)
        ids += row.ids[prefix:]
        positions += range(prefix, len(row.ids))
    lengths = [len(row.ids) - prefix for row in rows]
    return _batch(index, rows, [ids], [positions], prefix, lengths, hidden_index)


def _pad(index: list[int], rows: Sequence[Row]) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (width - len(row.ids))] for row in rows]
    positions = [list(range(width))] * len(rows)
    hidden_index = [
        b * width + t - 1
        for b, row in enumerate(rows)
        for t, is_scored in enumerate(row.mask)
        if is_scored
    ]
    return _batch(index, rows, ids, positions, 0, None, hidden_index)


def _batch(index, rows, ids, positions, prefix: int, lengths, hidden_index) -> Batch:
    device, ends = parallel.device(), None
    if lengths is not None:
        sequences = [(n, n) for n in [prefix] if n] + [(n, prefix + n) for n in lengths]
        queries, keys = zip(*sequences, strict=True)
        ends = Ends(
            *(torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device)
              for n in (queries, keys)), max(queries), max(keys),
        )  # fmt: skip
    scored = torch.zeros(len(rows), max(len(row.ids) for row in rows) - prefix, dtype=torch.bool)
    for b, row in enumerate(rows):
        scored[b, : len(row.ids) - prefix] = torch.tensor(row.mask[prefix:])
    width = scored.shape[1]
    found = [
        (token, b * width + t - prefix)
        for b, row in enumerate(rows)
        for t, (token, is_scored) in enumerate(zip(row.ids, row.mask, strict=True))
        if is_scored
    ]
    targets = [token for token, _ in found]
    index_in_rows = [at for _, at in found]
    here = scored.to(device)
    return Batch(
        index,
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        prefix,
        lengths,
        ends,
        torch.tensor(hidden_index, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        torch.tensor(index_in_rows, dtype=torch.long, device=device),
        here,
        here,
    )


def _filler(build) -> Batch:
    """Dummy micro-batch with zero loss, for a rank that has run out of packs."""
    batch = build([], [Row([0, 0], [False, True])])
    return batch._replace(mask=torch.zeros_like(batch.mask))


# --------------------------------------------------------------------------------------------------
# Attention


def attention_arguments(batch: Batch, heads_per_key: int, dtype: torch.dtype) -> dict:
    """What `attend` needs to know of a pack. On a GPU in bf16 that is where its sequences end,
    because flash attention takes no mask; elsewhere one product with a mask for several rows."""
    if batch.ids.device.type != "cpu" and dtype == torch.bfloat16:
        return {"prefix": batch.prefix, "lengths": batch.lengths, "ends": batch.ends}
    return {"prefix": batch.prefix, "calls": attention_calls(batch, heads_per_key, dtype)}


class AttentionCall(NamedTuple):
    """One call of the attention kernel, for consecutive rows of a pack."""

    tokens: int  # R, tokens of these rows after the prefix
    mask: torch.Tensor  # (H / K R, P + R), added to the attention scores: -inf where masked


def attention_calls(batch: Batch, heads_per_key: int, dtype: torch.dtype) -> list[AttentionCall]:
    """Split a pack's rows into attention calls of at least MIN_QUERIES queries each (the last may
    have fewer). The scores between different rows of one call are computed and masked, which costs
    less than many small calls."""
    device, calls = batch.ids.device, []
    lengths: list[int] = []  # of the rows of the next call
    for k, length in enumerate(batch.lengths):
        lengths.append(length)
        if heads_per_key * sum(lengths) >= MIN_QUERIES or k == len(batch.lengths) - 1:
            same_row = torch.block_diag(
                *[torch.ones(n, n, dtype=torch.bool, device=device) for n in lengths]
            )
            row_mask = torch.zeros(same_row.shape, dtype=dtype, device=device)  # (R, R)
            row_mask.masked_fill_(~same_row.tril(), float("-inf"))
            mask = F.pad(row_mask, (batch.prefix, 0)).repeat(heads_per_key, 1)
            calls.append(AttentionCall(sum(lengths), mask))
            lengths = []
    return calls


@torch.compiler.disable  # its calls differ in number and shape from pack to pack
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    prefix: int = 0,
    calls: Sequence[AttentionCall] = (),
    lengths: Sequence[int] = (),
    ends: Ends | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack: query (1, H, L, d), key and value (1, K, L, d) -> (1, L, H, d). The
    signature is that of transformers' attention functions; Policy.forward passes what
    attention_arguments gives."""
    if ends is not None:
        return attend_without_mask(query, key, value, scaling, prefix, lengths, ends), None
    heads, keys, d = query.shape[1], key.shape[1], query.shape[3]
    lengths = [prefix, *(call.tokens for call in calls)]
    q, k, v = (x.split(lengths, dim=2) for x in (query, key, value))
    sdpa, options = F.scaled_dot_product_attention, {"scale": scaling, "dropout_p": dropout}
    out = [sdpa(q[0], k[0], v[0], is_causal=True, enable_gqa=True, **options)]
    for q_rows, k_rows, v_rows, call in zip(q[1:], k[1:], v[1:], calls, strict=True):
        # The queries of the H / K heads that share a key head are concatenated into one product.
        o = sdpa(
            q_rows.reshape(1, keys, -1, d),  # (1, K, H / K R, d)
            torch.cat([k[0], k_rows], dim=2),  # (1, K, P + R, d)
            torch.cat([v[0], v_rows], dim=2),
            attn_mask=call.mask,
            **options,
        )
        out.append(o.reshape(1, heads, -1, d))  # (1, H, R, d)
    return torch.cat(out, dim=2).transpose(1, 2), None


def attend_without_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    prefix: int,
    lengths: Sequence[int],
    ends: Ends,
) -> torch.Tensor:
    """The same in one call of flash attention. Its causal mask is aligned at the last query and the
    last key of a sequence, so a row sees the whole prefix."""

    def behind_prefix(x: torch.Tensor) -> torch.Tensor:
        """(1, K, L, d) -> (P + sum of (P + R), K, d)"""
        first, *rows = x[0].transpose(0, 1).split([prefix, *lengths])
        return torch.cat([first, *(part for row in rows for part in (first, row))])

    return varlen_attn(
        query[0].transpose(0, 1),  # (L, H, d)
        behind_prefix(key),
        behind_prefix(value),
        *ends,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )[None]


# What attention runs on a CPU and on a GPU, with and without a shared prefix. policy.py keeps its
# output where the rest of a layer is recomputed.
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]
ATTENTION_NAME = "shared_prefix"  # under which transformers finds `attend`
AttentionInterface.register(ATTENTION_NAME, attend)
