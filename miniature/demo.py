"""The paper in miniature, offline, in minutes on two CPU cores (make demo).

    python demo.py --seed 0              one seed: about six minutes
    python demo.py --seeds 0 1 2 3 4     a table over seeds, two at a time with one thread each

Makes the base model (tiny.py), runs SEE and Adapted RLCR at equal sample-passes (cycle.py, the
files of the paper's run), answers the test prompts with every checkpoint (evaluate.py), and shows a
table, Figure 2 and a few rollouts. Each stage goes on where a killed one stopped; a finished one is
not done again, unless the base model's recipe has changed. Everything lies in models/tiny-SEED/,
runs/demo/ and results/demo/. What the miniature is, and what it is not, stands in tiny.py.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import matplotlib
import scipy.stats
import tyro

import evaluate
from backend import parallel
from config import PRESETS
from evaluation.digits import Reader
from evaluation.metrics import (
    Estimate,
    best_constant,
    correlation,
    frequent_digits,
    share_among,
    shuffled_calibration,
    top_k_accuracy,
)
from evaluation.sources import metrics_until, rollouts_of
from miniature.tiny import Recipe, recipe_hash
from prompts import ATTRIBUTES
from reward import calibration
from storage.data import load_prompts
from storage.files import write_text
from storage.logbook import checkpoints
from storage.record import Rollout

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from storage.record import read_rollouts  # noqa: E402

# Adapted RLCR at SEE's 2,400 sample-passes: one epoch over 2,400 prompts in batches of 48.
EQUAL = ["--window", "2400", "--epochs", "1", "--rl_steps", "50"]
FOLDER = Path("runs/demo")
COLOURS = {"Adapted RLCR": "tab:orange", "SEE": "tab:blue"}


def stage(title: str, work: Callable[[], object]) -> object:
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    result = work()
    print(f"== {title}: {time.perf_counter() - started:.0f} s", flush=True)
    return result


def command(*words: object) -> Callable[[], object]:
    """A command of this project, run beside this file."""
    script, *rest = map(str, words)
    line = [sys.executable, str(Path(__file__).with_name(script)), *rest]
    return lambda: subprocess.run(line, check=True)


# --------------------------------------------------------------------------------------------------
# Evaluation of checkpoints


class Point(NamedTuple):
    """One checkpoint of a run, and what it had cost by then."""

    passes: int  # sample-passes
    calls: int  # judge calls
    updates: int  # optimiser steps of both phases
    unique: int  # unique prompts
    checkpoint: Path
    answers: list[Rollout]
    table: dict[str, Estimate]  # their figures


def points(run: Path, base: Path, split: Path) -> list[Point]:
    """The base model and every checkpoint of a run, each with its answers to the prompts in
    `split`."""
    found = [Point(0, 0, 0, 0, base, *answers(base, "base", split, run))]
    window = len(json.loads((run / "window.json").read_text()))
    judged = Counter(
        (r.cycle, r.step)
        for path in (run / "rollouts").glob("*.jsonl")
        for r in read_rollouts(path)
        if r.judge_scores is not None
    )
    for checkpoint in checkpoints(run):
        lines = metrics_until(checkpoint)
        rl, sft = ([m for m in lines if m["phase"] == phase] for phase in ("rl", "sft"))
        passes = rl[-1]["sample_passes"]
        calls = sum(judged[m["cycle"], m["step"]] for m in rl)
        updates, unique = len(rl) + len(sft), min(passes, window)
        got = answers(checkpoint, f"{run.name}-{checkpoint.name}", split, run)
        found.append(Point(passes, calls, updates, unique, checkpoint, *got))
    return found


def answers(
    checkpoint: Path, name: str, split: Path, run: Path
) -> tuple[list[Rollout], dict[str, Estimate]]:
    """One answer to each prompt of the split at the training temperature, judged, and their
    figures."""
    trained = PRESETS["tiny"]
    cell = evaluate.Cell(
        model=str(checkpoint),
        data=str(split),
        name=f"{run.parent.name}/{split.parent.name}-{split.stem}-{name}",
        judge=trained.judge,
        template=trained.template,
        prompt_tokens=trained.prompt_tokens,
        sampling=trained.sampling,
        dtype=trained.policy.dtype,
        sampler=trained.sampler,
        sample_rows=512,
    )
    inputs = evaluate.prepare(cell)
    with closing(evaluate.load_sampler(cell, inputs)) as sampler:
        table = evaluate.answer(cell, inputs, sampler)
    return rollouts_of(cell.folder), table


# --------------------------------------------------------------------------------------------------
# Table and figure


def figures(point: Point) -> dict[str, float | None]:
    """What the table shows of a checkpoint."""
    valid = [r for r in point.answers if r.score_positions is not None and r.judge_scores]
    judge = [r.judge_scores for r in valid]
    constant = best_constant(judge)
    at = ATTRIBUTES.index("correctness")
    return {
        "well-formed": point.table["well_formed"].mean,
        "quality": point.table["quality"].mean,
        "calibration": point.table["calibration"].mean,
        "  of its scores shuffled": shuffled_calibration(
            [(r.self_scores, r.judge_scores) for r in valid]
        ),
        "  of the best constant": sum(calibration(constant, j) for j in judge) / len(judge),
        "correlation, correctness": correlation(
            [r.self_scores[at] for r in valid], [j[at] for j in judge]
        ),
        "bias, help. and corr.": sum(
            r.self_scores[a] - r.judge_scores[a] for r in valid for a in (0, 1)
        ) / (2 * len(valid)),
        "top-5": top_k_accuracy(Reader(point.checkpoint, "float32").own(valid), judge),
        "  of a constant ranking": sum(share_among(frequent_digits(judge), j) for j in judge)
        / len(judge),
    }  # fmt: skip


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(columns: dict[str, dict], cell: Callable[[object], str] = number, width: int = 16) -> str:
    """Columns {title: {row: value}} as text; `cell` writes a value."""
    lines = [f"{'':<26}" + "".join(f"{title:>{width}}" for title in columns)]
    for name in next(iter(columns.values())):
        cells = (cell(values[name]) for values in columns.values())
        lines.append(f"{name:<26}" + "".join(f"{text:>{width}}" for text in cells))
    return "\n".join(lines)


def figure_2(runs: dict[str, list[Point]], path: Path) -> None:
    """Quality and calibration over four costs. The paper's Figure 2 has the first alone."""
    costs = {"sample-passes": "passes", "judge calls": "calls", "optimiser steps": "updates",
             "unique prompts": "unique"}  # fmt: skip
    fig, axes = plt.subplots(2, 4, figsize=(14, 6), sharey="row", layout="constrained")
    for column, (label, field) in enumerate(costs.items()):
        for row, metric in enumerate(("quality", "calibration")):
            axis = axes[row][column]
            for title, found in runs.items():
                estimates = [p.table[metric] for p in found]
                axis.errorbar(
                    [getattr(p, field) for p in found], [e.mean for e in estimates],
                    [e.se or 0 for e in estimates], marker="o", markersize=3, capsize=2,
                    color=COLOURS[title], label=title,
                )  # fmt: skip
            axis.grid(alpha=0.3)
            axis.set_xlabel(label if row else "")
            axis.set_ylabel("" if column else f"{metric} (test)")
    axes[0][0].legend()
    fig.suptitle("The miniature: sample efficiency on 512 test prompts (bars: standard error)")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def look_at(rollouts: Sequence[Rollout], prompts: dict[str, str], count: int = 6) -> str:
    """A few of a step's rollouts: text, scores, judge's scores."""
    lines = []
    for r in rollouts[:: max(1, len(rollouts) // count)][:count]:
        lines.append(f"{prompts[r.prompt_id]!r} -> {r.text!r}")
        lines.append(f"    self {r.self_scores}  judge {r.judge_scores}  reward {r.reward:.3f}")
    return "\n".join(lines)


def one_seed(seed: int) -> None:
    base = Path(f"models/tiny-{seed}")
    common = ("--model", base, "--data", base / "train.jsonl", "--seed", 42 + seed)
    made = recipe_hash(Recipe(seed))[:6]  # another base model is another run
    names = {"SEE": f"demo/see-{seed}-{made}", "Adapted RLCR": f"demo/rlcr-{seed}-{made}"}
    stage(
        "1 of 4, base model: pretraining on the miniature world (about 3 minutes)",
        command("tiny.py", "--seed", seed),
    )
    stage(
        "2 of 4, SEE: 15 cycles of GRPO and distillation over 160 prompts (about 2 minutes)",
        command("cycle.py", "--preset", "tiny", "--name", names["SEE"], *common),
    )
    stage(
        "3 of 4, Adapted RLCR: GRPO alone, as many sample-passes (about a minute)",
        command("cycle.py", "--preset", "tiny-rlcr", "--name", names["Adapted RLCR"], *common,
                *EQUAL),
    )  # fmt: skip
    with parallel.process_group():
        runs = stage(
            "4 of 4, evaluation: every checkpoint on 512 test prompts (about a minute)",
            lambda: {
                title: points(Path("runs") / name, base, base / "test.jsonl")
                for title, name in names.items()
            },
        )
        columns = {"base": runs["SEE"][0]} | {title: runs[title][-1] for title in COLOURS}
        shown = {title: figures(point) for title, point in columns.items()}
    figure = FOLDER / ("figure2.png" if seed == 0 else f"figure2-{seed}.png")
    figure_2(runs, figure)
    by_cycle = [p.table["well_formed"].mean for p in runs["SEE"][1:]]
    write_text(table_file(seed), json.dumps(shown | {"SEE, well-formed by cycle": by_cycle}))

    train = load_prompts(base / "train.jsonl")
    asked = {p.id: p.conversation[-1]["content"] for p in train}
    last = read_rollouts(Path("runs") / names["SEE"] / "rollouts" / "cycle_15.jsonl")
    print(f"\nA few rollouts of SEE's last cycle\n\n{look_at(last, asked)}")
    print(f"\n512 test prompts, temperature 0.8, seed {seed}, after 2,400 sample-passes\n")
    print(
        f"{table(shown)}\n\nlowest well-formed rate after any of SEE's cycles {min(by_cycle):.3f}"
    )
    print(f"Figure 2: {figure}")


def table_file(seed: int) -> Path:
    return FOLDER / f"table-{seed}.json"


def many_seeds(seeds: Sequence[int]) -> None:
    """Two at a time, then mean and 95 % interval over seeds (Student's t)."""

    def run(seed: int) -> None:
        with open(FOLDER / f"log-{seed}.txt", "a") as log:
            line = [sys.executable, __file__, "--seed", str(seed)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(line, check=True, stdout=log, stderr=log, env=one_thread)
        print(f"seed {seed} is done", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, seeds))
    tables = [json.loads(table_file(seed).read_text()) for seed in seeds]
    columns = {
        title: {name: [t[title][name] for t in tables] for name in tables[0][title]}
        for title in ("base", *COLOURS)
    }
    print(f"\n512 test prompts, temperature 0.8, seeds {', '.join(map(str, seeds))}\n")
    print(table(columns, cell=interval, width=20))
    for seed, t in zip(seeds, tables, strict=True):
        see, rlcr, start = t["SEE"], t["Adapted RLCR"], t["base"]
        print(
            f"seed {seed}: SEE - base {see['calibration'] - start['calibration']:+.3f}, "
            f"SEE - RLCR {see['calibration'] - rlcr['calibration']:+.3f} in calibration, "
            f"{see['quality'] - rlcr['quality']:+.3f} in quality; lowest well-formed "
            f"{min(t['SEE, well-formed by cycle']):.3f}"
        )


def interval(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values)
    return f"{mean:.3f} ± {half / len(values) ** 0.5:.3f}"


def main(seed: int = 0, seeds: tuple[int, ...] = ()) -> None:
    """Run the demo.

    Args:
        seed: of the world's prompts, the base model and both runs.
        seeds: several, for a table with intervals (2 at least).
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    many_seeds(seeds) if seeds else one_seed(seed)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
