"""Phase 1's update: GRPO (Sec. 3.1; Algorithm 1, line 6; DeepSeekMath, arXiv 2402.03300).

    A_i    = (r_i - mean(r)) / (std(r) + 1e-6)    over the rollouts of one prompt, its group
    rho_t  = pi(y_t) / pi_old(y_t)
    k3_t   = pi_ref(y_t) / pi(y_t) - log(pi_ref(y_t) / pi(y_t)) - 1
    loss   = mean over responses of the mean over their tokens of
             -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + beta k3_t - c H_t

The loss is over the whole response with no special handling of the self-evaluation tokens
(Sec. 3.1), stop text included. Log-probabilities, KL and entropy H are taken at the sampling
temperature over the full vocabulary, for policy and reference.

1. One optimiser step per RL step on fresh rollouts: the old log-probabilities are the training
   forward's own, detached, so the ratio is 1 and no second forward is needed.
2. Sampling truncates (top-p, top-k), so a correction from the sampler's log-probabilities would be
   off by the mass that truncation cuts away. Their difference at temperature 1 is reported as an
   alarm and enters no loss.
3. The mean of each response's token mean is DeepSeekMath's form, and what the authors' run did in
   effect: their setting says token mean, but they ran micro-batches of one response.
   `--grpo.loss_mean token` is the global token mean.
4. k3 (the "low-variance KL") as it stands, unclamped and with its own gradient; newer TRL
   multiplies it by the ratio.
5. A group without reward spread has advantage exactly 0; the step is taken all the same, because
   KL and entropy still act.

Shapes: N rollouts of a step (all ranks'), G rollouts of a group, B rows of a micro-batch, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from backend import parallel
from backend.packing import Batch, Row, Work
from backend.policy import Policy
from storage.record import Rollout


@dataclass(frozen=True)
class GRPOConfig:
    lr: float = 1e-6
    """AdamW learning rate, constant, no warm-up (Table 5)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas (Table 5)."""
    weight_decay: float = 0.01
    """AdamW weight decay (Table 5)."""
    grad_clip: float = 1.0
    """Largest global gradient norm (Table 5)."""
    clip: float = 0.2
    """Clip range of the probability ratio (Table 5). Never active with one step per batch, where
    the ratio is 1."""
    kl_coef: float = 0.01
    """Weight of the k3 KL to the reference (Table 5)."""
    entropy_coef: float = 0.001
    """Weight of the entropy bonus (Table 5)."""
    loss_mean: Literal["response", "token"] = "response"
    """Mean over responses of token means, or over all tokens at once (note 3 in
    grpo.py)."""


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-6) -> torch.Tensor:
    """(N,) rewards, groups contiguous -> (N,) advantages (DeepSeekMath Sec. 4.1.2). ValueError if N
    is no multiple."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (N / G, G)
    flat = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # (N / G, 1)
    std = groups.std(1, keepdim=True, correction=min(1, group_size - 1))  # (N / G, 1), n - 1
    advantages = (groups - groups.mean(1, keepdim=True)) / (std + eps)  # (N / G, G)
    return advantages.masked_fill(flat, 0).view(-1)  # (N,)


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
    in the whole step, over all micro-batches and ranks, so that the losses of its parts add up;
    None counts this call's. The dict holds detached sums over the response tokens, to be divided by
    `tokens` once they are added up."""
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
    clipped = (surrogate < ratio * a) & mask  # (B, T): the minimum is the clipped side
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
    """The loss counts every response token, stop text included."""
    return Row((*prompt_ids, *response_ids), [False] * len(prompt_ids) + [True] * len(response_ids))


@torch.no_grad()
def reference_logps(
    reference: Policy, batches: Sequence[Batch], temperature: float
) -> list[torch.Tensor]:
    """(B, T) for each micro-batch. Needs no reward, so it may run while the judge is at work."""
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
    """One optimiser step on the rollouts of all ranks and their (N,) advantages, of which `work` is
    this rank's part; `ref_logps` are reference_logps of its micro-batches. Returns figures of the
    step over all ranks. Collective."""
    advantages = advantages.float().to(parallel.device())  # (N,)
    # Counted over all ranks and micro-batches, so that the losses of the parts add up.
    counts = {"response": len(rollouts), "token": sum(len(r.response_ids) for r in rollouts)}

    sums: dict[str, torch.Tensor | float] = {}
    for batch, ref_logp in zip(work.batches, ref_logps, strict=True):
        logp, entropy, logp_t1 = policy(batch, temperature)  # (B, T) each
        loss, part = policy_loss(
            logp=logp,
            old_logp=logp.detach(),
            ref_logp=ref_logp,
            advantages=advantages[batch.index] if batch.index else advantages.new_zeros(1),
            mask=batch.mask,
            clip=config.clip,
            kl_coef=config.kl_coef,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            loss_mean=config.loss_mean,
            denominator=counts[config.loss_mean],
        )
        loss.backward()
        mine = [rollouts[i] for i in batch.index]
        part |= sampler_gap(batch, mine, logp_t1) | score_entropy(batch, mine, entropy.detach())
        sums = {name: value + sums.get(name, 0.0) for name, value in part.items()}
    grad_norm = parallel.clip_grad_norm(policy, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()

    total = parallel.all_sum({name: float(value) for name, value in sums.items()})
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


def sampler_gap(
    batch: Batch, rollouts: Sequence[Rollout], logp_t1: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over the sampled tokens of |sampler's - trainer's (B, T) log-probability|, both at
    temperature 1 (note 2). `rollouts` are the rows of the micro-batch."""
    sampled = torch.full_like(logp_t1, float("nan"))  # (B, T)
    for b, r in enumerate(rollouts):
        if r.sampled_logp is not None:
            start = len(r.prompt_ids) - batch.prefix  # the response's first column
            sampled[b, start : start + len(r.response_ids)] = torch.tensor(r.sampled_logp)
    recorded = ~sampled.isnan()  # (B, T)
    return {"gap": (sampled - logp_t1)[recorded].abs().sum(), "gap_tokens": recorded.sum()}


def score_entropy(
    batch: Batch, rollouts: Sequence[Rollout], entropy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums of the (B, T) entropy over the five score tokens of each response."""
    at_score = torch.zeros_like(batch.mask)  # (B, T)
    for b, r in enumerate(rollouts):
        start = len(r.prompt_ids) - batch.prefix  # the response's first column
        at_score[b, [start + p for p in r.score_positions or ()]] = True
    return {"score_entropy": entropy[at_score].sum(), "score_tokens": at_score.sum()}
