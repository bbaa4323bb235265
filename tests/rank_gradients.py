"""Not a test: one rank of test_ranks.py. Usage: rank_gradients.py MODEL_FOLDER OUT.pt

Saves {case: {parameter: whole gradient}} of one RL step and one distillation update, for each loss
mean, with and without shared prefixes, and for several splits into micro-batches; under "figures" a
step's own {case: figures}.
"""

import sys
from dataclasses import replace

import torch
from conftest import make_rollout

import sft_masked
from backend import parallel
from backend.model_folder import load_tokenizer
from backend.packing import share_out
from backend.policy import PolicyConfig, load_policy
from grpo import GRPOConfig, group_advantages, reference_logps, response_row, rl_step

ANSWERS = ("Yes.", "It is old and good.", "Well, it is what it is, and that is fine.", "No, no.")
REWARDS = (0.3, -1.0, 0.9, 0.5, 0.2, 0.2, 0.7, 0.1)


class Capture:
    """In the optimiser's place: keeps the gradients instead of using them."""

    grads: dict[str, torch.Tensor]

    def __init__(self, parameters, **_):
        self.param_groups = []
        self.parameters = list(parameters)

    def step(self):
        Capture.grads = [parallel.full_tensor(p.grad).clone() for p in self.parameters]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def main(folder: str, out: str) -> None:
    tokenizer = load_tokenizer(folder)
    rollouts = [
        make_rollout(
            tokenizer, ANSWERS[k % 4], sample=k % 4, prompt="Hm? " * (1 + k // 4), reward=r
        )
        for k, r in enumerate(REWARDS)
    ]
    rollouts = [replace(r, sampled_logp=(-1.0 - k,) * len(r.response_ids))
                for k, r in enumerate(rollouts)]  # fmt: skip
    cases, figures = {}, {}
    with parallel.process_group():
        rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
        advantages = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), 4)
        for shared in (True, False):
            for budget in (1, 150, 10_000):
                batching = PolicyConfig(
                    "float32", head_tokens=7, shared_prefix=shared, micro_batch_tokens=budget
                )
                policy = load_policy(folder, batching)
                reference = load_policy(folder, batching, trainable=False)
                with torch.no_grad():
                    for p in policy.parameters():
                        p.mul_(1.02)  # so that the KL has a gradient
                names = [name for name, _ in policy.model.named_parameters()]
                work = share_out(rows, [k // 4 for k in range(8)], budget, shared)
                ref_logps = reference_logps(reference, work.batches, 0.8)
                for loss_mean in ("response", "token"):
                    config = GRPOConfig(loss_mean=loss_mean, kl_coef=0.5, grad_clip=1e9)
                    capture = Capture(policy.parameters())
                    said = rl_step(
                        policy, capture, work, rollouts, advantages, ref_logps, 0.8, config
                    )
                    case = f"{loss_mean} {budget} {shared}"
                    figures[case] = {k: v for k, v in said.items() if k != "imbalance"}
                    cases[case] = dict(zip(names, Capture.grads, strict=True))
                # Seven rows: ranks get different numbers of rows and of micro-batches.
                config = sft_masked.SFTConfig(grad_clip=1e9)
                targets = [sft_masked.distillation_row(r, tokenizer) for r in rollouts[:7]]
                capture = Capture(policy.parameters())
                for update in sft_masked.updates(targets, config, seed=0):
                    sft_masked.sft_step(policy, capture, update, config, batching)
                cases[f"sft {budget} {shared}"] = dict(zip(names, Capture.grads, strict=True))
        if parallel.rank() == 0:
            torch.save(cases | {"figures": figures}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
