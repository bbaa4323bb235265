"""Does the promised risk hold, how soon is drift found, and how often is there a false alarm?

    python bench/risk.py results/NAME/BENCHMARK/MODEL             # minutes on one core

Takes a real evaluation of evaluate.py as the world, so that the truth is known: prompts are drawn
from it with replacement, and the risk of a threshold is its risk on all of its answers.

promise   A threshold is chosen (risk.choose) on as many prompts as the evaluation has. The targets
          are hard ones, the world's own risk at three coverages: a threshold that sends a little
          more breaks it. Then the same by splits: chosen on one half of the prompts and measured on
          the other. There the measured risk has chance errors of its own on both sides, so that
          fewer than 95 % would show nothing against the promise.
false     Streams of answers drawn like the reference.
drift     Streams that drift after `quiet` answers: a judge whose scores are lower by one, or by
          two; prompts of one kind only, of which the reference has none. A kind is the prompt's
          category, or its first word where the file has no categories.

docs/monitoring.md has what was measured.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from statsmodels.stats.proportion import proportion_confint

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation import drift, risk  # noqa: E402
from evaluation.predictors import calibrations, groups, qualities  # noqa: E402
from evaluation.results import Cell, load_one_cell  # noqa: E402
from storage.options import Count, in_range  # noqa: E402
from storage.program import commit  # noqa: E402

COVERAGES = (0.25, 0.5, 0.75)
STRICTER = (1, 2)  # points
KIND = 0.05  # of the prompts at least, for a kind to be one of the drifts


@dataclass(frozen=True)
class Command:
    """The promises of thresholds and alarm, on an evaluation."""

    results: tyro.conf.Positional[Path]
    """results/NAME/BENCHMARK/MODEL of evaluate.py."""
    splits: Count = 1000
    """Draws, and splits, for each promise."""
    streams: Count = 200
    """Streams without drift; half as many with each drift."""
    length: Count = 1000
    """Answers in a stream without drift."""
    reference: Count = 500
    """Answers with which a stream is compared."""
    quiet: Count = 100
    """Answers before a drift begins."""
    drifted: Count = 400
    """Answers after it has begun."""
    delta: in_range(float, "(0, 1)") = 0.05
    """Probability that a promise is broken."""
    false_alarms: in_range(float, "(0, 1)") = 0.05
    """Probability of an alarm without drift."""
    bad_below: in_range(float, "(0, 1]") = 0.5
    """Answers of lower quality are bad."""
    seed: in_range(int, "[0, 4294967000]") = 0
    """Seed of all draws."""


def share(found: int, of: int) -> str:
    """With its exact 95 % interval."""
    low, high = proportion_confint(found, of, method="beta")
    return f"{found / of:.3f} [{low:.3f}, {high:.3f}]"


# --------------------------------------------------------------------------------------------------
# The promised risk


def targets(conf: np.ndarray, loss: np.ndarray) -> list[float]:
    """The world's own mean loss at the coverages of the well-formed answers, as far as it is
    neither 0 nor 1. At the thresholds of the grid, so that one of them just keeps it."""
    levels = [risk.GRID[risk.GRID <= np.nanquantile(conf, 1 - c)].max() for c in COVERAGES]
    found = {float(loss[conf >= level].mean()) for level in levels}
    return sorted(x for x in found if 0 < x < 1)


def promises(command: Command, cell: Cell) -> None:
    conf, quality, prompts, scores = risk.answers(cell)
    indices = groups(prompts)
    rng = np.random.default_rng(command.seed)
    print(f"\nconfidence: quality of the {scores} scores")
    print(f"{'promised':<34}  {'draws: held':<22} {'sends':>6}  {'splits: held':<22} none chosen")
    for measure in ("bad", "quality"):
        loss, _ = risk.losses(quality, 0.5, measure, command.bad_below)
        for most in targets(conf, loss):
            target = 1 - most if measure == "quality" else most
            held, split_held, none, sent = 0, 0, 0, []

            def chosen(drawn: list[np.ndarray], measure=measure, target=target) -> float | None:
                k = np.concatenate(drawn)
                anew = np.repeat(
                    np.arange(len(drawn)), list(map(len, drawn))
                )  # one drawn twice is two
                found = risk.choose(
                    conf[k], quality[k], anew, target, measure, command.delta,
                    command.bad_below, int(rng.integers(2**32 - 1)),
                )  # fmt: skip
                return found and found.value

            def keeps(threshold: float | None, k: np.ndarray, loss=loss, most=most) -> bool:
                """Whether what is sent of these answers keeps the promise; nothing sent does."""
                sends = k[conf[k] >= (2 if threshold is None else threshold)]
                return not len(sends) or loss[sends].mean() <= most + 1e-12

            for _ in range(command.splits):
                threshold = chosen(
                    [indices[i] for i in rng.integers(len(indices), size=len(indices))]
                )
                held += keeps(threshold, np.arange(len(conf)))
                none += threshold is None
                sent.append(0.0 if threshold is None else (conf >= threshold).mean())
                order = rng.permutation(len(indices))
                one, other = np.split(order, [len(order) // 2])
                threshold = chosen([indices[i] for i in one])
                split_held += keeps(threshold, np.concatenate([indices[i] for i in other]))
            sign = "at least" if measure == "quality" else "at most"
            print(
                f"{measure + ' ' + sign:<17} {target:.4f} at {1 - command.delta:.0%}    "
                f"{share(held, command.splits)}  {np.mean(sent):6.1%}  "
                f"{share(split_held, command.splits)}  {none / command.splits:.1%}",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------
# The alarm


def first(command: Command, before: drift.Watched, after: drift.Watched, seed: int) -> int | None:
    """Number of the answer at which the alarm is raised."""
    found = drift.alarms(before, after, command.false_alarms, seed)
    return min((a.at for a in found.values() if a.at), default=None)


def figures(cell: Cell, k: np.ndarray, lower: int = 0) -> drift.Watched:
    """Of these answers, by a judge whose scores are lower by so much."""
    j = np.clip(cell.j[k] - lower, 0, 9)
    return {"calibration": calibrations(cell.s[k], j), "quality": qualities(j)}


def kinds(cell: Cell) -> np.ndarray:
    """(N,) of each answer's prompt."""
    of = {
        p.id: p.category or next(iter(p.conversation[-1]["content"].split()), "") for p in cell.data
    }
    return np.array([of.get(p, "") for p in cell.prompts], object)


def together(a: drift.Watched, b: drift.Watched) -> drift.Watched:
    return {name: np.concatenate([a[name], b[name]]) for name in a}


def false(command: Command, cell: Cell) -> None:
    rng = np.random.default_rng(command.seed)
    n, raised = len(cell.valid), 0
    for k in range(command.streams):
        before = figures(cell, rng.integers(n, size=command.reference))
        after = figures(cell, rng.integers(n, size=command.length))
        raised += first(command, before, after, k) is not None
    print(
        f"\nfalse alarms, {command.streams} streams of {command.length:,} answers without drift: "
        f"{share(raised, command.streams)}; stated: {command.false_alarms:g}"
    )


def drifts(command: Command, cell: Cell) -> None:
    rng, streams = np.random.default_rng(command.seed), max(1, command.streams // 2)
    everything = np.arange(len(cell.valid))

    def stricter(lower: int) -> Callable:
        def make() -> tuple[drift.Watched, drift.Watched, drift.Watched]:
            return (
                figures(cell, rng.choice(everything, command.reference)),
                figures(cell, rng.choice(everything, command.quiet)),
                figures(cell, rng.choice(everything, command.drifted), lower),
            )

        return make

    def only(kind: str) -> Callable:
        of = kinds(cell) == kind

        def make() -> tuple[drift.Watched, drift.Watched, drift.Watched]:
            others, these = np.flatnonzero(~of), np.flatnonzero(of)
            return (
                figures(cell, rng.choice(others, command.reference)),
                figures(cell, rng.choice(others, command.quiet)),
                figures(cell, rng.choice(these, command.drifted)),
            )

        return make

    makers = {f"judge stricter by {x}": stricter(x) for x in STRICTER}
    common = {k: n for k, n in Counter(kinds(cell)).items() if k and n >= KIND * len(everything)}
    makers |= {f"only {kind!r}": only(kind) for kind in sorted(common)} if len(common) > 1 else {}
    print(f"\n{'drift':<26} {'calibration':<15} {'quality':<15} found within {command.drifted} "
          f"{'':<9} half within  nine tenths within")  # fmt: skip
    for name, make in makers.items():
        delays, early, means = [], 0, []
        for k in range(streams):
            before, quiet, after = make()
            at = first(command, before, together(quiet, after), k)
            early += at is not None and at <= command.quiet
            delays.append(np.inf if at is None or at <= command.quiet else at - command.quiet)
            means.append([x[f].mean() for f in before for x in (before, after)])
        c1, c2, q1, q2 = np.mean(means, axis=0)
        found = int(np.isfinite(delays).sum())
        half, most = (np.quantile(delays, q, method="higher") for q in (0.5, 0.9))
        print(
            f"{name:<26} {c1:.3f} to {c2:.3f}  {q1:.3f} to {q2:.3f}  {share(found, streams)}  "
            f"{half:>11.0f}  {most:>18.0f}" + (f"  ({early} before it)" if early else ""),
            flush=True,
        )


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    cell = load_one_cell(command.results)
    name, changed = commit()
    print(
        f"{command.results} (commit {name and name[:7]}{', changed' if changed else ''}): "
        f"{len(cell.valid):,} judged answers to {len(set(cell.prompts)):,} prompts, judge "
        f"{cell.config['judge']}; quality {cell.quality.mean():.3f}, own "
        f"{cell.own_quality.mean():.3f}, calibration {cell.calibration.mean():.3f}"
    )  # fmt: skip
    promises(command, cell)
    false(command, cell)
    drifts(command, cell)


if __name__ == "__main__":
    main()
