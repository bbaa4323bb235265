"""Where a run's wall time went: the split of its metrics.jsonl, by cycle and in all.

    python bench/loop.py runs/NAME

Useful is what a run is for: sampling, the reference pass and training, and the judge's tail that
nothing could fill. The rest is waiting for other ranks, weight hand-over, saving (that of which no
step makes use: copies, and waiting for the thread that writes), loading and what no part claims.

Below it the sampling of the RL steps: how many rollouts are unfinished as it goes on, how much of
it is the last one's, and what reference passes on finished groups would save meanwhile, at most.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from storage.files import read_json  # noqa: E402
from storage.record import Rollout  # noqa: E402
from storage.run_folder import RunFolder  # noqa: E402

USEFUL = ("sampling", "reference", "training", "judge_tail")
OTHERS = ("waiting", "hand_over", "saving", "loading", "other")


def unfinished(seconds: Sequence[float], tenths: int = 10) -> list[float]:
    """Share of a step's rollouts that are unfinished at the beginning of each tenth of its
    sampling, for the seconds after which each is finished."""
    whole = max(seconds)
    return [sum(s > whole * k / tenths for s in seconds) / len(seconds) for k in range(tenths)]


def alone(seconds: Sequence[float], rollouts: int) -> float:
    """Seconds for which at most `rollouts` are unfinished, and the machine does little else."""
    return max(seconds) - sorted(seconds)[-1 - rollouts]


def saved(groups: Sequence[tuple[float, float]], reference: float, ranks: int) -> float:
    """Seconds that a step would be shorter if the reference pass took each group as soon as it is
    sampled, and the sampler lost nothing by it. `groups`: (seconds after which its last rollout is
    finished, tokens). A pass is a collective: it takes a group of each rank. `reference`: its
    seconds in all."""
    groups, tokens = sorted(groups), sum(n for _, n in groups)
    end = 0.0
    for i in range(0, len(groups), ranks):
        now = groups[i : i + ranks]
        end = max(end, now[-1][0]) + reference * sum(n for _, n in now) / tokens
    return groups[-1][0] + reference - end


def show_sampling(run: RunFolder, steps: Sequence[dict], wall: float) -> None:
    """`steps`: lines of metrics.jsonl."""
    ranks = read_json(run.env_file, list)[-1]["ranks"]
    by_step: dict[tuple, list[Rollout]] = defaultdict(list)
    for r in run.all_rollouts():
        if r.sampled_after is not None:
            by_step[r.cycle, r.step].append(r)
    if not by_step:
        return print("when rollouts were finished is not on file: an older run")
    times = {step: [r.sampled_after for r in rows] for step, rows in by_step.items()}
    shares = [sum(x) / len(times) for x in zip(*map(unfinished, times.values()), strict=True)]
    print("unfinished rollouts at each tenth of a step's sampling: "
          + " ".join(f"{share:.0%}" for share in shares))  # fmt: skip
    sampling = sum(map(max, times.values()))
    for n in (1, 2, 4):
        last = sum(alone(t, n) for t in times.values() if len(t) > n)
        print(f"{last / sampling:8.1%} of sampling with {n} or fewer unfinished")
    bound = 0.0
    for line in steps:
        groups: dict[str, list[Rollout]] = defaultdict(list)
        for r in by_step.get((line["cycle"], line["step"]), []):
            groups[r.prompt_id].append(r)
        ends = [(max(r.sampled_after for r in g),
                 len(g[0].prompt_ids) + sum(len(r.response_ids) for r in g))
                for g in groups.values()]  # fmt: skip
        if ends:
            bound += saved(ends, line["seconds"]["reference"], ranks)
    print(f"{bound / wall:8.1%} of the wall time at most for reference passes during sampling")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    run = RunFolder(parser.parse_args().run)
    lines = run.metrics()
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
    show_sampling(run, steps, spent["all"]["wall"])


if __name__ == "__main__":
    main()
