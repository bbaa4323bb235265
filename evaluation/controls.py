"""Is it self-evaluation? What stands beside the figures of Sec. 4 so that they mean something.

On real judgements one constant vector reaches 0.67 to 0.82 in the paper's calibration, and one
ranking of the digits 0.75 to 0.94 in its top-5 accuracy. So each figure is shown beside predictors
that know less than the model is said to know, beside metrics that nothing was trained on, and
beside what the scores are good for. None of this is in the paper; Sec. 5 names the uses.

Predictors are fitted on judgements of the training window (`fit`) and tested on others; they answer
in digits, as the model has to.

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


def qualities(scores: np.ndarray) -> np.ndarray:
    """(..., 5) -> (...): reward.quality of each."""
    return np.asarray(scores, float)[..., QUALITY].mean(-1) / 9


def digits(x: np.ndarray) -> np.ndarray:
    """The nearest scores that can be written."""
    return np.clip(np.rint(x), 0, 9).astype(int)


def groups(prompts: Sequence[str]) -> list[np.ndarray]:
    """Indices of each prompt's responses."""
    found = defaultdict(list)
    for i, prompt in enumerate(prompts):
        found[prompt].append(i)
    return [np.array(indices) for indices in found.values()]


# --------------------------------------------------------------------------------------------------
# Trivial predictors: (N, 5) digits, or NaN where they say nothing


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
    """What can be seen of an answer without understanding it."""
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
    known, asked = ([surface_features(t) for t in ts] for ts in (fit_texts, texts))
    return digits(LinearRegression().fit(known, fit_j).predict(asked))


def other_samples(j: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The mean of the judge's scores for the prompt's other responses: knows the prompt, and not
    the response. NaN where there is no other."""
    j = np.asarray(j, float)
    found = np.full(j.shape, np.nan)
    for g in groups(prompts):
        if len(g) > 1:
            found[g] = digits((j[g].sum(0) - j[g]) / (len(g) - 1))
    return found


class Shuffled(NamedTuple):
    """Calibration of each response's scores against the judge's of other responses, summed over the
    responses of two prompts: row p has the scores of prompt p, column q the judge's of q."""

    sums: np.ndarray  # (P, P)
    counts: np.ndarray  # (P, P) pairs of responses

    def across(self, chosen: np.ndarray) -> float | None:
        """Mean over pairs of different prompts, of a choice of prompts (one chosen twice counts
        twice). None where there is none."""
        weight = np.bincount(chosen, minlength=len(self.sums)).astype(float)
        total, count = (
            weight @ x @ weight - weight**2 @ np.diag(x) for x in (self.sums, self.counts)
        )
        return float(total / count) if count else None


def shuffled(
    s: np.ndarray, j: np.ndarray, prompts: Sequence[str], gamma: float = GAMMA
) -> Shuffled:
    """What the scores are worth to other responses; a response does not meet its own judgement."""
    s, j = np.asarray(s), np.asarray(j)
    units, of, size = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.zeros((len(units), len(units)))
    for i in range(len(s)):
        met = calibrations(s[i], j, gamma)
        met[i] = 0
        sums[of[i]] += np.bincount(of, met, len(units))
    return Shuffled(sums, (np.outer(size, size) - np.diag(size)).astype(float))


def skill(calibration: float, constant: float, ceiling: float) -> float | None:
    """Share of the way from the best constant to the judge's agreement with itself. None where
    there is no way to go."""
    return (calibration - constant) / (ceiling - constant) if ceiling > constant else None


# --------------------------------------------------------------------------------------------------
# Does it tell answers to the same prompt apart?


class Ordering(NamedTuple):
    """How far x orders things as y does."""

    right: float  # pairs ordered alike, a tie of x counting half
    pairs: int  # pairs that y tells apart
    tau: float | None  # Kendall's tau-b; None where x or y does not vary

    @property
    def accuracy(self) -> float | None:
        return self.right / self.pairs if self.pairs else None


def ordering(x: Sequence[float], y: Sequence[float]) -> Ordering:
    """x: the model's figures, y: the judge's. With C and D pairs ordered alike and otherwise,
    tau-b = (C - D) / sqrt((n - ties of x) (n - ties of y)) over n pairs, so it gives C - D, and
    C plus half of x's ties among y's untied pairs is (untied pairs of y + C - D) / 2."""
    n = len(x) * (len(x) - 1) // 2
    free_x, free_y = (n - sum(c * (c - 1) // 2 for c in Counter(v).values()) for v in (x, y))
    if not free_x or not free_y:
        return Ordering(free_y / 2, free_y, None)
    tau = float(kendalltau(x, y).statistic)
    return Ordering((free_y + tau * math.sqrt(free_x * free_y)) / 2, free_y, tau)


def within_prompts(
    x: Sequence[float], y: Sequence[float], prompts: Sequence[str]
) -> list[Ordering]:
    """Of each prompt's responses."""
    return [ordering([x[i] for i in g], [y[i] for i in g]) for g in groups(prompts)]


def prompt_means(x: Sequence[float], prompts: Sequence[str]) -> np.ndarray:
    """(prompts,), for the ordering between prompts; of twelve digits, so that equal means are
    equal."""
    return np.array([np.mean([x[i] for i in g]) for g in groups(prompts)]).round(12)


# --------------------------------------------------------------------------------------------------
# Metrics that nothing was trained on


def digit_probabilities(logp: np.ndarray) -> np.ndarray:
    """(..., 10): given that one of the ten digits is written."""
    return np.exp(log_softmax(np.asarray(logp, float), axis=-1))


def negative_log_likelihood(logp: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(N, 5): of the judge's digit, in nats."""
    chosen = np.take_along_axis(log_softmax(np.asarray(logp, float), axis=-1),
                                np.asarray(j)[..., None], axis=-1)  # fmt: skip
    return -chosen[..., 0]


def ranked_probability_score(logp: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(N, 5): sum over the nine thresholds of (P(digit <= k) - [j <= k])^2, divided by 9; 0 is
    best."""
    reached = np.cumsum(digit_probabilities(logp), axis=-1)[..., :9]
    truth = np.asarray(j)[..., None] <= np.arange(9)
    return ((reached - truth) ** 2).mean(-1)


def expected_scores(logp: np.ndarray) -> np.ndarray:
    """(N, 5), real numbers."""
    return digit_probabilities(logp) @ np.arange(10)


def probability_below(logp: np.ndarray, threshold: float) -> np.ndarray:
    """(N,): that quality is below the threshold, the three attributes taken as independent given
    the digits before them."""
    p = digit_probabilities(logp)
    total = np.ones((len(p), 1))  # distribution of the sum
    for a in range(3):
        grown = np.zeros((len(p), total.shape[1] + 9))
        for digit in range(10):
            grown[:, digit : digit + total.shape[1]] += total * p[:, a, digit, None]
        total = grown
    return total[:, np.arange(28) / 27 < threshold].sum(-1)


def auroc(score: Sequence[float], truth: Sequence[bool]) -> float | None:
    """Area under the ROC curve, from the ranks of the true ones (Mann and Whitney); None where all
    are true or none is. It is scikit-learn's (a test compares them), which is slow for draws."""
    truth = np.asarray(truth, bool)
    n, others = int(truth.sum()), int((~truth).sum())
    if not n or not others:
        return None
    return float((rankdata(score)[truth].sum() - n * (n + 1) / 2) / (n * others))


def expected_calibration_error(
    probability: Sequence[float], truth: Sequence[bool], bins: int = 10
) -> float:
    """Mean distance of stated probability and frequency over equal-width bins, weighted by their
    size."""
    p, t = np.asarray(probability, float), np.asarray(truth, float)
    at = np.minimum((p * bins).astype(int), bins - 1)
    return sum(abs(p[at == b].sum() - t[at == b].sum()) for b in range(bins)) / len(p)


def kappa(s: np.ndarray, j: np.ndarray) -> list[float | None]:
    """Quadratic weighted kappa of each attribute: 1 - mean squared difference over what it would
    be of unrelated scores with these means and spreads. None where both never vary.

    It is scikit-learn's (a test compares them), which is too slow to be drawn hundreds of times.
    """
    found = []
    for x, y in zip(np.asarray(s, float).T, np.asarray(j, float).T, strict=True):
        chance = x.var() + y.var() + (x.mean() - y.mean()) ** 2
        found.append(float(1 - ((x - y) ** 2).mean() / chance) if chance else None)
    return found


class ErrorSplit(NamedTuple):
    """Parts of the mean squared error of one attribute; they add up to it."""

    bias: float  # (mean difference)^2
    spread: float  # (difference of the standard deviations)^2
    rest: float  # what is left: the order of the scores is wrong


def error_split(s: np.ndarray, j: np.ndarray) -> list[ErrorSplit]:
    found = []
    for x, y in zip(np.asarray(s, float).T, np.asarray(j, float).T, strict=True):
        bias, spread = (x.mean() - y.mean()) ** 2, (x.std() - y.std()) ** 2
        found.append(ErrorSplit(bias, spread, ((x - y) ** 2).mean() - bias - spread))
    return found


def copied(self_scores: Sequence[tuple], examples: Sequence[tuple]) -> list[float]:
    """1 for each score vector that stands in a few-shot example as it is, else 0."""
    shown = set(map(tuple, examples))
    return [float(tuple(s) in shown) for s in self_scores]


# --------------------------------------------------------------------------------------------------
# What the scores are good for (Sec. 5): each against chance and against knowing the judge


class Use(NamedTuple):
    by_self: float
    random: float
    oracle: float


def best_of_n(own: Sequence[float], judge: Sequence[float], prompts: Sequence[str]) -> list[Use]:
    """Of each prompt: the judge's quality of the response that the model rates best; among equally
    rated ones the mean."""
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
    even = np.empty(len(loss))
    for level in np.unique(confidence):
        even[confidence == level] = loss[confidence == level].mean()
    ordered = even[np.argsort(-confidence, kind="stable")]
    return np.cumsum(ordered) / np.arange(1, len(loss) + 1)


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
    """Mean quality when the given share of prompts goes to a stronger model: those that the model
    rates lowest (of equally rated ones random ones), random ones, or those that gain most."""
    own, judge, stronger = (np.asarray(x, float) for x in (own, judge, stronger))
    k, gain = round(share * len(judge)), stronger - judge
    even = np.empty(len(gain))
    for level in np.unique(own):
        even[own == level] = gain[own == level].mean()
    picked, best = np.argsort(own, kind="stable")[:k], np.sort(gain)[::-1][:k]
    return Use(
        float(judge.mean() + even[picked].sum() / len(judge)),
        float(judge.mean() + k / len(judge) * gain.mean()),
        float(judge.mean() + best.sum() / len(judge)),
    )
