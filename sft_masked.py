"""Phase 2: Masked Judge Distillation (Sec. 3.2; Algorithm 1, lines 22-24).

A sample is a rollout's own prompt and response with five tokens exchanged: the model's score digits
for the judge's. The loss is on these five tokens and on nothing else, so the answer is left as RL
made it.

    loss = - mean over the 5 score tokens of each row of log pi(judge's digit | everything before
    it)

1. Samples are token ids, not text: the sampled ids with five ids exchanged for the judge's digits
   in the same token form. The authors' scripts tokenise the text anew, which may give other tokens
   than were sampled.
2. The paper gives one epoch, batches of 32 and a cosine schedule; the schedule's end points are
   Hugging Face's (`get_cosine_schedule_with_warmup`), with floor(3 % of the updates) warm-up steps.

Shapes: B rows of a micro-batch, T tokens.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import parallel
from buffer import Rollout
from packing import Row, share_out
from policy import Policy, PolicyConfig
from prompts import digit_ids


@dataclass(frozen=True)
class SFTConfig:
    max_samples: int = 400
    """M, rollouts distilled per cycle (Table 5)."""
    per_prompt_limit: int = 4
    """Most rollouts of one prompt among them (authors' configuration)."""
    batch: int = 32
    """Rows per update (Table 5); the last batch of the one epoch may be shorter."""
    lr: float = 2e-6
    """Peak AdamW learning rate; cosine to 0 (Table 5)."""
    warmup: float = 0.03
    """Share of the updates over which the rate rises linearly, rounded down (Table 5)."""
    weight_decay: float = 0.0
    """AdamW weight decay (Table 5)."""
    grad_clip: float = 1.0
    """Largest global gradient norm (Table 5)."""


def distillation_row(rollout: Rollout, tokenizer) -> Row:
    """Ids and mask of one sample, in one call: judge's digits in place of the model's, five ones in
    the mask.

    Raises ValueError for a rollout without judge scores or score positions: such a one is not in
    the buffer."""
    if rollout.judge_scores is None or rollout.score_positions is None:
        raise ValueError(
            f"rollout {rollout.key} has no judge scores or no score positions and cannot be "
            "distilled"
        )
    ids = [*rollout.prompt_ids, *rollout.response_ids]
    mask = [False] * len(ids)
    for position, score in zip(rollout.score_positions, rollout.judge_scores, strict=True):
        at = len(rollout.prompt_ids) + position
        ids[at] = digit_ids(ids[at], tokenizer)[score]
        mask[at] = True
    return Row(ids, mask)


def masked_loss(logp: torch.Tensor, mask: torch.Tensor, denominator: float) -> torch.Tensor:
    """Cross-entropy of the masked tokens: (B, T) log-probabilities, (B, T) mask, tokens in the
    whole batch."""
    return -torch.where(mask, logp, torch.zeros_like(logp)).sum() / denominator


def lr_factor(update: int, updates: int, warmup: float) -> float:
    """Share of the peak rate at an update (counted from 0): linear warm-up, then half a cosine to
    0."""
    warm = math.floor(warmup * updates)
    if update < warm:
        return update / warm
    return 0.5 * (1 + math.cos(math.pi * (update - warm) / (updates - warm)))


def distil(
    policy: Policy,
    tokenizer,
    rollouts: Sequence[Rollout],
    config: SFTConfig,
    batching: PolicyConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """One epoch over the selected rollouts (the same list on every rank); yields figures after each
    update."""
    rows = [distillation_row(r, tokenizer) for r in rollouts]
    random.Random(seed).shuffle(rows)
    updates = math.ceil(len(rows) / config.batch)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )  # fresh
    for update in range(updates):
        batch_rows = rows[update * config.batch : (update + 1) * config.batch]
        work = share_out(  # one group: all share the template
            batch_rows, [0] * len(batch_rows), batching.micro_batch_tokens, batching.shared_prefix
        )
        denominator = sum(sum(row.mask) for row in batch_rows)  # 5 per row, over all ranks
        nll = 0.0
        for batch in work.batches:
            logp = policy(batch).logp  # (B, T), temperature 1
            loss = masked_loss(logp, batch.mask, denominator)
            # FSDP averages gradients over ranks; with a global denominator ours are to be added.
            (loss * parallel.world_size()).backward()
            nll += loss.item()
        lr = config.lr * lr_factor(update, updates, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = parallel.clip_grad_norm(policy, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield {
            "updates": updates,
            "loss": parallel.all_sum({"nll": nll})["nll"],
            "lr": lr,
            "grad_norm": grad_norm,
            "rows": len(batch_rows),
            "imbalance": work.imbalance,
        }
