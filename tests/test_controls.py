"""Controls, each against values worked out by hand: .venv/bin/python -m pytest
tests/test_controls.py"""

import math

import krippendorff
import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from evaluation import controls, intervals

# -------------------------------------------------------------------------------- discrimination


def test_pairs_within_prompts_with_ties():
    # Prompt a: judge 1 2 2, model 3 3 1. Pairs that the judge tells apart: 0-1 (tie of the model,
    # half), 0-2 (model 3 > 1, wrong). Prompt b: judge 5 9, model 0 1, right.
    x, y, prompts = [3, 3, 1, 0, 1], [1, 2, 2, 5, 9], ["a", "a", "a", "b", "b"]
    found = controls.within_prompts(x, y, prompts)
    a, b = found["a"], found["b"]
    # tau-b of a: one discordant pair; of 3 pairs one is tied in each: -1 / sqrt(2 * 2).
    assert a == pytest.approx((0.5, 2, -0.5)) and a.accuracy == pytest.approx(0.25)
    assert b == pytest.approx((1, 1, 1))
    # Between: means 7/3 and 0.5 against 5/3 and 7: the wrong way round.
    means = [controls.prompt_means(v, prompts) for v in (x, y)]
    assert means[0] == pytest.approx([7 / 3, 0.5])
    assert controls.ordering(*means) == pytest.approx((0, 1, -1))
    assert controls.ordering([5, 5], [1, 2]) == (0.5, 1, None)  # the model does not vary
    assert controls.ordering([1, 2], [5, 5]) == (0, 0, None)
    assert controls.ordering([1, 2], [5, 5]).accuracy is None
    assert controls.ordering([1], [2]) == (0, 0, None) and controls.within_prompts([], [], []) == {}


def test_orderings_against_counting_pairs_and_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 4, (2, 12)).tolist()
        pairs = [(x[i] - x[k], y[i] - y[k]) for i in range(12) for k in range(i)]
        apart = [(a, b) for a, b in pairs if b]
        right = sum(0.5 if a == 0 else a * b > 0 for a, b in apart)
        found = controls.ordering(x, y)
        assert found[:2] == pytest.approx((right, len(apart)))
        assert found.tau == pytest.approx(kendalltau(x, y).statistic)
        total = controls.pair_sums(x, y).sum((1, 2))
        assert controls.accuracy(total) == pytest.approx(found.accuracy)


# ----------------------------------------------------------------------- what was not trained on


def logp(*rows):
    """One response whose five positions have the given digit probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(np.array([rows], float))


SURE = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]  # of a 5
EVEN = [0.1] * 10
HALF = [0, 0, 0, 0, 0.5, 0, 0.5, 0, 0, 0]  # 4 or 6


def test_likelihood_and_ranked_probability_score():
    p = logp(EVEN, EVEN, HALF, HALF, SURE)
    judge = np.array([(0, 9, 4, 5, 5)])
    nll = controls.negative_log_likelihood(p, judge)[0]
    assert nll[:3] == pytest.approx([math.log(10), math.log(10), math.log(2)])
    assert nll[3] == math.inf and nll[4] == 0
    # Even, judge 0: reached 0.1 ... 0.9 against 1: (0.81 + 0.64 + ... + 0.01) / 9 = 2.85 / 9.
    # Half, judge 4: at k = 4, 5 half is missing: 0.5 / 9. Judge 5: 0.5 too early at 4, late at 5.
    rps = controls.ranked_probability_score(p, judge)[0]
    assert rps == pytest.approx([2.85 / 9, 2.85 / 9, 0.5 / 9, 0.5 / 9, 0])
    # A certain digit d is (distance / 9).
    assert controls.ranked_probability_score(logp(*[SURE] * 5), [(5, 4, 8, 0, 9)])[0] == (
        pytest.approx([0, 1 / 9, 3 / 9, 5 / 9, 4 / 9])
    )
    assert controls.expected_scores(p)[0] == pytest.approx([4.5, 4.5, 5, 5, 5])
    # Mass on other tokens is not the digits' business: all halved is the same.
    assert controls.negative_log_likelihood(p + math.log(0.5), judge)[0, 2] == pytest.approx(
        math.log(2)
    )


def test_probability_of_low_quality():
    # Helpfulness and correctness 4 or 6, coherence 5: the sum is 13, 15, 15, 17.
    p = logp(HALF, HALF, SURE, EVEN, EVEN)
    assert controls.probability_below(p, 13 / 27)[0] == pytest.approx(0)
    assert controls.probability_below(p, 14 / 27)[0] == pytest.approx(0.25)
    assert controls.probability_below(p, 15.5 / 27)[0] == pytest.approx(0.75)
    assert controls.probability_below(p, 1.1)[0] == pytest.approx(1)


def at_once(figure, *values):
    """A function of weights, with all of them 1."""
    return figure(np.ones((1, len(values[0]))))[0]


def test_auroc_is_scikit_learns():
    score, truth = [0.9, 0.8, 0.3, 0.3], [1, 0, 1, 0]
    assert at_once(controls.auroc(score, truth), score) == pytest.approx(2.5 / 4)
    with np.errstate(invalid="ignore"):
        assert np.isnan(at_once(controls.auroc([0.9, 0.8], [1, 1]), [1, 1]))
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 5, 60), rng.random(60) < 0.3
    weights = (rng.random((7, 60)) < 0.8) * 1.0
    theirs = [roc_auc_score(truth, score, sample_weight=w) for w in weights]
    assert controls.auroc(score, truth)(weights) == pytest.approx(theirs)


def calibration_error(stated, truth, bins):
    columns = controls.calibration_bins(stated, truth, bins)
    debiased = intervals.of_sums(controls.calibration_error, columns, range(len(stated)), True)
    return controls.calibration_error(columns.sum(0)), debiased


def test_the_calibration_error():
    # Two bins: stated 0.1 and 0.2, true 0 and 1; stated 0.8 and 1, both true.
    plain, _ = calibration_error([0.1, 0.2, 0.8, 1.0], [0, 1, 1, 1], 2)
    assert plain == pytest.approx(2 / 4 * 0.35**2 + 2 / 4 * 0.1**2)
    # Of a model that is calibrated, chance alone makes it positive; without that, it is 0 in the
    # mean, and its intervals reach both ways.
    rng = np.random.default_rng(0)
    stated = rng.random((200, 100))
    truth = rng.random((200, 100)) < stated
    found = [calibration_error(p, t, 10) for p, t in zip(stated, truth, strict=True)]
    chance = np.mean([plain for plain, _ in found])
    assert chance > 0.012
    assert abs(np.mean([e.value for _, e in found])) < chance / 8
    assert min(e.value for _, e in found) < 0 < max(e.value for _, e in found)


def counts(s, j):
    return controls.joint(s, j).sum(0)


def test_kappa_by_hand_and_by_scikit_learn():
    # Full agreement 1; crossed -1; a constant against one that varies 0.
    assert controls.kappa(counts([0, 9], [0, 9])) == pytest.approx(1)
    assert controls.kappa(counts([9, 0], [0, 9])) == pytest.approx(-1)
    assert controls.kappa(counts([3, 3], [3, 4])) == pytest.approx(0)
    rng = np.random.default_rng(0)
    s, j = rng.integers(0, 10, (2, 40))
    theirs = cohen_kappa_score(s, j, labels=range(10), weights="quadratic")
    assert controls.kappa(counts(s, j)) == pytest.approx(theirs)


def test_correlations_slope_and_spread():
    """Model 1 2 3, judge 2 6 7: sums of products 5, of squares 2 and 14; ranks alike."""
    table = counts([1, 2, 3], [2, 6, 7])
    assert controls.slope(table) == pytest.approx(5 / 2)
    assert controls.pearson(table) == pytest.approx(5 / math.sqrt(28))
    assert controls.spearman(table) == pytest.approx(1)
    assert controls.spread_ratio(table) == pytest.approx(math.sqrt(2 / 14))
    assert controls.spearman(counts([1, 2, 3], [7, 6, 2])) == pytest.approx(-1)
    with np.errstate(invalid="ignore"):
        for figure in (controls.slope, controls.pearson, controls.spearman, controls.spread_ratio):
            assert np.isnan(figure(counts([4, 4], [1, 2])))  # the model does not vary
    rng = np.random.default_rng(0)
    s, j = rng.integers(0, 5, (2, 50))
    assert controls.spearman(counts(s, j)) == pytest.approx(spearmanr(s, j).statistic)
    assert controls.pearson(counts(s, j)) == pytest.approx(pearsonr(s, j).statistic)


def test_a_correlation_that_length_explains_is_gone():
    rng = np.random.default_rng(0)
    length = rng.normal(size=4000)
    s, j = length + rng.normal(size=4000), 2 * length + rng.normal(size=4000)
    assert pearsonr(s, j).statistic > 0.5
    got = controls.partial_correlation(controls.partial_columns(s, j, length).sum(0))
    assert abs(got) < 0.05
    # By hand, r_sj = 0.5, r_sl = 0.5, r_jl = 0: 0.5 / sqrt(0.75).
    s, j, given = [2, 0, 0, -2], [1, 1, -1, -1], [1, -1, 1, -1]
    assert pearsonr(s, j).statistic == pytest.approx(1 / math.sqrt(2))
    got = controls.partial_correlation(controls.partial_columns(s, j, given).sum(0))
    assert got == pytest.approx(1)  # s is j + given


def test_krippendorffs_alpha():
    """Two judges, and two answers scored (1, 1) and (2, 4)."""
    scores = np.array([(1, 1), (2, 4)])
    # Observed: pairs within units, (0 + 4) / 2 = 2. Expected: the six pairs 0 1 9 1 9 4, mean 4.
    got = controls.krippendorff_alpha(controls.alpha_columns(scores).sum(0), 2)
    assert got == pytest.approx(1 - 2 / 4)
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 10, (30, 1)) + rng.integers(-1, 2, (30, 3))
    theirs = krippendorff.alpha(scores.T, level_of_measurement="interval")
    got = controls.krippendorff_alpha(controls.alpha_columns(scores).sum(0), 3)
    assert got == pytest.approx(theirs)
    with np.errstate(invalid="ignore"):
        same = controls.alpha_columns([(3, 3)] * 4).sum(0)
        assert np.isnan(controls.krippendorff_alpha(same, 2))


def test_copied_examples():
    assert controls.copied([(8, 8, 8, 1, 1), (8, 8, 8, 2, 1)], [(8, 8, 8, 1, 1)]) == [1, 0]
    assert controls.copied([], [(8,) * 5]) == []


# ------------------------------------------------------------------------------------------ uses


def test_best_of_n():
    own, judge, prompts = [3, 5, 5, 2], [0.2, 0.4, 0.8, 0.5], ["a", "a", "a", "b"]
    # Of a the two rated 5: mean 0.6; b has one.
    a, b = controls.best_of_n(own, judge, prompts)
    assert a == pytest.approx((0.6, 1.4 / 3, 0.8)) and b == (0.5, 0.5, 0.5)


def test_selective_answering():
    # Sorted by own: losses 0.1, then two tied with mean 0.5, then 0.9.
    own, loss = [9, 5, 5, 1], [0.1, 0.8, 0.2, 0.9]
    area = controls.risk_coverage(own, loss)
    risks = [0.1, 0.3, 1.1 / 3, 0.5]
    assert at_once(area, own) == pytest.approx(sum(risks) / 4)
    # Without the first tied one: 0.1, 0.15, 1.2 / 3.
    assert area(np.array([[1, 0, 1, 1]]))[0] == pytest.approx((0.1 + 0.15 + 0.4) / 3)
    # All alike: chance.
    assert at_once(controls.risk_coverage([5] * 4, loss), loss) == pytest.approx(0.5)


def test_escalation():
    own, gain = [1, 9, 2, 8], [0.7, 0.6, 0.1, -0.4]
    # Half of four: the lowest rated are the first and third.
    assert at_once(controls.escalation(own, gain, 0.5), own) == pytest.approx(0.8 / 4)
    # Three eighths of four are one and a half: the first, and half of the third.
    assert at_once(controls.escalation(own, gain, 3 / 8), own) == pytest.approx(0.75 / 4)
    # A model that rates all alike does as chance does, whatever the order of the file.
    assert at_once(controls.escalation([5] * 4, gain, 0.5), own) == pytest.approx(0.25 / 2)
    assert at_once(controls.escalation(own, gain, 0.0), own) == 0
