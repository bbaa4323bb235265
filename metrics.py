"""The metrics of Sec. 4.1 as pure functions of scores.

Only well-formed responses enter quality, calibration and the errors (Sec. 4.1, Metrics), so the
well-formed rate stands beside each of them: a model that answers only what it finds easy would look
good without it.

`rows` below are (prompt_id, self_scores | None, judge_scores | None) per response; None self-scores
are a malformed response."""

import math
from collections import defaultdict
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
