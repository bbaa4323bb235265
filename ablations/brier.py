"""A Brier-style calibration reward: 1 - mean((s - j)^2) / 81, RLCR's proper score, in the place of
the power of the mean absolute error (Sec. 4.1, Baselines; Eq. 1)."""

import cycle
import reward


def brier_reward(self_scores, judge, w_quality, w_calibration, gamma, penalty):
    if self_scores is None:
        return penalty
    squares = [(s - j) ** 2 for s, j in zip(self_scores, judge, strict=True)]
    brier = 1 - sum(squares) / len(squares) / 81
    return w_quality * reward.quality(judge) + w_calibration * brier


reward.reward = brier_reward
cycle.main()
