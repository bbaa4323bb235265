"""Memory and work of each GPU, for a model and a machine that need not be there.

    python bench/memory.py --model DIR --gpus 4 --gpu_gb 96
    python bench/memory.py --model DIR --measure

DIR needs a config.json and nothing else. Each case is traced: the run's own step is taken on a GPU
that is not there (fake_gpu.py), where memory, FLOPs and traffic are counted and nothing is
computed; beside it stands the formula that --dry_run uses (backend/footprint.py). About a quarter
of a minute a case for Qwen3-4B. A CUDA context, NCCL's buffers and fragmentation are in the margin
and not in the trace. --measure takes the same steps with random weights on this machine's GPU.
"""

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu_trace  # noqa: E402
import torch  # noqa: E402

from backend import footprint, parallel  # noqa: E402
from backend.model_folder import model_size  # noqa: E402
from config import PRESETS, Config  # noqa: E402

# bf16 FLOP/s without sparsity and bytes/s of memory, by the makers' data sheets.
CARDS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
# Prompt tokens, response tokens of each rollout, prompts a rank, options of the policy.
CASES = {
    "4,096 + 8,192 + 4,096": (4096, [8192, 4096], 2, {}),
    "1,000 + 8 x 1,000": (1000, [1000] * 8, 2, {}),
    "1,000 + 8,192": (1000, [8192], 2, {}),
    "the first, official": (4096, [8192, 4096], 2, {"parameters": "bfloat16"}),
    "the first, kept": (4096, [8192, 4096], 2, {"gradient_checkpointing": False}),
    "2 x 8,192, padded": (4096, [4096, 4096], 2, {"shared_prefix": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--gpus", type=int, default=4, help="ranks")
    parser.add_argument("--gpu_gb", type=float, default=96, help="memory of each, GB (10^9 bytes)")
    parser.add_argument("--card", choices=CARDS, default="H100", help="for the bound on time")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="decides the rest")
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU, one rank")
    args = parser.parse_args()
    if args.measure:
        with parallel.process_group():  # before all else, because it sets up CUDA's allocator
            measure(args)
    else:
        trace(args)


def trace(args: argparse.Namespace) -> None:
    config, size = replace(PRESETS[args.preset], sampler="vllm"), model_size(args.model)
    machine = footprint.Machine(args.gpu_gb * 1e9, cuda=True)
    print(f"{size.kind}, {size.parameters / 1e9:.2f} B parameters, preset {args.preset}, "
          f"{args.gpus} GPUs. GB a GPU: peaks as traced, RL step by formula and its ratio.\n"
          f"An RL step of {config.batch} x {config.rollouts} such rollouts: PFLOP a GPU, seconds "
          f"that a {args.card} takes at least,\nand seconds of its full memory bandwidth for what "
          "kernels read and write.\n")  # fmt: skip
    head = ("load", "reference", "RL step", "formula", "ratio", "PFLOP", "s", "traffic s")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in head), flush=True)
    peak = 0.0
    for name in args.case:
        rank, formula, rows = take(name, Path(args.model), config, args.gpus)
        stages, (_, _, prompts, options) = rank.stages, CASES[name]
        step = stages["RL step"].peak
        scale = config.batch * config.rollouts / args.gpus / (prompts * rows)
        flops = scale * (stages["reference"].flops + stages["RL step"].flops)
        moved = scale * (stages["reference"].moved + stages["RL step"].moved)
        speed, bandwidth = CARDS[args.card]
        print(f"{name:24}" + "".join(f"{x:11.2f}" for x in (
            stages["load"].peak / 1e9, stages["reference"].peak / 1e9, step / 1e9, formula / 1e9,
            formula / step, flops / 1e15, flops / speed, moved / bandwidth,
        )), flush=True)  # fmt: skip
        if not options:
            peak = max(peak, step)
    tuning, hand_over = distil(Path(args.model), config, args.gpus)
    print(f"\ndistillation, {config.sft.batch} x (1,000 + 1,000)      {tuning.peak / 1e9:8.2f} GB, "
          f"{tuning.flops / 1e15:.2f} PFLOP an update, at least {tuning.flops / speed:.2f} s\n"
          f"hand-over, beside what a step leaves    {hand_over.peak / 1e9:8.2f} GB")  # fmt: skip
    if not peak:
        return
    needed = peak * footprint.MARGIN + footprint.CONTEXT
    print(f"\nlargest peak of the preset's cases      {peak / 1e9:8.2f} GB\n"
          f"with margin, CUDA context and NCCL      {needed / 1e9:8.2f} GB\n"
          f"left for vLLM                           {args.gpu_gb - needed / 1e9:8.2f} GB; it takes "
          f"{footprint.engine(config, size, machine) / 1e9:.2f} (--engine.gpu_memory), of which "
          f"{footprint.kv_tokens(config, size, machine):,} tokens of cache")  # fmt: skip
    free = machine.memory - footprint.engine(config, size, machine)
    fit = footprint.tokens_that_fit(config, size, machine, args.gpus, free)
    print(f"tokens of a micro-batch that fit        {fit:8,}")


def take(name: str, model: Path, config: Config, ranks: int, real: bool = False):
    """A case's two steps: the rank with its stages, the formula's bytes, rollouts of a prompt."""
    prompt, responses, prompts, options = CASES[name]
    policy = replace(config.policy, **options)
    with gpu_trace.rank(model, policy, ranks, real=real) as rank:
        rank.rl_steps(prompt, responses, prompts * ranks)
    rows = len(responses)
    tokens = prompt + sum(responses)
    if not policy.shared_prefix:
        tokens = rows * (prompt + max(responses))
    same = replace(config, policy=policy, prompt_tokens=prompt, rollouts=max(2, rows))
    formula = sum(footprint.training(same, model_size(model), ranks, True, tokens).values())
    return rank, formula, rows


def distil(model: Path, config: Config, ranks: int, real: bool = False):
    """The stages of a distillation update and of the hand-over after it."""
    with gpu_trace.rank(model, config.policy, ranks, real=real) as rank:
        rank.sft_steps(1000, [1000] * config.sft.batch)
        rank.hand_over()
    return rank.stages["distillation"], rank.stages["hand-over"]


def measure(args: argparse.Namespace) -> None:
    config = replace(PRESETS[args.preset], sampler="vllm")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, preset {args.preset}. GB: "
          "peaks of PyTorch's allocator, RL step by\nformula, its ratio, and what the allocator "
          "held. Seconds of the second step.\n")  # fmt: skip
    head = "load,reference,RL step,formula,ratio,held,s ref.,s RL,tokens/s".split(",")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in head), flush=True)
    for name in args.case:
        try:
            rank, formula, _ = take(name, Path(args.model), config, 1, real=True)
        except torch.OutOfMemoryError:
            print(f"{name:24} does not fit", flush=True)
        else:
            load, reference, step = (rank.stages[k] for k in ("load", "reference", "RL step"))
            seconds = reference.seconds, step.seconds
            peaks = [x / 1e9 for x in (load.peak, reference.peak, step.peak, formula)]
            held = torch.cuda.memory_reserved() / 1e9
            values = (*peaks, formula / step.peak, held, *seconds, rank.tokens / sum(seconds))
            print(f"{name:24}" + "".join(f"{x:11.2f}" for x in values), flush=True)
            waits = ", ".join(f"{n} x {place}" for place, n in step.waits.items())
            print(f"    waits: {waits}", flush=True)
            del rank
        gc.collect()  # what autograd's graph holds in cycles
        torch.cuda.empty_cache()
    tuning, hand_over = distil(Path(args.model), config, 1, real=True)
    print(f"\ndistillation, {config.sft.batch} x (1,000 + 1,000)   {tuning.peak / 1e9:.2f} GB, "
          f"{tuning.seconds:.2f} s an update\n"
          f"hand-over  {hand_over.peak / 1e9:.2f} GB, {hand_over.seconds:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
