"""The reward of Calibration-Coupled RL (Sec. 3.1, Eq. 1) for one response.

`s` are the model's self-scores and `j` the judge's scores: five integers 0-9 each, in the order of
`prompts.ATTRIBUTES`. Quality uses the first three (helpfulness, correctness, coherence),
calibration all five.

The metric "calibration" of training and evaluation is the function below with the paper's gamma,
whatever exponent the reward of a run has, so that runs can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from storage.options import Finite, Options, Positive

EVALUATIVE = 3  # the first attributes, which make the quality; the others describe


@dataclass(frozen=True)
class RewardConfig(Options):
    prefix: ClassVar[str] = "reward."

    w_quality: Finite = 0.7
    """Weight w_q of the quality term (Sec. 4.1, training budget)."""
    w_calibration: Finite = 0.3
    """Weight w_c of the calibration term (Sec. 4.1)."""
    gamma: Positive = 2.0
    """Exponent of the calibration term; above 1 it penalises large gaps more (Sec. 3.1)."""
    penalty: Finite = -1.0
    """Reward of a malformed response (Eq. 1, first case)."""


def quality(judge: Sequence[int]) -> float:
    """Mean of the three evaluative scores on [0, 1] (Eq. 1, quality)."""
    return sum(judge[:EVALUATIVE]) / EVALUATIVE / 9


def mean_absolute_error(self_scores: Sequence[int], judge: Sequence[int]) -> float:
    """MAE(s, j) over the five attributes, in points on the 0-9 scale (Algorithm 1, line 14)."""
    return sum(abs(s - j) for s, j in zip(self_scores, judge, strict=True)) / len(judge)


def calibration(
    self_scores: Sequence[int], judge: Sequence[int], gamma: float = RewardConfig.gamma
) -> float:
    """(1 - MAE(s, j) / 9) ** gamma on [0, 1] (Eq. 1, calibration)."""
    return (1 - mean_absolute_error(self_scores, judge) / 9) ** gamma


def reward(
    self_scores: Sequence[int] | None,
    judge: Sequence[int] | None,
    w_quality: float = RewardConfig.w_quality,
    w_calibration: float = RewardConfig.w_calibration,
    gamma: float = RewardConfig.gamma,
    penalty: float = RewardConfig.penalty,
) -> float:
    """Eq. 1. `self_scores` is None for a malformed response, whose reward is the penalty.

    Raises ValueError for a well-formed response without judge scores: its reward is undefined.
    """
    if self_scores is None:
        return penalty
    if judge is None:
        raise ValueError(
            "a well-formed response has no judge scores; its reward cannot be computed"
        )
    q, c = quality(judge), calibration(self_scores, judge, gamma)
    return w_quality * q + w_calibration * c
