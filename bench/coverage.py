"""How often the report's 95 % intervals hold the truth, and how often its tests reject a true null.

    python bench/coverage.py                        # 2,000 replications: ten minutes on one core
    python bench/coverage.py --only mean            # one figure

Made-up evaluations whose truth is known go through the report's own functions
(evaluation/intervals.py, controls.py, metrics.py). Prompts and seeds are drawn anew in each
replication. Values have a part of the prompt (standard deviation 0.1), of the seed (as given), of
both together (0.05) and of the response (0.1); scores of 0-9 are rounded from such parts. docs/
evaluation.md has the table.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation import controls, intervals, metrics  # noqa: E402
from evaluation.intervals import Estimate, Scale  # noqa: E402

PROMPTS = (20, 60, 200, 800)
SAMPLES = 4
Rng = np.random.Generator


@dataclass(frozen=True)
class Command:
    """Coverage of the report's intervals, by simulation."""

    replications: int = 2000
    """Of each figure and design; a rank figure on 800 prompts has a quarter of them."""
    only: tuple[str, ...] = ()
    """Names of figures; none: all."""


def ids(n: int) -> np.ndarray:
    return np.arange(n).astype(str).astype(object)


# --------------------------------------------------------------------------------------------------
# Means, proportions and differences: (S, P, K) values -> one estimate for each seed


def values(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> np.ndarray:
    """(S, P, K) with mean 0. same: whether the seeds have their prompts in common."""
    prompt = rng.normal(0, 0.1, (1 if same else seeds, n, 1))
    seed = rng.normal(0, seed_sd, (seeds, 1, 1))
    both = rng.normal(0, 0.05, (seeds, n, 1))
    return prompt + seed + both + rng.normal(0, 0.1, (seeds, n, SAMPLES))


def means(x: np.ndarray) -> list[Estimate]:
    counts = np.full(x.shape[1], x.shape[2])
    return [intervals.ratio(row.sum(1), counts, ids(x.shape[1])) for row in x]


def mean_figure(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
    return means(values(rng, seeds, n, seed_sd, same))


def difference_figure(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
    """Two models that are equally good, on the same prompts; of ours about a fifth of the responses
    are malformed. Theirs, the base, answers once where the seeds share their prompts."""
    prompt = rng.normal(0, 0.1, (1 if same else seeds, n, 1))
    ours = prompt + values(rng, seeds, n, seed_sd, False)
    theirs = prompt + values(rng, 1 if same else seeds, n, 0.0, False) + np.zeros((seeds, 1, 1))
    kept = rng.random(ours.shape) < 0.8
    found = []
    for a, b, k in zip(ours, theirs, kept, strict=True):
        own = np.repeat(ids(n), SAMPLES).reshape(n, SAMPLES)
        found.append(intervals.difference((a[k], own[k]), (b.ravel(), own.ravel())))
    return found


def proportion_figure(
    rate: float,
) -> Callable[[Rng, int, int, float, bool], list[Estimate]]:
    """Well-formed responses, likelier for some prompts than for others."""

    def figure(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
        middle = norm.ppf(rate) * np.sqrt(1 + 0.5**2 + (5 * seed_sd) ** 2)
        prompt = rng.normal(0, 0.5, (1 if same else seeds, n, 1))
        seed = rng.normal(0, 5 * seed_sd, (seeds, 1, 1))
        return means((rng.normal(size=(seeds, n, SAMPLES)) < middle + prompt + seed) * 1.0)

    return figure


# --------------------------------------------------------------------------------------------------
# Figures of scores: one response per prompt, own and judge's scores of 0-9


def scores(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> tuple:
    """(S, P) own scores, judge's, and the stated probability that the judge is below 5."""
    prompt = rng.normal(0, 1.2, (1 if same else seeds, n))
    answer = rng.normal(0, 0.9, (seeds, n)) + rng.normal(0, 10 * seed_sd, (seeds, 1))
    quality = 5.5 + prompt + answer
    judge = np.clip(np.rint(quality + rng.normal(0, 0.8, (seeds, n))), 0, 9).astype(int)
    read = quality + rng.normal(0, 1.2, (seeds, n))
    own = np.clip(np.rint(read), 0, 9).astype(int)
    return own, judge, norm.cdf((4.5 - read) / 1.2)


def of_joint(figure: Callable, scale: Scale) -> Callable:
    def estimates(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
        own, judge, _ = scores(rng, seeds, n, seed_sd, same)
        return [
            intervals.of_prompt_sums(
                lambda x: scale.to(figure(x)), controls.joint(s, j), ids(n)
            )
            for s, j in zip(own, judge, strict=True)
        ]  # fmt: skip

    return estimates


def auroc(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
    _, judge, stated = scores(rng, seeds, n, seed_sd, same)
    areas = [controls.auroc(p, j < 5) for p, j in zip(stated, judge, strict=True)]
    return [
        intervals.of_weights(lambda w, area=area: intervals.LOGIT.to(area(w)), ids(n))
        for area in areas
    ]


def between_tau(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
    own, judge, _ = scores(rng, seeds, n, seed_sd, same)
    return [
        intervals.of_pairs(controls.tau_b, controls.pair_sums(s, j), ids(n))
        for s, j in zip(own, judge, strict=True)
    ]


def calibration_error(power: float) -> Callable:
    """power: 1 is a model that states true probabilities."""

    def figure(rng: Rng, seeds: int, n: int, seed_sd: float, same: bool) -> list[Estimate]:
        found = []
        for _ in range(seeds):
            true = rng.random(n)
            bins = controls.calibration_bins(true**power, rng.random(n) < true)
            found.append(
                intervals.of_prompt_sums(controls.calibration_error, bins, ids(n), debias=True)
            )
        return found

    return figure


@dataclass(frozen=True)
class Figure:
    estimates: Callable[[Rng, int, int, float, bool], list[Estimate]]
    truth: float | None = None  # None: by one evaluation of many prompts
    scale: Scale = intervals.PLAIN
    proportion: bool = False
    seed_sds: Sequence[float] = (0.01,)  # where there are several seeds
    ranks: bool = False  # takes time in the square of the prompts
    many: bool = False  # whether several seeds on 800 prompts are worth their time


FIGURES = {
    "mean": Figure(mean_figure, 0.0, seed_sds=(0.0, 0.01, 0.03), many=True),
    "paired difference": Figure(difference_figure, 0.0, seed_sds=(0.0, 0.01, 0.03)),
    "proportion 0.97": Figure(proportion_figure(0.97), 0.97, proportion=True, many=True),
    "proportion 0.6": Figure(proportion_figure(0.6), 0.6, proportion=True),
    "correlation": Figure(of_joint(controls.pearson, intervals.FISHER), scale=intervals.FISHER),
    "Spearman": Figure(of_joint(controls.spearman, intervals.FISHER), scale=intervals.FISHER),
    "kappa": Figure(of_joint(controls.kappa, intervals.FISHER), scale=intervals.FISHER),
    "slope": Figure(of_joint(controls.slope, intervals.PLAIN)),
    "spread ratio": Figure(of_joint(controls.spread_ratio, intervals.LOG), scale=intervals.LOG),
    "AUROC": Figure(auroc, scale=intervals.LOGIT, ranks=True),
    "tau between prompts": Figure(between_tau, ranks=True),
    "calibration error, calibrated": Figure(calibration_error(1.0), 0.0, seed_sds=()),
    "calibration error, not": Figure(calibration_error(2.0), seed_sds=()),
}
DESIGNS = (("one evaluation", 1, True), ("3 seeds, same prompts", 3, True),
           ("5 seeds, same prompts", 5, True), ("3 seeds, own prompts", 3, False),
           ("5 seeds, own prompts", 5, False))  # fmt: skip


def by_students(estimates: Sequence[Estimate]) -> intervals.Interval:
    """What was done before: Student's t over seeds, for the same prompts too."""
    return intervals.interval(estimates, same_prompts=False)


# --------------------------------------------------------------------------------------------------
# The run


def truth(figure: Figure) -> float:
    """On the figure's scale, back-transformed. Of 40,000 prompts; rank figures of 50 x 1,500."""
    rng = np.random.default_rng(1)
    repeats, n = (50, 1500) if figure.ranks else (1, 40_000)
    found = [figure.estimates(rng, 1, n, 0.0, True)[0].value for _ in range(repeats)]
    return float(figure.scale.back(np.mean(found)))


def coverage(
    figure: Figure, known: float, seeds: int, n: int, seed_sd: float, same: bool, times: int,
    interval: Callable[..., intervals.Interval] = intervals.interval,
) -> tuple[float, float, float]:  # fmt: skip
    """(share of intervals that hold the truth, their median width, share without an interval)."""
    rng = np.random.default_rng([n, seeds, round(1000 * seed_sd), same])
    held, widths = 0, []
    for _ in range(times):
        estimates = figure.estimates(rng, seeds, n, seed_sd, same)
        if None in estimates:
            continue
        if interval is by_students:
            x = by_students(estimates)
        else:
            x = interval(estimates, same, figure.scale, figure.proportion)
        if x.low is not None and np.isfinite([x.low, x.high]).all():
            held += x.low <= known <= x.high
            widths.append(x.high - x.low)
    if not widths:
        return np.nan, np.nan, 1.0
    return held / len(widths), float(np.median(widths)), 1 - len(widths) / times


def ceilings(times: int) -> None:
    """The extrapolated ceiling against the agreement of judges whose medians are known."""
    rng = np.random.default_rng(0)
    print("\njudge's noise (sd)  its own medians  leave-one-out of 5  ceiling from 5")
    for noise in (0.4, 0.7, 1.0, 1.5, 2.2):
        middle = rng.uniform(1, 8.5, (times // 4, 1, 5))

        def judged(k: int, middle=middle, noise=noise) -> np.ndarray:
            drawn = middle + noise * rng.normal(size=(len(middle), k, 5))
            return np.clip(np.rint(drawn), 0, 9).astype(int)

        medians = np.median(judged(201), axis=1)[:, None]
        known = ((1 - np.abs(judged(40) - medians).mean(-1) / 9) ** 2).mean()
        table = metrics.repeated_agreement(ids(len(middle)), judged(5).tolist())
        print(f"{noise:<18}  {known:<15.3f}  {table['median of the others'].mean:<18.3f}  "
              f"{table['ceiling'].text()}")  # fmt: skip


def main(command: Command) -> None:
    print("coverage (median width) of 95 % intervals; * outside 0.93 to 0.97\n")
    print(f"{'figure':<30}{'design':<24}{'seed sd':<9}"
          + "".join(f"{f'{n} prompts':<17}" for n in PROMPTS))  # fmt: skip
    for name, figure in FIGURES.items():
        if command.only and name not in command.only:
            continue
        known = truth(figure) if figure.truth is None else figure.truth
        ways = [(design, seeds, same, intervals.interval) for design, seeds, same in DESIGNS]
        if name == "mean":
            ways += [(f"{s} seeds, t over seeds", s, True, by_students) for s in (3, 5)]
        for design, seeds, same, way in ways:
            for seed_sd in figure.seed_sds if seeds > 1 else ("-",):
                cells = []
                for n in PROMPTS:
                    if seeds > 1 and n > 200 and not figure.many:
                        cells.append("not run")
                        continue
                    times = command.replications // (4 if figure.ranks and n > 200 else 1)
                    sd = seed_sd if seeds > 1 else 0.0
                    held, width, none = coverage(figure, known, seeds, n, sd, same, times, way)
                    mark = "" if 0.93 <= held <= 0.97 else "*"
                    missing = f" -{none:.0%}" if none > 0.005 else ""
                    cells.append(f"{held:.3f}{mark} ({width:.3f}){missing}")
                print(f"{name:<30}{design:<24}{seed_sd!s:<9}"
                      + "".join(f"{cell:<17}" for cell in cells), flush=True)  # fmt: skip
    if not command.only:
        ceilings(command.replications)


if __name__ == "__main__":
    main(tyro.cli(Command, description=__doc__))
