"""Predictors of the judge's scores that know less than the model is said to know (Sec. 4 has none).

A score vector that knows nothing of the answer can reach a high calibration too. So each figure is
shown beside predictors that are fitted on the training window's judgements (arguments `fit_...`)
and tested on others. They answer in digits, as the model has to. Fits are medians where the metric
wants medians: calibration falls with the absolute error.

Shapes: N responses, 5 attributes. s, j: (N, 5) integers 0-9, the model's scores and the judge's.
prompts: the N prompt ids.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import QuantileRegressor, RidgeCV

from prompts import Scores
from reward import RewardConfig

GAMMA = RewardConfig.gamma  # the metric's (Sec. 4.1), whatever a run's reward has
QUALITY = slice(0, 3)  # helpfulness, correctness, coherence


def calibrations(s: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(..., 5), (..., 5) -> (...): reward.calibration of each pair (Sec. 4.1)."""
    return (1 - np.abs(np.asarray(s, float) - j).mean(-1) / 9) ** GAMMA


def attribute_calibrations(s: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(..., 5), (..., 5) -> (..., 5): the calibration of each attribute alone (Figure 3)."""
    return calibrations(np.asarray(s)[..., None], np.asarray(j)[..., None])


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
# One vector for all


def best_constant(judge: Sequence[Scores]) -> Scores:
    """The one vector whose calibration against all these judge scores is highest, found among all
    100,000; of equals the smallest."""
    distances = np.abs(np.arange(10)[:, None, None] - np.asarray(judge))  # (10, N, 5)
    total = _squares(distances)
    best = np.flatnonzero(total.ravel() >= total.max() - 1e-9)[0]
    return tuple(int(x) for x in np.unravel_index(best, (10,) * 5))


def _squares(distances: np.ndarray) -> np.ndarray:
    """(10, N, 5) distances of each digit -> (10, 10, 10, 10, 10) sums of (1 - MAE / 9)^2. The
    square holds products of two attributes at most, so tables of pairs hold all of it."""
    total = np.full((10,) * 5, float(distances.shape[1]))
    for a in range(5):
        for b in range(a, 5):
            products = distances[:, :, a].astype(float) @ distances[:, :, b].T / 45**2  # (10, 10)
            if a == b:
                table = np.diag(products) - 2 * distances[:, :, a].sum(1) / 45
                total += table.reshape([10 if k == a else 1 for k in range(5)])
            else:
                total += 2 * products.reshape([10 if k in (a, b) else 1 for k in range(5)])
    return total


def uniform_guess(j: np.ndarray) -> np.ndarray:
    """(N,) expected calibration of five digits drawn at random (Sec. 4.2: "above chance")."""
    error = np.ones((len(j), 1))  # distribution of the sum of absolute errors so far
    for a in range(5):
        longer = np.zeros((len(j), error.shape[1] + 9))
        for digit in range(10):
            moved = np.abs(np.asarray(j)[:, a] - digit)
            for by in range(10):
                longer[moved == by, by : by + error.shape[1]] += error[moved == by] / 10
        error = longer
    return error @ (1 - np.arange(46) / 45) ** GAMMA


# --------------------------------------------------------------------------------------------------
# (N, 5) digits, NaN where nothing is predicted


def offset(fit_s: np.ndarray, fit_j: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The model's own scores, moved by the median difference of each attribute."""
    return digits(np.asarray(s) + np.median(np.asarray(fit_j) - fit_s, axis=0))


def rising(fit_s: np.ndarray, fit_j: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The model's own scores through the rising curve of each attribute that has the least absolute
    error (scikit-learn's isotonic regression knows squares alone)."""
    curves = [
        _rising_curve(x, y) for x, y in zip(np.array(fit_s).T, np.array(fit_j).T, strict=True)
    ]
    return np.stack([curve[x] for curve, x in zip(curves, np.array(s, int).T, strict=True)], axis=1)


def _rising_curve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(10,) digits by own score. Level by level: what the best curve costs that ends at a digit or
    below it, from which it is read backwards."""
    counts = np.zeros((10, 10))  # own score, judge's score
    np.add.at(counts, (x, y), 1)
    cost = counts @ np.abs(np.subtract.outer(np.arange(10), np.arange(10)))  # (own score, digit)
    reached = np.zeros((10, 10))  # least cost up to an own score, its digit being this or smaller
    for level in range(10):
        before = reached[level - 1] if level else 0
        reached[level] = np.minimum.accumulate(before + cost[level])
    curve, top = np.zeros(10, int), 9
    for level in reversed(range(10)):
        top = curve[level] = int(np.argmin(reached[level, : top + 1]))
    seen = np.flatnonzero(counts.any(1))
    # Between the own scores that were seen, and beyond them, the nearest one's digit.
    nearest = np.abs(np.subtract.outer(np.arange(10), seen)).argmin(1)
    return curve[seen[nearest]]


def surface_features(text: str) -> list[float]:
    """Length and form of an answer; they can be counted without understanding it."""
    words = text.split()
    return [
        math.log1p(len(words)),
        math.log1p(text.count("\n")),
        math.log1p(len(re.findall(r"^\s*([-*]|\d+[.)])\s", text, re.MULTILINE))),
        float("```" in text),
        len(re.findall(r"\d", text)) / max(1, len(text)),
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
    ]


class Surface:
    """The judge's scores by a linear fit of their median on surface features."""

    def __init__(self, texts: Sequence[str], j: np.ndarray):
        x = np.array([surface_features(text) for text in texts])
        self.fits = [
            QuantileRegressor(quantile=0.5, alpha=0, solver="highs").fit(x, y)
            for y in np.asarray(j, float).T
        ]

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        x = np.array([surface_features(text) for text in texts])
        return digits(np.stack([fit.predict(x) for fit in self.fits], axis=1))


def other_samples(j: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The judge's median for the prompt's other responses: it knows the prompt, and not the
    response. NaN where there is no other."""
    j = np.asarray(j, float)
    predicted = np.full(j.shape, np.nan)
    for g in groups(prompts):
        for k, i in enumerate(g if len(g) > 1 else ()):
            predicted[i] = digits(np.median(j[np.delete(g, k)], axis=0))
    return predicted


class PromptOnly:
    """The judge's scores from the prompt alone: ridge regression on the base model's last hidden
    state of the prompt. One row per prompt, its judgements averaged; alpha by the window's own
    cross-validation (leaving out one prompt at a time)."""

    ALPHAS = np.logspace(-2, 6, 17)

    def __init__(self, states: np.ndarray, j: np.ndarray):
        """states: (P, D); j: (P, 5) mean judge scores."""
        states = np.asarray(states, float)
        self.center, scale = states.mean(0), states.std(0)
        self.scale = np.where(scale > 0, scale, 1.0)
        self.fit = RidgeCV(self.ALPHAS, alpha_per_target=True)
        self.fit.fit((states - self.center) / self.scale, j)

    def predict(self, states: np.ndarray) -> np.ndarray:
        """(P, D) -> (P, 5)."""
        return digits(self.fit.predict((np.asarray(states, float) - self.center) / self.scale))


# --------------------------------------------------------------------------------------------------
# The model's own scores against other answers


class Shuffled(NamedTuple):
    """Calibration of each response's scores against the judge's scores of other responses. Entry
    (p, q) is over pairs of a response to prompt p (the model's scores) and one to prompt q (the
    judge's); a response's pair with itself is excluded."""

    sums: np.ndarray  # (P, P) sum of calibrations
    counts: np.ndarray  # (P, P) number of pairs
    prompts: np.ndarray  # (P,) ids, sorted


def shuffled(s: np.ndarray, j: np.ndarray, prompts: Sequence[str]) -> Shuffled:
    """What the model's scores are worth for other responses; own pairs excluded."""
    s, j = np.asarray(s), np.asarray(j)
    unique, prompt_of, size = np.unique(prompts, return_inverse=True, return_counts=True)
    of_error = (1 - np.arange(46) / 45) ** GAMMA
    sums = np.zeros((len(unique), len(unique)))
    for i in range(len(s)):
        values = of_error[np.abs(s[i] - j).sum(1)]
        values[i] = 0  # own pairs excluded
        sums[prompt_of[i]] += np.bincount(prompt_of, values, len(unique))
    counts = (np.outer(size, size) - np.diag(size)).astype(float)
    return Shuffled(sums, counts, unique)
