"""How sure a figure is. Intervals and tests come from scipy and statsmodels.

Responses to one prompt depend on each other, so within a run the prompt is the unit (cluster
bootstrap), and models are paired on prompts. Runs with other seeds are the unit of replication:
with several, a figure's interval is Student's t over their means, and prompts are not counted as
independent evidence again.

The primary endpoint is calibration against the best constant on held-out prompts; all other
comparisons of a table are corrected together (Holm).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import statsmodels.api as sm
from scipy.special import expit
from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test, t, ttest_1samp
from statsmodels.stats.multitest import multipletests
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

DRAWS = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    mean: float | None  # None where nothing was measured
    low: float | None  # None where there are fewer than two units
    high: float | None
    n: int  # units: prompts, or seeds


def _sums(values: Sequence[float], prompts: Sequence[str], units: Sequence[str]) -> np.ndarray:
    """(2, units): each prompt's sum and count."""
    at = {unit: k for k, unit in enumerate(units)}
    found = np.zeros((2, len(units)))
    for value, prompt in zip(values, prompts, strict=True):
        found[:, at[prompt]] += value, 1
    return found


def over_prompts(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> Interval:
    """Mean over responses with a percentile interval; prompts are drawn."""
    units = list(dict.fromkeys(prompts))
    if not units:
        return Interval(None, None, None, 0)
    return ratio(*_sums(values, prompts, units), seed)


def ratio(tops: Sequence[float], bottoms: Sequence[float], seed: int = 0) -> Interval:
    """sum(tops) / sum(bottoms) over prompts, those with bottom 0 left out; prompts are drawn."""
    tops, bottoms = np.asarray(tops, float), np.asarray(bottoms, float)
    tops, bottoms = tops[bottoms > 0], bottoms[bottoms > 0]
    if not len(bottoms):
        return Interval(None, None, None, 0)
    mean = float(tops.sum() / bottoms.sum())
    if len(bottoms) < 2:
        return Interval(mean, None, None, 1)
    found = bootstrap(
        (tops, bottoms), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
        vectorized=True, n_resamples=DRAWS, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high), len(bottoms))


def over_seeds(means: Sequence[float]) -> Interval:
    """Mean of the runs' figures with Student's interval."""
    values = np.asarray(means, float)
    if len(values) < 2:
        return Interval(values.mean() if len(values) else None, None, None, len(values))
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half, len(values))


class Difference(NamedTuple):
    interval: Interval
    p: float | None  # two-sided; None where there are fewer than two units


def differences(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """ours - theirs, means over responses, of the prompts that both have."""
    return {
        p: float(np.mean(ours[p]) - np.mean(theirs[p]))
        for p in ours
        if p in theirs and len(ours[p]) and len(theirs[p])
    }


def paired(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], seed: int = 0
) -> Difference:
    """ours - theirs of one run, prompt id -> values of its responses; over the prompts that both
    have, each counting once. The test exchanges the two models prompt by prompt."""
    found = differences(ours, theirs)
    common, apart = list(found), np.array(list(found.values()))
    if len(apart) < 2:
        mean = float(apart.mean()) if len(apart) else None
        return Difference(Interval(mean, None, None, len(apart)), None)
    interval = over_prompts(apart, common, seed)
    if not apart.any():
        return Difference(interval, 1.0)
    test = permutation_test(
        (apart, np.zeros_like(apart)), lambda a, b, axis: (a - b).mean(axis), vectorized=True,
        permutation_type="samples", n_resamples=9999, batch=500, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Difference(interval, float(test.pvalue))


def paired_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs over runs of the same seeds, with the paired t test."""
    apart = np.asarray(ours, float) - np.asarray(theirs, float)
    interval = over_seeds(apart)
    if len(apart) < 2:
        return Difference(interval, None)
    if np.ptp(apart) == 0:
        return Difference(interval, 0.0 if apart.any() else 1.0)
    return Difference(interval, float(ttest_1samp(apart, 0.0).pvalue))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Corrected p-values by name."""
    known = {name: p for name, p in p_values.items() if p is not None}
    if not known:
        return dict.fromkeys(p_values)
    corrected = multipletests(list(known.values()), method="holm")[1]
    return dict.fromkeys(p_values) | dict(zip(known, map(float, corrected), strict=True))


def length_adjusted(results: Sequence[int], length_differences: Sequence[float]) -> float | None:
    """The win-rate at equal lengths: theta of logit P(win) = theta + phi tanh(d / sd(d)), d the
    difference in characters. LC AlpacaEval's form without its term for a prompt's difficulty, so
    not its figure. results: 1 win, 0 tie, -1 loss. None where lengths explain all, or do not
    vary."""
    won = (np.asarray(results, float) + 1) / 2
    d = np.asarray(length_differences, float)
    if len(d) < 3 or d.std() == 0:
        return None
    if won.std() == 0:
        return float(won[0])
    x = sm.add_constant(np.tanh(d / d.std()), has_constant="add")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerfectSeparationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            fit = sm.GLM(won, x, family=sm.families.Binomial()).fit()
        except PerfectSeparationWarning:
            return None
    return float(expit(fit.params[0]))


def of_statistic(
    statistic: Callable[[np.ndarray, Sequence], float | None], prompts: Sequence[str], seed: int = 0
) -> Interval:
    """A figure of a choice of responses (their indices, and what stands for their prompts: one
    drawn twice is two) with a percentile interval over 200 draws of the prompts. Draws in which it
    is not defined are left out."""
    units = list(dict.fromkeys(prompts))
    at: dict[str, list[int]] = {unit: [] for unit in units}
    for i, prompt in enumerate(prompts):
        at[prompt].append(i)
    flat = np.concatenate([at[unit] for unit in units]) if units else np.array([], int)
    sizes = np.array([len(at[unit]) for unit in units], int)
    starts = np.cumsum(sizes) - sizes  # where each prompt's responses begin in `flat`
    value = statistic(np.arange(len(prompts)), prompts) if units else None
    if value is None or len(units) < 2:
        return Interval(value, None, None, len(units))

    def drawn(chosen: np.ndarray) -> float:
        n = sizes[chosen]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        index = flat[np.repeat(starts[chosen], n) + within]
        found = statistic(index, np.repeat(np.arange(len(chosen)), n))
        return np.nan if found is None else found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of draws without the figure
        found = bootstrap(
            (np.arange(len(units)),), drawn, vectorized=False, n_resamples=200,
            method="percentile", rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(value, None, None, len(units))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), len(units))
