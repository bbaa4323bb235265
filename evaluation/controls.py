"""Is it self-evaluation? Figures beside those of Sec. 4, none of which is in the paper: does the
model tell answers apart, what do its ten digits say, where does its error come from, what are the
scores good for (Sec. 5 names the uses). predictors.py has the predictors that know less.

Many are given as intervals.py wants them: functions of sums over responses, (..., K) -> (...), or
of weights, (B, N) -> (B,), nan where they are not defined.

Shapes: N responses, 5 attributes, 10 digits. s, j: (N, 5) integers 0-9, the model's scores and the
judge's. prompts: the N prompt ids. logp: (N, 5, 10) log-probabilities of the digit tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from evaluation.predictors import groups

DIGITS = np.arange(10)

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


def pair_sums(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """(3, n, n) by ordered pair: the product of the signs of their differences in x and y, whether
    they differ in x, whether in y."""
    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    return np.stack([x * y, x != 0, y != 0])


def accuracy(sums: np.ndarray) -> np.ndarray:
    """(..., 3) totals of `pair_sums` -> share of the pairs that y tells apart which x orders alike,
    ties of x counting half."""
    return (sums[..., 2] + sums[..., 0]) / (2 * sums[..., 2])


def tau_b(sums: np.ndarray) -> np.ndarray:
    """(..., 3) totals of `pair_sums` -> Kendall's tau-b."""
    return sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])


def ordering(x: Sequence[float], y: Sequence[float]) -> Ordering:
    """x: the model's figures, y: the judge's, one per response."""
    total = pair_sums(x, y).sum((1, 2)) / 2
    agree, untied_x, untied_y = total
    tau = float(tau_b(total)) if untied_x and untied_y else None
    return Ordering(float(untied_y + agree) / 2, int(untied_y), tau)


def within_prompts(
    x: Sequence[float], y: Sequence[float], prompts: Sequence[str]
) -> dict[str, Ordering]:
    """The ordering of each prompt's responses."""
    found = groups(prompts)
    return {prompts[g[0]]: ordering([x[i] for i in g], [y[i] for i in g]) for g in found}


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
    return digit_probabilities(logp) @ DIGITS


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


def auroc(score: Sequence[float], truth: Sequence[bool]) -> Callable[[np.ndarray], np.ndarray]:
    """Area under the ROC curve as a function of weights (B, N), ties counting half. A test compares
    it with scikit-learn's, which takes one set of weights at a time."""
    order, starts = _levels(np.asarray(score, float))
    truth = np.asarray(truth, bool)[order]

    def area(weights: np.ndarray) -> np.ndarray:
        w = weights[:, order]
        true, false = (np.add.reduceat(w * x, starts, axis=1) for x in (truth, ~truth))
        below = np.cumsum(false, axis=1) - false / 2
        return (true * below).sum(1) / (true.sum(1) * false.sum(1))

    return area


def _levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order that sorts x, where in it each new value begins)."""
    order = np.argsort(x, kind="stable")
    return order, np.flatnonzero(np.r_[True, np.diff(x[order]) != 0])


def calibration_bins(probability: Sequence[float], truth: Sequence[bool], bins: int = 10):
    """(N, 2 * bins): of each response, in the columns of its bin, 1 and the stated probability
    minus the truth. Bins hold equally many responses."""
    p, t = np.asarray(probability, float), np.asarray(truth, float)
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins)) if len(p) else []
    bin_of = np.searchsorted(edges, p, side="right")
    columns = np.zeros((len(p), 2, bins))
    columns[np.arange(len(p)), 0, bin_of] = 1
    columns[np.arange(len(p)), 1, bin_of] = p - t
    return columns.reshape(len(p), 2 * bins)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """(..., 2 * bins) totals of `calibration_bins` -> mean squared distance between stated
    probability and frequency over bins, weighted by their size. It is too high by chance alone, by
    about what the jackknife takes off again."""
    size, apart = np.split(sums, 2, axis=-1)
    squares = np.divide(apart**2, size, out=np.zeros_like(apart), where=size > 0)
    return squares.sum(-1) / size.sum(-1)


# --------------------------------------------------------------------------------------------------
# Parts of the error of one attribute. All are functions of how often the model says one digit and
# the judge another, (..., 100) counts.


def joint(s: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(N,), (N,) digits -> (N, 100): 1 in the column of (own score, judge's score)."""
    return np.eye(100)[np.asarray(s, int) * 10 + np.asarray(j, int)]


class _Moments(NamedTuple):
    """Of the model's values x and the judge's y, under counts."""

    mean_x: np.ndarray
    mean_y: np.ndarray
    var_x: np.ndarray
    var_y: np.ndarray
    cov: np.ndarray


def _moments(counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> _Moments:
    """counts: (..., 10, 10); x: (..., 10) value of each own score, y: of each of the judge's."""
    p = counts / counts.sum((-1, -2), keepdims=True)
    px, py = p.sum(-1), p.sum(-2)
    mean_x, mean_y = (px * x).sum(-1), (py * y).sum(-1)
    dx, dy = x - mean_x[..., None], y - mean_y[..., None]
    cov = np.einsum("...ab,...a,...b->...", p, dx, dy)
    return _Moments(mean_x, mean_y, (px * dx**2).sum(-1), (py * dy**2).sum(-1), cov)


def _of_digits(counts: np.ndarray) -> _Moments:
    return _moments(counts.reshape(*counts.shape[:-1], 10, 10), DIGITS, DIGITS)


def kappa(counts: np.ndarray) -> np.ndarray:
    """Quadratic weighted kappa: 1 - the mean squared difference divided by that of unrelated scores
    with the same means and spreads. A test compares it with scikit-learn's."""
    m = _of_digits(counts)
    apart = (m.mean_x - m.mean_y) ** 2
    return 1 - (m.var_x + m.var_y - 2 * m.cov + apart) / (m.var_x + m.var_y + apart)


def pearson(counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation."""
    m = _of_digits(counts)
    return np.where(m.var_x * m.var_y > 1e-12, m.cov / np.sqrt(m.var_x * m.var_y), np.nan)


def spearman(counts: np.ndarray) -> np.ndarray:
    """Spearman's correlation: Pearson's of the ranks, equal scores sharing their mean rank."""
    counts = counts.reshape(*counts.shape[:-1], 10, 10)
    ranks = [np.cumsum(n, axis=-1) - n / 2 for n in (counts.sum(-1), counts.sum(-2))]
    m = _moments(counts, *ranks)
    return np.where(m.var_x * m.var_y > 1e-12, m.cov / np.sqrt(m.var_x * m.var_y), np.nan)


def slope(counts: np.ndarray) -> np.ndarray:
    """The judge's score for each point of the model's, by least squares: 1 is calibrated, below 1
    the model's scores are too far apart."""
    m = _of_digits(counts)
    return np.where(m.var_x > 1e-12, m.cov / m.var_x, np.nan)


def spread_ratio(counts: np.ndarray) -> np.ndarray:
    """Standard deviation of the model's scores over that of the judge's."""
    m = _of_digits(counts)
    return np.where(m.var_x * m.var_y > 1e-12, np.sqrt(m.var_x / m.var_y), np.nan)


def partial_columns(s: np.ndarray, j: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(N,) each -> (N, 9): 1, the three, and their products."""
    x = np.stack([np.asarray(v, float) for v in (s, j, given)], axis=1)
    products = [x[:, a] * x[:, b] for a in range(3) for b in range(a, 3)]
    return np.column_stack([np.ones(len(x)), x, *products])


def partial_correlation(sums: np.ndarray) -> np.ndarray:
    """(..., 9) totals of `partial_columns` -> correlation of the first two, given the third."""
    means = sums[..., 1:] / sums[..., :1]
    cov = np.empty((*sums.shape[:-1], 3, 3))
    pairs = [(a, b) for a in range(3) for b in range(a, 3)]
    for k, (a, b) in enumerate(pairs):
        cov[..., a, b] = cov[..., b, a] = means[..., 3 + k] - means[..., a] * means[..., b]
    deviation = np.sqrt(np.diagonal(cov, axis1=-2, axis2=-1))
    r = cov / (deviation[..., None] * deviation[..., None, :])
    free = np.sqrt((1 - r[..., 0, 2] ** 2) * (1 - r[..., 1, 2] ** 2))
    return (r[..., 0, 1] - r[..., 0, 2] * r[..., 1, 2]) / free


def alpha_columns(scores: np.ndarray) -> np.ndarray:
    """(N, R) the judges' scores of one attribute -> (N, 4): 1, their sum, the sum of their squares,
    the square of their sum."""
    x = np.asarray(scores, float)
    return np.column_stack([np.ones(len(x)), x.sum(1), (x**2).sum(1), x.sum(1) ** 2])


def krippendorff_alpha(sums: np.ndarray, judges: int) -> np.ndarray:
    """(..., 4) totals of `alpha_columns` -> Krippendorff's alpha for interval data, of answers that
    all judges scored. A test compares it with the krippendorff package's."""
    n = sums[..., 0] * judges
    observed = (judges * sums[..., 2] - sums[..., 3]) / (judges - 1)
    expected = (n * sums[..., 2] - sums[..., 1] ** 2) / (n - 1)
    return np.where(expected > 1e-12, 1 - observed / expected, np.nan)


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


def risk_coverage(
    confidence: Sequence[float], loss: Sequence[float]
) -> Callable[[np.ndarray], np.ndarray]:
    """Area under the risk-coverage curve as a function of weights (B, N): the mean, over k, of the
    mean loss of the k most confident responses; equally confident ones in random order."""
    order, starts = _levels(-np.asarray(confidence, float))
    loss = np.asarray(loss, float)[order]
    level = np.searchsorted(starts, np.arange(len(order)), side="right") - 1

    def area(weights: np.ndarray) -> np.ndarray:
        w = weights[:, order]
        size = np.add.reduceat(w, starts, axis=1)
        mean = np.add.reduceat(w * loss, starts, axis=1) / np.where(size > 0, size, 1)
        risk = np.cumsum(w * mean[:, level], axis=1) / np.maximum(np.cumsum(w, axis=1), 1e-12)
        return (w * risk).sum(1) / w.sum(1)

    return area


def escalation(
    own: Sequence[float], gain: Sequence[float], share: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Mean gain, as a function of weights (B, N), when this share of answers goes to a stronger
    model: those rated lowest, random ones among equals. gain: the judge's quality of the stronger
    model's answer minus that of the model's own."""
    order, starts = _levels(np.asarray(own, float))
    gain = np.asarray(gain, float)[order]

    def figure(weights: np.ndarray) -> np.ndarray:
        w = weights[:, order]
        size = np.add.reduceat(w, starts, axis=1)
        mean = np.add.reduceat(w * gain, starts, axis=1) / np.where(size > 0, size, 1)
        before = np.cumsum(size, axis=1) - size
        total = w.sum(1, keepdims=True)
        sent = np.clip(share * total - before, 0, size)
        return (sent * mean).sum(1) / total[:, 0]

    return figure
