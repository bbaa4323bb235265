"""Figures 2 to 4 and the course of training. Each function draws one PNG file and returns the same
as SVG for the page, None where there is nothing to draw.

On the page each panel is an SVG of its own, so that panels stand below each other on a narrow
screen. Text and axes have the page's text colour. The colours of the lines have a contrast of 3 at
least with white and with the page's dark background."""

import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from evaluation.error_tables import judged_where
from evaluation.intervals import Interval
from evaluation.paper_tables import calibration, quality
from evaluation.results import Cell
from evaluation.table import Results, Values, mean
from prompts import ATTRIBUTES
from storage.files import FileError
from storage.run_folder import RunFolder, metrics_until

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8c7a00", "#808080")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    title: str
    legend: dict[str, str]  # label -> colour
    panels: list[str]  # SVG


# --------------------------------------------------------------------------------------------------
# Figure 2


class Costs(NamedTuple):
    """What a checkpoint had cost by then."""

    sample_passes: int  # prompts times the passes over them: the paper's axis
    judge_calls: int  # judged rollouts
    optimiser_steps: int  # of both phases
    unique_prompts: int


COSTS = ("sample-passes", "judge calls", "optimiser steps", "unique prompts")


def costs(checkpoints: Sequence[Path]) -> dict[Path, Costs]:
    """What these checkpoints of one run had cost; {} if its metrics are not on file."""
    run = RunFolder(checkpoints[0].parent.parent)
    if not run.metrics():
        return {}
    window = len(run.window_ids())
    judged = Counter((r.cycle, r.step) for r in run.all_rollouts() if r.judge_scores is not None)
    table = {}
    for checkpoint in checkpoints:
        lines = metrics_until(checkpoint)
        rl = [line for line in lines if line["phase"] == "rl"]
        sft = [line for line in lines if line["phase"] == "sft"]
        passes = rl[-1]["sample_passes"]
        table[checkpoint] = Costs(
            sample_passes=passes,
            judge_calls=sum(judged[line["cycle"], line["step"]] for line in rl),
            optimiser_steps=len(rl) + len(sft),
            unique_prompts=min(passes, window),
        )
    return table


def costs_of_models(results: Results) -> dict[str, dict[str, Costs]]:
    """run -> model -> costs, of all models on file that are a run's checkpoint
    runs/NAME/checkpoints/cycle_NN..., in the order of their costs."""
    runs: dict[Path, dict[Path, str]] = {}
    for model in results.on_file:
        path = Path(results.cells(results.benchmarks[0], model)[0].config["model"])
        if path.parent.name == "checkpoints":
            runs.setdefault(path.parent.parent, {})[path] = model
    table = {}
    for run, models in runs.items():
        by_cost = sorted((cost, models[path]) for path, cost in costs(list(models)).items())
        if by_cost:
            table[run.name] = {model: cost for cost, model in by_cost}
    return table


def figure_2(results: Results, path: Path) -> Drawn | None:
    """Quality and calibration over sample-passes (the paper's Figure 2) and over three other costs;
    one line per run, from the base on if that is what it was trained from."""
    runs = costs_of_models(results)
    if max(map(len, runs.values()), default=0) < 2:
        return None
    rows = [
        (benchmark, name, mean(values))
        for benchmark in results.benchmarks
        for name, values in (("quality", quality), ("calibration", calibration))
    ]
    fig, axes = plt.subplots(len(rows), 4, sharey="row", layout="constrained",
                             figsize=(14, 3 * len(rows)))  # fmt: skip
    looks = looks_of_runs(results, runs)
    # A run is called as its last model is in the tables, if it is there.
    names = {run: next((m for m in by_model if m in results.models), run)
             for run, by_model in runs.items()}  # fmt: skip
    for (benchmark, name, column), row in zip(rows, axes, strict=True):
        for run, by_model in runs.items():
            if starts_at_base(results, next(iter(by_model))):
                by_model = {results.base: Costs(0, 0, 0, 0)} | by_model
            points = [column(results.cells(benchmark, model)) for model in by_model]
            for k, axis in enumerate(row):
                line(axis, [cost[k] for cost in by_model.values()], points, names[run], looks[run])
                axis.set(xlabel=COSTS[k], ylabel=f"{name}, {benchmark}")
    title = "Figure 2: quality and calibration over sample-passes and other costs"
    return save(fig, path, title, {names[run]: look for run, look in looks.items()})


def starts_at_base(results: Results, model: str) -> bool:
    """Whether the run of this checkpoint was trained from the base that stands in the tables; True
    for a run without config.json."""
    base, checkpoint = (
        Path(results.cells(results.benchmarks[0], m)[0].config["model"])
        for m in (results.base, model)
    )
    run = RunFolder(checkpoint.parent.parent)
    if not run.config_file.exists():
        return True
    return Path(run.config()["model"]).resolve() == base.resolve()


def looks_of_runs(results: Results | None, runs: Iterable[str]) -> dict[str, int]:
    """Number of each run's colour: that of its last model in the tables, so that it has one colour
    in all figures."""
    model_of = {}  # run -> number of its last model
    for k, model in enumerate(results.models if results else ()):
        path = Path(results.cells(results.benchmarks[0], model)[0].config["model"])
        model_of[path.parent.parent.name] = k
    return {run: model_of.get(run, k) for k, run in enumerate(runs)}


# --------------------------------------------------------------------------------------------------
# Figures 3 and 4


def figure_3(results: Results, path: Path) -> Drawn:
    """Calibration by attribute (Figure 3)."""
    fig, axes = _panels(results)
    width = 0.8 / len(results.models)
    columns = [mean(lambda c, a=a: (c.attribute_calibration[:, a], c.prompts)) for a in range(5)]
    for benchmark, axis in zip(results.benchmarks, axes, strict=True):
        for k, model in enumerate(results.models):
            bars = [column(results.cells(benchmark, model)) for column in columns]
            axis.bar(np.arange(5) + k * width, [x.mean or 0 for x in bars], width,
                     yerr=_error_bars(bars), label=model, color=colour(k))  # fmt: skip
        axis.set_xticks(np.arange(5) + 0.4 - width / 2, ATTRIBUTES, rotation=20)
    return save(fig, path, "Figure 3: calibration by attribute", _looks(results.models))


def figure_4(results: Results, path: Path) -> Drawn:
    """Calibration of an attribute's score by the judge's score, all attributes (Figure 4). The
    judge's score is noisy, and where it is extreme noise is part of the reason: even a model that
    knows the judge's own mean misses it there (regression to the mean). `reliability` asks the
    other way round."""
    fig, axes = _panels(results)
    columns = [mean(lambda c, score=score: by_judge_score(c, score)) for score in range(10)]
    for benchmark, axis in zip(results.benchmarks, axes, strict=True):
        for k, model in enumerate(results.models):
            points = [column(results.cells(benchmark, model)) for column in columns]
            given = [score for score in range(10) if points[score].mean is not None]
            line(axis, given, [points[score] for score in given], model, k)
        axis.set_xlabel("judge's score (extreme ones are partly noise: the judge's own mean\n"
                        "for an answer would fall off at both ends too)")  # fmt: skip
    return save(fig, path, "Figure 4: calibration by the judge's score", _looks(results.models))


def reliability(results: Results, path: Path) -> Drawn:
    """Reliability diagram: the judge's mean score by the model's, each attribute; on the diagonal a
    score means what it says."""
    n = len(results.benchmarks)
    fig, axes = plt.subplots(n, 5, squeeze=False, layout="constrained", sharex=True, sharey=True,
                             figsize=(14, 3 * n))  # fmt: skip
    for benchmark, row in zip(results.benchmarks, axes, strict=True):
        for a, (attribute, axis) in enumerate(zip(ATTRIBUTES, row, strict=True)):
            axis.plot([0, 9], [0, 9], color="gray", linewidth=0.6)
            axis.set(title=attribute, xlabel="model's score", ylabel=f"judge's mean, {benchmark}")
            for look, model in enumerate(results.models):
                cells = results.cells(benchmark, model)
                points = [mean(lambda c, a=a, k=k: judged_where(c, a, k))(cells) for k in range(10)]
                points = {k: x for k, x in enumerate(points) if isinstance(x, Interval) and x.n}
                line(axis, list(points), list(points.values()), model, look)
    title = "Reliability: the judge's mean by the model's score"
    return save(fig, path, title, _looks(results.models))


def by_judge_score(c: Cell, score: int) -> Values:
    """Calibration of every attribute to which the judge gave this score, and its prompt."""
    response, attribute = np.nonzero(c.j == score)
    return c.attribute_calibration[response, attribute], c.prompts[response]


# --------------------------------------------------------------------------------------------------
# Training


def training(runs: Sequence[Path], path: Path, results: Results | None = None) -> Drawn | None:
    """Means over each RL step of the runs' own rollouts; a line at the end of each cycle."""
    names = ("quality", "calibration", "well_formed", "response_tokens")
    steps = {run.name: [x for x in RunFolder(run).metrics() if x["phase"] == "rl"] for run in runs}
    for run in runs:
        if any(name not in x for x in steps[run.name] for name in ("sample_passes", *names)):
            raise FileError(
                f"{RunFolder(run).metrics_file}: a step lacks one of {', '.join(names)}; restore "
                "the file, or delete that line"
            )
    if not any(steps.values()):
        return None
    fig, axes = plt.subplots(1, len(names), figsize=(15, 3.2), layout="constrained")
    looks = looks_of_runs(results, steps)
    first = next(iter(steps.values()))
    ends = {x["cycle"]: x["sample_passes"] for x in first}
    for name, axis in zip(names, axes, strict=True):
        for run, lines in steps.items():
            points = [(x["sample_passes"], x[name]) for x in lines if x[name] is not None]
            axis.plot(*zip(*points, strict=True), label=run, color=colour(looks[run]))
        for end in list(ends.values())[:-1]:
            axis.axvline(end, color="gray", linewidth=0.4)
        axis.set_xlabel("sample-passes")
        axis.set_ylabel(name.replace("_", " "))
    return save(fig, path, "Training: means over each RL step's own rollouts", looks)


# --------------------------------------------------------------------------------------------------
# Differences


def forest(
    panels: Mapping[str, Mapping[str, tuple[Interval, bool]]], title: str, path: Path
) -> None:
    """Differences with their intervals, a panel for each figure and a line for each variant; filled
    where a difference was found. Written as `path`.png and .svg."""
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    fig, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained", sharey=True,
                             figsize=(2 + 2.6 * len(panels), 1.4 + 0.3 * len(labels)))  # fmt: skip
    for (name, panel), axis in zip(panels.items(), axes[0], strict=True):
        axis.axvline(0, color="gray", linewidth=0.8)
        for label, (x, found) in panel.items():
            if x.mean is not None:
                fill = colour(0) if found else "white"
                axis.errorbar(x.mean, labels.index(label), xerr=_error_bars([x]), capsize=2,
                              marker="o", markersize=5, markerfacecolor=fill,
                              color=colour(0))  # fmt: skip
        axis.set(xlabel=name, yticks=range(len(labels)), yticklabels=labels)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    fig.suptitle(title)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        for suffix in (".png", ".svg"):
            fig.savefig(path.with_name(path.name + suffix), dpi=130)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------
# Parts of figures


def _panels(results: Results) -> tuple[plt.Figure, np.ndarray]:
    """One panel for each benchmark, with calibration on the y axis."""
    n = len(results.benchmarks)
    fig, axes = plt.subplots(1, n, squeeze=False, layout="constrained", sharey=True,
                             figsize=(5 * n, 3.2))  # fmt: skip
    for benchmark, axis in zip(results.benchmarks, axes[0], strict=True):
        axis.set(title=benchmark, ylabel="calibration")
    return fig, axes[0]


def _error_bars(points: Sequence[Interval]) -> np.ndarray:
    """(2, points): distances of the interval's ends from the mean; 0 where there is none."""
    bars = [(x.mean - x.low, x.high - x.mean) if x.low is not None else (0, 0) for x in points]
    return np.abs(np.reshape(bars, (-1, 2))).T


def line(
    axis: plt.Axes, x: Sequence[float], points: Sequence[Interval], label: str, look: int
) -> None:
    """`look`: number of its colour and marker."""
    means = [np.nan if point.mean is None else point.mean for point in points]
    axis.errorbar(x, means, _error_bars(points), capsize=2, label=label, markersize=4,
                  color=colour(look), marker=MARKERS[look % len(MARKERS)])  # fmt: skip


def _looks(labels: Iterable[str]) -> dict[str, int]:
    return {label: k for k, label in enumerate(labels)}


def colour(look: int) -> str:
    return COLOURS[look % len(COLOURS)]


def save(fig: plt.Figure, path: Path, title: str, looks: Mapping[str, int]) -> Drawn:
    """`looks`: label -> number of its colour."""
    legend = fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper center",
                        ncols=len(looks), frameon=False)  # fmt: skip
    for axis in fig.axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelleft=True)
    fig.savefig(path, dpi=130)
    legend.remove()  # the page has its own
    fig.set_layout_engine("none")
    panels = [_svg(fig, axis, f"{path.stem}-{k}") for k, axis in enumerate(fig.axes)]
    plt.close(fig)
    return Drawn(title, {label: colour(look) for label, look in looks.items()}, panels)


def _svg(fig: plt.Figure, axis: plt.Axes, name: str) -> str:
    """One panel. `name` keeps the ids in it apart from those of other panels."""
    for other in fig.axes:
        other.set_visible(other is axis)
    box = axis.get_tightbbox().transformed(fig.dpi_scale_trans.inverted()).padded(0.05)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(file, format="svg", bbox_inches=box, transparent=True)
    svg = file.getvalue()
    size = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = svg[svg.index("<defs>") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z.]+_\d+"', "", svg)  # figure_1, axes_1: in every panel
    svg = svg.replace("#000000", "currentColor")
    label = f"{axis.get_ylabel()} over {axis.get_xlabel() or axis.get_title()}"
    return f'<svg {size} role="img" aria-label="{html.escape(label)}" fill="currentColor">{svg}'
