"""Steps of a run on this machine at full size, without data or judge: seconds and memory by part.

    python bench/full_step.py --model DIR
    torchrun --nproc_per_node 4 bench/full_step.py --model DIR

DIR is a Hugging Face folder; where it has a config.json and a tokenizer but no weights, --random
draws them and writes them there. Prompts are random tokens and rewards are made up, which changes
no time; responses end where the model ends them or at --response_tokens. The order of the parts is
cycle.py's. The last step and the second distillation update are shown: in the first ones kernels
are chosen and AdamW's state is made. The gap is that of sampler and trainer, in nats a token
(grpo.py, note 2).
"""

import argparse
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import sft_masked  # noqa: E402
from backend import parallel  # noqa: E402
from backend.model_folder import load_tokenizer, weight_files  # noqa: E402
from backend.packing import Row, share_out  # noqa: E402
from backend.policy import load_policy  # noqa: E402
from backend.sampler import Request, choose_sampler, make_sampler  # noqa: E402
from config import PRESETS  # noqa: E402
from grpo import (  # noqa: E402
    group_advantages,
    make_optimizer,
    reference_logps,
    response_row,
    rl_step,
)
from storage.record import Rollout  # noqa: E402


class Parts(dict):
    """`with parts("name"):` gives a part's seconds and its peak of GPU memory in bytes."""

    @contextmanager
    def __call__(self, name: str):
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
        peak = torch.cuda.max_memory_allocated() if gpu else 0
        self[name] = time.perf_counter() - began, peak, total - free


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--random", action="store_true", help="draw weights, if it has none")
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--prompts", type=int, help="of a step; by default the preset's")
    parser.add_argument("--prompt_tokens", type=int, default=1000, help="of each prompt")
    parser.add_argument("--response_tokens", type=int, default=1000, help="at most")
    parser.add_argument("--sampler", default="auto", help="auto, vllm or transformers")
    parser.add_argument("--sample_rows", type=int, help="rollouts at once per rank, by default the "
                        "preset's")  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, help="RL steps; the last one is shown")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    config = replace(
        preset, model=str(args.model), prompt_tokens=args.prompt_tokens,
        sampling=replace(preset.sampling, max_tokens=args.response_tokens),
        sampler=choose_sampler(args.sampler), sample_rows=args.sample_rows or preset.sample_rows,
        batch=args.prompts or preset.batch,
    )  # fmt: skip
    with parallel.process_group():
        if args.random and parallel.rank() == 0 and not weight_files(args.model):
            write_random(args.model)
        parallel.barrier()
        run(config, args)


def write_random(folder: Path) -> None:
    torch.manual_seed(0)
    with parallel.device():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(config, args: argparse.Namespace) -> None:
    parts, tokenizer = Parts(), load_tokenizer(args.model)
    with parts("sampler starts"):
        sampler = make_sampler(config, args.model, tokenizer, config.policy.dtype)
    with parts("load policy and reference"):
        policy = load_policy(args.model, config.policy)
        reference = load_policy(args.model, config.policy, trainable=False)
    optimizer = make_optimizer(policy, config.grpo)
    rng = random.Random(0)
    prompts = [
        tuple(rng.choices(range(10, len(tokenizer)), k=config.prompt_tokens))
        for _ in range(config.batch)
    ]
    temperature, options = config.sampling.temperature, config.policy
    for step in range(args.steps):
        with parts("hand-over"):
            sampler.load_weights(policy, f"c1s{step}")
        with parts("sampling"):
            mine = range(parallel.rank(), config.batch, parallel.world_size())
            requests = [
                Request(f"{i}", k, prompts[i], 1000 * i + k if sampler.seed_per_rollout else 0)
                for i in mine
                for k in range(config.rollouts)
            ]
            samples = list(sampler.sample(requests, config.sampling))
        with parts("sleep"):
            sampler.sleep()
        rollouts = sorted(parallel.gather([rollout(s) for s in samples]), key=lambda r: r.key)
        rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
        groups = [i // config.rollouts for i in range(len(rows))]
        with parts("reference"):
            work = share_out(rows, groups, options.micro_batch_tokens, options.shared_prefix)
            refs = reference_logps(reference, work.batches, temperature)
        with parts("update"):
            rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
            advantages = group_advantages(rewards, config.rollouts)
            figures = rl_step(
                policy, optimizer, work, rollouts, advantages, refs, temperature, config.grpo
            )
    sampled = sum(len(r.response_ids) for r in rollouts)
    del optimizer
    # Behind one prompt, as the run's rows are behind one template.
    targets = [
        Row((*prompts[0], *r.response_ids),
            [False] * (len(prompts[0]) + len(r.response_ids) - 5) + [True] * 5, f"{r.key}")
        for r in rollouts[: config.sft.batch]
    ]  # fmt: skip
    optimizer = sft_masked.make_optimizer(policy, config.sft)
    for _ in range(2):
        with parts("distillation update"):
            update = sft_masked.Update(targets, config.sft.lr)
            sft_masked.sft_step(policy, optimizer, update, config.sft, options)
    sampler.close()
    if parallel.rank() == 0:
        show(config, parts, sampled, sum(b.ids.numel() for b in work.batches), figures)


def rollout(sample) -> Rollout:
    r = sample.request
    return Rollout(
        cycle=1, step=1, prompt_id=r.prompt_id, sample=r.sample, seed=r.seed,
        prompt_ids=r.prompt_ids, response_ids=sample.response_ids, text="",
        finish_reason=sample.finish_reason, answer=None, self_scores=None, score_positions=None,
        judge_scores=None, judge_model=None, quality=None, calibration=None,
        reward=float(r.sample % 3), weight_version="", sampled_logp=sample.logp,
    )  # fmt: skip


def show(config, parts: Parts, sampled: int, passed: int, figures: dict) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(
        f"\n{device}, {parallel.world_size()} rank(s), torch {torch.__version__}, preset "
        f"{config.preset}, sampler {config.sampler}, {config.sample_rows} at once: {config.batch} "
        f"prompts of {config.prompt_tokens:,} tokens x {config.rollouts} rollouts\n"
        f"{'':28}{'seconds':>9}{'peak GB':>9}{'GPU holds':>11}"
    )
    for name, (seconds, peak, held) in parts.items():
        print(f"{name:28}{seconds:9.2f}{peak / 1e9:9.2f}{held / 1e9:11.2f}")
    seconds = {name: values[0] for name, values in parts.items()}
    training = seconds["reference"] + seconds["update"]
    step = training + seconds["hand-over"] + seconds["sampling"] + seconds["sleep"]
    print(
        f"{sampled:,} tokens sampled, {sampled / seconds['sampling']:,.0f} a second; {passed:,} of "
        f"rank 0 through the layers, {passed / training:,.0f} a second\n"
        f"an RL step {step:.1f} s; gap of sampler and trainer {figures['logprob_gap']:.4f}, KL "
        f"{figures['kl']:.1e}, gradient norm {figures['grad_norm']:.3f}"
    )


if __name__ == "__main__":
    main()
