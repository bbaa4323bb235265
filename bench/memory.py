"""Memory of each GPU by formula, for a model and a machine that need not be there.

    python bench/memory.py --model DIR --gpus 4 --gpu_gb 96

DIR needs a config.json and nothing else. A test holds the formulas (backend/footprint.py)
against a measured step on CPU; no GPU has been measured.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend import footprint  # noqa: E402
from backend.model_folder import model_size  # noqa: E402
from config import PRESETS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--gpus", type=int, default=4, help="ranks")
    parser.add_argument("--gpu_gb", type=float, default=96, help="memory of each, GB (10^9 bytes)")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="decides the rest")
    parser.add_argument("--sleep", action="store_true", help="vLLM gives its memory back")
    args = parser.parse_args()
    config, size = replace(PRESETS[args.preset], sampler="vllm"), model_size(args.model)
    config = replace(config, engine=replace(config.engine, sleep=args.sleep))
    machine = footprint.Machine(args.gpu_gb * 1e9, cuda=True)
    parts = footprint.training(config, size, args.gpus)
    parts["margin"] = (footprint.MARGIN - 1) * sum(parts.values())
    parts["vLLM: weights, KV cache"] = footprint.engine(config, size, machine)
    tokens = config.policy.micro_batch_tokens
    print(f"{size.kind}, {size.parameters / 1e9:.2f} B parameters, preset {args.preset}, "
          f"{args.gpus} GPUs, micro-batches of {tokens:,} tokens\n")  # fmt: skip
    for name, value in parts.items():
        print(f"  {name:<34}{value / 1e9:8.1f} GB")
    print(f"  {'of ' + format(args.gpu_gb, 'g') + ' GB':<34}{sum(parts.values()) / 1e9:8.1f} GB")
    free = machine.memory - parts["vLLM: weights, KV cache"]
    fit = footprint.tokens_that_fit(config, size, args.gpus, free)
    longest = config.longest_row
    print(f"\n  tokens of a micro-batch that fit  {fit:10,}"
          + ("" if fit >= longest else f"   fewer than one row of {longest:,}"))  # fmt: skip
    capacity = footprint.kv_tokens(config, size, machine)
    print(f"  tokens in vLLM's KV cache         {capacity:10,}"
          + ("" if capacity >= longest else f"   fewer than a rollout of {longest:,}"))  # fmt: skip


if __name__ == "__main__":
    main()
