"""Is it self-evaluation? Controls for the figures of Sec. 4.

A score vector that knows nothing of the answer can reach a high calibration too. So each figure is
shown beside predictors that know less than the model is said to know, beside metrics that nothing
was trained on, and beside what the scores are good for. None of this is in the paper; Sec. 5 names
the uses.

Predictors are fitted on the training window's judgements (arguments `fit_...`) and tested on
others. They answer in digits, as the model has to.

Shapes: N responses, 5 attributes, 10 digits. s, j: (N, 5) integers 0-9, the model's scores and the
judge's. prompts: the N prompt ids. logp: (N, 5, 10) log-probabilities of the digit tokens.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax
from scipy.stats import kendalltau, rankdata
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression

from reward import RewardConfig

GAMMA = RewardConfig.gamma
QUALITY = slice(0, 3)  # helpfulness, correctness, coherence


def calibrations(s: np.ndarray, j: np.ndarray, gamma: float = GAMMA) -> np.ndarray:
    """(..., 5), (..., 5) -> (...): reward.calibration of each pair (Sec. 4.1)."""
    return (1 - np.abs(np.asarray(s, float) - j).mean(-1) / 9) ** gamma


def attribute_calibrations(s: np.ndarray, j: np.ndarray, gamma: float = GAMMA) -> np.ndarray:
    """(..., 5), (..., 5) -> (..., 5): the calibration of each attribute alone (Figure 3)."""
    return calibrations(np.asarray(s)[..., None], np.asarray(j)[..., None], gamma)


def qualities(scores: np.ndarray) -> np.ndarray:
    """(..., 5) -> (...): reward.quality of each."""
    return np.asarray(scores, float)[..., QUALITY].mean(-1) / 9


def digits(x: np.ndarray) -> np.ndarray:
    """The nearest scores that can be written."""
    return np.clip(np.rint(x), 0, 9).astype(int)


def groups(prompts: Sequence[str]) -> list[np.ndarray]:
    """Indices of each prompt's responses, prompts in order of appearance."""
    indices = defaultdict(list)
    for i, prompt in enumerate(prompts):
        indices[prompt].append(i)
    return [np.array(group) for group in indices.values()]


# --------------------------------------------------------------------------------------------------
# Trivial predictors: (N, 5) digits, NaN where nothing is predicted


def offset(fit_s: np.ndarray, fit_j: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The model's own scores, moved by the median difference of each attribute."""
    return digits(np.asarray(s) + np.median(np.asarray(fit_j) - fit_s, axis=0))


def isotonic(fit_s: np.ndarray, fit_j: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The model's own scores through the best rising curve of each attribute."""
    columns = [
        IsotonicRegression(out_of_bounds="clip").fit(x, y).predict(z)
        for x, y, z in zip(np.asarray(fit_s, float).T, np.asarray(fit_j, float).T,
                           np.asarray(s, float).T, strict=True)
    ]  # fmt: skip
    return digits(np.stack(columns, axis=1))


def surface_features(text: str) -> list[float]:
    """Length and form of an answer; they can be counted without understanding it."""
    words = text.split()
    return [
        math.log1p(len(words)),
        math.log1p(text.count("\n")),
        math.log1p(len(re.findall(r"^\s*([-*]|\d+[.)])\s", text, re.MULTILINE))),
        float("```" in text),
        sum(c.isdigit() for c in text) / max(1, len(text)),
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
    ]


def surface(fit_texts: Sequence[str], fit_j: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The judge's scores by a linear fit on surface features."""
    fit_x, x = ([surface_features(text) for text in group] for group in (fit_texts, texts))
    return digits(LinearRegression().fit(fit_x, fit_j).predict(x))


def other_samples(j: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The judge's mean for the prompt's other responses: it knows the prompt, and not the response.
    NaN where there is no other."""
    j = np.asarray(j, float)
    predicted = np.full(j.shape, np.nan)
    for g in groups(prompts):
        if len(g) > 1:
            predicted[g] = digits((j[g].sum(0) - j[g]) / (len(g) - 1))
    return predicted


class Shuffled(NamedTuple):
    """Calibration of each response's scores against the judge's scores of other responses. Entry
    (p, q) is over pairs of a response to prompt p (the model's scores) and one to prompt q (the
    judge's); a response's pair with itself is excluded."""

    sums: np.ndarray  # (P, P) sum of calibrations
    counts: np.ndarray  # (P, P) number of pairs

    def across(self, chosen: np.ndarray) -> float | None:
        """Mean over pairs of responses to different prompts. chosen: indices of prompts; one that
        stands there twice counts twice. None where there is no pair."""
        weight = np.bincount(chosen, minlength=len(self.sums)).astype(float)
        total, count = (
            weight @ x @ weight - weight**2 @ np.diag(x) for x in (self.sums, self.counts)
        )
        return float(total / count) if count else None


def shuffled(
    s: np.ndarray, j: np.ndarray, prompts: Sequence[str], gamma: float = GAMMA
) -> Shuffled:
    """What the model's scores are worth for other responses; own pairs excluded. Prompts in sorted
    order."""
    s, j = np.asarray(s), np.asarray(j)
    unique, prompt_of, size = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.zeros((len(unique), len(unique)))
    for i in range(len(s)):
        values = calibrations(s[i], j, gamma)
        values[i] = 0  # own pairs excluded
        sums[prompt_of[i]] += np.bincount(prompt_of, values, len(unique))
    return Shuffled(sums, (np.outer(size, size) - np.diag(size)).astype(float))


def skill(calibration: float, constant: float, ceiling: float) -> float | None:
    """Share of the way from the best constant to the judge's agreement with itself. None where the
    constant reaches the ceiling."""
    return (calibration - constant) / (ceiling - constant) if ceiling > constant else None


# --------------------------------------------------------------------------------------------------
# Does it tell answers to the same prompt apart?


class Ordering(NamedTuple):
    """How far the model (x) orders responses as the judge (y) does."""

    right: float  # pairs ordered alike, a tie of x counting half
    pairs: int  # pairs that y tells apart
    tau: float | None  # Kendall's tau-b; None where x or y does not vary

    @property
    def accuracy(self) -> float | None:
        return self.right / self.pairs if self.pairs else None


def ordering(x: Sequence[float], y: Sequence[float]) -> Ordering:
    """x: the model's figures, y: the judge's, one per response.

    Over n pairs, C of them ordered alike and D the other way round,
    tau-b = (C - D) / sqrt((n - ties of x) (n - ties of y)). So tau-b gives C - D, and C plus half
    of x's ties among y's untied pairs is (untied pairs of y + C - D) / 2."""
    n = len(x) * (len(x) - 1) // 2
    untied_x, untied_y = (n - sum(c * (c - 1) // 2 for c in Counter(v).values()) for v in (x, y))
    if not untied_x or not untied_y:
        return Ordering(untied_y / 2, untied_y, None)
    tau = float(kendalltau(x, y).statistic)
    return Ordering((untied_y + tau * math.sqrt(untied_x * untied_y)) / 2, untied_y, tau)


def within_prompts(
    x: Sequence[float], y: Sequence[float], prompts: Sequence[str]
) -> list[Ordering]:
    """The ordering of each prompt's responses."""
    return [ordering([x[i] for i in g], [y[i] for i in g]) for g in groups(prompts)]


def prompt_means(x: Sequence[float], prompts: Sequence[str]) -> np.ndarray:
    """(prompts,) mean of each prompt, rounded to twelve decimals so that equal means are equal."""
    return np.array([np.mean([x[i] for i in g]) for g in groups(prompts)]).round(12)


# --------------------------------------------------------------------------------------------------
# Metrics that nothing was trained on


def digit_probabilities(logp: np.ndarray) -> np.ndarray:
    """(..., 10) -> (..., 10): probabilities given that one of the ten digits is written."""
    return np.exp(log_softmax(np.asarray(logp, float), axis=-1))


def negative_log_likelihood(logp: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(N, 5): minus the log-probability of the judge's digit, in nats."""
    chosen = np.take_along_axis(log_softmax(np.asarray(logp, float), axis=-1),
                                np.asarray(j)[..., None], axis=-1)  # fmt: skip
    return -chosen[..., 0]


def ranked_probability_score(logp: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(N, 5): sum over the nine thresholds of (P(digit <= k) - [j <= k])^2, divided by 9; 0 is
    best."""
    cumulative = np.cumsum(digit_probabilities(logp), axis=-1)[..., :9]
    truth = np.asarray(j)[..., None] <= np.arange(9)
    return ((cumulative - truth) ** 2).mean(-1)


def expected_scores(logp: np.ndarray) -> np.ndarray:
    """(N, 5): mean of the ten digits under their probabilities."""
    return digit_probabilities(logp) @ np.arange(10)


def probability_below(logp: np.ndarray, threshold: float) -> np.ndarray:
    """(N,): probability that quality is below the threshold, the three attributes taken as
    independent given the digits before them."""
    p = digit_probabilities(logp)
    total = np.ones((len(p), 1))  # distribution of the sum of the attributes so far
    for a in range(3):
        longer = np.zeros((len(p), total.shape[1] + 9))
        for digit in range(10):
            longer[:, digit : digit + total.shape[1]] += total * p[:, a, digit, None]
        total = longer
    return total[:, np.arange(28) / 27 < threshold].sum(-1)


def auroc(score: Sequence[float], truth: Sequence[bool]) -> float | None:
    """Area under the ROC curve, from the ranks of the true ones (Mann and Whitney); None where all
    are true or none is. A test compares it with scikit-learn's, which is too slow for a bootstrap.
    """
    truth = np.asarray(truth, bool)
    n, others = int(truth.sum()), int((~truth).sum())
    if not n or not others:
        return None
    return float((rankdata(score)[truth].sum() - n * (n + 1) / 2) / (n * others))


def expected_calibration_error(
    probability: Sequence[float], truth: Sequence[bool], bins: int = 10
) -> float:
    """Mean distance between stated probability and frequency over equal-width bins, weighted by
    their size."""
    p, t = np.asarray(probability, float), np.asarray(truth, float)
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    return sum(abs(p[bin_of == b].sum() - t[bin_of == b].sum()) for b in range(bins)) / len(p)


def kappa(s: np.ndarray, j: np.ndarray) -> list[float | None]:
    """Quadratic weighted kappa of each attribute: 1 - the mean squared difference divided by that
    of unrelated scores with the same means and spreads. None where neither varies. A test compares
    it with scikit-learn's, which is too slow for a bootstrap."""
    kappas = []
    for x, y in zip(np.asarray(s, float).T, np.asarray(j, float).T, strict=True):
        chance = x.var() + y.var() + (x.mean() - y.mean()) ** 2
        kappas.append(float(1 - ((x - y) ** 2).mean() / chance) if chance else None)
    return kappas


class ErrorSplit(NamedTuple):
    """Parts of the mean squared error of one attribute; they add up to it."""

    bias: float  # (mean difference)^2
    spread: float  # (difference of the standard deviations)^2
    rest: float  # the remainder: scores in the wrong order


def error_split(s: np.ndarray, j: np.ndarray) -> list[ErrorSplit]:
    """One for each attribute."""
    splits = []
    for x, y in zip(np.asarray(s, float).T, np.asarray(j, float).T, strict=True):
        bias, spread = (x.mean() - y.mean()) ** 2, (x.std() - y.std()) ** 2
        splits.append(ErrorSplit(bias, spread, ((x - y) ** 2).mean() - bias - spread))
    return splits


def copied(self_scores: Sequence[tuple], examples: Sequence[tuple]) -> list[float]:
    """Per response: 1 if its score vector is that of a few-shot example, else 0."""
    vectors = set(map(tuple, examples))
    return [float(tuple(s) in vectors) for s in self_scores]


# --------------------------------------------------------------------------------------------------
# What the scores are good for (Sec. 5): each against chance and against knowing the judge


class Use(NamedTuple):
    """A figure when the model's own scores decide, when chance does, and when the judge's do."""

    by_self: float
    random: float
    oracle: float


def best_of_n(own: Sequence[float], judge: Sequence[float], prompts: Sequence[str]) -> list[Use]:
    """Per prompt: the judge's quality of the response that the model rates best, or the mean of
    those that it rates equally. own, judge: the model's and the judge's quality of each
    response."""
    own, judge = np.asarray(own, float), np.asarray(judge, float)
    return [
        Use(
            float(judge[g][own[g] == own[g].max()].mean()),
            float(judge[g].mean()),
            float(judge[g].max()),
        )
        for g in groups(prompts)
    ]


def risk_coverage(confidence: Sequence[float], loss: Sequence[float]) -> np.ndarray:
    """(N,): mean loss of the k most confident responses, k = 1 to N; equally confident ones in
    random order."""
    confidence, loss = np.asarray(confidence, float), np.asarray(loss, float)
    ordered = _level_means(confidence, loss)[np.argsort(-confidence, kind="stable")]
    return np.cumsum(ordered) / np.arange(1, len(loss) + 1)


def _level_means(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,): each value replaced by the mean of those on its level, which is what a random order
    among equals gives on average."""
    _, level = np.unique(levels, return_inverse=True)
    return (np.bincount(level, values) / np.bincount(level))[level]


def selective_answering(own: Sequence[float], judge: Sequence[float]) -> Use:
    """Area under the risk-coverage curve (lower is better); risk is 1 - the judge's quality."""
    loss = 1 - np.asarray(judge, float)
    return Use(
        float(risk_coverage(own, loss).mean()),
        float(loss.mean()),
        float(risk_coverage(-loss, loss).mean()),
    )


def escalation(
    own: Sequence[float], judge: Sequence[float], stronger: Sequence[float], share: float
) -> Use:
    """Mean quality when the given share of answers goes to a stronger model: those that the model
    rates lowest (random ones among equals), random ones, or those that gain most. stronger: the
    judge's quality of the stronger model's answers."""
    own, judge, stronger = (np.asarray(x, float) for x in (own, judge, stronger))
    k, gain = round(share * len(judge)), stronger - judge
    lowest, best = np.argsort(own, kind="stable")[:k], np.sort(gain)[::-1][:k]
    return Use(
        float(judge.mean() + _level_means(own, gain)[lowest].sum() / len(judge)),
        float(judge.mean() + k / len(judge) * gain.mean()),
        float(judge.mean() + best.sum() / len(judge)),
    )
