"""Phase 2: Masked Judge Distillation (Sec. 3.2; Algorithm 1, lines 22-24).

A sample is a rollout's prompt and response with the model's five score digits replaced by the
judge's. The loss is on these five tokens only, so phase 2 does not train on the answer.

    loss = -mean over the 5 score tokens of all rows of log pi(judge's digit | all tokens before)

1. Samples are token ids, not text: the sampled ids, with the five score tokens replaced by the
   judge's digits in the same token form. The authors' scripts tokenise the text again, which may
   give other tokens than were sampled.
2. The paper specifies one epoch, batches of 32 and a cosine schedule. The schedule's end points are
   those of Hugging Face's `get_cosine_schedule_with_warmup`, with floor(3 % of the updates) warm-up
   steps.

Shapes: B rows of a micro-batch, T tokens.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from backend import parallel
from backend.packing import Row, chosen_rows, share_out
from backend.policy import Policy, PolicyConfig
from prompts import digit_ids
from storage.options import Count, NotNegative, Options, Positive, in_range
from storage.record import Rollout


@dataclass(frozen=True)
class SFTConfig(Options):
    prefix: ClassVar[str] = "sft."

    max_samples: Count = 400
    """M, rollouts distilled per cycle (Table 5)."""
    per_prompt_limit: Count = 4
    """Maximum number of distilled rollouts per prompt (authors' configuration)."""
    batch: Count = 32
    """Rows per update (Table 5); the last batch of the epoch may be smaller."""
    lr: Positive = 2e-6
    """Peak AdamW learning rate; cosine to 0 (Table 5)."""
    warmup: in_range(float, "[0, 1]") = 0.03
    """Share of the updates with linear warm-up, rounded down (Table 5)."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay (Table 5)."""
    grad_clip: Positive = 1.0
    """Maximum global gradient norm (Table 5)."""


def distillation_row(rollout: Rollout, tokenizer) -> Row:
    """The training row of one sample: the judge's digits replace the model's, and only these five
    tokens are scored.

    Raises ValueError for a rollout without judge scores or score positions; the buffer has none."""
    if rollout.judge_scores is None or rollout.score_positions is None:
        raise ValueError(
            f"rollout {rollout.key} has no judge scores or no score positions and cannot be "
            "distilled"
        )
    ids = [*rollout.prompt_ids, *rollout.response_ids]
    mask = [False] * len(ids)
    for position, score in zip(rollout.score_positions, rollout.judge_scores, strict=True):
        index = len(rollout.prompt_ids) + position
        ids[index] = digit_ids(ids[index], tokenizer)[score]
        mask[index] = True
    return Row(ids, mask, f"prompt {rollout.prompt_id}, sample {rollout.sample}")


def masked_loss(logp: torch.Tensor, mask: torch.Tensor, denominator: float) -> torch.Tensor:
    """Cross-entropy of the score tokens, for (B, T) log-probabilities and a (B, T) mask of these
    tokens. `denominator` is the number of score tokens in the whole batch."""
    return -torch.where(mask, logp, torch.zeros_like(logp)).sum() / denominator


def lr_factor(update: int, updates: int, warmup: float) -> float:
    """Learning rate at an update (from 0) as a share of the peak rate: linear warm-up, then cosine
    decay to 0."""
    warmup_updates = math.floor(warmup * updates)
    if update < warmup_updates:
        return update / warmup_updates
    cosine = math.cos(math.pi * (update - warmup_updates) / (updates - warmup_updates))
    return 0.5 * (1 + cosine)


class Update(NamedTuple):
    """One optimiser step of phase 2."""

    rows: list[Row]  # of all ranks; the last update of the epoch may have fewer rows
    lr: float


def updates(rows: Sequence[Row], config: SFTConfig, seed: int) -> list[Update]:
    """The updates of one epoch: rows in an order drawn by `seed`, and learning rates."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    batches = [rows[i : i + config.batch] for i in range(0, len(rows), config.batch)]
    factors = [lr_factor(k, len(batches), config.warmup) for k in range(len(batches))]
    return [
        Update(batch, config.lr * factor) for batch, factor in zip(batches, factors, strict=True)
    ]


def make_optimizer(policy: Policy, config: SFTConfig) -> torch.optim.AdamW:
    """A fresh AdamW, as at the start of every phase; each update sets its learning rate."""
    return torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


def sft_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    update: Update,
    config: SFTConfig,
    batching: PolicyConfig,
) -> dict[str, float]:
    """One optimiser step on an update's rows, which every rank passes in full. Returns metrics of
    the step over all ranks. Collective."""
    one_group = [0] * len(update.rows)  # all rows share the template
    work = share_out(update.rows, one_group, batching.micro_batch_tokens, batching.shared_prefix)
    denominator = sum(sum(row.mask) for row in update.rows)  # 5 per row, over all ranks
    losses, not_finite = [], []
    for batch in work.batches:
        logp = policy(batch).logp  # (B, T), temperature 1
        loss = masked_loss(logp, batch.mask, denominator)
        loss.backward()
        losses.append(loss.detach())
        not_finite.append(batch.mask & ~logp.detach().isfinite())  # (B, T)
    for group in optimizer.param_groups:
        group["lr"] = update.lr
    grad_norm = parallel.clip_grad_norm(policy, config.grad_clip)
    nll = parallel.all_sum({"nll": torch.stack(losses).sum().item()})["nll"]
    names = [row.name for row in update.rows]
    parallel.check_finite(nll, grad_norm, lambda: chosen_rows(work.batches, not_finite, names))
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": nll,
        "lr": update.lr,
        "grad_norm": grad_norm,
        "rows": len(update.rows),
        "imbalance": work.imbalance,
    }
