"""How sure a figure is.

Responses to one prompt depend on each other, so the prompt is the unit. Every figure is reduced to
an `Estimate`: its value, and by how much each prompt pulls it up or down (its influence, to first
order). For means and ratios this is exact algebra; for other figures it is the jackknife that
leaves out one prompt at a time. All intervals and tests follow from the pulls:

    one evaluation                         Student's t over prompts
    three or more, all of the same         variance components of seeds and prompts, with
    prompts                                Satterthwaite's degrees of freedom
    several, each with prompts of its own  Student's t over seeds

So an interval is about new prompts, and with several seeds about new seeds too. bench/coverage.py
measures what they cover; docs/evaluation.md has the table. What would not cover gets no interval:
anything below ten prompts, two evaluations of the same prompts, a figure that does not vary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import f, norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
FEWEST = 10  # prompts for an interval
SEEN = {"seeds": 0.4, "prompts": 0.05}  # a part of the variance that an F test finds at this level
CLEAR = 2  # times the rest's is the mean square of prompts that clearly differ
ROWS = 4_000_000  # numbers in a block of the jackknife's weights


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    mean: float | None  # None where nothing was measured
    low: float | None  # None where there is no interval
    high: float | None
    n: int  # prompts; evaluations, where each has prompts of its own

    def text(self, decimals: int = 3) -> str:
        """0.731 [0.702, 0.760]; 0.731 [-] without an interval; - without a figure"""
        if self.mean is None:
            return "-"
        if self.low is None:
            return f"{self.mean:.{decimals}f} [-]"
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


NOTHING = Interval(None, None, None, 0)


# --------------------------------------------------------------------------------------------------
# Estimates: a figure of one evaluation


class Estimate(NamedTuple):
    """A figure and what each of its n prompts does to it. The standard error is that of the mean of
    the pulls."""

    value: float
    pulls: np.ndarray  # (n,) add up to 0
    prompts: np.ndarray  # (n,) ids

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference, paired by prompt. Raises ValueError for other prompts."""
        if list(self.prompts) != list(other.prompts):
            raise ValueError("a difference needs two figures of the same prompts")
        return Estimate(self.value - other.value, self.pulls - other.pulls, self.prompts)


def mean(values: Sequence[float], prompts: Sequence) -> Estimate | None:
    """Mean over responses, each of which counts the same. values, prompts: one number and one
    prompt id per response. None where there is no response."""
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    sums = np.bincount(prompt_of, np.asarray(values, float), len(unique))
    return ratio(sums, np.bincount(prompt_of, minlength=len(unique)), unique)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], prompts: Sequence
) -> Estimate | None:
    """sum(numerators) / sum(denominators), one of each per prompt. Prompts with denominator 0 are
    left out; None where all are."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    some = below > 0
    if not some.any():
        return None
    above, below = above[some], below[some]
    value = float(above.sum() / below.sum())
    return Estimate(value, (above - value * below) / below.mean(), np.asarray(prompts)[some])


def jackknife(
    value: float, without: np.ndarray, prompts: Sequence, debias: bool = False
) -> Estimate | None:
    """`without`: (n,) the figure without each of the prompts. debias: remove the part of the bias
    that falls as 1 / n. None where the figure is not defined."""
    if not math.isfinite(value):
        return None
    n = len(without)
    pseudo = n * value - (n - 1) * without  # Tukey's pseudo-values
    value = float(pseudo.mean()) if debias else float(value)
    return Estimate(value, pseudo - pseudo.mean(), np.asarray(prompts))


def of_sums(
    figure: Callable[[np.ndarray], np.ndarray],
    columns: np.ndarray,
    prompts: Sequence,
    debias: bool = False,
) -> Estimate | None:
    """A figure of sums over responses. columns: (N, K), a row per response; figure: (..., K) sums
    -> (...), nan where it is not defined. A count is a column of ones."""
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    if not len(unique):
        return None
    columns = np.asarray(columns, float)
    sums = np.zeros((len(unique), columns.shape[1]))
    np.add.at(sums, prompt_of, columns)
    return of_prompt_sums(figure, sums, unique, debias)


def of_prompt_sums(
    figure: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    prompts: Sequence,
    debias: bool = False,
) -> Estimate | None:
    """The same of (n, ...) sums, one row for each prompt."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = sums.sum(0)
        return jackknife(float(figure(total)), figure(total - sums), prompts, debias)


def of_weights(figure: Callable[[np.ndarray], np.ndarray], prompts: Sequence) -> Estimate | None:
    """A figure of weighted responses, for what depends on ranks. figure: (B, N) weights, each 0 or
    1 -> (B,), nan where it is not defined. prompts: the N responses' prompt ids."""
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    if not len(unique):
        return None
    step = max(1, ROWS // len(prompt_of))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(np.ones((1, len(prompt_of))))[0])
        without = [
            figure((prompt_of != np.arange(start, min(start + step, len(unique)))[:, None]) * 1.0)
            for start in range(0, len(unique), step)
        ]
    return jackknife(value, np.concatenate(without), unique)


def of_pairs(
    figure: Callable[[np.ndarray], np.ndarray], pairs: np.ndarray, prompts: Sequence
) -> Estimate | None:
    """A figure of sums over pairs of different prompts. pairs: (K, n, n), one number for each
    ordered pair, of which the diagonal does not count; figure: (..., K) sums -> (...)."""
    pairs = np.asarray(pairs, float)
    if pairs.shape[1] < 2:
        return None
    own = np.diagonal(pairs, axis1=1, axis2=2)  # (K, n)
    with_prompt = pairs.sum(1) + pairs.sum(2) - 2 * own
    total = with_prompt.sum(1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        without = figure((total[:, None] - with_prompt).T)
        return jackknife(float(figure(total)), without, prompts)


# --------------------------------------------------------------------------------------------------
# Intervals and tests


class Scale(NamedTuple):
    """On which a figure's distribution is nearly normal."""

    to: Callable
    back: Callable


PLAIN = Scale(lambda x: x, lambda x: x)
LOG = Scale(np.log, np.exp)  # ratios
FISHER = Scale(np.arctanh, np.tanh)  # correlations
LOGIT = Scale(lambda p: np.log(p / (1 - p)), lambda x: 1 / (1 + np.exp(-x)))  # areas under a curve


class Spread(NamedTuple):
    """The mean of one figure over evaluations, and its error: (standard error, degrees of freedom)
    of each way to see it, of which the widest counts; () where there is none."""

    mean: float
    errors: tuple[tuple[float, float], ...]
    n: int  # as in Interval
    by_seed: bool  # whether it varies from evaluation to evaluation, or there is only one

    def half_width(self) -> float:
        return max(t.ppf((1 + LEVEL) / 2, df) * se for se, df in self.errors)

    def p(self, null: float = 0.0) -> float | None:
        """Two-sided p-value of the mean being `null`; None where nothing can be tested."""
        if not self.errors or not self.by_seed:
            return None
        return float(max(2 * t.sf(abs(self.mean - null) / se, df) for se, df in self.errors))

    def p_above(self, null: float) -> float | None:
        """One-sided p-value against the mean being `null` or less."""
        if not self.errors or not self.by_seed:
            return None
        return float(max(t.sf((self.mean - null) / se, df) for se, df in self.errors))


def spread(estimates: Sequence[Estimate], same_prompts: bool) -> Spread:
    """One estimate for each evaluation. same_prompts: whether several are of the same prompts, or
    each has its own."""
    first, *others = estimates
    repeated = others and all(
        e.value == first.value and np.array_equal(e.pulls, first.pulls) for e in others
    )
    if repeated:  # such as the base's answers, given with every seed
        return spread([first], True)._replace(by_seed=False)
    seeds = len(estimates)
    value = float(np.mean([e.value for e in estimates]))
    fewest = min(len(e.pulls) for e in estimates)
    n = fewest if not others else (
        len(set().union(*(e.prompts for e in estimates))) if same_prompts else seeds
    )  # fmt: skip
    if fewest < FEWEST or not all(np.isfinite(e.pulls).all() for e in estimates):
        return Spread(value, (), n, True)
    if not others:
        errors = [(math.sqrt(first.pulls @ first.pulls / (n * (n - 1))), n - 1)]
    elif same_prompts:
        errors = _two_way(estimates) if seeds > 2 else []
    else:
        errors = [(float(np.std([e.value for e in estimates], ddof=1)) / seeds**0.5, seeds - 1)]
    return Spread(value, tuple((se, df) for se, df in errors if se > 0), n, True)


def _two_way(estimates: Sequence[Estimate]) -> list[tuple[float, float]]:
    """(standard error, degrees of freedom) of the mean over S evaluations of the same n prompts,
    both drawn at random: a two-way table without repeats. A prompt without a response in an
    evaluation pulls by 0.

    The variance of the mean is (MS of seeds + MS of prompts - MS of the rest) / (S n), with
    Satterthwaite's degrees of freedom. These are too many where the seeds' part is large and its
    few degrees make it look small, so the interval is never narrower than Student's over seeds.
    Where prompts hardly differ (CLEAR), a part that an F test does not see (SEEN) is pooled with
    the rest: otherwise intervals would be too wide where there is no such part."""
    _, pulls = align(estimates)  # (S, n)
    s, n = pulls.shape
    prompt = pulls.mean(0)
    rest, rest_df = float(((pulls - prompt) ** 2).sum()) / ((s - 1) * (n - 1)), (s - 1) * (n - 1)
    squares = {
        "seeds": (n * float(np.var([e.value for e in estimates], ddof=1)), s - 1),
        "prompts": (s * float(prompt @ prompt) / (n - 1), n - 1),
    }
    clear = squares["prompts"][0] >= CLEAR * rest
    parts = {
        name: (square, df)
        for name, (square, df) in squares.items()
        if clear or f.sf(square / rest, df, rest_df) < SEEN[name]
    }

    def error(variance: float, df: float) -> tuple[float, float]:
        return math.sqrt(variance / (s * n)), df

    if not parts:
        pooled = [*squares.values(), (rest, rest_df)]
        total = sum(df for _, df in pooled)
        return [error(sum(square * df for square, df in pooled) / total, total)]
    if len(parts) == 1:
        return [error(*part) for part in parts.values()]
    (seeds, seeds_df), (prompts, prompts_df) = parts.values()
    variance = max(seeds + prompts - rest, seeds, prompts)
    below = seeds**2 / seeds_df + prompts**2 / prompts_df + rest**2 / rest_df
    df = max(variance**2 / below, seeds_df) if below else seeds_df
    return [error(variance, df), error(seeds, seeds_df)]


def align(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """(all n prompts, (S, n) pulls); a prompt that an estimate lacks does not pull on it."""
    first = estimates[0].prompts
    if all(np.array_equal(e.prompts, first) for e in estimates):
        return first, np.stack([e.pulls for e in estimates])
    table = pd.DataFrame([dict(zip(e.prompts, e.pulls, strict=True)) for e in estimates])
    return table.columns.to_numpy(), table.fillna(0.0).to_numpy()


def interval(
    estimates: Sequence[Estimate],
    same_prompts: bool = True,
    scale: Scale = PLAIN,
    proportion: bool = False,
) -> Interval:
    """The mean over evaluations of a figure, with its interval. scale: on which the interval is
    symmetric; estimates are on it already. proportion: of responses; Wilson's interval, at the
    number of independent responses that the standard error stands for."""
    if not estimates:
        return NOTHING
    s = spread(estimates, same_prompts)
    mean = float(scale.back(s.mean))
    if proportion and min(len(e.pulls) for e in estimates) >= FEWEST:
        low, high = _wilson(s)
        return Interval(mean, low, high, s.n)
    if not s.errors:
        return Interval(mean, None, None, s.n)
    half = s.half_width()
    low, high = (float(scale.back(s.mean + x)) for x in (-half, half))
    return Interval(mean, low, high, s.n)


def _wilson(s: Spread) -> tuple[float, float]:
    """Where all responses are alike, a prompt counts as one response."""
    widest = max(s.errors, key=lambda e: t.ppf((1 + LEVEL) / 2, e[1]) * e[0], default=None)
    p = min(max(s.mean, 0.0), 1.0)
    inner = widest is not None and 0 < p < 1
    n, df = (p * (1 - p) / widest[0] ** 2, widest[1]) if inner else (s.n, max(s.n - 1, 1))
    alpha = 2 * norm.sf(t.ppf((1 + LEVEL) / 2, df))
    low, high = proportion_confint(p * n, n, alpha=alpha, method="wilson")
    return float(low), float(high)


def over_prompts(values: Sequence[float], prompts: Sequence, proportion: bool = False) -> Interval:
    """Mean over the responses of one evaluation; see `mean`."""
    estimate = mean(values, prompts)
    return interval([estimate] if estimate else [], proportion=proportion)


# --------------------------------------------------------------------------------------------------
# Comparisons


def difference(
    ours: tuple[Sequence[float], Sequence], theirs: tuple[Sequence[float], Sequence]
) -> Estimate | None:
    """The mean of ours minus that of theirs, over the prompts that both have, as the tables weigh
    them: each response counts the same. ours, theirs: values and prompts, as for `mean`."""
    common = set(ours[1]) & set(theirs[1])
    order = {prompt: k for k, prompt in enumerate(p for p in dict.fromkeys(ours[1]) if p in common)}
    if not order:
        return None

    def side(values: Sequence[float], prompts: Sequence) -> Estimate:
        index = np.array([order.get(p, -1) for p in prompts])
        kept = index >= 0
        sums = np.bincount(index[kept], np.asarray(values, float)[kept], len(order))
        return ratio(sums, np.bincount(index[kept], minlength=len(order)), list(order))

    return side(*ours) - side(*theirs)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Corrected p-values by name. None stays None and does not count."""
    tested = {name: p for name, p in p_values.items() if p is not None}
    if not tested:
        return dict.fromkeys(p_values)
    corrected = multipletests(list(tested.values()), method="holm")[1]
    return dict.fromkeys(p_values) | dict(zip(tested, map(float, corrected), strict=True))


def after_primary(
    primary: float | None, p_values: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Corrected p-values of a family that counts only where the primary endpoint does: Holm's, and
    none below the primary's, so that primary and family together err in 5 % at most."""
    floor = 0.0 if primary is None else primary
    return {name: None if p is None else max(p, floor) for name, p in holm(p_values).items()}


def prompts_needed(sd: float, difference: float = 0.02, power: float = 0.8) -> int:
    """Prompts with which a paired t test at 5 % finds the difference, given the standard deviation
    of the differences by prompt."""
    found = TTestPower().solve_power(effect_size=difference / sd, alpha=1 - LEVEL, power=power)
    return math.ceil(float(np.squeeze(found)))


def paired_spread(estimates: Sequence[Estimate]) -> float | None:
    """Standard deviation by prompt of a paired difference, mean over the evaluations; None below
    ten prompts or without a spread."""
    known = [e.pulls.std(ddof=1) for e in estimates if len(e.pulls) >= FEWEST]
    return float(np.mean(known)) if known and min(known) > 0 else None
