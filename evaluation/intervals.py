"""How sure a figure is. Intervals and tests come from scipy and statsmodels.

Responses to one prompt depend on each other, so within a run the prompt is the unit: the bootstrap
draws prompts with all their responses, and two models are compared prompt by prompt. With several
runs, the run (its seed) is the unit: a figure's interval is Student's t over the runs' figures, and
prompts do not count as independent evidence again.

The primary endpoint is calibration against the best constant on held-out prompts. All other
comparisons of a table are corrected together (Holm).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.special import expit
from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test, t, ttest_1samp
from statsmodels.stats.multitest import multipletests
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

DRAWS = 1000  # of a mean or ratio, which are vectorised
STATISTIC_DRAWS = 200  # of any other figure
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    mean: float | None  # None where nothing was measured
    low: float | None  # None where there are fewer than two units
    high: float | None
    n: int  # units: prompts, or seeds

    def text(self, decimals: int = 3) -> str:
        """0.731 [0.702, 0.760]"""
        if self.mean is None:
            return "-"
        if self.low is None:
            return f"{self.mean:.{decimals}f}"
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


NOTHING = Interval(None, None, None, 0)


# --------------------------------------------------------------------------------------------------
# Intervals over the prompts of one run


def over_prompts(values: Sequence[float], prompts: Sequence, draws: int = DRAWS) -> Interval:
    """Mean over responses, with a percentile interval. `values` and `prompts`: one number and one
    prompt id per response. draws: of the bootstrap; 0: the mean alone."""
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    sums = np.bincount(prompt_of, np.asarray(values, float), len(unique))
    return ratio(sums, np.bincount(prompt_of, minlength=len(unique)), draws)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], draws: int = DRAWS
) -> Interval:
    """sum(numerators) / sum(denominators), one of each per prompt, with a percentile interval.
    Prompts with denominator 0 are left out."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    above, below = above[below > 0], below[below > 0]
    if not len(below):
        return NOTHING
    mean = float(above.sum() / below.sum())
    if len(below) < 2 or not draws:
        return Interval(mean, None, None, len(below))
    ends = bootstrap(
        (above, below), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
        vectorized=True, n_resamples=draws, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(ends.low), float(ends.high), len(below))


def of_statistic(
    statistic: Callable[[np.ndarray], float | None],
    prompts: Sequence,
    draws: int = STATISTIC_DRAWS,
) -> Interval:
    """Any figure, with a percentile interval.

    `statistic` gets the indices of some responses (a prompt that is drawn twice gives its responses
    twice) and returns the figure for these, or None where it is not defined; such draws are left
    out. `prompts`: the prompt id of every response."""
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    n = len(unique)
    value = statistic(np.arange(len(prompt_of))) if n else None
    if value is None or n < 2 or not draws:
        return Interval(value, None, None, n)
    by_prompt = np.argsort(prompt_of, kind="stable")  # responses, prompt after prompt
    sizes = np.bincount(prompt_of)
    starts = np.cumsum(sizes) - sizes

    def figure(drawn: np.ndarray) -> float:
        size = sizes[drawn]
        place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        drawn_value = statistic(by_prompt[np.repeat(starts[drawn], size) + place])
        return np.nan if drawn_value is None else drawn_value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # draws without the figure
        values = bootstrap(
            (np.arange(n),), figure, vectorized=False, n_resamples=draws, method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution  # fmt: skip
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(value, None, None, n)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


# --------------------------------------------------------------------------------------------------
# Intervals over runs


def over_seeds(figures: Sequence[float]) -> Interval:
    """Mean of the runs' figures, with Student's interval."""
    values = np.asarray(figures, float)
    n = len(values)
    if n < 2:
        return Interval(float(values[0]), None, None, 1) if n else NOTHING
    half = t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    mean = values.mean()
    return Interval(float(mean), float(mean - half), float(mean + half), n)


# --------------------------------------------------------------------------------------------------
# Comparisons


class Difference(NamedTuple):
    interval: Interval
    p: float | None  # two-sided; None where there are fewer than two units


def differences(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Per prompt that both have: our mean over its responses minus theirs."""
    return {
        prompt: float(np.mean(ours[prompt]) - np.mean(theirs[prompt]))
        for prompt in ours
        if prompt in theirs and len(ours[prompt]) and len(theirs[prompt])
    }


def paired(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> Difference:
    """ours - theirs within one run, over the prompts that both have; each prompt counts once.
    `ours` and `theirs`: prompt id -> values of its responses. The permutation test exchanges the
    two within each prompt."""
    by_prompt = differences(ours, theirs)
    values = np.array(list(by_prompt.values()))
    interval = over_prompts(values, list(by_prompt))
    if len(values) < 2:
        return Difference(interval, None)
    if not values.any():
        return Difference(interval, 1.0)
    test = permutation_test(
        (values, np.zeros_like(values)), lambda a, b, axis: (a - b).mean(axis), vectorized=True,
        permutation_type="samples", n_resamples=9999, batch=500, rng=np.random.default_rng(0),
    )  # fmt: skip
    return Difference(interval, float(test.pvalue))


def paired_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs over runs of the same seeds, with the paired t test."""
    values = np.asarray(ours, float) - np.asarray(theirs, float)
    interval = over_seeds(values)
    if len(values) < 2:
        return Difference(interval, None)
    if np.ptp(values) == 0:
        return Difference(interval, 0.0 if values.any() else 1.0)
    return Difference(interval, float(ttest_1samp(values, 0.0).pvalue))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Corrected p-values by name. None stays None and does not count."""
    tested = {name: p for name, p in p_values.items() if p is not None}
    if not tested:
        return dict.fromkeys(p_values)
    corrected = multipletests(list(tested.values()), method="holm")[1]
    return dict.fromkeys(p_values) | dict(zip(tested, map(float, corrected), strict=True))


def length_adjusted(results: Sequence[int], length_differences: Sequence[float]) -> float | None:
    """The win-rate at equal lengths: theta of logit P(win) = theta + phi tanh(d / sd(d)), where d
    is the difference in characters. This is LC AlpacaEval's form without its term for a prompt's
    difficulty, so the figure is not LC AlpacaEval's. results: 1 win, 0 tie, -1 loss. None where
    lengths explain everything, or do not vary."""
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
