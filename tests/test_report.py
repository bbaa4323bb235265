"""Tables, figures and the page from result files worked out by hand: .venv/bin/python -m pytest
tests/test_report.py"""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_rollout

import report
from config import CellConfig
from evaluation import figures, table
from evaluation.answers import choose
from evaluation.intervals import Interval
from evaluation.predictors import calibrations
from evaluation.results import load_evaluation, load_run
from evaluation.table import Results, Table, by_settings
from prompts import ATTRIBUTES
from reward import calibration, quality
from storage.data import load_prompts
from storage.files import write_text
from storage.record import answer_id, append_rollout, read_rollouts
from storage.run_folder import CellFolder, metrics_until

SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
# Two prompts, two samples; the base's last response is malformed. (self, judge) per response.
BASE = [((8,) * 5, (4, 5, 6, 0, 9)), ((8,) * 5, (6, 6, 6, 2, 2)), ((5,) * 5, (5,) * 5), None]
SEE = [((4,) * 5, (4, 5, 6, 0, 9)), ((7,) * 5, (8, 8, 8, 2, 2)), ((5,) * 5, (5,) * 5),
       ((1,) * 5, (2, 2, 2, 0, 0))]  # fmt: skip
FORCED = (3, 3, 3, 3, 3)  # what the judge says of the malformed answer


def ten(digit: int, p: float = 0.5) -> list[float]:
    """Log-probabilities: p on the digit, the rest even."""
    return [math.log(p if d == digit else (1 - p) / 9) for d in range(10)]


class Maker:
    def __init__(self, root: Path, tokenizer):
        self.root, self.tokenizer = root, tokenizer
        self.data = root / "data.jsonl"
        rows = [{"prompt": "Question A?"}, {"prompt": f"Question B {SCRIPT}?"}]
        self.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        self.prompts = [p.id for p in load_prompts(self.data)]
        self.keys = [(p, k) for p in self.prompts for k in range(2)]

    def cell(self, name: str, benchmark: str, model: str, answers, samples=2, window="") -> Path:
        path = self.root / name / benchmark / model
        path.mkdir(parents=True)
        cell = CellConfig(model="m", data=str(self.data), name=str(path), judge="judge",
                          samples=samples, training_run=window)  # fmt: skip
        write_text(path / "config.json", json.dumps(dataclasses.asdict(cell)))
        for (prompt, sample), scores in zip(self.keys, answers, strict=False):
            append_rollout(path / "rollouts.jsonl", self.rollout(prompt, sample, scores, model))
        return path

    def rollout(self, prompt, sample, scores, model):
        own, judge = scores or ((8,) * 5, None)
        answer = f"{model} says {SCRIPT}"
        r = make_rollout(self.tokenizer, answer, own, judge, sample=sample)
        if scores is None:
            r = dataclasses.replace(r, answer=None, self_scores=None, score_positions=None,
                                    text=answer)  # fmt: skip
        return dataclasses.replace(r, prompt_id=prompt)

    def lines(self, path: Path, rows) -> None:
        ids = {(r.prompt_id, r.sample): answer_id(r) for r in CellFolder(path.parent).answers()}
        path.write_text("".join(json.dumps(
            {"prompt_id": p, "sample": k, "version": "v", "answer_id": ids[p, k], **row}) + "\n"
            for (p, k), row in zip(self.keys, rows, strict=False) if row is not None))  # fmt: skip


@pytest.fixture
def made(tmp_path, tokenizer):
    m = Maker(tmp_path, tokenizer)
    run = tmp_path / "window"
    (run / "rollouts").mkdir(parents=True)
    for k, judge in enumerate([(5, 5, 5, 1, 1), (5, 5, 5, 1, 1), (9, 9, 9, 1, 1)]):
        append_rollout(
            run / "rollouts" / "cycle_01.jsonl", m.rollout("w", k, ((8,) * 5, judge), "base")
        )
    window = read_rollouts(run / "rollouts" / "cycle_01.jsonl")
    base = m.cell("x", "one", "base", BASE, window=str(run))
    write_text(m.root / "x" / "window.jsonl", "".join(
        json.dumps({"prompt_id": "w", "version": "v", "answer_id": answer_id(r),
                    "scores": (8,) * 5}) + "\n"
        for r in window
    ))  # fmt: skip
    see = m.cell("x", "one", "see", SEE, window=str(run))
    for cell, answers in ((base, BASE), (see, SEE)):
        judges = [a[1] if a else None for a in answers]
        # The base reads 8 everywhere; SEE reads what the judge said, or 2 of the malformed one.
        for scorer in ("base", "see"):
            digit = [(8,) * 5 if scorer == "base" else j or (2,) * 5 for j in judges]
            rows = [
                {"scores": d, "free": [ten(x) for x in d],
                 "judge": [ten(9 - x) for x in d] if j else None,  # unlike what it reads on its own
                 "own": [ten(x) for x in d] if j and scorer == cell.name else None}
                for d, j in zip(digit, judges, strict=True)
            ]  # fmt: skip
            m.lines(cell / f"digits_{scorer}.jsonl", rows)
        held_out = [{"draw": 0, "scores": (9,) * 5} if j else None for j in judges]
        m.lines(cell / "scores_other.jsonl", held_out)
    m.lines(see / "scores_judge.jsonl", [{"draw": 0, "scores": SEE[0][1]}])
    with open(see / "scores_judge.jsonl", "a") as f:  # a second judgement of the same answer
        scores = (4, 5, 6, 0, 4)
        p, k = m.keys[0]
        about = {"prompt_id": p, "sample": k, "version": "v"}
        about["answer_id"] = answer_id(m.rollout(p, k, SEE[0], "see"))
        row = about | {"draw": 1, "scores": scores}
        f.write(json.dumps(row) + "\n")
    m.lines(base / "scores_judge.jsonl", [None, None, None, {"draw": 0, "scores": FORCED}])
    m.lines(see / "preferences.jsonl", [
        {"result": 1, "shown_first": 1, "shown_second": 1, "longer_by": 3},
        {"result": 0, "shown_first": 1, "shown_second": -1, "longer_by": -3},
        {"result": 1, "shown_first": 1, "shown_second": 1, "longer_by": 1},
    ])  # fmt: skip
    m.lines(see / "sensitivity.jsonl", [
        {"as_it_is": (5, 6, 5, 5, 5), "another": (5, 2, 5, 5, 5), "cut": (5, 5, 5, 5, 5)},
        {"as_it_is": (5, 6, 5, 5, 5), "another": (5, 4, 5, 5, 5), "cut": None},
    ])  # fmt: skip
    return m


def tables(*folders: Path, beside=(), **options) -> dict[str, list[dict]]:
    """title -> a row {header: text} for each of the table's rows"""
    results = Results([load_evaluation(folder) for folder in folders], **options)
    others = by_settings([load_evaluation(folder) for folder in beside])
    return {
        table.title: table.strings().to_dict("records")
        for table in report.make_tables(results, others)
    }


def one(rows: list[dict], **where) -> dict:
    [row] = [r for r in rows if all(r[k] == v for k, v in where.items())]
    return row


def begins(text: str, value: float) -> bool:
    return text.split(" ")[0] == f"{value:.3f}"


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_the_papers_tables_by_hand(made):
    found = tables(made.root / "x")
    main = found["Tables 1 and 2: quality and calibration"]
    base, see = one(main, model="base"), one(main, model="see")
    assert begins(base["well-formed"], 0.75) and begins(see["well-formed"], 1.0)
    assert begins(base["quality"], mean(quality(j) for _, j in BASE[:3]))
    assert begins(base["calibration"], mean(calibration(s, j) for s, j in BASE[:3]))
    assert begins(see["calibration"], mean(calibration(s, j) for s, j in SEE))
    # Errors of the first: 4 3 2 8 1; then 2 2 2 6 6; then none: 18/5, 18/5, 0.
    assert begins(base["MAE"], mean([3.6, 3.6, 0]))

    rates = one(found["Win-rates against base"], model="see")
    # Over the three samples that both answered. Quality: tie, win, tie. Calibration: the first
    # errors are 0 1 2 4 5 (2.4 < 3.6: win), 1 1 1 5 5 (2.6 < 3.6: win), none and none (tie).
    assert begins(rates["quality"], (0.5 + 1 + 0.5) / 3)
    assert begins(rates["calibration"], (1 + 1 + 0.5) / 3)
    assert begins(rates["responses"], (1 + 0.5 + 1) / 3)
    assert begins(rates["first order"], (1 + 1 + 1) / 3)
    assert begins(rates["order bias"], (0 + 1 + 0) / 3)

    other = one(found["Table 3: held-out judges"], model="base")
    assert begins(other["quality"], 1.0)
    assert begins(other["calibration"], mean(calibration(s, (9,) * 5) for s, _ in BASE[:3]))

    top = found["Table 4: top-5 accuracy"]
    assert begins(one(top, model="see")["top-5"], 1.0)  # SEE reads what the judge said
    # The window's ranking: 5 9 0 1 2 in the first three attributes, 1 0 2 3 4 in the others. Of
    # SEE's answers: 0 and 9; 8s and 2s; 5s; 2s and 0s.
    hits = (0 + 1 + 0) + 1 + 0 + (0 + 0 + 0) + 2 + 3 + 0 + 3 + 2
    assert begins(one(top, model="see")["window ranking"], hits / 20)
    # The base: 8 first, then 0 1 2 3 by size. Judge digits among these: 0 of the first answer;
    # 2 and 2 of the second; none of five fives.
    assert begins(one(top, model="base")["top-5"], 3 / 15)

    by = one(found["By attribute: calibration"], model="base")
    assert begins(by["helpfulness"], mean([(1 - 4 / 9) ** 2, (1 - 2 / 9) ** 2, 1]))
    assert begins(one(found["By attribute: mean absolute error"], model="base")["helpfulness"], 2.0)


def test_the_controls_by_hand(made):
    found = tables(made.root / "x")
    less = found["Calibration beside predictors that know less"]
    see = one(less, model="see")
    # Window: 5 5 5 1 1 twice and 9 9 9 1 1 once.
    assert begins(see["window constant"], mean(calibration((5, 5, 5, 1, 1), j) for _, j in SEE))
    # Offset: the base's eights moved by -3 -3 -3 -7 -7.
    assert see["offset"] == see["window constant"]
    # Within prompts: each answer's scores against its twin.
    twins = [calibration(SEE[a][0], SEE[b][1]) for a, b in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert begins(see["within"], mean(twins))
    assert begins(see["other samples"],
                  mean(calibration(SEE[b][1], SEE[a][1])
                       for a, b in ((0, 1), (1, 0), (2, 3), (3, 2))))  # fmt: skip
    assert see["references"] == "-" == see["prompt only"]
    # Errors 5 4 3 1 8 and so on of a random digit: digit d is off by (d (d+1) + (9-d) (10-d)) / 20.
    off = [sum(abs(x - d) for x in range(10)) / 10 for d in range(10)]
    square = [sum((x - d) ** 2 for x in range(10)) / 10 - off[d] ** 2 for d in range(10)]
    guess = [(1 - sum(off[d] for d in j) / 45) ** 2 + sum(square[d] for d in j) / 45**2
             for _, j in SEE]  # fmt: skip
    assert begins(see["uniform guess"], mean(guess))
    # The judge's two scores of one answer differ by 5 in one attribute; four would make a ceiling.
    again = one(found["The judge against itself"], model="see")
    assert begins(again["leave-one-out agreement"], (1 - 1 / 9) ** 2)
    assert begins(again["its scores"], calibration(*SEE[0])) and again["ceiling"] == "-"
    assert begins(see["most probable"], 1.0) and begins(see["its scores"], mean(
        calibration(s, j) for s, j in SEE))  # fmt: skip

    first, last, states, together = found["Primary endpoint"]
    constant = [calibration((5, 5, 5, 1, 1), j) for _, j in SEE]
    apart = [calibration(s, j) - x for (s, j), x in zip(SEE, constant, strict=True)]
    assert begins(first["difference"], mean(apart)) and begins(last["difference"], mean(apart))
    assert states["difference"] == "-" == together["p"]  # no hidden states, so no endpoint
    assert "not declared" in first["this is"] and first["model"] == "see"
    rows = found["Comparisons"]
    moved = one(rows, model="see", difference="calibration - base's")
    ours, theirs = ([calibration(*x) for x in c if x] for c in (SEE, BASE))
    assert begins(moved["mean"], mean(ours) - mean(theirs))  # as in Table 2
    swapped = one(
        rows, model="see", difference="on base's answers: calibration of its scores - base's"
    )
    assert begins(swapped["mean"], mean(1 - calibration((8,) * 5, j) for _, j in BASE[:3]))
    won = one(rows, model="see", difference="response win-rate - half")
    assert begins(won["mean"], (1 + 0.5 + 1) / 3 - 0.5)
    pairs = one(rows, model="see", difference="share of a prompt's pairs ordered right - half")
    assert begins(pairs["mean"], 0.5)
    assert all(r["p"] == "-" == r["corrected p"] for r in rows)  # two prompts

    swap = found["Answers by one model, scores by another: calibration"]
    assert begins(one(swap, **{"answers by": "base"})["scored by see"], 1.0)
    assert begins(one(swap, **{"answers by": "see"})["scored by base"],
                  mean(calibration((8,) * 5, j) for _, j in SEE))  # fmt: skip

    apart = one(found["Telling answers apart, by quality"], model="see")
    # Prompt A: judge and model put the second answer first; prompt B: the first. Both right.
    assert apart["pairs"] == "2" and begins(apart["within: accuracy"], 1.0)
    assert apart["prompts without a tau"] == "0"
    base = one(found["Telling answers apart, by quality"], model="base")
    assert base["pairs"] == "1" and begins(base["within: accuracy"], 0.5)  # 8 and 8
    assert base["prompts without a tau"] == "1" and base["within: tau"] == "-"

    forms = found["Calibration by choice of responses"]
    each = [calibration(s, j) for s, j in BASE[:3]]
    base = one(forms, model="base")
    assert begins(base["malformed = 0"], sum(each) / 4)
    forced = [calibration((8,) * 5, j) for j in (*(j for _, j in BASE[:3]), FORCED)]
    assert begins(base["forced block"], mean(forced)) and base["answers read"] == "4 of 4"
    # For all: SEE without its answer to the sample that the base left malformed.
    assert begins(one(forms, model="see")["well-formed for all"],
                  mean(calibration(s, j) for s, j in SEE[:3]))  # fmt: skip

    digits = one(found["Ten-digit distributions, after the model's digits"], model="see")
    assert begins(digits["NLL"], math.log(2))
    parts = one(found["Where the error comes from, by attribute"],
                model="base", attribute="helpfulness")  # fmt: skip
    # 8 8 5 against 4 6 5: means 7 and 5, sums of squares 6 and 2.
    assert begins(parts["spread, self / judge"], math.sqrt(3)) and begins(parts["slope"], 0.0)
    assert begins(parts["self - judge"], 2.0)
    # Deviations 1 1 -2 and -1 1 0: products -1 + 1 + 0.
    assert begins(parts["correlation"], 0.0)
    verbosity = one(found["Where the error comes from, by attribute"],
                    model="see", attribute="verbosity")  # fmt: skip
    # 4 7 5 1 against 9 2 5 0: differences -5 5 0 1; means 17/4 and 4, sums of products
    # 36 + 14 + 25 + 0 - 68 = 7, of squares 91 - 289/4 and 110 - 64.
    assert begins(verbosity["self - judge"], 0.25)
    assert begins(verbosity["correlation"], 7 / math.sqrt((91 - 289 / 4) * 46))
    moved = one(found["Does the score depend on the answer?"], model="see")
    assert begins(moved["another prompt's answer"], (-4 - 2) / 2)
    assert begins(moved["half of the answer"], -1.0)
    uses = found["Uses"]
    best = one(uses, model="see", use="best of 2: quality")
    a, b, c, d = (quality(j) for _, j in SEE)
    assert begins(best["by self-evaluation"], (b + c) / 2) and begins(best["oracle"], (b + c) / 2)
    assert begins(best["random"], (a + b + c + d) / 4)


@pytest.mark.parametrize(("judge", "order_bias"), [("gpt-5.4", "0.333"), ("rubric:0.3", "-")])
def test_an_offline_judge_has_no_order_bias(made, judge, order_bias):
    """It compares scores, so that its 0 would say nothing."""
    for path in (made.root / "x").glob("*/*/config.json"):
        write_text(path, json.dumps(json.loads(path.read_text()) | {"judge": judge}))
    row = one(tables(made.root / "x")["Win-rates against base"], model="see")
    assert row["order bias"].split(" ")[0] == order_bias


def test_the_mean_human_label_of_the_references(tmp_path, tokenizer):
    m = Maker(tmp_path, tokenizer)
    labels = dict(zip(ATTRIBUTES, (4, 3, 2, 1, 0), strict=True))
    rows = [{"prompt": "Question A?", "response": r, **labels} for r in ("One.", "Two.")]
    rows[1] |= {"helpfulness": 1}
    m.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    m.keys = [(p.id, k) for p in load_prompts(m.data) for k in range(2)]
    m.cell("x", "one", "base", BASE[:2])
    row = one(tables(m.root / "x")["Calibration beside predictors that know less"], model="base")
    # Labels doubled: helpfulness between 8 and 2, then 6, 4, 2, 0.
    assert begins(row["references"], mean(calibration((5, 6, 4, 2, 0), j) for _, j in BASE[:2]))


def test_escalation_and_the_choice_of_models(made):
    a, b = made.prompts
    strong = {a: (9, 9, 9, 2, 2), b: (6, 6, 6, 2, 2)}
    (made.root / "x" / "one" / "stronger.jsonl").write_text("".join(
        json.dumps({"prompt_id": p, "version": "", "scores": s}) + "\n" for p, s in strong.items()
    ))  # fmt: skip
    found = tables(made.root / "x")
    use = one(found["Uses"], model="base", use="25% escalated to the stronger model: quality")
    # Judged 15, 18 and 15 of 27, stronger 27, 27 and 18. A quarter of three answers is 0.75; the
    # model rates the third lowest, and the first gains most.
    assert begins(use["by self-evaluation"], (48 + 0.75 * 3) / 81)
    assert begins(use["random"], (48 + 0.25 * (12 + 9 + 3)) / 81)
    assert begins(use["oracle"], (48 + 0.75 * 12) / 81)
    only = tables(made.root / "x", models=("see",))
    assert [r["model"] for r in only["Tables 1 and 2: quality and calibration"]] == ["see"]
    with pytest.raises(ValueError, match="no results of model none"):
        tables(made.root / "x", models=("none",))


def test_seeds_are_the_unit_where_there_are_several(made):
    shutil.copytree(made.root / "x", made.root / "y")
    path = made.root / "y" / "one" / "see" / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for r in rows:
        r["self_scores"] = r["judge_scores"]  # a run that knows its judge
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = tables(made.root / "x", made.root / "y")
    see = one(found["Tables 1 and 2: quality and calibration"], model="see")
    first = mean(calibration(s, j) for s, j in SEE)
    assert see["calibration"] == f"{(first + 1) / 2:.3f} [-]"  # two prompts
    made.cell("z", "one", "base", BASE)
    found = tables(made.root / "x", made.root / "z")  # without digits, and without SEE
    assert "in 1 of 2 only" in str(found)
    made.cell("z", "two", "base", BASE)
    with pytest.raises(ValueError, match="hold other benchmarks: two"):
        tables(made.root / "x", made.root / "z")
    known = made.root / "y" / "one" / "base" / "config.json"
    config = json.loads(known.read_text())
    config["sampling"]["temperature"] = 0.0
    known.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="differ in temperature"):
        tables(made.root / "x", made.root / "y")


@pytest.mark.parametrize(("change", "shown"), [
    ({}, True), ({"judge": "gpt-5.4-2026-03-05"}, True), ({"judge": "gpt-5.4-mini"}, False),
    ({"few_shot": "varied"}, False), ({"limit": 60}, False), ({"template": "short"}, False),
    ({"prompt_tokens": 2048}, False), ({"temperature": 0.0}, False), ({"top_p": 1.0}, False),
    ({"top_k": 0}, False), ({"max_tokens": 4096}, False),  # other decoding
    ({"whole": 10_159}, False), ({"too_long": 1}, False),  # another split; prompts left out
])  # fmt: skip
def test_the_papers_figures_stand_beside_its_settings_only(made, monkeypatch, change, shown):
    whole = change.get("whole", 2)
    monkeypatch.setattr(table, "PAPER_PROMPTS", {"helpsteer2": whole})
    path = made.cell("p", "helpsteer2", "base", BASE)
    config = json.loads((path / "config.json").read_text()) | {"judge": "gpt-5.4"} | change
    config["sampling"] |= {k: v for k, v in change.items() if k in config["sampling"]}
    (path / "config.json").write_text(json.dumps(config))
    CellFolder(path).add_to_summary({"too_long": change.get("too_long", 0)})
    row = one(tables(made.root / "p")["Tables 1 and 2: quality and calibration"], model="base")
    assert row["quality"].endswith("(paper 0.644)") == shown


def test_prompts_that_were_too_long_are_named_under_each_table(made):
    CellFolder(made.root / "x" / "one" / "see").add_to_summary({"too_long": 10})
    found = report.make_tables(Results([load_evaluation(made.root / "x")]))
    said = "Prompts over 4,096 tokens are left out: one 10."
    assert len(found) > 10 and all(t.note.endswith(said) for t in found)


def test_lines_about_other_answers_do_not_count(made):
    """An answer that was sampled anew is not read by the old one's digits."""
    path = made.root / "x" / "one" / "see" / "digits_see.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answer_id"] = "another"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    cell = load_evaluation(made.root / "x").cells["one", "see"]
    assert len(cell.digits["see"]) == 3 and len(cell.digits["base"]) == 4


def test_settings_stand_side_by_side(made):
    """The base decoded greedily, in a column of its own; SEE was not."""
    known = made.cell("greedy", "one", "base", [SEE[0], None, None, None]) / "config.json"
    config = json.loads(known.read_text())
    config["sampling"]["temperature"] = 0.0
    known.write_text(json.dumps(config))
    rows = tables(made.root / "x", beside=[made.root / "greedy"])
    rows = rows["The same models under other settings"]
    assert list(rows[0])[3:-1] == ["temperature 0.8", "temperature 0.0"]
    row = next(r for r in rows if (r["model"], r["metric"]) == ("base", "calibration"))
    assert begins(row["temperature 0.8"], mean(calibration(s, j) for s, j in BASE[:3]))
    assert begins(row["temperature 0.0"], calibration(*SEE[0]))
    row = next(r for r in rows if (r["model"], r["metric"]) == ("base", "well-formed"))
    assert begins(row["temperature 0.8"], 0.75) and begins(row["temperature 0.0"], 0.25)
    assert all(r["temperature 0.0"] == "-" for r in rows if r["model"] == "see")
    assert "The same models under other settings" not in tables(made.root / "x")
    again = tables(made.root / "x", beside=[made.root / "x"])  # the same settings: by folder
    assert list(again["The same models under other settings"][0])[3:-1] == [str(made.root / "x")]


def test_a_table_as_text_markdown_and_csv():
    rows = [
        {
            "model": "a|b",
            "x": Interval(0.5, 0.25, 0.75, 12),
            "y": Interval(0.5, 0.25, 0.75, 12),
            "z": Interval(0.5, 0.25, 0.75, 11),
            "pairs": 1234,
            "p": 0.0004,
            "note": "-5",
        },
        {
            "model": "c",
            "x": Interval(1.0, None, None, 1),
            "y": None,
            "z": None,
            "pairs": 5,
            "p": None,
            "note": None,
        },
        {
            "model": "d",
            "x": None,
            "y": Interval(None, None, None, 0),
            "z": "-",
            "pairs": 0,
            "p": 1.0,
            "note": "w",
        },
    ]
    table = Table.of("A title: 5 (or 6)", "Its note.", rows)
    same = "0.500 [0.250, 0.750]"
    assert table.note.startswith("Its note. [-]: no interval")
    assert table.text().splitlines()[3:] == [
        "model  x                     y                     z                            pairs  "
        "p       note  n",
        f"a|b    {same}  {same}  {same} (n 11)  1,234  <0.001  -5    12",
        "c      1.000 [-]             -                     -                            5      "
        "-       -     1",
        "d      -                     -                     -                            0      "
        "1.000   w     -",
    ]
    assert table.markdown().splitlines()[4] == "| model | x | y | z | pairs | p | note | n |"
    assert f"| a\\|b | {same} | {same} | {same} (n 11) | 1,234 | <0.001 | -5 | 12 |" in (
        table.markdown()
    )
    parts = [f"{x},{x} low,{x} high,{x} n" for x in "xyz"]
    assert table.csv().splitlines() == [
        f"model,{','.join(parts)},pairs,p,note",
        "a|b,0.5,0.25,0.75,12,0.5,0.25,0.75,12,0.5,0.25,0.75,11,1234,0.0004,-5",
        "c,1.0,,,1,,,,0,,,,0,5,,",
        "d,,,,0,,,,0,,,,0,0,1.0,w",
    ]
    assert table.file_name == "a-title-5-or-6"


def test_one_valid_response_and_none(made):
    made.cell("few", "one", "base", [BASE[0], None, None, None], samples=1)
    made.cell("few", "one", "see", [None], samples=1)
    found = tables(made.root / "few")
    main = found["Tables 1 and 2: quality and calibration"]
    assert one(main, model="base")["calibration"] == f"{calibration(*BASE[0]):.3f} [-]"
    assert one(main, model="see")["calibration"] == "-"
    assert one(main, model="see")["well-formed"] == "0.000 [-]"
    assert one(found["Win-rates against base"], model="see")["quality"] == "-"
    assert "Comparisons" not in found and "Primary endpoint" not in found  # nothing to compare


def test_the_base_is_the_model_that_was_first_asked_for(made):
    assert Results([load_evaluation(made.root / "x")]).base == "base"  # by name, without the file
    (made.root / "x" / "models.json").write_text('["see", "base"]')
    t = Results([load_evaluation(made.root / "x")])
    assert t.base == "see" and t.models == ["see", "base"] and t.benchmarks == ["one"]


def test_lines_on_older_weights_do_not_count(made):
    path = made.root / "x" / "one" / "see" / "digits_see.jsonl"
    now = path.read_text()
    old = [json.loads(line) | {"version": "older", "scores": (9,) * 5} for line in now.splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in old) + now)
    swap = tables(made.root / "x")["Answers by one model, scores by another: calibration"]
    assert begins(one(swap, **{"answers by": "see"})["scored by see"], 1.0)


def test_figure_3_shows_calibration(made, tmp_path, monkeypatch):
    """A bar for each model and attribute; models in their order."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure) or True)
    assert figures.figure_3(Results([load_evaluation(made.root / "x")]), tmp_path / "f")
    [axis] = drawn[0].axes
    for bars, answers in zip(axis.containers[1::2], (BASE[:3], SEE), strict=True):
        expected = [mean((1 - abs(s[a] - j[a]) / 9) ** 2 for s, j in answers) for a in range(5)]
        assert [bar.get_height() for bar in bars] == pytest.approx(expected)


def test_calibration_by_judge_score(made):
    cell = load_evaluation(made.root / "x").cells["one", "base"]
    values, prompts = figures.by_judge_score(cell, 2)  # complexity and verbosity of the second
    assert values == pytest.approx([(1 - 6 / 9) ** 2] * 2) and set(prompts) == {made.prompts[0]}
    assert [list(x) for x in figures.by_judge_score(cell, 7)] == [[], []]
    everything = sum(len(figures.by_judge_score(cell, d)[0]) for d in range(10))
    assert everything == 15 and len(calibrations(cell.s, cell.j)) == 3


def test_figure_2_needs_a_runs_checkpoints(made, tmp_path):
    run = tmp_path / "runs" / "r"
    lines = [("rl", 1, 1, 16), ("rl", 1, 2, 32), ("sft", 1, 1, 32), ("rl", 2, 1, 48),
             ("rl", 2, 2, 64), ("sft", 2, 1, 64)]  # fmt: skip
    names = ("phase", "cycle", "step", "sample_passes")
    for checkpoint in ("cycle_01", "cycle_02_step_00001", "cycle_02"):
        (run / "checkpoints" / checkpoint).mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(dict(zip(names, x, strict=True))) + "\n" for x in lines)
    )
    (run / "window.json").write_text(json.dumps([str(k) for k in range(40)]))
    (run / "rollouts").mkdir()
    for cycle, step, sample, scores in [
        (1, 1, 0, BASE[0]), (1, 1, 1, BASE[1]), (1, 2, 0, BASE[0]), (1, 2, 1, None),
        (2, 1, 0, BASE[2]), (2, 2, 0, BASE[2]),
    ]:  # fmt: skip
        r = made.rollout(made.prompts[0], sample, scores, "r")
        r = dataclasses.replace(r, cycle=cycle, step=step)
        append_rollout(run / "rollouts" / f"cycle_{cycle:02d}.jsonl", r)
    seen = [len(metrics_until(run / "checkpoints" / c))
            for c in ("cycle_01", "cycle_02_step_00001", "cycle_02")]  # fmt: skip
    assert seen == [3, 4, 6]  # the last cycle's distillation comes after its RL steps
    for model, checkpoint in (("one-cycle", "cycle_01"), ("two-cycles", "cycle_02")):
        path = made.cell("x", "one", model, SEE, window=str(made.root / "window"))
        config = json.loads((path / "config.json").read_text())
        config["model"] = str(run / "checkpoints" / checkpoint)
        write_text(path / "config.json", json.dumps(config))
    t = Results([load_evaluation(made.root / "x")])
    # After cycle 1: 2 RL steps and 1 update of distillation; judged are 2 rollouts of its first
    # step and 1 of its second. The window has 40 prompts.
    assert figures.costs_of_models(t) == {
        "r": {"one-cycle": (32, 3, 3, 32), "two-cycles": (64, 5, 6, 40)}
    }
    assert figures.figure_2(t, tmp_path / "f.png") and (tmp_path / "f.png").stat().st_size > 9000
    # Tables are of the models that were asked for; a run's other checkpoints are for this figure.
    (made.root / "x" / "models.json").write_text('["base", "see", "two-cycles"]')
    asked = Results([load_evaluation(made.root / "x")])
    assert asked.models == ["base", "see", "two-cycles"] and "one-cycle" in asked.on_file
    assert figures.costs_of_models(asked) == figures.costs_of_models(t)
    # It shows all checkpoints on file, whichever models the tables show.
    assert figures.figure_2(Results(t.evaluations, ("base", "see")), tmp_path / "h.png")
    shutil.rmtree(path)
    one_checkpoint = Results([load_evaluation(made.root / "x")])
    assert not figures.figure_2(one_checkpoint, tmp_path / "g.png")


def test_files_and_figures(made, tmp_path):
    out = tmp_path / "out"
    text = report.run(report.Command((made.root / "x",), out=out))
    assert (out / "tables.txt").read_text() == text and "Table 4" in text
    assert "| benchmark | model |" in (out / "tables.md").read_text()
    assert {p.name for p in out.iterdir()} == {
        "tables.txt", "tables.md", "csv", "figure3.png", "figure4.png", "reliability.png",
        "report.html",
    }  # fmt: skip
    with open(out / "csv" / "tables-1-and-2-quality-and-calibration.csv") as f:
        base, see = csv.DictReader(f)
    assert (base["model"], see["model"]) == ("base", "see")
    assert float(base["MAE"]) == pytest.approx(2.4) and base["MAE n"] == "2"  # as by hand above
    assert base["MAE low"] == "" == base["MAE high"]
    assert len(list((out / "csv").iterdir())) == text.count("\n\n\n") + 1  # one for each table
    html = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html)  # nothing from elsewhere
    bad = subprocess.run([sys.executable, str(ROOT / "report.py"), str(tmp_path / "none")],
                         capture_output=True, text=True)  # fmt: skip
    assert bad.returncode == 1 and "no results of evaluate.py there" in bad.stderr


def test_a_runs_rollouts_by_cycle(made, tmp_path):
    """Two cycles of three rollouts; two of each are shown, the biggest disagreement first."""
    run = made.cell("runs", "x", "r", [])
    (run / "rollouts").mkdir()
    for cycle in (1, 2):
        for k, own in enumerate(((5,) * 5, (9,) * 5, (6,) * 5)):
            r = made.rollout(made.prompts[0], k, (own, (5,) * 5), "r")
            r = dataclasses.replace(r, cycle=cycle)
            append_rollout(run / "rollouts" / f"cycle_{cycle:02d}.jsonl", r)
    lines = [
        {"phase": "rl", "cycle": c, "sample_passes": 16 * c, "calibration": 0.5,
         "quality": None if c == 1 else 1, "well_formed": 1, "response_tokens": 9}
        for c in (1, 2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    malformed = dataclasses.replace(made.rollout(made.prompts[1], 0, None, "r"), cycle=2)
    append_rollout(run / "rollouts" / "cycle_02.jsonl", malformed)
    chosen = choose(load_run(run), 4)
    assert chosen.pop().self_scores is None
    assert [(r.cycle, r.sample) for r in chosen] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len(choose(load_run(run), 0)) == 7
    out = tmp_path / "out"
    report.run(report.Command(runs=(run,), out=out))
    assert {"training.png", "report.html"} <= {p.name for p in out.iterdir()}
    with pytest.raises(ValueError, match="no run of cycle.py there"):
        report.run(report.Command(runs=(made.root / "x",), out=out))
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="metrics.jsonl: no such file; restore it"):
        report.run(report.Command(runs=(run,), out=out))
    with pytest.raises(ValueError, match="nor --runs"):
        report.run(report.Command(out=out))
