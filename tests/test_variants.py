"""The table of ablate.py, by hand: .venv/bin/python -m pytest tests/test_variants.py"""

import numpy as np
import pytest
from test_tables import JUDGE, PROMPTS, RIGHT, evaluation, pairs, records, rollout

from evaluation import variants
from evaluation.comparison_tables import Found
from evaluation.intervals import Interval
from evaluation.results import Cell
from evaluation.table import Results

# Two and three points too high or too low: calibrations (7/9)^2 and (6/9)^2 in turn.
OFF = pairs([j + (2 + k % 2) * (1 if j < 6 else -1) for k, j in enumerate(JUDGE)], JUDGE)
LOSS = 1 - (49 + 36) / 2 / 81


def differences(against: str, **models) -> dict[tuple[str, str], variants.Difference]:
    e = evaluation("a", {("one", m): rows for m, rows in models.items()})
    results = Results([e], tuple(models), against)
    rows = variants.differences(results, [m for m in models if m != against])
    return {(row.variant, row.figure): row for row in rows}


def test_a_variant_minus_the_reference():
    row = differences("see", see=RIGHT, worse=OFF)["worse", "calibration"]
    assert row.apart.figure.mean == pytest.approx(-LOSS) and row.seeds == 1
    assert variants.allows(row) == "difference found: lower than the reference's"
    row = differences("worse", see=RIGHT, worse=OFF)["see", "calibration"]
    assert row.apart.figure.mean == pytest.approx(LOSS)
    assert variants.allows(row) == "difference found: higher than the reference's"


def test_a_lost_block_counts_against_the_well_formed_rate_alone():
    """Two of twelve answers are malformed; the others are the reference's."""
    rows = differences("see", see=RIGHT, lost=[None, None, *RIGHT[2:]])
    assert rows["lost", "well-formed"].apart.figure.mean == pytest.approx(-2 / 12)
    assert rows["lost", "calibration"].apart.figure.mean == 0
    assert variants.allows(rows["lost", "calibration"]).startswith("no difference here:")


def test_corrected_over_the_rows_that_have_a_p_value():
    """The quality is the same in all: only three calibrations can be tested."""
    half = [a if k % 2 else b for k, (a, b) in enumerate(zip(OFF, RIGHT, strict=True))]
    some = [*OFF[:2], *RIGHT[2:]]
    rows = differences("see", see=RIGHT, off=OFF, half=half, some=some)
    tested = {key: row for key, row in rows.items() if row.apart.p is not None}
    assert {key[1] for key in tested} == {"calibration"} and len(tested) == 3
    p = {key[0]: row.apart.p for key, row in tested.items()}
    assert p["off"] < p["half"] < p["some"]
    corrected = {key[0]: row.corrected for key, row in tested.items()}
    assert corrected == pytest.approx(
        {"off": 3 * p["off"], "half": 2 * p["half"], "some": p["some"]}
    )


def cell(rows) -> Cell:
    """rows: (prompt, sample, own digit, judge's digit)"""
    answers = [rollout(p, (s,) * 5, (j,) * 5, k) for p, k, s, j in rows]
    return Cell("one", "see", {}, answers)


def test_pairs_within_prompts():
    """Three answers of which two are ordered wrong: 2 of 3 pairs right. Two that the judge holds
    equal: no pair. Two that the model holds equal: half a pair."""
    values, prompts = variants.pairs_within_prompts(cell([
        ("a", 0, 2, 2), ("a", 1, 8, 5), ("a", 2, 5, 8), ("b", 0, 1, 4), ("b", 1, 9, 4),
        ("c", 0, 7, 3), ("c", 1, 7, 6),
    ]))  # fmt: skip
    assert values == pytest.approx([2 / 3] * 3 + [0.5]) and prompts == ["a", "a", "a", "c"]


def test_the_swap_drop_is_of_correctness_and_positive_where_the_score_falls():
    c = cell([])
    c.sensitivity = [
        {"prompt_id": "a", "as_it_is": [9, 7, 1, 1, 1], "another": [9, 3, 1, 1, 1], "cut": None},
        {"prompt_id": "b", "as_it_is": [9, 4, 1, 1, 1], "another": [1, 5, 1, 1, 1], "cut": None},
        {"prompt_id": "c", "as_it_is": None, "another": [1, 5, 1, 1, 1], "cut": None},
    ]
    assert variants.swap_drop(c) == ([4, -1], ["a", "b"])


@pytest.mark.parametrize(
    "figure, corrected, said",
    [
        (Interval(0.1, 0.02, 0.18, 5), 0.04, "difference found: higher"),
        (Interval(-0.1, -0.18, -0.02, 5), 0.04, "difference found: lower"),
        (Interval(0.01, -0.02, 0.04, 5), 0.5, "no difference found; below -0.020 and above +0.040"),
        (Interval(0.1, 0.02, 0.18, 5), 0.2, "no difference found after correction"),
        (Interval(0.1, None, None, 5), None, "nothing: there is no interval"),
        ("in 1 of 2 only", None, "nothing: there is no interval"),
    ],
)
def test_what_a_row_allows(figure, corrected, said):
    row = variants.Difference("one", "v", "quality", 5, Found(figure, None, None), corrected)
    assert variants.allows(row).startswith(said)


def test_the_tables_over_seeds_of_which_one_lacks_a_variant(tmp_path):
    evaluations = [
        evaluation(name, {("one", "base"): OFF, ("one", "see"): RIGHT}
                   | ({("one", "rare"): some} if name != "c" else {}),
                   [name + p for p in PROMPTS])
        for name, some in zip("abc", (OFF, [*OFF[:6], *RIGHT[6:]], None), strict=True)
    ]  # fmt: skip
    results = Results(evaluations, ("base", "see", "rare"), "see")
    rows = variants.differences(results, ["rare"])
    [first, *_] = records(variants.table(results, rows))
    by_hand = -np.mean([LOSS, LOSS / 2])
    assert first["seeds"] == "2" and first["difference"].startswith(f"{by_hand:.3f} [")
    levels = {r["model"]: r for r in records(variants.levels(results))}
    assert (levels["rare"]["seeds"], levels["see"]["seeds"]) == ("2", "3")
    variants.draw(results, rows, tmp_path / "forest")
    assert "rare" in (tmp_path / "forest-one.svg").read_text()
