"""Tables, figures and a page from what evaluate.py left on file (Sec. 4); no model and no judge is
asked.

    python report.py results/paper --out report
    python report.py results/seed-0 results/seed-1 results/seed-2 --out report

Several folders are evaluations of runs with other seeds. Writes tables.txt, tables.md, figure2.png
to figure4.png where there is something to draw, and report.html: one file that needs no network,
with a browser over the answers (the first folder's).
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import sklearn
import tyro

import control_tables
import inference
from controls import calibrations, qualities
from files import write_text
from prompts import ATTRIBUTES
from results import Cell, Evaluation, load
from sources import metrics_until
from tables import Table, Tables, over

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Command:
    """Tables, figures and a page from result files."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Folders results/NAME of evaluate.py; several: runs with other seeds."""
    out: Path = Path("report")
    """Folder for tables, figures and page."""
    models: tuple[str, ...] = ()
    """Which models, the base first; none: all."""
    stronger: str = ""
    """Model whose answers others are escalated to; it is one of the models."""
    show: int = 200
    """Answers of each model to each benchmark on the page; 0: all."""


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


def _bars(found: Sequence[inference.Interval]) -> list[list[float]]:
    """Distances of the interval's ends from the mean."""
    return [
        [abs((x.mean or 0) - (end if end is not None else x.mean or 0)) for x, end in
         ((x, getattr(x, side)) for x in found)]
        for side in ("low", "high")
    ]  # fmt: skip


def _line(axis, at: Sequence[float], found: Sequence[inference.Interval], label: str) -> None:
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


def answers(e: Evaluation, t: Tables, limit: int) -> list[dict]:
    """What the page shows, biggest disagreements first within each cell; malformed ones last."""
    found = []
    for b, m in t.each():
        c = e[b, m]
        own = [(_distance(r), r) for r in c.rollouts]
        own.sort(key=lambda x: -x[0])
        for distance, r in own[: limit or None]:
            found.append({
                "benchmark": b, "model": m, "rollout": r, "distance": distance,
                "scores": list(zip(ATTRIBUTES, r.self_scores or [None] * 5,
                                   r.judge_scores or [None] * 5, strict=True)),
                "prompt": c.questions.get(r.prompt_id, r.prompt_id),
            })  # fmt: skip
    return found


def _distance(r) -> float:
    if r.judge_scores is None:
        return -1.0
    return float(np.abs(np.subtract(r.self_scores, r.judge_scores)).sum())


def page(t: Tables, tables: Sequence[Table], figures: dict[str, Path], limit: int) -> str:
    """report.html. Text of models and prompts is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    pictures = {
        title: base64.b64encode(path.read_bytes()).decode() for title, path in figures.items()
    }
    return environment.get_template("report_page.html").render(
        folders=[str(e.folder) for e in t.evaluations], judge=t.judge, tables=tables,
        figures=pictures, answers=answers(t.first, t, limit), attributes=ATTRIBUTES,
        benchmarks=t.benchmarks, models=t.models,
    )  # fmt: skip


FIGURES = {
    "Figure 2: quality and calibration over sample-passes": ("figure2.png", figure_2),
    "Figure 3: calibration by attribute": ("figure3.png", figure_3),
    "Figure 4: calibration by the judge's score": ("figure4.png", figure_4),
}


def run(command: Command) -> str:
    """Write everything; the tables as text. Raises ValueError."""
    if not command.results:
        raise ValueError("no results are given, such as results/NAME of evaluate.py")
    t = Tables([load(folder) for folder in command.results], command.models, command.stronger)
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # for speed
        tables = [*t.all(), *control_tables.all_tables(t)]
    command.out.mkdir(parents=True, exist_ok=True)
    figures = {
        title: command.out / name
        for title, (name, draw) in FIGURES.items()
        if draw(t, command.out / name)
    }
    text = "\n\n\n".join(table.text() for table in tables) + "\n"
    write_text(command.out / "tables.txt", text)
    write_text(command.out / "tables.md", "\n\n".join(x.markdown() for x in tables) + "\n")
    write_text(command.out / "report.html", page(t, tables, figures, command.show))
    return text


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        print(run(command))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written to {command.out}/")


if __name__ == "__main__":
    main()
