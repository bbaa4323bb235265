"""Eq. 1 by hand: .venv/bin/python -m pytest tests/test_reward.py"""

import pytest

from reward import calibration, mean_absolute_error, quality, reward

JUDGE = (6, 3, 9, 2, 4)


def test_quality_reads_the_first_three():
    assert quality(JUDGE) == pytest.approx(18 / 27)
    assert quality((6, 3, 9, 9, 9)) == quality(JUDGE)


def test_calibration_reads_all_five():
    own = (8, 3, 9, 0, 5)  # errors 2, 0, 0, 2, 1: MAE 1
    assert mean_absolute_error(own, JUDGE) == 1
    assert calibration(own, JUDGE) == pytest.approx((8 / 9) ** 2)
    assert calibration(own, JUDGE, gamma=1.0) == pytest.approx(8 / 9)
    assert calibration(JUDGE, JUDGE) == 1
    assert calibration((0,) * 5, (9,) * 5) == 0


def test_reward_weighs_quality_and_calibration():
    own = (8, 3, 9, 0, 5)
    assert reward(own, JUDGE) == pytest.approx(0.7 * 18 / 27 + 0.3 * 64 / 81)
    assert reward(own, JUDGE, 0.0, 1.0, 1.0) == pytest.approx(8 / 9)


def test_malformed_fails_closed_and_a_missing_judgement_is_no_number():
    assert reward(None, None) == -1
    assert reward(None, JUDGE) == -1
    assert reward(None, JUDGE, penalty=-2.5) == -2.5
    with pytest.raises(ValueError, match="no judge scores"):
        reward((8, 3, 9, 0, 5), None)
    with pytest.raises(ValueError):
        reward((8, 3, 9, 0), JUDGE)
