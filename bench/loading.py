"""What it takes each rank to load policy and reference: host memory at its peak, and seconds.

torchrun --nproc_per_node 4 bench/loading.py --model DIR
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend import parallel  # noqa: E402
from backend.policy import PolicyConfig, load_policy  # noqa: E402


def peak() -> float:
    """This process's largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    args = parser.parse_args()
    with parallel.process_group():
        parallel.barrier()
        before, started = peak(), time.perf_counter()
        kept = [load_policy(args.model, PolicyConfig(), trainable) for trainable in (True, False)]
        taken, seconds = peak() - before, time.perf_counter() - started
        own = sum(parallel.own_rows(p)[0].nbytes for model in kept for p in model.parameters())
        for line in parallel.gather([(parallel.rank(), taken, own / 1e9, seconds)]):
            parallel.print0(
                "rank {}: {:.2f} GB at most for {:.2f} GB of shards, {:.1f} s".format(*line)
            )


if __name__ == "__main__":
    main()
