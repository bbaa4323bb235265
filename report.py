"""Tables, figures and a page from what evaluate.py and cycle.py left on file (Sec. 4); no model and
no judge is asked.

    python report.py results/paper --out report
    python report.py results/seed-0 results/seed-1 results/seed-2 --out report
    python report.py results/paper --beside results/paper-greedy results/paper-varied
    python report.py --runs runs/see

Several folders are evaluations of runs with other seeds; those given to --beside have other
settings and get columns of their own. Writes tables.txt, tables.md, figure2.png to figure4.png and
training.png where there is something to draw, and report.html: one file that needs no network, with
a browser over the answers (the first folder's, and the runs').
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import sklearn
import tyro

from evaluation import control_tables, further_tables, intervals
from evaluation.controls import calibrations, qualities
from evaluation.results import TRAINING, Cell, Evaluation, load_evaluation, load_run
from evaluation.tables import Table, Tables, over, settings
from prompts import ATTRIBUTES
from storage.files import write_text
from storage.run_folder import RunFolder, metrics_until

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Command:
    """Tables, figures and a page from result files."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders results/NAME of evaluate.py; several: runs with other seeds."""
    beside: tuple[Path, ...] = ()
    """Folders results/NAME of evaluations under other settings, such as greedy decoding or other
    few-shot examples."""
    runs: tuple[Path, ...] = ()
    """Folders runs/NAME of cycle.py, whose training and rollouts are shown."""
    out: Path = Path("report")
    """Folder for tables, figures and page."""
    models: tuple[str, ...] = ()
    """Which models, the base first; none: all."""
    show: int = 200
    """Answers of each model to each benchmark on the page, and of each run, evenly from its cycles;
    as many malformed ones at most; 0: all."""


# --------------------------------------------------------------------------------------------------
# Figures


def sample_passes(cell: Cell) -> tuple[str, int] | None:
    """(run, sample-passes) of a checkpoint runs/NAME/checkpoints/cycle_NN..., None for others."""
    checkpoint = Path(cell.config["model"])
    if checkpoint.parent.name != "checkpoints":
        return None
    done = [x["sample_passes"] for x in metrics_until(checkpoint) if x["phase"] == "rl"]
    return (checkpoint.parent.parent.name, done[-1]) if done else None


def figure_2(t: Tables, path: Path) -> bool:
    """Quality and calibration over sample-passes, one line per run, from the base on."""
    runs: dict[str, list[tuple[int, str]]] = {}
    for m in t.models:
        if found := sample_passes(t.first[t.benchmarks[0], m]):
            runs.setdefault(found[0], [(0, t.base)]).append((found[1], m))
    if max(map(len, runs.values()), default=0) < 3:
        return False
    fig, axes = plt.subplots(len(t.benchmarks), 2, squeeze=False, layout="constrained",
                             figsize=(9, 3 * len(t.benchmarks)))  # fmt: skip
    for b, (left, right) in zip(t.benchmarks, axes, strict=True):
        for axis, name, of in ((left, "quality", lambda c: qualities(c.j)),
                               (right, "calibration", lambda c: c.calibration)):  # fmt: skip
            for run, points in runs.items():
                found = [
                    t.mean(b, m, lambda c, of=of: (of(c), c.prompts)) for _, m in sorted(points)
                ]
                _line(axis, [x for x, _ in sorted(points)], found, run)
            axis.set_xlabel("sample-passes")
            axis.set_ylabel(f"{name}, {b}")
    axes[0][0].legend()
    return _save(fig, path)


def training(runs: Sequence[Path], path: Path) -> bool:
    """Means over each RL step of the runs' own rollouts; a line at the end of each cycle."""
    names = ("quality", "calibration", "well_formed", "response_tokens")
    found = {}
    for run in runs:
        found[run.name] = [x for x in RunFolder(run).metrics() if x["phase"] == "rl"]
    if not any(found.values()):
        return False
    fig, axes = plt.subplots(1, len(names), figsize=(15, 3.2), layout="constrained")
    for name, axis in zip(names, axes, strict=True):
        for run, lines in found.items():
            known = [(x["sample_passes"], x[name]) for x in lines if x[name] is not None]
            axis.plot(*zip(*known, strict=True), label=run)
        ends = {x["cycle"]: x["sample_passes"] for x in next(iter(found.values()))}
        for end in list(ends.values())[:-1]:
            axis.axvline(end, color="gray", linewidth=0.4)
        axis.set_xlabel("sample-passes")
        axis.set_ylabel(name.replace("_", " "))
    axes[0].legend()
    return _save(fig, path)


def figure_3(t: Tables, path: Path) -> bool:
    """Calibration by attribute (Figure 3)."""
    fig, axes = plt.subplots(1, len(t.benchmarks), squeeze=False, layout="constrained", sharey=True,
                             figsize=(5 * len(t.benchmarks), 3.2))  # fmt: skip
    width = 0.8 / len(t.models)
    for b, axis in zip(t.benchmarks, axes[0], strict=True):
        for k, m in enumerate(t.models):
            found = [
                t.mean(b, m, lambda c, a=a: (
                    calibrations(c.s[:, a : a + 1], c.j[:, a : a + 1], c.gamma), c.prompts))
                for a in range(5)
            ]  # fmt: skip
            at = [a + k * width for a in range(5)]
            axis.bar(at, [x.mean or 0 for x in found], width, yerr=_bars(found), label=m)
        axis.set_xticks([a + 0.4 - width / 2 for a in range(5)], ATTRIBUTES, rotation=20)
        axis.set_title(b)
    axes[0][0].set_ylabel("calibration")
    axes[0][0].legend()
    return _save(fig, path)


def figure_4(t: Tables, path: Path) -> bool:
    """Calibration of an attribute's score by the judge's score, all attributes (Figure 4)."""
    fig, axes = plt.subplots(1, len(t.benchmarks), squeeze=False, layout="constrained", sharey=True,
                             figsize=(5 * len(t.benchmarks), 3.2))  # fmt: skip
    for b, axis in zip(t.benchmarks, axes[0], strict=True):
        for m in t.models:
            found = [over(t.evaluations, lambda e, d=d, m=m: by_judge_score(e[b, m], d))  # noqa: B023
                     for d in range(10)]  # fmt: skip
            known = [d for d in range(10) if found[d].mean is not None]
            _line(axis, known, [found[d] for d in known], m)
        axis.set_xlabel("judge's score")
        axis.set_title(b)
    axes[0][0].set_ylabel("calibration")
    axes[0][0].legend()
    return _save(fig, path)


def by_judge_score(c: Cell, score: int) -> tuple[list[float], list[str]]:
    """Calibration of every attribute that the judge gave this score, and its prompt."""
    i, a = np.nonzero(c.j == score)
    return list(calibrations(c.s[i, a][:, None], c.j[i, a][:, None], c.gamma)), [
        c.prompts[k] for k in i
    ]


def _bars(found: Sequence[intervals.Interval]) -> list[list[float]]:
    """Distances of the interval's ends from the mean."""
    return [
        [abs((x.mean or 0) - (end if end is not None else x.mean or 0)) for x, end in
         ((x, getattr(x, side)) for x in found)]
        for side in ("low", "high")
    ]  # fmt: skip


def _line(axis, at: Sequence[float], found: Sequence[intervals.Interval], label: str) -> None:
    axis.errorbar(at, [x.mean for x in found], _bars(found), marker="o", markersize=3, capsize=2,
                  label=label)  # fmt: skip


def _save(fig, path: Path) -> bool:
    for axis in fig.axes:
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True


# --------------------------------------------------------------------------------------------------
# The page


def answers(cells: Sequence[Cell], limit: int) -> list[dict]:
    """What the page shows, biggest disagreements first within each cell; malformed ones last."""
    found = []
    for c in cells:
        trained = cycle_of(c)
        cycles = {r.cycle for r in c.rollouts}
        for cycle in sorted(cycles):
            own = [r for r in c.rollouts if r.cycle == cycle]
            own.sort(key=lambda r: -_distance(r))
            most = max(1, limit // len(cycles)) if limit else None
            malformed = [r for r in own if r.judge_scores is None]
            for r in (*[r for r in own if r.judge_scores is not None][:most], *malformed[:most]):
                found.append({
                    "benchmark": c.benchmark, "model": c.model, "rollout": r,
                    "cycle": trained if trained is not None else cycle, "distance": _distance(r),
                    "scores": list(zip(ATTRIBUTES, r.self_scores or [None] * 5,
                                       r.judge_scores or [None] * 5, strict=True)),
                    "prompt": c.questions.get(r.prompt_id, r.prompt_id),
                })  # fmt: skip
    return found


def cycle_of(c: Cell) -> int | None:
    """The cycle after which a model was exported, None for other models and for training itself."""
    found = re.fullmatch(r"cycle_(\d+).*", Path(c.config["model"]).name)
    return int(found[1]) if found and c.benchmark != TRAINING else None


def _distance(r) -> float:
    if r.judge_scores is None:
        return -1.0
    return float(np.abs(np.subtract(r.self_scores, r.judge_scores)).sum())


def page(
    title: str, judge: str, tables: Sequence[Table], figures: dict[str, Path], shown: Sequence[dict]
) -> str:
    """report.html. Text of models and prompts is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "evaluation"), autoescape=True
    )
    pictures = {
        name: base64.b64encode(path.read_bytes()).decode() for name, path in figures.items()
    }
    choices = {key: list(dict.fromkeys(a[key] for a in shown)) for key in ("benchmark", "model")}
    return environment.get_template("page.html").render(
        title=title, judge=judge, tables=tables, figures=pictures, answers=shown,
        attributes=ATTRIBUTES, choices=choices,
    )  # fmt: skip


FIGURES = {
    "Figure 2: quality and calibration over sample-passes": ("figure2.png", figure_2),
    "Figure 3: calibration by attribute": ("figure3.png", figure_3),
    "Figure 4: calibration by the judge's score": ("figure4.png", figure_4),
}


def run(command: Command) -> str:
    """Write everything; the tables as text. Raises ValueError."""
    if not (command.results or command.runs):
        raise ValueError("no results are given, such as results/NAME of evaluate.py, nor --runs")
    runs = [load_run(folder) for folder in command.runs]
    cells, tables, judge, drawn = [*runs], [], "", []
    if command.results:
        t = Tables([load_evaluation(folder) for folder in command.results], command.models)
        others = by_settings([load_evaluation(folder) for folder in command.beside])
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # speed
            tables = [*t.all(), *control_tables.all_tables(t)]
            tables += further_tables.all_tables(t, others)
        cells, judge = [*(t.first[key] for key in t.each()), *cells], t.judge
        drawn = [(title, name, partial(draw, t)) for title, (name, draw) in FIGURES.items()]
    drawn.append(("Training", "training.png", partial(training, command.runs)))
    command.out.mkdir(parents=True, exist_ok=True)
    figures = {title: command.out / name for title, name, draw in drawn if draw(command.out / name)}
    text = "\n\n\n".join(table.text() for table in tables) + "\n"
    write_text(command.out / "tables.txt", text)
    write_text(command.out / "tables.md", "\n\n".join(x.markdown() for x in tables) + "\n")
    title = ", ".join(map(str, (*command.results, *command.runs)))
    shown = answers(cells, command.show)
    write_text(command.out / "report.html", page(title, judge, tables, figures, shown))
    return text


def by_settings(evaluations: Sequence[Evaluation]) -> list[Tables]:
    """Those of the same settings together, as runs with other seeds."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        key = repr(settings(next(iter(e.cells.values()))))
        groups.setdefault(key, []).append(e)
    return [Tables(group) for group in groups.values()]


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        print(run(command))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written to {command.out}/")


if __name__ == "__main__":
    main()
