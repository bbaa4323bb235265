"""Metrics by hand: .venv/bin/python -m pytest tests/test_metrics.py"""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit

from evaluation.metrics import (
    agreement_with,
    ceiling,
    frequent_digits,
    length_adjusted,
    render,
    repeated_agreement,
    share_among,
    summarise,
    top_k_hits,
)


def test_intervals_are_over_prompts_and_the_rate_counts_responses():
    """Two responses to each of twenty prompts, every other prompt all well-formed and the others
    not at all: the interval is that of twenty coins, not of forty."""
    right = ((5,) * 5, (5,) * 5)
    rows = [(str(k // 2), *(right if k // 2 % 2 else (None, None))) for k in range(40)]
    table = summarise(rows)
    # Wilson with n = 19 (the variance counts n - 1) and t(0.975, 19) = 2.0930.
    half = 2.0930 / (1 + 2.0930**2 / 19) * math.sqrt(0.25 / 19 + 2.0930**2 / 4 / 19**2)
    assert table["well_formed"] == pytest.approx((0.5, 0.5 - half, 0.5 + half, 40), abs=1e-4)
    assert table["calibration"] == (1.0, None, None, 10)  # it does not vary
    assert summarise([])["quality"] == (None, None, None, 0)
    lines = render(table).splitlines()
    low, high = 0.5 - half, 0.5 + half
    assert lines[0] == f"well_formed              0.5000 [{low:.4f}, {high:.4f}]   n = 40 responses"
    assert lines[2] == "calibration              1.0000 [-]                n = 10 prompts"


def test_only_well_formed_responses_enter_the_scores():
    rows = [
        ("a", (8, 8, 8, 1, 1), (6, 6, 6, 2, 1)),  # quality 2/3, MAE 7/5
        ("a", None, None),
        ("b", (5, 5, 5, 5, 5), (3, 3, 3, 5, 5)),  # quality 1/3, MAE 6/5
    ]
    table = summarise(rows)
    assert table["well_formed"].mean == pytest.approx(2 / 3) and table["well_formed"].n == 3
    assert table["quality"].mean == pytest.approx(1 / 2) and table["quality"].n == 2
    assert table["calibration"].mean == pytest.approx(((1 - 7 / 45) ** 2 + (1 - 6 / 45) ** 2) / 2)
    assert table["mae"].mean == pytest.approx(1.3)
    assert table["mae/helpfulness"].mean == 2 and table["mae/complexity"].mean == 0.5
    assert table["mae/verbosity"].mean == 0
    # Medians (the lower of two): 3, 3, 3, 2, 1. MAE 9/5 to the first judgement, 7/5 to the second.
    constant = ((1 - 9 / 45) ** 2 + (1 - 7 / 45) ** 2) / 2
    assert table["calibration/constant"].mean == pytest.approx(constant)


def test_an_answer_that_the_judge_refused_is_well_formed_and_in_no_other_figure():
    rows = [
        ("a", (8, 8, 8, 1, 1), None),
        ("b", (5, 5, 5, 5, 5), (3, 3, 3, 5, 5)),
        ("b", None, None),
    ]
    table, without = summarise(rows), summarise(rows[1:])
    assert table["well_formed"].mean == pytest.approx(2 / 3) and table["well_formed"].n == 3
    assert table["quality"].mean == pytest.approx(1 / 3) and table["quality"].n == 1
    del table["well_formed"], without["well_formed"]
    assert table == without


def test_top_k_by_hand():
    """Ranks 0, 4, 5, 9, 0; of equally probable digits the smaller ones are first."""
    falling = [-float(d) for d in range(10)]
    rows = [falling] * 5
    assert top_k_hits([rows], [(0, 4, 5, 9, 0)]).mean() == pytest.approx(3 / 5)
    assert top_k_hits([rows], [(0, 4, 5, 9, 0)], k=1).mean() == pytest.approx(2 / 5)
    tied = [[0.0] * 10] * 5
    assert top_k_hits([tied], [(4, 5, 4, 9, 0)]).mean() == pytest.approx(3 / 5)
    assert top_k_hits([], []).size == 0
    assert top_k_hits([rows, tied], [(0, 4, 5, 9, 0), (4, 5, 4, 9, 0)]).tolist() == [
        [True, True, False, False, True], [True, False, True, False, True]
    ]  # fmt: skip
    # In the first attribute 0-4 are seen twice and 5 once; the rest is constant.
    judge = [(d, 1, 1, 1, 1) for d in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5)]
    digits = frequent_digits(judge)
    assert digits[0] == [0, 1, 2, 3, 4] and digits[1] == [1, 0, 2, 3, 4]
    assert [share_among(digits, j) for j in judge] == [1.0] * 10 + [4 / 5]
    assert share_among(digits, (9, 9, 2, 5, 0)) == pytest.approx(2 / 5)


def test_agreement_by_number_of_judgements():
    """Three judgements 0, 0, 3 of one attribute. One predicts another: 0-0, 0-3 and 3-0. Two: the
    others' two middle digits count half each."""
    draws = [(0,) * 5, (0,) * 5, (3,) * 5]
    off = (1 - 3 / 9) ** 2
    assert agreement_with(draws, 1) == pytest.approx((2 * 1 + 4 * off) / 6)
    # Left out 0: others 0 and 3, twice; left out 3: others 0 and 0.
    assert agreement_with(draws, 2) == pytest.approx((2 * (1 + off) / 2 + off) / 3)


def test_the_ceiling_is_more_than_leave_one_out_agreement():
    """(4 A(3) - 2 A(1)) / 2 of four or five judgements, where A(m) is agreement with m others."""
    draws = [(0,) * 5, (0,) * 5, (3,) * 5, (0,) * 5]
    one, three = agreement_with(draws, 1), agreement_with(draws, 3)
    assert ceiling(draws) == pytest.approx(2 * three - one)
    assert ceiling(draws[:3]) is None
    # A judge with rounded normal noise, whose own medians are known: leave-one-out is too low.
    rng = np.random.default_rng(0)
    middle = rng.integers(2, 8, (400, 1, 5))
    scores = np.clip(np.rint(middle + rng.normal(size=(400, 5, 5))), 0, 9).astype(int)
    known = ((1 - np.abs(scores - middle).mean(-1) / 9) ** 2).mean()
    table = repeated_agreement([str(k) for k in range(400)], scores.tolist())
    assert table["median of the others"].mean < known - 0.02
    assert table["ceiling"].mean == pytest.approx(known, abs=0.01)
    assert table["ceiling"].high - table["ceiling"].low < 0.02


def test_the_win_rate_at_equal_lengths():
    # Wins go with length alone, and ours are longer: at equal lengths nothing is left.
    d, ids = np.tile([-50.0, 50.0, 100.0, 150.0], 200), [str(k) for k in range(800)]
    rng = np.random.default_rng(0)
    results = np.where(rng.random(800) < expit(2 * np.tanh(d / d.std())), 1, -1)
    assert (results == 1).mean() > 0.65

    def rate(results, d):
        found = length_adjusted(results, d, [str(k) for k in range(len(d))])
        return found and expit(found.value)

    assert rate(results, d) == pytest.approx(0.5, abs=0.06)
    assert rate(results, -d) == pytest.approx(0.5, abs=0.06)
    # Its standard error is that of the regression.
    known = sm.GLM((results + 1) / 2, sm.add_constant(np.tanh(d / d.std())),
                   family=sm.families.Binomial()).fit(cov_type="HC1")  # fmt: skip
    found = length_adjusted(results, d, ids)
    assert found.pulls.std(ddof=1) / math.sqrt(800) == pytest.approx(known.bse[0], rel=0.01)
    assert rate([1, 0, -1], [5, 5, 5]) is None
    assert rate([1, 1, -1, -1], [9, 8, -8, -9]) is None  # lengths say all
    assert rate([0, 0, 0, 0], [9, 8, -8, -9]) is None


def test_no_win_rate_at_lengths_that_were_not_seen():
    """Ten characters against two thousand, as AlpacaEval's gpt4_gamed: 4 % are won, and what would
    be won at equal length nobody has seen."""
    rng = np.random.default_rng(0)
    d = 10.0 - rng.normal(2000, 600, 800).clip(200)
    results = np.where(rng.random(800) < 0.04, 1, -1)
    assert length_adjusted(results, d, [str(k) for k in range(800)]) is None
    d[:100] = 50.0  # an eighth of ours are longer
    assert length_adjusted(results, d, [str(k) for k in range(800)]) is not None
