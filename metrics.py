"""The metrics of Sec. 4.1 as pure functions of scores.

Only well-formed responses enter quality, calibration and the errors (Sec. 4.1, Metrics), so the
well-formed rate stands beside each of them: a model that answers only what it finds easy would look
good without it.

`rows` below are (prompt_id, self_scores | None, judge_scores | None) per response; None self-scores
are a malformed response."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import reward
from prompts import ATTRIBUTES, Scores

Row = tuple[str, Scores | None, Scores | None]


class Estimate(NamedTuple):
    mean: float | None  # None where nothing was measured
    se: float | None  # standard error; None with fewer than two prompts
    n: int  # responses


def clustered_mean(values: Sequence[float], prompt_ids: Sequence[str]) -> Estimate:
    """Mean over responses, with a standard error that treats the responses to one prompt as
    dependent.

    With P prompts and residual sums u_p = sum of (value - mean) over prompt p:
    se = sqrt(P / (P - 1) * sum_p u_p^2) / n.
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, 0)
    mean = math.fsum(values) / n
    residual: dict[str, float] = defaultdict(float)
    for value, prompt in zip(values, prompt_ids, strict=True):
        residual[prompt] += value - mean
    p = len(residual)
    se = math.sqrt(p / (p - 1) * math.fsum(u * u for u in residual.values())) / n if p > 1 else None
    return Estimate(mean, se, n)


def summarise(rows: Sequence[Row], gamma: float = reward.RewardConfig.gamma) -> dict[str, Estimate]:
    """well_formed over all responses, the rest over the well-formed: quality, calibration, mae,
    mae/<attribute>, and calibration/constant, what one vector for all responses would reach.

    Raises ValueError if a well-formed response has no judge scores.
    """
    valid = [(prompt, s, j) for prompt, s, j in rows if s is not None]
    if any(j is None for _, _, j in valid):
        raise ValueError("a well-formed response has no judge scores")
    prompts = [prompt for prompt, _, _ in valid]

    def over_valid(f) -> Estimate:
        return clustered_mean([f(s, j) for _, s, j in valid], prompts)

    # A predictor that knows nothing of the response: the judge's median on these same responses.
    constant = [median_low(scores) for scores in zip(*(j for _, _, j in valid), strict=True)]
    table = {
        "well_formed": clustered_mean(
            [float(s is not None) for _, s, _ in rows], [prompt for prompt, _, _ in rows]
        ),
        "quality": over_valid(lambda s, j: reward.quality(j)),
        "calibration": over_valid(lambda s, j: reward.calibration(s, j, gamma)),
        "calibration/constant": over_valid(lambda s, j: reward.calibration(constant, j, gamma)),
        "mae": over_valid(reward.mean_absolute_error),
    }
    for a, name in enumerate(ATTRIBUTES):
        table[f"mae/{name}"] = over_valid(lambda s, j, a=a: abs(s[a] - j[a]))
    return table


def best_constant(judge: Sequence[Scores], gamma: float = reward.RewardConfig.gamma) -> Scores:
    """The one vector whose calibration against all these judge scores is highest, found from the
    medians by changing one attribute at a time."""
    best = [median_low(scores) for scores in zip(*judge, strict=True)]

    def total(vector: Sequence[int]) -> float:
        return math.fsum(reward.calibration(vector, j, gamma) for j in judge)

    while True:
        tries = [[*best[:a], s, *best[a + 1 :]] for a in range(len(best)) for s in range(10)]
        better = max(tries, key=total)
        if total(better) <= total(best):
            return tuple(best)
        best = better


def shuffled_calibration(
    valid: Sequence[tuple[Scores, Scores]], gamma: float = reward.RewardConfig.gamma
) -> float | None:
    """Mean calibration of each response's self-scores against every other response's judge scores:
    what the scores are worth if they knew nothing of their own response. None below two."""
    n = len(valid)
    if n < 2:
        return None
    pairs = ((s, j) for a, (s, _) in enumerate(valid) for b, (_, j) in enumerate(valid) if a != b)
    return math.fsum(reward.calibration(s, j, gamma) for s, j in pairs) / (n * (n - 1))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def top_k_accuracy(
    logp: Sequence[Sequence[Sequence[float]]], judge: Sequence[Scores], k: int = 5
) -> float | None:
    """Share of the judge's digits that are among the k most probable of the ten digit tokens (Sec.
    4.5); of equal ones the smaller digit goes first. logp: per response five rows of ten
    log-probabilities."""
    hits = [
        sum((p, -other) > (row[digit], -digit) for other, p in enumerate(row)) < k
        for rows, scores in zip(logp, judge, strict=True)
        for row, digit in zip(rows, scores, strict=True)
    ]
    return sum(hits) / len(hits) if hits else None


def constant_top_k(judge: Sequence[Scores], k: int = 5) -> float | None:
    """The same for one ranking of the digits by attribute, taken from these judge scores."""
    counts = [Counter(scores) for scores in zip(*judge, strict=True)]
    ranking = [[float(count[digit]) for digit in range(10)] for count in counts]
    return top_k_accuracy([ranking] * len(judge), judge, k)
