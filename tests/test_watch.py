"""The monitor: .venv/bin/python -m pytest tests/test_watch.py"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rollout

import watch
from config import CellConfig
from evaluation import drift
from evaluation.results import load_one_cell
from judging.client import JudgeError
from judging.endpoint import ClientConfig
from storage.files import FileError
from storage.record import append_rollout
from watch import Command, run

# --------------------------------------------------------------------------------------------------
# The sequential test


def plain_jumper(reference: list, log: list, seed: int) -> list[float]:
    """Three experts bet 1 - x, 1 and 1 + x on a rank x from -0.5 to 0.5; a hundredth of their money
    is shared out anew before each bet."""
    rng, seen, wealth, totals = np.random.default_rng(seed), list(reference), [1 / 3] * 3, []
    for value in log:
        higher = sum(x > value for x in seen)
        equal = sum(x == value for x in seen)
        x = (higher + rng.uniform() * (equal + 1)) / (len(seen) + 1) - 0.5
        pot = sum(wealth)
        wealth = [0.99 * w + 0.01 * pot / 3 for w in wealth]
        wealth = [w * (1 + e * x) for w, e in zip(wealth, (-1, 0, 1), strict=True)]
        totals.append(sum(wealth))
        seen.append(value)
    return totals


def test_the_evidence_is_the_simple_jumper():
    reference, log = [0.3, 0.5, 0.5, 0.9], [0.5, 0.1, 0.1, 0.95, 0.2]
    got = drift.evidence(np.array(reference), np.array(log), seed=7)
    np.testing.assert_allclose(got, plain_jumper(reference, log, 7))
    assert got[0] == pytest.approx(1)  # a first bet in both directions wins nothing
    # More answers at the end change nothing before them.
    longer = drift.evidence(np.array(reference), np.array([*log, 0.4]), seed=7)
    assert list(longer[:5]) == list(got)


def test_when_the_alarm_is_raised():
    assert drift.first_alarm(np.array([1, 19.9, 20, 3]), 0.05) == 3  # and it stays
    assert drift.first_alarm(np.array([1, 19.9]), 0.05) is None
    rng = np.random.default_rng(1)
    before = {"calibration": rng.normal(0.7, 0.1, 200), "quality": rng.normal(0.7, 0.1, 200)}
    same = {name: rng.normal(0.7, 0.1, 300) for name in before}
    assert [a.at for a in drift.alarms(before, same, 0.05, 0).values()] == [None, None]
    for moved in (0.6, 0.8):  # worse, and better
        after = same | {"quality": np.r_[same["quality"][:50], rng.normal(moved, 0.1, 100)]}
        found = drift.alarms(before, after, 0.05, 0)
        assert found["calibration"].at is None and 50 < found["quality"].at < 120
        # Each of the two figures has half of the probability.
        values = found["quality"].values
        assert values[found["quality"].at - 1] >= 40 > values[: found["quality"].at - 1].max()


# --------------------------------------------------------------------------------------------------
# The command

OWN = (7, 7, 7, 3, 3)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """An evaluation of 60 prompts, judged near the model's own scores."""
    path = tmp_path / "results" / "x" / "one" / "see"
    path.mkdir(parents=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Old {k}?", "id": f"old-{k}"}) + "\n"
                            for k in range(60)))  # fmt: skip
    config = CellConfig(model="m", data=str(data), name="x", judge="heuristic")
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for k in range(60):
        r = make_rollout(tokenizer, "Fine.", OWN, judged(k), prompt=f"old-{k}")
        append_rollout(path / "rollouts.jsonl", r)
    return path


def judged(k: int, lower: int = 0) -> tuple[int, ...]:
    return tuple(max(0, s + (k + a) % 3 - 1 - lower) for a, s in enumerate(OWN))


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prediction(k: int, **changes) -> dict:
    none = dict.fromkeys(("digits", "expected", "spread", "p_below", "unlike"))
    row = {"id": f"n{k}", "prompt": f"New {k}?", "answer": f"Fine {k}.", "text": "Fine.",
           "scores": OWN, "expected_quality": 0.7, "sample": 0, "model": "m", "time": "",
           "decision": "send" if k % 2 else "escalate"}  # fmt: skip
    return row | none | changes


def command(folder: Path, log: Path, *judgements: Path, **options) -> Command:
    client = ClientConfig(backoff=0.01, concurrency=1)
    options = {"client": client, "out": log.with_name("out")} | options
    return Command(log, folder, judgements, **options)


def test_no_alarm_and_alarm(folder, tmp_path, monkeypatch, capsys):
    log = write(tmp_path / "log.jsonl", [prediction(k) for k in range(120)])
    same = write(
        tmp_path / "same.jsonl", [{"id": f"n{k}", "scores": judged(k)} for k in range(120)]
    )
    fine = run(command(folder, log, same))
    assert not fine.alarm and fine.text.startswith("no alarm: the evidence for drift has reached")
    assert "120 predictions, 0 of them malformed; 120 judged, of 120 prompts" in fine.text
    rows = [{"id": f"n{k}", "scores": judged(k, 3 * (k >= 40))} for k in range(120)]
    worse = write(tmp_path / "worse.jsonl", rows)
    threshold = {"value": 0.7, "target": 0.1, "measure": "bad", "bad_below": 0.5, "delta": 0.05,
                 "n": 60, "coverage": 1.0, "reached": 0.0, "scores": "sampled",
                 "source": "x"}  # fmt: skip
    (tmp_path / "threshold.json").write_text(json.dumps(threshold))
    words = ["watch.py", str(log), "--reference", str(folder), "--judgements", str(worse), "--out",
             str(tmp_path / "w"), "--threshold", str(tmp_path / "threshold.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        watch.main()
    said = capsys.readouterr().out
    assert ended.value.code == watch.ALARM == 3
    assert "ALARM: calibration has drifted" in said and "ALARM: quality has drifted" in said
    assert "is below the evaluation's" in said and "is above" not in said
    # Sent are the odd ones; of the 60, those from 41 on (40) have a quality of about 4 / 9.
    assert "measured on 60 sent answers: 0.667 [" in said
    html = (tmp_path / "w" / "watch.html").read_text()
    for part in ("By attribute", "By decision", "Prompts that moved", "Control chart", "Evidence"):
        assert part in html
    assert (tmp_path / "w" / "control.png").exists()


def test_what_counts_of_a_log(folder, tmp_path):
    """An id that comes again, a conversation that comes again, a malformed answer, a last line that
    is being written, judgements of other answers, and a second judgement."""
    rows = [prediction(0, answer="Old."), prediction(0), prediction(1, prompt="New 0?"),
            prediction(2, scores=None, answer=None), prediction(3)]  # fmt: skip
    log = write(tmp_path / "log.jsonl", rows)
    with log.open("a") as f:
        f.write('{"id": "n9"')
    found = drift.read_log(log)
    assert list(found) == ["n0", "n1", "n2", "n3"] and found["n0"].answer == "Fine 0."
    lines = [{"id": "n0", "scores": [7] * 5, "answer_key": drift.answer_key("Old.")},
             {"id": "n3", "scores": [1] * 5, "answer_key": drift.answer_key("Fine 3.")},
             {"id": "n2", "scores": [2] * 5},
             {"id": "x", "scores": [3] * 5}, {"id": "n1", "scores": [4] * 5},
             {"id": "n0", "scores": [5] * 5}, {"id": "n3", "scores": [6] * 5}]  # fmt: skip
    scores = drift.read_judgements(write(tmp_path / "j.jsonl", lines), found)
    assert scores == {"n3": (1,) * 5, "n1": (4,) * 5, "n0": (5,) * 5}
    assert list(scores) == ["n3", "n1", "n0"]
    cell = drift.judged_cell(found, scores, load_one_cell(folder), "log")
    assert [(r.prompt_id, r.sample) for r in cell.rollouts] == [
        ("n3", 0), ("n1", 0), ("n1", 1), ("n2", 0)
    ]  # fmt: skip
    assert list(drift.first_of_each(cell)) == [0, 1]
    np.testing.assert_allclose(drift.watched(cell)["quality"], [1 / 9, 4 / 9])
    assert cell.questions["n1"] == "User: New 0?"


def test_which_prompts_moved(folder, tmp_path):
    """One that was in the evaluation is compared with itself there."""
    log = drift.read_log(write(tmp_path / "log.jsonl", [
        prediction(0, prompt="Old 5?"), prediction(1), prediction(2)
    ]))  # fmt: skip
    scores = {"n0": OWN, "n1": (0,) * 5, "n2": OWN}
    reference = load_one_cell(folder)
    table = drift.moved(reference, drift.judged_cell(log, scores, reference, "log"))
    rows = table.frame.to_dict("records")
    assert rows[0]["prompt"] == "n1"
    by = {r["prompt"]: r for r in rows}
    then = reference.calibration[list(reference.prompts).index("old-5")]
    assert by["n0"]["same prompt, evaluation"] == then
    assert by["n1"]["same prompt, evaluation"] is None
    assert by["n0"]["change"] == pytest.approx(1 - then)
    low = (1 - 27 / 5 / 9) ** 2  # errors 7, 7, 7, 3, 3
    assert by["n1"]["change"] == pytest.approx(low - reference.calibration.mean())


def test_a_share_of_the_log_is_judged_once_and_within_the_budget(fake_judge, folder, tmp_path):
    log = write(tmp_path / "log.jsonl", [prediction(k) for k in range(12)])
    asked = command(folder, log, share=1.0, judge="some-judge")
    little = dataclasses.replace(asked.client, max_calls=5)
    with pytest.raises(JudgeError, match="budget of 5 calls is used up"):
        run(dataclasses.replace(asked, client=little))
    assert len(fake_judge.bodies) == 5
    said = run(asked).text
    assert len(fake_judge.bodies) == 12 and "12 judged, of 12 prompts" in said
    lines = [json.loads(x) for x in (asked.out / "judgements.jsonl").read_text().splitlines()]
    assert [x["id"] for x in lines] == [f"n{k}" for k in range(12)]
    assert {x["judge"] for x in lines} == {"some-judge"}
    # Longer by two: they alone are asked for. The ledger serves as judgements too.
    write(log, [prediction(k) for k in range(14)])
    run(asked)
    assert len(fake_judge.bodies) == 14
    again = run(command(folder, log, asked.out / "judge_cache.jsonl", out=tmp_path / "other"))
    assert "14 judged, of 14 prompts" in again.text and len(fake_judge.bodies) == 14


def test_the_share_is_the_same_each_time():
    picked = {k for k in range(2000) if watch.chosen(str(k), 0.1, 42)}
    assert 150 < len(picked) < 250
    assert picked < {k for k in range(2000) if watch.chosen(str(k), 0.2, 42)}
    assert picked != {k for k in range(2000) if watch.chosen(str(k), 0.1, 43)}
    assert watch.chosen("a", 1.0, 0) and not watch.chosen("a", 0.0, 0)


@pytest.mark.parametrize(("rows", "lines", "says"), [
    ([prediction(0, scores=[1, 2])], [], "log.jsonl:1: not a prediction .scores .1, 2. are not"),
    ([{"id": "a", "prompt": "P?"}], [], "log.jsonl:1: not a prediction"),
    ([], [], "log.jsonl: no prediction there yet"),
    ([prediction(0)], [], "log.jsonl: 0 of its answers are judged; give --judgements"),
    ([prediction(0)], [{"id": "n0", "scores": [1] * 5}, {"id": "n1", "scores": [10] * 5}],
     "j.jsonl:2: a judgement has an id and five scores"),
])  # fmt: skip
def test_bad_input_is_one_sentence(folder, tmp_path, rows, lines, says):
    log = write(tmp_path / "log.jsonl", rows)
    with pytest.raises(ValueError, match=says) as caught:
        run(command(folder, log, write(tmp_path / "j.jsonl", lines)))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="none.jsonl: no prediction there"):
        drift.read_log(tmp_path / "none.jsonl")
