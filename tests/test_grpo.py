"""Advantages and loss, by hand: .venv/bin/python -m pytest tests/test_grpo.py"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_rollout

from backend import parallel
from backend.packing import share_out
from backend.policy import PolicyConfig, load_policy
from grpo import (
    GRPOConfig,
    group_advantages,
    policy_loss,
    reference_logps,
    response_row,
    rewards_of,
    rl_step,
)


def test_advantages_by_hand():
    # Group 1: mean 2, sample standard deviation 1. Group 2 is flat and gets exactly 0.
    a = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.3, 0.3, 0.3]), 3)
    assert a.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0], abs=2e-6)
    assert a[3:].tolist() == [0, 0, 0]
    assert a[2] < 1  # the 1e-6 in the denominator
    assert group_advantages(torch.tensor([1.0, 5.0]), 1).tolist() == [0, 0]
    with pytest.raises(ValueError, match="5 rewards"):
        group_advantages(torch.ones(5), 2)


def test_a_missing_reward_is_in_no_mean_and_no_deviation():
    """Of 0, ?, 0, 0, 1 the mean is 1/4 and the deviation 1/2; fewer than two rewards are flat."""
    none = math.nan
    a = group_advantages(torch.tensor([0.0, none, 0.0, 0.0, 1.0]), 5)
    assert a.tolist() == pytest.approx([-0.5, 0, -0.5, -0.5, 1.5], abs=1e-5)
    groups = [0.3, none, none, none, none, none, 0.2, none, 0.2]
    assert group_advantages(torch.tensor(groups), 3).tolist() == [0] * 9


@pytest.mark.parametrize("loss_mean", ["response", "token"])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_rollout_without_a_reward_changes_no_weight(
    random_folder, tokenizer, loss_mean, shared_prefix
):
    """One step with a refused rollout among three gives the gradient and the figures that the other
    two alone give."""
    rollouts = [
        make_rollout(
            tokenizer,
            "word " * (3 + k),
            sample=k,
            reward=(0.9, None, 0.2)[k],
            sampled_logp=(-1.0 - k,) * 200,
        )
        for k in range(3)
    ]
    rollouts = [replace(r, sampled_logp=r.sampled_logp[: len(r.response_ids)]) for r in rollouts]
    assert len({len(r.response_ids) for r in rollouts}) == 3

    def step(chosen):
        policy = load_policy(random_folder(), PolicyConfig("float32", shared_prefix=shared_prefix))
        rows = [response_row(r.prompt_ids, r.response_ids) for r in chosen]
        work = share_out(rows, [0] * len(rows), 10_000, shared_prefix)
        refs = [logp + 0.1 for logp in reference_logps(policy, work.batches, 0.8)]
        advantages = group_advantages(rewards_of(chosen), len(chosen))
        config = GRPOConfig(loss_mean=loss_mean, grad_clip=1e9)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        figures = rl_step(policy, optimizer, work, chosen, advantages, refs, 0.8, config)
        weights = [parallel.full_tensor(p.detach()).clone() for p in policy.parameters()]
        return figures, weights

    figures, weights = step(rollouts)
    expected, expected_weights = step([rollouts[0], rollouts[2]])
    assert expected["kl"] > 0 and expected["logprob_gap"] > 0
    assert figures == pytest.approx(expected, rel=1e-4)
    for got, want in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # Where no rollout has a reward nothing is learnt, and no figure is made up.
    nothing, _ = step([rollouts[1]])
    assert nothing["loss"] == nothing["grad_norm"] == 0 and nothing["kl"] is None


def test_advantages_use_the_sample_standard_deviation():
    # 0, 0, 0, 1: mean 1/4, squared deviations 3/4, sample std sqrt(3/4 / 3) = 1/2.
    a = group_advantages(torch.tensor([0.0, 0.0, 0.0, 1.0]), 4)
    assert a.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-5)


def tensors(seed=0, b=3, t=5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: -3 * torch.rand(b, t, generator=g, dtype=torch.float64)  # noqa: E731
    logp = draw()
    old = logp + 0.6 * torch.randn(b, t, generator=g, dtype=torch.float64)  # ratios off both ends
    ref, entropy = draw(), -draw()
    advantages = torch.tensor([1.3, -0.7, 0.4], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return logp, old, ref, advantages, mask, entropy


def transcription(
    logp, old, ref, advantages, mask, entropy, loss_mean, clip=0.2, beta=0.01, c=0.001
):
    """The formulas of grpo.py's docstring, token by token."""
    responses, tokens = [], []
    for i in range(len(logp)):
        here = []
        for t in range(logp.shape[1]):
            if not mask[i, t]:
                continue
            rho = torch.exp(logp[i, t]) / torch.exp(old[i, t])
            clipped = min(max(rho.item(), 1 - clip), 1 + clip)
            unclipped_side = rho * advantages[i]
            clipped_side = (rho if clipped == rho.item() else rho.new_tensor(clipped)) * advantages[
                i
            ]
            surrogate = min(unclipped_side, clipped_side, key=lambda x: x.item())
            q = torch.exp(ref[i, t]) / torch.exp(logp[i, t])
            here.append(-surrogate + beta * (q - torch.log(q) - 1) - c * entropy[i, t])
        responses.append(sum(here) / len(here))
        tokens += here
    return sum(responses) / len(responses) if loss_mean == "response" else sum(tokens) / len(tokens)


@pytest.mark.parametrize("loss_mean", ["response", "token"])
def test_loss_and_gradient_equal_the_formulas(loss_mean):
    logp, old, ref, advantages, mask, entropy = tensors()
    leaves = [(logp.clone().requires_grad_(), entropy.clone().requires_grad_()) for _ in range(2)]
    (x, h), (y, k) = leaves
    loss, _ = policy_loss(x, old, ref, advantages, mask, entropy=h, loss_mean=loss_mean)
    expected = transcription(y, old, ref, advantages, mask, k, loss_mean)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(h.grad, k.grad, rtol=1e-10, atol=1e-12)
    assert (x.grad[~mask] == 0).all() and (h.grad[~mask] == 0).all()


def test_signs():
    one = torch.ones(1, 1, dtype=torch.bool)
    logp = torch.full((1, 1), -1.0, requires_grad=True)

    def gradient(advantage=0.0, ref=-1.0, **kw):
        logp.grad = None
        loss, sums = policy_loss(logp, logp.detach(), torch.full((1, 1), ref),
                                 torch.tensor([advantage]), one, **kw)  # fmt: skip
        loss.backward()
        return logp.grad.item(), sums

    # A good response becomes likelier: descent moves against a gradient of -A.
    assert gradient(advantage=2.0)[0] == pytest.approx(-2.0)
    assert gradient(advantage=-2.0)[0] == pytest.approx(2.0)
    # k3 with d = ref - logp has gradient 1 - e^d: ref above pulls logp up, ref below down.
    up, sums = gradient(ref=-0.5, kl_coef=1.0)
    assert up == pytest.approx(1 - math.exp(0.5)) and up < 0
    assert sums["kl"].item() == pytest.approx(math.exp(0.5) - 0.5 - 1)
    assert gradient(ref=-1.5, kl_coef=1.0)[0] == pytest.approx(1 - math.exp(-0.5))
    # More entropy lowers the loss.
    entropy = torch.full((1, 1), 2.0, requires_grad=True)
    loss, _ = policy_loss(logp, logp.detach(), logp.detach(), torch.zeros(1), one, entropy=entropy,
                          entropy_coef=0.5)  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(-1.0) and entropy.grad.item() == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (-0.5, 1.0, False),
        (-0.5, -1.0, True),
        (0.1, 1.0, False),
    ],
)
def test_the_clip_acts_only_where_it_lowers_the_objective(log_ratio, advantage, clipped):
    logp = torch.full((1, 1), -1.0, requires_grad=True)
    loss, sums = policy_loss(logp, logp.detach() - log_ratio, logp.detach(),
                             torch.tensor([advantage]), torch.ones(1, 1))  # fmt: skip
    loss.backward()
    assert sums["clipped"].item() == clipped
    assert (logp.grad.item() == 0) == clipped


def test_the_two_means_differ_as_they_should():
    # Token losses 1 (one token) and 0 (three tokens): mean of means 1/2, mean of tokens 1/4.
    logp = torch.zeros(2, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    args = (logp, logp, logp, torch.tensor([-1.0, 0.0]), mask)
    assert policy_loss(*args)[0].item() == pytest.approx(0.5)
    assert policy_loss(*args, loss_mean="token")[0].item() == pytest.approx(0.25)
    assert policy_loss(*args, denominator=4)[0].item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="loss_mean"):
        policy_loss(*args, loss_mean="sequence")


@pytest.mark.parametrize("loss_mean", ["response", "token"])
def test_parts_add_up_to_the_whole(loss_mean):
    logp, old, ref, advantages, mask, entropy = tensors()
    kw = dict(loss_mean=loss_mean)
    whole, sums = policy_loss(logp, old, ref, advantages, mask, entropy=entropy, **kw)
    count = 3 if loss_mean == "response" else sums["tokens"].item()
    parts = [
        policy_loss(logp[r], old[r], ref[r], advantages[r], mask[r], entropy=entropy[r],
                    denominator=count, **kw)[0]
        for r in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_padding_may_hold_anything_and_no_argument_is_changed():
    logp, old, ref, advantages, mask, entropy = tensors()
    clean, _ = policy_loss(logp, old, ref, advantages, mask, entropy=entropy)
    dirty = [x.clone().masked_fill(~mask, float("inf")) for x in (logp, old, ref, entropy)]
    leaf = dirty[0].clone().requires_grad_()
    copies = [x.clone() for x in (*dirty, mask)]
    loss, _ = policy_loss(leaf, dirty[1], dirty[2], advantages, mask, entropy=dirty[3])
    torch.testing.assert_close(loss, clean)
    loss.backward()
    assert leaf.grad.isfinite().all()
    assert all(torch.equal(x, y) for x, y in zip((*dirty, mask), copies, strict=True))
