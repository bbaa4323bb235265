"""Controls, each against values worked out by hand: .venv/bin/python -m pytest
tests/test_controls.py"""

import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score, roc_auc_score

import reward
from evaluation import controls, intervals

J = np.array([(8, 8, 8, 2, 2), (2, 2, 2, 2, 2), (5, 5, 5, 5, 5)])


def test_calibration_and_quality_are_the_rewards():
    s = np.array([(8, 7, 9, 1, 0), (9, 9, 9, 9, 9), (0, 0, 0, 0, 0)])
    assert controls.calibrations(s, J) == pytest.approx(
        [reward.calibration(a, b) for a, b in zip(s.tolist(), J.tolist(), strict=True)]
    )
    assert controls.qualities(J) == pytest.approx([24 / 27, 6 / 27, 15 / 27])


# ---------------------------------------------------------------------------- trivial predictors


def test_offset_moves_by_the_median():
    fit_s, fit_j = np.array([(8,) * 5] * 3), np.array([(5, 8, 9, 0, 8), (4,) * 5, (6,) * 5])
    # Differences by attribute: -3 -4 -2, 0 -4 -2, 1 -4 -2, -8 -4 -2, 0 -4 -2.
    got = controls.offset(fit_s, fit_j, [(8, 8, 8, 8, 8), (1, 1, 1, 1, 1)])
    assert got.tolist() == [[5, 6, 6, 4, 6], [0, 0, 0, 0, 0]]  # 1 - 2 is off the scale


def test_isotonic_only_rises():
    fit_s = np.array([(1,) * 5, (2,) * 5, (3,) * 5, (9,) * 5])
    fit_j = np.array([(0,) * 5, (6,) * 5, (2,) * 5, (8,) * 5])
    # 6 and 2 are out of order and become their mean, 4; beyond the ends it stays level.
    got = controls.isotonic(fit_s, fit_j, [(0,) * 5, (2,) * 5, (3,) * 5, (9,) * 5])
    assert got[:, 0].tolist() == [0, 4, 4, 8]
    falling = controls.isotonic(fit_s, fit_j[::-1], fit_s)
    assert (falling == 4).all()  # a judge that falls where the model rises: the mean


def test_surface_sees_length_and_not_truth():
    texts = ["word " * n for n in (1, 3, 7, 15, 31)]
    scores = np.array([(n,) * 5 for n in (1, 2, 3, 4, 5)])  # log2(words + 1)
    got = controls.surface(texts, scores, ["word " * 7, "lie! " * 15])
    assert got[:, 0].tolist() == [3, 4]
    assert controls.surface_features("") == [0, 0, 0, 0, 0, 0, 0]
    listed = controls.surface_features("Do:\n- one\n2. two\n```x```")
    assert listed[1] == pytest.approx(math.log(4)) and listed[2] == pytest.approx(math.log(3))
    assert listed[3] == 1


def test_other_samples_know_the_prompt_only():
    got = controls.other_samples(J, ["a", "a", "b"])
    assert got[0].tolist() == [2, 2, 2, 2, 2] and got[1].tolist() == [8, 8, 8, 2, 2]
    assert np.isnan(got[2]).all()  # one sample


def test_shuffled_within_and_across():
    s = J.copy()
    # Within: 0 against 1 and 1 against 0, MAE 18/5. Across: 0-2, 1-2 and back, MAE 3 each.
    within, across = (1 - 3.6 / 9) ** 2, (1 - 3 / 9) ** 2
    prompts = ["a", "a", "b"]
    found = controls.shuffled(s, J, prompts)
    assert found.sums == pytest.approx(
        np.array([[2 * within, 2 * across], [2 * across, 0]])  # rows and columns: prompts a, b
    )
    assert found.counts.tolist() == [[2, 2], [2, 0]]
    assert found.across(np.array([0, 1])) == pytest.approx(across)
    assert found.across(np.array([0, 0])) is None  # a prompt drawn twice is not another prompt
    assert controls.shuffled(s[:1], J[:1], ["a"]).across(np.array([0])) is None
    # Drawn twice and once: a-c counts twice; rows are whose scores, columns whose judgement.
    s, three = np.array([(9,) * 5, (2,) * 5, (5,) * 5]), ["a", "b", "c"]
    found = controls.shuffled(s, J, three)
    met = [reward.calibration(s[x].tolist(), J[y].tolist()) for x, y in ((0, 2), (2, 0))]
    assert found.across(np.array([0, 2, 0])) == pytest.approx(sum(met) / 2)
    assert met[0] != met[1] and found.sums[0, 2] == pytest.approx(met[0])


def test_skill():
    assert controls.skill(0.8, 0.7, 0.9) == pytest.approx(0.5)
    assert controls.skill(0.6, 0.7, 0.9) == pytest.approx(-0.5)
    assert controls.skill(0.8, 0.7, 0.7) is None


# -------------------------------------------------------------------------------- discrimination


def test_pairs_within_prompts_with_ties():
    # Prompt a: judge 1 2 2, model 3 3 1. Pairs that the judge tells apart: 0-1 (tie of the model,
    # half), 0-2 (model 3 > 1, wrong). Prompt b: judge 5 9, model 0 1, right.
    x, y, prompts = [3, 3, 1, 0, 1], [1, 2, 2, 5, 9], ["a", "a", "a", "b", "b"]
    a, b = controls.within_prompts(x, y, prompts)
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
    assert controls.ordering([1], [2]) == (0, 0, None) and controls.within_prompts([], [], []) == []


def test_orderings_against_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 4, (2, 12)).tolist()
        pairs = [(x[i] - x[k], y[i] - y[k]) for i in range(12) for k in range(i)]
        apart = [(a, b) for a, b in pairs if b]
        right = sum(0.5 if a == 0 else a * b > 0 for a, b in apart)
        assert controls.ordering(x, y)[:2] == pytest.approx((right, len(apart)))


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


def test_auroc_ece_and_kappa():
    assert controls.auroc([0.9, 0.8, 0.3, 0.3], [1, 0, 1, 0]) == pytest.approx(2.5 / 4)
    assert controls.auroc([0.9, 0.8], [1, 1]) is None
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 5, 60), rng.random(60) < 0.3
    assert controls.auroc(score, truth) == pytest.approx(roc_auc_score(truth, score))
    # Bins [0.1, 0.2): stated 0.3 of two, true 1; [0.9, 1]: stated 1.9 of two, true 1.
    got = controls.expected_calibration_error([0.1, 0.2 - 1e-9, 0.9, 1.0], [0, 1, 1, 0])
    assert got == pytest.approx((abs(0.3 - 1) + abs(1.9 - 1)) / 4)
    s = np.array([(0, 5, 3, 9, 1), (9, 5, 3, 0, 1)])
    judge = np.array([(0, 5, 3, 0, 1), (9, 5, 4, 9, 2)])
    got = controls.kappa(s, judge)
    # Full agreement 1; both constant None; a constant against one that varies 0; crossed -1.
    assert got[0] == pytest.approx(1) and got[1] is None and got[3] == pytest.approx(-1)
    assert got[2] == pytest.approx(0)


def test_kappa_is_scikit_learns():
    rng = np.random.default_rng(0)
    s, j = rng.integers(0, 10, (2, 40, 5))
    for a, value in enumerate(controls.kappa(s, j)):
        theirs = cohen_kappa_score(s[:, a], j[:, a], labels=range(10), weights="quadratic")
        assert value == pytest.approx(theirs)


def test_the_error_split_adds_up():
    s, judge = np.array([(1,) * 5, (3,) * 5]), np.array([(4,) * 5, (8,) * 5])
    split = controls.error_split(s, judge)[0]
    # Means 2 and 6; deviations 1 and 2; the order is right, so nothing is left of (9 + 25) / 2.
    assert split == pytest.approx((16, 1, 0)) and sum(split) == pytest.approx(17)
    turned = controls.error_split(s[::-1], judge)[0]
    assert turned == pytest.approx((16, 1, 8)) and sum(turned) == pytest.approx((1 + 49) / 2)


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
    own, judge = [9, 5, 5, 1], [0.9, 0.2, 0.8, 0.1]
    assert controls.risk_coverage(own, [0.1, 0.8, 0.2, 0.9]) == pytest.approx(
        [0.1, 0.3, 1.1 / 3, 0.5]
    )
    got = controls.selective_answering(own, judge)
    assert got.by_self == pytest.approx((0.1 + 0.3 + 1.1 / 3 + 0.5) / 4)
    assert got.random == pytest.approx(0.5)
    assert got.oracle == pytest.approx((0.1 + 0.15 + 1.1 / 3 + 0.5) / 4)
    same = controls.selective_answering([5] * 4, judge)
    assert same.by_self == pytest.approx(same.random)


def test_escalation():
    own, judge, stronger = [1, 9, 2, 8], [0.2, 0.3, 0.6, 0.9], [0.9, 0.9, 0.7, 0.5]
    # Gains 0.7, 0.6, 0.1, -0.4; half of four: lowest rated are the first and third.
    got = controls.escalation(own, judge, stronger, 0.5)
    assert got == pytest.approx((0.5 + 0.8 / 4, 0.5 + 0.5 * 0.25, 0.5 + 1.3 / 4))
    # A model that rates all alike does as chance does, whatever the order of the file.
    same = controls.escalation([5] * 4, judge, stronger, 0.5)
    assert same.by_self == pytest.approx(same.random)
    assert controls.escalation(own, judge, stronger, 0.0) == pytest.approx((0.5, 0.5, 0.5))


# ------------------------------------------------------------------------------------- inference


def test_an_interval_over_prompts_counts_prompts():
    got = intervals.over_prompts([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (got.mean, got.n) == (0.75, 2) and (got.low, got.high) == (0, 1)
    # Many equal copies of a response add nothing: the interval is that of two prompts.
    many = intervals.over_prompts([1] * 300 + [0] * 100, ["a"] * 300 + ["b"] * 100)
    assert (many.low, many.high) == (0, 1)
    rng = np.random.default_rng(0)
    wide = intervals.over_prompts(rng.normal(size=400), [str(k) for k in range(400)])
    assert wide.high - wide.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert intervals.over_prompts([0.5], ["a"]) == (0.5, None, None, 1)
    assert intervals.over_prompts([], []) == (None, None, None, 0)
    assert intervals.over_prompts([1, 0, 1], ["a", "a", "b"], draws=0) == (2 / 3, None, None, 2)
    assert intervals.Interval(0.5, 0.25, 0.75, 2).text() == "0.500 [0.250, 0.750]"
    assert intervals.Interval(0.5, None, None, 1).text(4) == "0.5000"
    assert intervals.NOTHING.text() == "-"


def test_an_interval_of_a_ratio_and_of_any_figure():
    got = intervals.ratio([1, 0, 3], [2, 0, 3])
    assert got.mean == pytest.approx(4 / 5) and got.n == 2  # a prompt without pairs says nothing
    assert (got.low, got.high) == (pytest.approx(0.5), pytest.approx(1))
    assert intervals.ratio([], []) == (None, None, None, 0)
    # Prompts are drawn with all their responses: three prompts with 2, 1 and 1.
    seen = []

    def figure(index):
        seen.append(len(index))
        return float(len(index))

    got = intervals.of_statistic(figure, ["a", "a", "b", "c"])
    assert got.mean == 4 == seen[0] and set(seen) == {3, 4, 5, 6}
    assert got.n == 3 and (got.low, got.high) == (3, 6)
    assert intervals.of_statistic(lambda i: None, ["a", "b"]) == (None, None, None, 2)
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    plain = intervals.over_prompts(values, [str(k) for k in range(400)])
    same = intervals.of_statistic(lambda i: values[i].mean(), [str(k) for k in range(400)])
    assert same.mean == pytest.approx(plain.mean)
    assert same.high - same.low == pytest.approx(plain.high - plain.low, rel=0.2)


def test_an_interval_over_seeds_is_students():
    got = intervals.over_seeds([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027; sd 1.
    assert got.mean == 2 and got.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert intervals.over_seeds([1.0]) == (1.0, None, None, 1)


def test_models_are_paired_on_prompts():
    ours = {p: [k / 20 + 0.1] for k, p in enumerate("abcdefgh")}
    theirs = {p: [k / 20] for k, p in enumerate("abcdefghi")}
    got = intervals.paired(ours, theirs)
    # A constant difference has no spread, however much the prompts differ; two of 2^8 sign
    # patterns are as extreme.
    assert got.interval.mean == pytest.approx(0.1) and got.interval.n == 8
    assert got.interval.low == pytest.approx(0.1) and got.p == pytest.approx(2 / 256)
    assert intervals.paired(ours, ours).p == 1.0
    assert intervals.paired({"a": [1.0]}, theirs).p is None
    assert intervals.paired({}, theirs).interval.n == 0
    seeds = intervals.paired_seeds([1.0, 2.0, 4.0], [0.0, 1.5, 2.0])
    # Differences 1, 0.5, 2: mean 7/6, sd 0.7638; t = 2.6458, p = 0.1181 with 2 degrees.
    assert seeds.interval.mean == pytest.approx(7 / 6) and seeds.p == pytest.approx(0.118, abs=1e-3)


def test_holm():
    got = intervals.holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
    # Sorted 0.01 x 3, 0.03 x 2, 0.04 x 1, made rising.
    assert got == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": None,
                   "d": pytest.approx(0.06)}  # fmt: skip
    assert intervals.holm({"a": None}) == {"a": None}


def test_the_win_rate_at_equal_lengths():
    # Wins go with length alone, and ours are longer: at equal lengths nothing is left.
    d = np.tile([-50.0, 50.0, 100.0, 150.0], 200)
    rng = np.random.default_rng(0)
    results = np.where(rng.random(800) < expit(2 * np.tanh(d / d.std())), 1, -1)
    assert (results == 1).mean() > 0.65
    assert intervals.length_adjusted(results, d) == pytest.approx(0.5, abs=0.06)
    assert intervals.length_adjusted(results, -d) == pytest.approx(0.5, abs=0.06)
    assert intervals.length_adjusted([1, 0, -1], [5, 5, 5]) is None
    assert intervals.length_adjusted([1, 1, -1, -1], [9, 8, -8, -9]) is None  # lengths say all
    assert intervals.length_adjusted([0, 0, 0, 0], [9, 8, -8, -9]) == pytest.approx(0.5)
