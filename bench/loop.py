"""Where a run's wall time went: the split of its metrics.jsonl, by cycle and in all.

    python bench/loop.py runs/NAME

Useful is what a run is for: sampling, the reference pass and training, and the judge's tail that
nothing could fill. The rest is waiting for other ranks, weight hand-over, saving, loading and what
no part claims.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from storage.run_folder import RunFolder  # noqa: E402

USEFUL = ("sampling", "reference", "training", "judge_tail")
OTHERS = ("waiting", "hand_over", "saving", "loading", "other")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    lines = RunFolder(parser.parse_args().run).metrics()
    if not lines:
        raise SystemExit("error: no metrics.jsonl there; give a run's folder")
    spent: dict[object, Counter] = {}
    for line in lines:
        if line["phase"] != "setup":  # loading once is not the loop
            for key in (line["cycle"], "all"):
                spent.setdefault(key, Counter()).update(line["seconds"])
    print(f"{'cycle':>7}" + "".join(f"{part:>11}" for part in (*USEFUL, *OTHERS, "wall"))
          + "     useful")  # fmt: skip
    for cycle, parts in spent.items():
        row = "".join(f"{parts[part]:11.1f}" for part in (*USEFUL, *OTHERS, "wall"))
        useful = sum(parts[part] for part in USEFUL) / parts["wall"]
        print(f"{cycle:>7}{row}{useful:11.1%}")
        if parts["other"] > 0.02 * parts["wall"]:
            print(f"{'':>7}  the named parts do not add up to the wall time within 2 %")
    steps = [line for line in lines if line["phase"] == "rl"]
    for name, what in (
        ("imbalance", "longer than an even share the ranks' rounds are (mean, RL)"),
        ("hand_over_s_per_gb", "seconds per GB of weights handed over (mean)"),
    ):
        print(f"{sum(line[name] for line in steps) / len(steps):8.3f} {what}")


if __name__ == "__main__":
    main()
