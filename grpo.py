"""The update of phase 1: GRPO (Sec. 3.1; Algorithm 1, line 6; DeepSeekMath, arXiv 2402.03300).

    A_i    = (r_i - mean(r)) / (std(r) + 1e-6)    over a group: the rollouts of one prompt
    rho_t  = pi(y_t) / pi_old(y_t)
    k3_t   = pi_ref(y_t) / pi(y_t) - log(pi_ref(y_t) / pi(y_t)) - 1
    loss   = mean over responses of the mean over their tokens of
             -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + beta k3_t - c H_t

The loss is over the whole response, stop text included, with no special handling of the
self-evaluation tokens (Sec. 3.1). Log-probabilities, KL and entropy H are computed at the sampling
temperature over the full vocabulary, for policy and reference.

1. There is one optimiser step per RL step, on fresh rollouts. So the old log-probabilities are
   those of the training forward, detached: the ratio is 1 and no second forward is needed.
2. Sampling truncates the distribution (top-p, top-k), so an importance correction with the
   sampler's log-probabilities would be off by the truncated mass. Only their difference from the
   trainer's log-probabilities at temperature 1 is reported, as a check; it does not enter the loss.
3. The mean of each response's token mean is DeepSeekMath's form, and in effect that of the authors'
   run of SEE: their setting is token mean, but with micro-batches of one response. Their baseline
   has the same setting with micro-batches of several responses, as many as fit: token means of
   parts. `--grpo.loss_mean token` (`--preset rlcr`) is the mean over all tokens of the step, which
   does not depend on how responses are packed.
4. k3 (the "low-variance KL") is neither clamped nor multiplied by the ratio (newer TRL multiplies),
   and its gradient is that of the formula.
5. A group with equal rewards has advantage exactly 0. The step is still taken, because the KL and
   entropy terms remain.
6. A response that the judge refused has no reward (nan below). It enters neither its group's mean
   and deviation nor the loss: its advantage is 0, its mask empty, and it is not counted.

Shapes: N rollouts of a step over all ranks, G rollouts of a group, B rows of a micro-batch, T
tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from backend import parallel
from backend.packing import Batch, Row, Work, chosen_rows
from backend.policy import Policy
from storage.options import Finite, NotNegative, Options, Positive, in_range
from storage.record import Rollout

# What a step's figures must be, whatever is learnt. Not in the paper: nats per token; two bf16
# forwards of the same weights differ by about 0.02.
GAP_ALARM = 0.1
# Not in the paper: nats per token that rounding can make of a KL of zero.
KL_ALARM = {"float32": 1e-6, "bfloat16": 1e-3}


@dataclass(frozen=True)
class GRPOConfig(Options):
    prefix: ClassVar[str] = "grpo."

    lr: Positive = 1e-6
    """AdamW learning rate, constant, no warm-up (Table 5)."""
    betas: in_range(tuple[float, float], "[0, 1)") = (0.9, 0.999)
    """AdamW betas (Table 5)."""
    weight_decay: NotNegative = 0.01
    """AdamW weight decay (Table 5)."""
    grad_clip: Positive = 1.0
    """Maximum global gradient norm (Table 5)."""
    clip: Positive = 0.2
    """Clip range of the probability ratio (Table 5). Never active with one step per batch, because
    the ratio is then 1."""
    kl_coef: NotNegative = 0.01
    """Weight of the k3 KL to the reference (Table 5)."""
    entropy_coef: Finite = 0.001
    """Weight of the entropy bonus (Table 5)."""
    loss_mean: Literal["response", "token"] = "response"
    """Loss averaging: mean over responses of their token means, or mean over all tokens (note 3 in
    grpo.py)."""


def rewards_of(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """(N,) rewards; nan where there is none."""
    values = [math.nan if r.reward is None else r.reward for r in rollouts]
    return torch.tensor(values, dtype=torch.float64)


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-6) -> torch.Tensor:
    """(N,) rewards, groups contiguous, nan where there is none (note 6) -> (N,) advantages
    (DeepSeekMath Sec. 4.1.2). ValueError if N is not a multiple of `group_size`."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (N / G, G)
    missing = groups.isnan()  # (N / G, G)
    count = (~missing).sum(1, keepdim=True)  # (N / G, 1)
    gaps = (groups - groups.nanmean(1, keepdim=True)).masked_fill(missing, 0)  # (N / G, G)
    std = (gaps.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # (N / G, 1)
    lowest = groups.masked_fill(missing, math.inf).amin(1, keepdim=True)  # (N / G, 1)
    highest = groups.masked_fill(missing, -math.inf).amax(1, keepdim=True)  # (N / G, 1)
    return (gaps / (std + eps)).masked_fill(highest <= lowest, 0).view(-1)  # (N,)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
    kl_coef: float = 0.01,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.001,
    loss_mean: str = "response",
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss above for (B, T) log-probabilities, (B,) advantages and a (B, T) mask of response
    tokens.

    `denominator` is the number of responses (loss_mean "response") or of response tokens ("token")
    in the whole step, over all micro-batches and ranks, so that the losses of micro-batches sum to
    the step's loss; None: the number in this call. The dict has the detached loss, and detached
    sums over the response tokens, which divided by the sum of `tokens` are means."""
    mask = mask.bool()  # (B, T)
    zero = torch.zeros_like(logp)
    log_ratio = torch.where(mask, logp - old_logp, zero)  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    a = advantages[:, None]  # (B, 1)
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)  # (B, T)
    d = torch.where(mask, ref_logp - logp, zero)  # (B, T)
    kl = d.exp() - d - 1  # (B, T) k3
    h = zero if entropy is None else torch.where(mask, entropy, zero)  # (B, T)
    token_loss = torch.where(mask, -surrogate + kl_coef * kl - entropy_coef * h, zero)  # (B, T)

    tokens = mask.sum(1)  # (B,)
    if loss_mean == "response":
        total = (token_loss.sum(1) / tokens.clamp(min=1)).sum()
        count = (tokens > 0).sum()
    elif loss_mean == "token":
        total, count = token_loss.sum(), tokens.sum()
    else:
        raise ValueError(f"loss_mean must be 'response' or 'token', not {loss_mean!r}")
    loss = total / (count if denominator is None else denominator)
    clipped = (surrogate < ratio * a) & mask  # (B, T): the clipped term is the smaller one
    sums = {
        "loss": loss,
        "kl": kl.sum(),
        "entropy": h.sum(),
        "clipped": clipped.sum(),
        "tokens": tokens.sum(),
    }
    return loss, {name: value.detach() for name, value in sums.items()}


def make_optimizer(policy: Policy, config: GRPOConfig) -> torch.optim.AdamW:
    """A fresh AdamW, as at the start of every phase."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def response_row(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Row:
    """Training row of a response; every response token is scored, stop text included."""
    return Row((*prompt_ids, *response_ids), [False] * len(prompt_ids) + [True] * len(response_ids))


@torch.no_grad()
def reference_logps(
    reference: Policy, batches: Sequence[Batch], temperature: float
) -> list[torch.Tensor]:
    """The reference's log-probabilities, (B, T) for each micro-batch. They need no rewards, so they
    can be computed during judging."""
    return [reference(batch, temperature).logp for batch in batches]


def rl_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    work: Work,
    rollouts: Sequence[Rollout],
    advantages: torch.Tensor,
    ref_logps: Sequence[torch.Tensor],
    temperature: float,
    config: GRPOConfig,
) -> dict[str, float | None]:
    """One optimiser step. `rollouts` and (N,) `advantages` are those of all ranks; `work` has this
    rank's micro-batches, and `ref_logps` their reference_logps. Returns metrics of the step over
    all ranks. Collective."""
    # Over all ranks and micro-batches, so that the losses of micro-batches sum to the step's loss.
    lengths = [len(r.response_ids) for r in rollouts if r.reward is not None]
    counts = {"response": max(1, len(lengths)), "token": max(1, sum(lengths))}

    # Before the loop: each copy to a GPU waits until the GPU has done all it was given.
    recorded = [recorded_values(batch, rollouts, advantages) for batch in work.batches]

    sums: dict[str, torch.Tensor | float] = {}
    not_finite: list[torch.Tensor] = []
    for batch, ref_logp, known in zip(work.batches, ref_logps, recorded, strict=True):
        logp, entropy, logp_t1 = policy(batch, temperature)  # (B, T) each
        loss, batch_sums = policy_loss(
            logp=logp,
            old_logp=logp.detach(),
            ref_logp=ref_logp,
            advantages=known.advantages,
            mask=batch.mask & known.rewarded,
            clip=config.clip,
            kl_coef=config.kl_coef,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            loss_mean=config.loss_mean,
            denominator=counts[config.loss_mean],
        )
        loss.backward()
        not_finite.append(batch.mask & known.rewarded & ~logp.detach().isfinite())  # (B, T)
        batch_sums |= {
            "gap": _sum_where(known.has_logp, (known.sampled_logp - logp_t1).abs()),
            "gap_tokens": known.has_logp.sum(),
            "score_entropy": _sum_where(known.at_score, entropy.detach()),
            "score_tokens": known.at_score.sum(),
        }
        sums = {name: value + sums.get(name, 0.0) for name, value in batch_sums.items()}
    grad_norm = parallel.clip_grad_norm(policy, config.grad_clip)
    values = torch.stack([value.double() for value in sums.values()]).tolist()
    total = parallel.all_sum(dict(zip(sums, values, strict=True)))

    def rows_not_finite() -> list[str]:
        names = [f"prompt {r.prompt_id}, sample {r.sample}" for r in rollouts]
        return chosen_rows(work.batches, not_finite, names)

    parallel.check_finite(total["loss"], grad_norm, rows_not_finite)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": total["loss"],
        "kl": _ratio(total["kl"], total["tokens"]),
        "entropy": _ratio(total["entropy"], total["tokens"]),
        "clip_fraction": _ratio(total["clipped"], total["tokens"]),
        "score_entropy": _ratio(total["score_entropy"], total["score_tokens"]),
        "logprob_gap": _ratio(total["gap"], total["gap_tokens"]),
        "grad_norm": grad_norm,
        "imbalance": work.imbalance,
    }


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


class Recorded(NamedTuple):
    """What is known of a micro-batch's rollouts, on the device, laid out as Batch.scored."""

    advantages: torch.Tensor  # (B,), 0 in a filler
    rewarded: torch.Tensor  # (B, 1) bool: which have a reward (note 6)
    sampled_logp: torch.Tensor  # (B, T) the sampler's log-probabilities, at temperature 1 (note 2)
    has_logp: torch.Tensor  # (B, T) bool: where it has given them, and the response has a reward
    at_score: torch.Tensor  # (B, T) bool: the five score tokens of each response with a reward


def recorded_values(
    batch: Batch, rollouts: Sequence[Rollout], advantages: torch.Tensor
) -> Recorded:
    """`rollouts` and (N,) `advantages` are those of the whole step."""
    shape = batch.scored.shape
    own, rewarded = torch.zeros(shape[0]), torch.ones(shape[0], 1, dtype=bool)
    sampled = torch.zeros(shape)
    has_logp, at_score = torch.zeros(shape, dtype=bool), torch.zeros(shape, dtype=bool)
    for b, i in enumerate(batch.index):
        r, own[b] = rollouts[i], advantages[i]
        if r.reward is None:
            rewarded[b] = False
            continue
        start = len(r.prompt_ids) - batch.prefix  # column of the first response token
        if r.sampled_logp is not None:
            response = slice(start, start + len(r.response_ids))
            sampled[b, response] = torch.tensor(r.sampled_logp)
            has_logp[b, response] = True
        at_score[b, [start + p for p in r.score_positions or ()]] = True
    return Recorded(
        *(x.to(parallel.device()) for x in (own, rewarded, sampled, has_logp, at_score))
    )


def _sum_where(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, torch.zeros_like(values)).sum()
