"""Figures 2 to 4 and the course of training. Each function draws one file and says whether there
was something to draw."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from evaluation.intervals import Interval
from evaluation.paper_tables import calibration, quality
from evaluation.results import Cell
from evaluation.table import Results, Values, mean
from prompts import ATTRIBUTES
from storage.files import FileError
from storage.run_folder import RunFolder, metrics_until

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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


def figure_2(results: Results, path: Path) -> bool:
    """Quality and calibration over sample-passes (the paper's Figure 2) and over three other costs;
    one line per run, from the base on."""
    runs = costs_of_models(results)
    if max(map(len, runs.values()), default=0) < 2:
        return False
    rows = [
        (benchmark, name, mean(values))
        for benchmark in results.benchmarks
        for name, values in (("quality", quality), ("calibration", calibration))
    ]
    fig, axes = plt.subplots(len(rows), 4, sharey="row", layout="constrained",
                             figsize=(14, 3 * len(rows)))  # fmt: skip
    for (benchmark, name, column), row in zip(rows, axes, strict=True):
        row[0].set_ylabel(f"{name}, {benchmark}")
        for run, by_model in runs.items():
            by_model = {results.base: Costs(0, 0, 0, 0)} | by_model
            points = [column(results.cells(benchmark, model)) for model in by_model]
            for k, axis in enumerate(row):
                _line(axis, [cost[k] for cost in by_model.values()], points, run)
                axis.set_xlabel(COSTS[k])
    axes[0][0].legend()
    return _save(fig, path)


# --------------------------------------------------------------------------------------------------
# Figures 3 and 4


def figure_3(results: Results, path: Path) -> bool:
    """Calibration by attribute (Figure 3)."""
    fig, axes = _panels(results)
    width = 0.8 / len(results.models)
    columns = [mean(lambda c, a=a: (c.attribute_calibration[:, a], c.prompts)) for a in range(5)]
    for benchmark, axis in zip(results.benchmarks, axes, strict=True):
        for k, model in enumerate(results.models):
            bars = [column(results.cells(benchmark, model)) for column in columns]
            axis.bar(np.arange(5) + k * width, [x.mean or 0 for x in bars], width,
                     yerr=_error_bars(bars), label=model)  # fmt: skip
        axis.set_xticks(np.arange(5) + 0.4 - width / 2, ATTRIBUTES, rotation=20)
    axes[0].legend()
    return _save(fig, path)


def figure_4(results: Results, path: Path) -> bool:
    """Calibration of an attribute's score by the judge's score, all attributes (Figure 4)."""
    fig, axes = _panels(results)
    columns = [mean(lambda c, score=score: by_judge_score(c, score)) for score in range(10)]
    for benchmark, axis in zip(results.benchmarks, axes, strict=True):
        for model in results.models:
            points = [column(results.cells(benchmark, model)) for column in columns]
            given = [score for score in range(10) if points[score].mean is not None]
            _line(axis, given, [points[score] for score in given], model)
        axis.set_xlabel("judge's score")
    axes[0].legend()
    return _save(fig, path)


def by_judge_score(c: Cell, score: int) -> Values:
    """Calibration of every attribute to which the judge gave this score, and its prompt."""
    response, attribute = np.nonzero(c.j == score)
    return c.attribute_calibration[response, attribute], c.prompts[response]


# --------------------------------------------------------------------------------------------------
# Training


def training(runs: Sequence[Path], path: Path) -> bool:
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
        return False
    fig, axes = plt.subplots(1, len(names), figsize=(15, 3.2), layout="constrained")
    first = next(iter(steps.values()))
    ends = {x["cycle"]: x["sample_passes"] for x in first}
    for name, axis in zip(names, axes, strict=True):
        for run, lines in steps.items():
            points = [(x["sample_passes"], x[name]) for x in lines if x[name] is not None]
            axis.plot(*zip(*points, strict=True), label=run)
        for end in list(ends.values())[:-1]:
            axis.axvline(end, color="gray", linewidth=0.4)
        axis.set_xlabel("sample-passes")
        axis.set_ylabel(name.replace("_", " "))
    axes[0].legend()
    return _save(fig, path)


# --------------------------------------------------------------------------------------------------
# Parts of figures


def _panels(results: Results) -> tuple[plt.Figure, np.ndarray]:
    """One panel for each benchmark, with calibration on the y axis."""
    n = len(results.benchmarks)
    fig, axes = plt.subplots(1, n, squeeze=False, layout="constrained", sharey=True,
                             figsize=(5 * n, 3.2))  # fmt: skip
    for benchmark, axis in zip(results.benchmarks, axes[0], strict=True):
        axis.set_title(benchmark)
    axes[0][0].set_ylabel("calibration")
    return fig, axes[0]


def _error_bars(points: Sequence[Interval]) -> np.ndarray:
    """(2, points): distances of the interval's ends from the mean; 0 where there is none."""
    bars = [(x.mean - x.low, x.high - x.mean) if x.low is not None else (0, 0) for x in points]
    return np.abs(np.reshape(bars, (-1, 2))).T


def _line(axis: plt.Axes, x: Sequence[float], points: Sequence[Interval], label: str) -> None:
    means = [np.nan if point.mean is None else point.mean for point in points]
    axis.errorbar(x, means, _error_bars(points), marker="o", markersize=3, capsize=2, label=label)


def _save(fig: plt.Figure, path: Path) -> bool:
    for axis in fig.axes:
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True
