"""Predictors that know less, by hand: .venv/bin/python -m pytest tests/test_predictors.py"""

import itertools
import math

import numpy as np
import pytest

import reward
from evaluation import predictors
from evaluation.intervals import of_pairs

J = np.array([(8, 8, 8, 2, 2), (2, 2, 2, 2, 2), (5, 5, 5, 5, 5)])


def test_calibration_and_quality_are_the_rewards():
    s = np.array([(8, 7, 9, 1, 0), (9, 9, 9, 9, 9), (0, 0, 0, 0, 0)])
    assert predictors.calibrations(s, J) == pytest.approx(
        [reward.calibration(a, b) for a, b in zip(s.tolist(), J.tolist(), strict=True)]
    )
    assert predictors.qualities(J) == pytest.approx([24 / 27, 6 / 27, 15 / 27])


def test_the_best_constant_by_hand():
    """Ten answers judged 4 and one 9 in one attribute: 4 is nearer in all; of 3 x 2 and 2 x 8 the
    squares decide."""
    judge = [(4, 0, 0, 0, 0)] * 10 + [(9, 0, 0, 0, 0)]
    assert predictors.best_constant(judge) == (4, 0, 0, 0, 0)
    judge = [(2, 5, 9, 1, 3), (2, 5, 9, 1, 3), (8, 5, 9, 1, 3)]
    best = predictors.best_constant(judge)
    totals = {first: sum((1 - abs(first - j[0]) / 45) ** 2 for j in judge) for first in range(10)}
    assert best == (max(totals, key=totals.get), 5, 9, 1, 3)


def test_no_vector_is_better_than_the_best_constant():
    judge = np.random.default_rng(0).integers(0, 10, (12, 5))
    best = predictors.best_constant(judge.tolist())
    every = np.array(list(itertools.product(range(10), repeat=5)))
    errors = np.abs(every[:, None] - judge).mean(-1)  # (100000, 12)
    total = math.fsum(reward.calibration(best, j) for j in judge.tolist())
    assert total == pytest.approx(((1 - errors / 9) ** 2).sum(1).max())


def test_a_uniform_guess():
    """The MAE of one random digit against 0 is 4.5; the variance comes on top: five digits, each of
    variance 8.25."""
    [guess] = predictors.uniform_guess(np.array([(0,) * 5]))
    assert guess == pytest.approx(0.5**2 + 5 * 8.25 / 45**2)


def test_offset_moves_by_the_median():
    fit_s, fit_j = np.array([(8,) * 5] * 3), np.array([(5, 8, 9, 0, 8), (4,) * 5, (6,) * 5])
    # Differences by attribute: -3 -4 -2, 0 -4 -2, 1 -4 -2, -8 -4 -2, 0 -4 -2.
    got = predictors.offset(fit_s, fit_j, [(8, 8, 8, 8, 8), (1, 1, 1, 1, 1)])
    assert got.tolist() == [[5, 6, 6, 4, 6], [0, 0, 0, 0, 0]]  # 1 - 2 is off the scale


def test_the_rising_curve_is_a_median():
    fit_s = np.array([(1,) * 5] * 3 + [(2,) * 5] * 3 + [(9,) * 5])
    fit_j = np.array([(0,) * 5, (0,) * 5, (9,) * 5, (6,) * 5, (2,) * 5, (2,) * 5, (8,) * 5])
    # Medians 0, 2, 8 rise (means would be 3, 3.3, 8); beyond and between: the nearest own score.
    got = predictors.rising(fit_s, fit_j, [(0,) * 5, (1,) * 5, (2,) * 5, (4,) * 5, (9,) * 5])
    assert got[:, 0].tolist() == [0, 0, 2, 2, 8]
    # A judge that falls where the model rises: one level, with the least absolute error (4 or 6).
    falling = predictors.rising(np.array([(1,) * 5, (2,) * 5]), np.array([(6,) * 5, (4,) * 5]), J)
    assert (falling == falling[0, 0]).all() and 4 <= falling[0, 0] <= 6


def test_the_rising_curve_has_the_least_absolute_error():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, 30), rng.integers(0, 10, 30)
    curve = predictors.rising(np.stack([x] * 5, 1), np.stack([y] * 5, 1), np.stack([x] * 5, 1))
    best = min(
        sum(abs(c[a] - b) for a, b in zip(x, y, strict=True))
        for c in itertools.combinations_with_replacement(range(10), 4)
    )
    assert np.abs(curve[:, 0] - y).sum() == best


def test_surface_sees_length_and_not_truth():
    texts = ["word " * n for n in (1, 3, 7, 15, 31)]
    scores = np.array([(n,) * 5 for n in (1, 2, 3, 4, 5)])  # log2(words + 1)
    got = predictors.Surface(texts, scores).predict(["word " * 7, "lie! " * 15])
    assert got[:, 0].tolist() == [3, 4]
    # One wild judgement among many moves a mean, not a median.
    wild = np.array([(4,) * 5] * 8 + [(9,) * 5])
    assert (predictors.Surface(["same text"] * 9, wild).predict(["same text"]) == 4).all()
    assert predictors.surface_features("") == [0, 0, 0, 0, 0, 0, 0]
    listed = predictors.surface_features("Do:\n- one\n2. two\n```x```")
    assert listed[1] == pytest.approx(math.log(4)) and listed[2] == pytest.approx(math.log(3))
    assert listed[3] == 1


def test_other_samples_know_the_prompt_only():
    j = np.array([(8,) * 5, (2,) * 5, (3,) * 5, (5,) * 5])
    got = predictors.other_samples(j, ["a", "a", "a", "b"])
    # Medians of the two others: 2.5 (to even: 2), 5.5 (6), 5.
    assert got[:3, 0].tolist() == [2, 6, 5] and np.isnan(got[3]).all()  # b: one sample


def test_the_prompt_alone_predicts_what_its_state_says():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(60, 4))
    states[:, 3] = 7.0  # says nothing, and does not vary
    truth = np.clip(np.rint(4.5 + 2 * states[:, :1] + np.zeros((1, 5))), 0, 9)
    fit = predictors.PromptOnly(states[:40], truth[:40])
    assert np.abs(fit.predict(states[40:]) - truth[40:]).mean() < 0.5
    noise = predictors.PromptOnly(rng.normal(size=(40, 4)), truth[:40]).predict(states[40:])
    assert np.abs(noise - truth[:40].mean(0)).max() < 2  # it learns the mean, and little more


def test_shuffled_within_and_across():
    s = J.copy()
    # Within: 0 against 1 and 1 against 0, MAE 18/5. Across: 0-2, 1-2 and back, MAE 3 each.
    within, across = (1 - 3.6 / 9) ** 2, (1 - 3 / 9) ** 2
    found = predictors.shuffled(s, J, ["a", "a", "b"])
    assert found.sums == pytest.approx(
        np.array([[2 * within, 2 * across], [2 * across, 0]])  # rows and columns: prompts a, b
    )
    assert found.counts.tolist() == [[2, 2], [2, 0]] and found.prompts.tolist() == ["a", "b"]

    def mean_across(found):
        pairs = np.stack([found.sums, found.counts])
        return of_pairs(lambda x: x[..., 0] / x[..., 1], pairs, found.prompts)

    assert mean_across(found).value == pytest.approx(across)
    assert mean_across(predictors.shuffled(s[:1], J[:1], ["a"])) is None
    # Rows are whose scores, columns whose judgement.
    s = np.array([(9,) * 5, (2,) * 5, (5,) * 5])
    found = predictors.shuffled(s, J, ["a", "b", "c"])
    assert found.sums[0, 2] == pytest.approx(reward.calibration(s[0].tolist(), J[2].tolist()))
    assert found.sums[0, 2] != pytest.approx(found.sums[2, 0])
