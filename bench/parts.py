"""Where an RL step's time goes on a CPU, by part.

    python bench/parts.py --model models/smollm2-135m --prompt_tokens 1000
    torchrun --nproc_per_node 2 bench/parts.py --model models/smollm2-135m

The step is grpo_step.py's, once under PyTorch's profiler after one that warms up. An operator's own
time belongs to the first of these around it: optimiser (with clipping), FSDP, head; otherwise to
attention, matrix products, casts and copies, or norms and activations, by its name. Time in no
operator is Python's. FLOP/s are those of the products that the kernels are asked for. Under
torchrun rank 0 is shown, which waits for the others in FSDP.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from flops import count_flops
from grpo_step import See, drawn
from sides import matrix_rate
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend import parallel  # noqa: E402

AROUND = {  # beginnings of the names of operators and ranges around others
    "Optimizer.step": "optimiser",
    "clipping": "optimiser",
    "FSDP::": "FSDP",
    "HeadLogProbs": "head",
    "autograd::engine::evaluate_function: HeadLogProbs": "head",
    "aten::scaled_dot_product_attention": "attention",
}
NAMED = {  # parts of an operator's own name
    "scaled_dot_product": "attention",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::bmm": "matrix products",
    "aten::linear": "matrix products",
    "aten::copy_": "casts and copies",
    "aten::_to_copy": "casts and copies",
    "aten::cat": "casts and copies",
    "aten::clone": "casts and copies",
    "cpp_fused": "norms and activations",  # compiled
    "aten::": "norms and activations",
}
PARTS = ("attention", "matrix products", "norms and activations", "casts and copies", "head",
         "FSDP", "optimiser", "Python")  # fmt: skip


def part_of(event) -> str:
    """Of a profiler's event."""
    around = event
    while around is not None:
        for name, part in AROUND.items():
            if around.name.startswith(name):
                return part
        around = around.cpu_parent
    return next((part for name, part in NAMED.items() if name in event.name), "Python")


def profiled(side: See) -> tuple[Counter, Counter, float]:
    """Seconds and operators by part, and the step's seconds."""
    clip = parallel.clip_grad_norm

    def clipping(*args):
        with record_function("clipping"):
            return clip(*args)

    parallel.clip_grad_norm = clipping
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        watch = side.step()
    parallel.clip_grad_norm = clip
    seconds, calls = Counter(), Counter()
    for event in profiler.events():
        part = part_of(event)
        seconds[part] += event.self_cpu_time_total / 1e6
        calls[part] += event.name.startswith("aten::")
    whole = sum(watch.values())
    # What ranges such as autograd's nodes hold beside operators is Python's too.
    seconds["Python"] = whole - sum(seconds[part] for part in PARTS if part != "Python")
    return seconds, calls, whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompt_tokens", type=int, default=1000)
    parser.add_argument("--responses", type=int, default=8, help="to the one prompt")
    parser.add_argument("--response_tokens", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no_checkpointing", dest="checkpointing", action="store_false",
                        help="keep activations")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="without the shared prefix")
    parser.add_argument("--compile", action="store_true", help="layers compiled")
    args = parser.parse_args()
    first = parallel.rank() == 0
    tokens = args.prompt_tokens + args.responses * args.response_tokens
    rate = matrix_rate(args.model, tokens, args.dtype, args.threads) if first else 1.0
    torch.set_num_threads(args.threads)
    if args.compile:
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True  # so that its kernels have names
    options = {k: getattr(args, k) for k in ("dtype", "checkpointing", "plain", "compile")}
    rollouts = drawn(args.prompt_tokens, args.responses, args.response_tokens)
    side = See(args.model, rollouts, options)
    for _ in range(2):
        side.step()
    flops = count_flops(side.step, side.vocabulary)
    seconds, calls, whole = profiled(side)
    if first:
        print(f"{args.prompt_tokens:,} + {args.responses} x {args.response_tokens} tokens, "
              f"{parallel.world_size()} rank(s) of {args.threads} threads, {args.dtype}: "
              f"{whole:.2f} s")  # fmt: skip
        print(f"{'':24}{'seconds':>9}{'share':>8}{'operators':>11}{'TFLOP':>8}{'GFLOP/s':>9}"
              f"{'of rate':>9}")  # fmt: skip
        for part in PARTS:
            asked, spent = flops[part], seconds[part]
            speed = f"{asked / 1e12:8.2f}{asked / spent / 1e9:9.0f}{asked / spent / rate:9.0%}"
            print(f"{part:24}{spent:9.2f}{spent / whole:8.0%}{calls[part]:11,}"
                  + (speed if asked else ""))  # fmt: skip
        print(f"{'all':24}{whole:9.2f}{'':19}{flops.total() / 1e12:8.2f}"
              f"{flops.total() / whole / 1e9:9.0f}{flops.total() / whole / rate:9.0%}")  # fmt: skip
    side.close()


if __name__ == "__main__":
    main()
