"""Figures about the use of a trained model: coverage against risk, and the monitor's control chart
and evidence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.figures import Drawn, colour, line, plt, save
from evaluation.intervals import Interval


def coverage_risk(points: Sequence, chosen: float | None, wish, path: Path) -> Drawn:
    """Mean quality and share of bad answers of what is sent, over the share that is sent. points:
    risk.Point; chosen: the coverage of the chosen threshold; wish: risk.Wish."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    panels = {"quality": "mean quality", "bad": f"share with quality below {wish.bad_below:g}"}
    for (name, label), axis in zip(panels.items(), axes, strict=True):
        line(axis, [p.coverage for p in points], [getattr(p, name) for p in points], "sent", 0)
        if name == wish.measure:
            axis.axhline(wish.target, color=colour(1), linewidth=0.8)
        if chosen is not None:
            axis.axvline(chosen, color=colour(2), linewidth=0.8, label="chosen threshold")
        axis.set(xlabel="coverage: share of all answers that is sent", ylabel=label)
    axes[0].plot([], [], color=colour(1), linewidth=0.8, label="target")  # for the legend
    looks = {"sent": 0, "target": 1} | ({} if chosen is None else {"chosen threshold": 2})
    return save(fig, path, "Coverage and risk", looks)


def control_chart(
    batches: Mapping[str, Sequence[tuple[int, Interval]]],
    reference: Mapping[str, tuple[float, float]],
    batch: int,
    path: Path,
) -> Drawn:
    """Shewhart's chart of means. batches: figure -> (number of its last answer, mean) of each;
    reference: figure -> (mean, standard deviation) in the evaluation. The limits are three standard
    errors of a full batch."""
    fig, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 3.2), squeeze=False,
                             layout="constrained")  # fmt: skip
    for (name, points), axis in zip(batches.items(), axes[0], strict=True):
        mean, sd = reference[name]
        line(axis, [k for k, _ in points], [x for _, x in points], "batches", 0)
        axis.axhline(mean, color=colour(2), linewidth=0.8, label="evaluation")
        for k, sign in enumerate((-1, 1)):
            axis.axhline(mean + sign * 3 * sd / np.sqrt(batch), color=colour(1), linewidth=0.8,
                         linestyle="--", label="3 standard errors" if k == 0 else None)  # fmt: skip
        axis.set(xlabel="judged answers", ylabel=f"{name}, mean of {batch}")
    looks = {"batches": 0, "evaluation": 2, "3 standard errors": 1}
    return save(fig, path, "Control chart", looks)


def evidence_chart(evidence: Mapping[str, np.ndarray], level: float, path: Path) -> Drawn:
    """The evidence for drift (drift.evidence) over judged answers, and where the alarm is."""
    fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for k, (name, values) in enumerate(evidence.items()):
        axis.plot(np.arange(1, len(values) + 1), values, color=colour(k), label=name)
    axis.axhline(1 / level, color=colour(len(evidence)), linestyle="--", label="alarm")
    axis.set(xlabel="judged answers", ylabel="evidence for drift", yscale="log")
    return save(fig, path, "Evidence", {name: k for k, name in enumerate([*evidence, "alarm"])})
