"""Thresholds by Learn-then-Test: .venv/bin/python -m pytest tests/test_risk.py"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rollout

from config import CellConfig
from evaluation import risk
from evaluation.results import Cell
from evaluation.risk import GRID, calibrate, choose, p_values
from evaluation.threshold import Threshold, Wish
from storage.files import FileError
from storage.record import append_rollout


def ids(n: int) -> list[str]:
    return [f"p{k}" for k in range(n)]


def test_p_values_by_hand():
    """Of 13 answers one is malformed and two are of low confidence; of the ten others two are
    bad."""
    conf = np.array([0.9] * 10 + [0.2, 0.2, np.nan])
    loss = np.array([1.0, 1.0] + [0.0] * 8 + [1.0, 1.0, np.nan])
    p = dict(zip(GRID, p_values(conf, loss, 0.5, binary=True), strict=True))
    # At most 2 of 10 at a rate of a half: (1 + 10 + 45) / 1024. Hoeffding's bound is larger.
    assert math.isclose(p[0.9], 56 / 1024) and p[0.21] == p[0.9] and p[0.91] == 1
    # At most 4 of 12: (1 + 12 + 66 + 220 + 495) / 4096.
    assert math.isclose(p[0.2], 794 / 4096) and p[0.0] == p[0.2]
    # Losses that are not 0 or 1: e times the tail, or exp(-10 KL(0.2, 0.5)) where that is smaller.
    kl = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    q = p_values(conf, loss, 0.5, binary=False)[90]
    assert math.isclose(q, min(math.e * 56 / 1024, math.exp(-10 * kl))) and q > p[0.9]
    assert p_values(conf, loss, 0.1, binary=True)[90] > 0.5  # a risk of 0.2 is no 0.1


def world(good: int, bad: int) -> tuple[list, list]:
    """Confidence 0.8 and quality 1, confidence 0.3 and quality 0."""
    return [0.8] * good + [0.3] * bad, [1.0] * good + [0.0] * bad


@pytest.mark.parametrize(("target", "measure"), [(0.1, "bad"), (0.9, "quality")])
def test_the_threshold_lies_above_the_bad_answers(target, measure):
    conf, quality = world(150, 150)
    found = choose(conf, quality, ids(300), target, measure)
    assert found.value == 0.31 and found.n == 300  # the lowest that leaves them out
    assert (found.coverage, found.reached) == (0.5, 0.0 if measure == "bad" else 1.0)
    turned = [1 - c for c in conf]  # a model that is sure of its bad answers
    assert choose(turned, quality, ids(300), target, measure) is None
    # Half of the answers are bad: a promise of 60 % lets all through.
    loose = 0.6 if measure == "bad" else 0.4
    assert choose(conf, quality, ids(300), loose, measure).value == 0
    malformed = choose([*conf, *[math.nan] * 300], [*quality, *[math.nan] * 300], ids(600), target,
                       measure)  # fmt: skip
    assert malformed.value == 0.31 and malformed.coverage == 0.25


def test_risk_that_does_not_fall_with_the_threshold():
    """The ten answers of highest confidence are bad. A sequence of tests from the top would end
    there; all 310 together have 3 % of bad ones."""
    conf, quality = world(300, 0)
    found = choose([0.99] * 10 + conf, [0.0] * 10 + quality, ids(310), 0.1, "bad")
    assert found.value <= 0.8 and math.isclose(found.reached, 10 / 310)


def test_answers_to_one_prompt_count_once():
    conf, quality = world(200, 0)
    assert choose(conf, quality, ids(200), 0.1, "bad").value == 0
    assert choose(conf, quality, ids(10) * 20, 0.1, "bad") is None  # 0.9^8 is no small p-value


def test_a_promise_that_does_not_hold_is_rarely_made():
    """Whatever the confidence, 12 % are bad: each of the 400 thresholds for 10 % is a mistake."""
    rng = np.random.default_rng(0)
    made = 0
    for _ in range(400):
        conf, bad = rng.random(200), rng.random(200) < 0.12
        made += choose(conf, 1.0 - bad, ids(200), 0.1, "bad") is not None
    assert made <= 30  # at most 20 on average; 30 or fewer with probability 0.99


def test_the_confidence_is_that_of_the_expected_scores(tokenizer):
    """Sampled scores of 9 whose digits are 9 or 0 with equal probability: 4.5 expected."""
    line = [[math.log(0.5)] + [-math.inf] * 8 + [math.log(0.5)]] * 5
    r = make_rollout(tokenizer)
    rollouts = [
        replace(r, prompt_id="a", self_scores=(9,) * 5),
        replace(r, prompt_id="b", self_scores=(6,) * 5),
        replace(r, prompt_id="c", self_scores=None, judge_scores=None),
        replace(r, prompt_id="d", judge_scores=None, refused="no"),
    ]
    cell = Cell("one", "m", {}, rollouts)
    digits = {("a", 0): {"own": line, "judge": None}}
    with_digits = replace(cell, digits={"m": digits})
    plain, expected = risk.answers(cell), risk.answers(with_digits)
    assert list(plain.prompts) == ["a", "b", "c"] and plain.scores == "sampled"
    np.testing.assert_allclose(plain.confidence, [1, 6 / 9, np.nan])
    # An answer whose digits could not be read is not sent.
    np.testing.assert_allclose(expected.confidence, [0.5, np.nan, np.nan])
    assert expected.scores == "expected"


@pytest.fixture
def results(tmp_path, tokenizer) -> Path:
    """120 prompts: 80 answers rated 8 and judged 9, 40 rated 3 and judged 0; one malformed."""
    path = tmp_path / "results" / "x" / "one" / "see"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(asdict(CellConfig(model="m", data="d", name="x"))))
    for k in range(121):
        own, judge = ((8,) * 5, (9,) * 5) if k < 80 else ((3,) * 5, (0,) * 5)
        r = make_rollout(tokenizer, "An answer.", own, judge, prompt=f"p{k}")
        if k == 120:
            r = replace(r, answer=None, self_scores=None, judge_scores=None)
        append_rollout(path / "rollouts.jsonl", r)
    return path


def test_calibrate_from_an_evaluation(results, tmp_path):
    out = tmp_path / "out"
    said = calibrate(results.parent.parent, Wish(target=0.1), out)  # results/x has one cell
    found = Threshold.load(out / "threshold.json")
    assert found.value == 0.34 and found.n == 121 and (out / "coverage_risk.png").stat().st_size
    assert math.isclose(found.coverage, 80 / 121) and found.reached == 0
    assert "0.34 or more" in said and "66.1% of all answers" in said and "for prompts like" in said
    assert "at most 10.0% with quality below 0.5, at 95%" in found.promise()
    (out / "coverage_risk.png").unlink()
    with pytest.raises(ValueError, match="no threshold can promise .* at 99% .* 121 prompts"):
        calibrate(results, Wish(target=0.01, delta=0.01), out)
    assert (out / "coverage_risk.png").exists()
    with pytest.raises(ValueError, match="one model's answers to one benchmark are needed"):
        calibrate(tmp_path / "results", Wish(), out)


@pytest.mark.parametrize(("changes", "says"), [
    ({"value": 7}, "value must be a number from 0 to 1, not 7"),
    ({"delta": None}, "delta is missing"),
])  # fmt: skip
def test_a_threshold_file_that_is_none(tmp_path, changes, says):
    row = asdict(Threshold(0.5, 0.1, "bad", 0.5, 0.05, 9, 0.5, 0.0)) | changes
    path = tmp_path / "threshold.json"
    path.write_text(json.dumps({k: v for k, v in row.items() if v is not None}))
    with pytest.raises(FileError, match=f"threshold.json: {says}; make it again"):
        Threshold.load(path)
