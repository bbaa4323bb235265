"""Estimates, intervals and tests by hand: .venv/bin/python -m pytest tests/test_intervals.py"""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from evaluation import intervals
from evaluation.intervals import Estimate

IDS = [f"p{k}" for k in range(10)]
UP_DOWN = np.array([1.0, -1.0] * 5)  # ten prompts' pulls


def test_each_response_counts_the_same():
    """Prompt a: 1 and 3, b: 5. Mean 3; 1.5 responses per prompt; a is 2 below in all, b 2 above."""
    got = intervals.mean([1, 5, 3], ["a", "b", "a"])
    assert got.value == 3 and list(got.prompts) == ["a", "b"]
    assert got.pulls == pytest.approx([-2 / 1.5, 2 / 1.5])
    # A prompt without a pair is not there, and does not count.
    got = intervals.ratio([1, 0, 3], [2, 0, 2], ["a", "b", "c"])
    assert got.value == 1 and list(got.prompts) == ["a", "c"]
    assert got.pulls == pytest.approx([-0.5, 0.5])
    assert intervals.mean([], []) is None


def test_one_evaluation_is_students_over_prompts():
    values = [0.1, 0.4, 0.3, 0.9, 0.5, 0.6, 0.2, 0.8, 0.7, 0.9]
    got = intervals.interval([intervals.mean(values, IDS)])
    known = ttest_1samp(values, 0.0)
    low, high = known.confidence_interval(0.95)
    assert got == pytest.approx((np.mean(values), low, high, 10))
    assert intervals.spread([intervals.mean(values, IDS)], True).p() == pytest.approx(known.pvalue)
    above = intervals.spread([intervals.mean(values, IDS)], True).p_above(0.3)
    assert above == pytest.approx(ttest_1samp(values, 0.3, alternative="greater").pvalue)


@pytest.mark.parametrize("values", [[0.1, 0.2] * 4 + [0.3], [0.5] * 10])
def test_no_interval_below_ten_prompts_nor_without_variation(values):
    got = intervals.over_prompts(values, IDS[: len(values)])
    assert got == (pytest.approx(np.mean(values)), None, None, len(values))
    assert got.text().endswith("[-]")
    assert intervals.spread([intervals.mean(values, IDS[: len(values)])], True).p() is None


def test_a_difference_weighs_as_the_tables_do():
    """The tables say 0.1 and 0.2; prompt by prompt the sign would be the other one."""
    ours = [0.0] * 9 + [1.0], ["a"] * 9 + ["b"]
    theirs = [0.2, 0.2, 9.0], ["a", "b", "c"]  # c is not ours
    got = intervals.difference(ours, theirs)
    assert got.value == pytest.approx(0.1 - 0.2) and list(got.prompts) == ["a", "b"]
    # Ours: a is 9 x 0.1 below, b 0.9 above, 5 responses per prompt. Theirs do not vary.
    assert got.pulls == pytest.approx([-0.9 / 5, 0.9 / 5])
    assert (0.0 - 0.2 + 1.0 - 0.2) / 2 > 0
    assert intervals.difference(ours, ([1.0], ["c"])) is None


def test_seeds_and_prompts_by_hand():
    """Three seeds, values 1, 2, 3, each prompt 1 above or below. Mean squares: seeds 10 x 1,
    prompts 3 x 10 / 9, rest 0. Variance of the mean (10 + 10 / 3) / 30, and
    (40 / 3)^2 / (100 / 2 + (10 / 3)^2 / 9) degrees of freedom."""
    estimates = [Estimate(v, UP_DOWN, np.array(IDS)) for v in (1.0, 2.0, 3.0)]
    (both, both_df), (seeds, seeds_df) = intervals.spread(estimates, True).errors
    assert (seeds, seeds_df) == (pytest.approx(1 / math.sqrt(3)), 2)
    assert both == pytest.approx(math.sqrt(40 / 3 / 30))
    assert both_df == pytest.approx((40 / 3) ** 2 / (50 + (10 / 3) ** 2 / 9))
    got = intervals.interval(estimates)
    # Student's over seeds is the wider here: 4.3027 x 0.5774 against t(3.47) x 0.6667.
    assert got.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4) and got.n == 10


def test_a_part_that_is_not_seen_is_pooled():
    """Seeds and prompts whose means are alike: all squares are pooled, (0 + 0 + 20) / 29."""
    up = Estimate(0.0, UP_DOWN, np.array(IDS))
    none = [up._replace(pulls=sign * UP_DOWN) for sign in (1, 0, -1)]
    [(error, df)] = intervals.spread(none, True).errors
    assert (error, df) == (pytest.approx(math.sqrt(20 / 29 / 30)), 29)


def test_two_seeds_of_the_same_prompts_give_no_interval():
    two = [Estimate(v, UP_DOWN, np.array(IDS)) for v in (1.0, 2.0)]
    assert intervals.interval(two) == (1.5, None, None, 10)
    assert intervals.spread(two, True).p() is None


def test_prompts_are_no_more_certain_for_three_seeds_that_agree():
    """All seeds say 2: the prompts' part alone is left, 3 x 10 / 9 / 30, as for one seed."""
    wobble = np.array([1e-9, -1e-9] * 5)
    estimates = [Estimate(2.0, UP_DOWN + k * wobble, np.array(IDS)) for k in range(3)]
    got = intervals.interval(estimates)
    half = t.ppf(0.975, 9) * math.sqrt(1 / 9)
    assert (got.low, got.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_identical_evaluations_are_one_and_test_nothing():
    one = Estimate(0.3, UP_DOWN, np.array(IDS))
    spread = intervals.spread([one, one, one], True)
    assert spread.p() is None and intervals.spread([one], True).p() is not None
    assert intervals.interval([one, one, one]) == intervals.interval([one])


def test_seeds_with_prompts_of_their_own_are_the_unit():
    estimates = [Estimate(v, UP_DOWN, np.array([f"{v}{p}" for p in IDS])) for v in (1.0, 2.0, 3.0)]
    got = intervals.interval(estimates, same_prompts=False)
    # t(0.975, 2) = 4.3027; sd 1.
    assert got.mean == 2 and got.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert got.n == 3
    few = [e._replace(pulls=e.pulls[:9], prompts=e.prompts[:9]) for e in estimates]
    assert intervals.interval(few, same_prompts=False).low is None


def test_a_null_is_rejected_in_one_of_twenty():
    """Two models without a difference, three seeds on the same 30 prompts; over seeds alone a
    quarter would be rejected."""
    rng = np.random.default_rng(0)
    ids = np.array([str(k) for k in range(30)])
    rejected, by_seeds = [], []
    for _ in range(600):
        x = rng.normal(size=30) + 0.7 * rng.normal(size=(3, 30)) + 0.1 * rng.normal(size=(3, 1))
        spread = intervals.spread([intervals.mean(row, ids) for row in x], True)
        rejected.append(spread.p() < 0.05)
        by_seeds.append(ttest_1samp(x.mean(1), 0.0).pvalue < 0.05)
    assert 0.02 < np.mean(rejected) < 0.07 and np.mean(by_seeds) > 0.15


def test_a_proportion_does_not_end_at_certainty():
    """Twenty of twenty: Wilson's lower end n / (n + z^2), with t(0.975, 19) = 2.0930 for z."""
    ids = [str(k) for k in range(20)]
    got = intervals.over_prompts([1] * 20, ids, proportion=True)
    assert got.high == pytest.approx(1) and got.low == pytest.approx(
        20 / (20 + 2.0930**2), abs=1e-4
    )
    assert intervals.over_prompts([1] * 9, ids[:9], proportion=True).low is None
    # Pairs of equal responses are ten independent ones: 0.5 +- as for ten.
    twice = intervals.over_prompts([1, 1, 0, 0] * 5, [x for x in IDS for _ in range(2)], True)
    once = intervals.over_prompts([1, 0] * 5, IDS, True)
    assert twice == pytest.approx(once)


def test_the_jackknife():
    values, ids = np.array([1.0, 2.0, 4.0, 9.0]), list("abcd")
    columns = np.stack([np.ones(4), values, values**2], axis=1)

    def variance(sums):
        n, x, square = np.moveaxis(sums, -1, 0)
        return square / n - (x / n) ** 2

    # Without its bias the variance of a sample is that with n - 1.
    got = intervals.of_sums(variance, columns, ids, debias=True)
    assert got.value == pytest.approx(values.var(ddof=1))
    assert intervals.of_sums(variance, columns, ids).value == pytest.approx(values.var())
    # Of a mean the pulls are the distances from it, whichever way it is given.
    mean = intervals.mean(values, ids)
    weights = intervals.of_weights(lambda w: (w @ values) / w.sum(1), ids)
    assert mean.pulls == pytest.approx(values - 4) and weights.pulls == pytest.approx(mean.pulls)
    # A prompt's responses go together.
    of_two = intervals.of_weights(lambda w: (w @ values) / w.sum(1), list("aabb"))
    assert of_two.pulls == pytest.approx([1.5 - 4, 6.5 - 4])
    assert intervals.of_weights(lambda w: w.sum(1) * np.nan, ids) is None


def test_pairs_leave_out_both_ways():
    """Sums over ordered pairs (row, column) of three prompts; the diagonal does not count."""
    pairs = np.array([[[7, 1, 2], [3, 7, 4], [5, 6, 7]]], float)
    got = intervals.of_pairs(lambda x: x[..., 0], pairs, list("abc"))
    without = np.array([4 + 6, 2 + 5, 1 + 3])
    pseudo = 3 * 21 - 2 * without
    assert got.value == 21 and got.pulls == pytest.approx(pseudo - pseudo.mean())


def test_holm_and_the_gate():
    p = {"a": 0.01, "b": 0.04, "c": None, "d": 0.03}
    # Sorted 0.01 x 3, 0.03 x 2, 0.04 x 1, made rising.
    corrected = {"a": 0.03, "b": 0.06, "c": None, "d": 0.06}
    assert intervals.holm(p) == pytest.approx(corrected)
    assert intervals.after_primary(0.001, p) == pytest.approx(corrected)
    assert intervals.after_primary(0.05, p) == pytest.approx(corrected | {"a": 0.05})
    assert intervals.after_primary(None, {"a": None}) == {"a": None}


def test_power():
    """(1.95996 + 0.84162)^2 (0.17 / 0.02)^2 = 567.1 by the normal; t adds two."""
    assert 568 <= intervals.prompts_needed(0.17) <= 570
    assert intervals.prompts_needed(0.17, 0.04) < 150
    estimate = Estimate(0.0, UP_DOWN, np.array(IDS))
    assert intervals.paired_spread([estimate]) == pytest.approx(math.sqrt(10 / 9))
    assert intervals.paired_spread([estimate._replace(pulls=UP_DOWN[:4])]) is None


def test_a_figure_without_prompts_in_it_varies_by_seed_alone():
    """All prompts alike within a seed: three values 1, 2, 3; Student's t over seeds."""
    flat = [Estimate(v, np.zeros(10), np.array(IDS)) for v in (1.0, 2.0, 3.0)]
    got = intervals.interval(flat)
    assert got.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert intervals.interval([flat[0], *flat[:2]]).low is not None
