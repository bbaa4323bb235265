"""Metrics by hand: .venv/bin/python -m pytest tests/test_metrics.py"""

import numpy as np
import pytest

from evaluation.controls import shuffled
from evaluation.metrics import (
    best_constant,
    correlation,
    frequent_digits,
    render,
    share_among,
    summarise,
    top_k_hits,
)


def test_intervals_are_over_prompts_and_the_rate_counts_responses():
    """Two responses to each of two prompts, one prompt all well-formed and one not at all: the
    bootstrap draws prompts, so that the rate lies between 0 and 1."""
    right = ((5,) * 5, (5,) * 5)
    table = summarise([("a", *right), ("a", *right), ("b", None, None), ("b", None, None)])
    assert table["well_formed"] == (0.5, 0.0, 1.0, 4)
    assert table["calibration"] == (1.0, None, None, 1)  # of one prompt
    assert summarise([])["quality"] == (None, None, None, 0)
    lines = render(table).splitlines()
    assert lines[0] == "well_formed              0.5000 [0.0000, 1.0000]   n = 4 responses"
    assert lines[2] == "calibration              1.0000                    n = 1 prompts"


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


def test_the_best_constant_by_hand():
    """Ten answers judged 4 and one 9 in one attribute: 4 is nearer in all; of 3 x 2 and 2 x 8 the
    squares decide."""
    judge = [(4, 0, 0, 0, 0)] * 10 + [(9, 0, 0, 0, 0)]
    assert best_constant(judge) == (4, 0, 0, 0, 0)
    judge = [(2, 5, 9, 1, 3), (2, 5, 9, 1, 3), (8, 5, 9, 1, 3)]
    best = best_constant(judge)
    totals = {first: sum((1 - abs(first - j[0]) / 45) ** 2 for j in judge) for first in range(10)}
    assert best == (max(totals, key=totals.get), 5, 9, 1, 3)


def test_shuffled_scores_by_hand():
    a, b = (9, 9, 9, 9, 9), (0, 0, 0, 0, 0)

    def shuffled_calibration(*pairs):
        """Of (self-scores, judge's scores), each of a prompt of its own."""
        s, j = zip(*pairs, strict=True)
        prompts = [str(k) for k in range(len(pairs))]
        return shuffled(s, j, prompts).across(np.arange(len(pairs)))

    # Each right for itself (calibration 1), wholly wrong for the other (0).
    assert shuffled_calibration((a, a), (b, b)) == 0
    assert shuffled_calibration((a, a), (a, a)) == 1
    assert shuffled_calibration((a, b), (b, a)) == 1
    assert shuffled_calibration((a, a)) is None


def test_correlation_has_its_sign_and_may_be_missing():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [3, 2, 1]) is None is correlation([], [])


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
