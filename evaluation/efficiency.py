"""Figure 2 in numbers (Sec. 4.4): the area under each run's curve, and what a run costs until it
reaches another run's end (the paper's 12x). None of these figures but the 12x is in the paper.

A curve goes through the base, at no cost, and the run's checkpoints; between them it is a straight
line. A run that never reaches the other's end is censored, not dropped: its ratio is below that of
the two runs' whole costs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evaluation import intervals
from evaluation.figures import COSTS, Costs, costs_of_models
from evaluation.intervals import Estimate, Interval
from evaluation.paper_tables import calibration, quality
from evaluation.results import Cell
from evaluation.table import Results, Table, Values, same_prompts

DRAWS = 2000  # of the bootstrap over prompts
METRICS = {"quality": quality, "calibration": calibration}
NO_COST = Costs(0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------
# Area under the curve


def heights(costs: Sequence[float], end: float) -> np.ndarray:
    """(checkpoints,) weights with which a curve's values make its mean height from 0 to `end`
    (trapezoids; `end` is not beyond the last cost)."""
    weights = np.zeros(len(costs))
    for k, (a, b) in enumerate(zip(costs[:-1], costs[1:], strict=True)):
        width = min(b, end) - a
        if width > 0:
            reached = width / (b - a)  # of this stretch; the value there is between its two ends
            weights[k] += width * (1 - reached / 2)
            weights[k + 1] += width * reached / 2
    return weights / end


def weighted(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted sum of figures."""
    prompts, pulls = intervals.align(parts)
    value = sum(w * p.value for w, p in zip(weights, parts, strict=True))
    return Estimate(float(value), np.asarray(weights) @ pulls, prompts)


def area(cells: Sequence[Cell], metric: str, costs: Sequence[float], end: float) -> Estimate | None:
    """cells: one evaluation's, the base first, then the checkpoints."""
    parts = [intervals.mean(*METRICS[metric](c)) for c in cells]
    return weighted(parts, heights(costs, end)) if all(parts) else None


# --------------------------------------------------------------------------------------------------
# Cost to parity


def first_reached(costs: Sequence[float], curves: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(B,) cost at which each curve first reaches its target, on straight lines between the
    checkpoints; inf where it does not. curves: (B, checkpoints), target: (B,)."""
    costs = np.asarray(costs, float)
    above = curves >= target[:, None]
    k = above.argmax(1)
    rows = np.arange(len(curves))
    left = np.maximum(k - 1, 0)
    low, high = curves[rows, left], curves[rows, k]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(k > 0, (target - low) / (high - low), 0.0)
    reached = costs[left] + share * (costs[k] - costs[left])
    return np.where(above.any(1), reached, np.inf)


def prompt_table(values: Values, prompts: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of the responses by prompt, in this order of prompts."""
    index = pd.Index(prompts).get_indexer(pd.Index(np.asarray(values[1], object)))
    sums = np.bincount(index, np.asarray(values[0], float), len(prompts))
    return sums, np.bincount(index, minlength=len(prompts)).astype(float)


def ratios(
    ours: Sequence[Cell], theirs: Cell, metric: str, costs: np.ndarray, theirs_costs: np.ndarray
) -> np.ndarray | None:
    """(1 + DRAWS, costs) their whole cost divided by ours to parity with their end: of all
    prompts, then of prompts drawn again (with replacement, the same for all curves); 0 where our
    curve does not get there. ours: base and checkpoints of one run; costs: (checkpoints, costs).
    None where a checkpoint has no answer that counts."""
    prompts = sorted(theirs.asked.union(*(c.asked for c in ours)))
    tables = [prompt_table(METRICS[metric](c), prompts) for c in (*ours, theirs)]
    if not all(counts.sum() for _, counts in tables):
        return None
    n = len(prompts)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
    weights = np.vstack([np.ones((1, n)), drawn])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.stack([(weights @ s) / (weights @ c) for s, c in tables], axis=1)
        return np.stack(
            [
                theirs_costs[k] / first_reached(costs[:, k], means[:, :-1], means[:, -1])
                for k in range(costs.shape[1])
            ],
            axis=1,
        )


def times(found: np.ndarray, least: float, enough: bool) -> str:
    """12.1 [9.8, 15.0], with "<" before what is censored. found: (1 + draws,); least: the ratio of
    the whole costs, below which nothing can be seen."""

    def text(x: float) -> str:
        if np.isinf(x):
            return "at once"
        return f"<{least:.2g}" if x == 0 else f"{x:.2g}" if x < 10 else f"{x:.0f}"

    if not enough:
        return f"{text(found[0])} [-]"
    low, high = np.quantile(found[1:], [0.025, 0.975], method="nearest")
    return f"{text(found[0])} [{text(low)}, {text(high)}]"


def over_runs(found: Sequence[float], least: float) -> str:
    """Of several evaluations: median and range; those that do not get there are in both."""
    never = sum(x == 0 for x in found)
    middle, low, high = (times(np.array([x]), least, False).removesuffix(" [-]")
                         for x in (np.median(found), min(found), max(found)))  # fmt: skip
    return f"{middle} ({low} to {high}; {never} of {len(found)} never)"


# --------------------------------------------------------------------------------------------------
# The table


def efficiency(results: Results) -> Table:
    runs = {run: {results.base: NO_COST} | models
            for run, models in costs_of_models(results).items()}  # fmt: skip
    rows = []
    for benchmark in results.benchmarks if len(runs) > 1 else ():
        for metric in METRICS:
            for run, models in runs.items():
                for other, others in runs.items():
                    if run != other:
                        rows.append(
                            {"benchmark": benchmark, "metric": metric, "run": run}
                            | _row(results, benchmark, metric, models, other, others)
                        )
    return Table.of(
        "Figure 2 in numbers: mean height, and cost to parity",
        "Mean height: of the run's curve over sample-passes, up to where the shorter run ends. "
        "Then how many times what a run costs to reach the other run's end fits into the other "
        "run's whole cost (the paper: about 12 in sample-passes); checkpoints are joined by "
        "straight lines, 95 % by the bootstrap over prompts; < where it is not reached by the "
        "run's end, at once where the base is there already. With several evaluations: the median, "
        "the range, and how many never get there. Unique prompts: the ratio of the two settings "
        "(the paper: about 31), not a result.",
        rows,
    )


def _row(
    results: Results, benchmark: str, metric: str, models: dict[str, Costs], other: str,
    others: dict[str, Costs],
) -> dict:  # fmt: skip
    ours, end = np.array(list(models.values()), float), np.array(list(others.values()), float)[-1]
    shared = min(ours[-1, 0], end[0])
    both = results.together(benchmark, [*models, list(others)[-1]])
    if not both:
        return {"mean height": None, "reaches the end of": other}
    groups, targets = [cells[:-1] for cells in both], [cells[-1] for cells in both]
    areas = [area(cells, metric, ours[:, 0], shared) for cells in groups]
    same = same_prompts([cells[0] for cells in groups])
    height = intervals.interval(areas, same) if all(areas) else None
    least = end / ours[-1]
    found = [ratios(cells, target, metric, ours[:, :3], end)
             for cells, target in zip(groups, targets, strict=True)]  # fmt: skip
    row: dict[str, Interval | str | None] = {"mean height": height, "reaches the end of": other}
    for k, name in enumerate(COSTS[:3]):
        if any(x is None for x in found):
            row[name] = None
        elif len(found) == 1:
            enough = len(groups[0][0].asked) >= intervals.FEWEST
            row[name] = times(found[0][:, k], least[k], enough)
        else:
            row[name] = over_runs([x[0, k] for x in found], least[k])
    return row | {COSTS[3]: f"{least[3]:.2g}"}


TABLES = (efficiency,)
