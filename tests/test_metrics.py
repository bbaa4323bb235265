"""Metrics by hand: .venv/bin/python -m pytest tests/test_metrics.py"""

import math

import pytest

from metrics import clustered_mean, summarise


def test_standard_error_counts_prompts_not_responses():
    # Two prompts, values 1, 1 and 0, 0: mean 1/2, residual sums +1 and -1,
    # se = sqrt(2 / 1 * (1 + 1)) / 4 = 1/2, as for two independent values 1 and 0.
    estimate = clustered_mean([1, 1, 0, 0], ["a", "a", "b", "b"])
    assert estimate == (0.5, 0.5, 4)
    # All prompts different: the usual s / sqrt(n), s^2 = 1/3.
    alone = clustered_mean([1, 1, 0, 0], ["a", "b", "c", "d"])
    assert alone.se == pytest.approx(math.sqrt(1 / 3 / 4))
    assert clustered_mean([1.0], ["a"]) == (1.0, None, 1)
    assert clustered_mean([], []) == (None, None, 0)


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


def test_a_well_formed_response_without_a_judgement_is_an_error():
    with pytest.raises(ValueError, match="no judge scores"):
        summarise([("a", (8, 8, 8, 1, 1), None)])
