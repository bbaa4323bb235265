"""Judgements on file, from the command: .venv/bin/python -m pytest tests/test_judge_command.py"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_rollout

import reward
from config import CellConfig, Config
from evaluation import judgements, metrics
from evaluation.judgements import Command, as_before, load_sources, run
from evaluation.metrics import ATTRIBUTES
from judging.client import JudgeError
from judging.endpoint import Endpoint
from storage.data import load_prompts
from storage.files import write_text
from storage.record import append_rollout


@pytest.fixture
def folder(tmp_path, tokenizer):
    """make(name): results of four answers to two HelpSteer2 prompts, one of them malformed."""
    data = tmp_path / "data.jsonl"
    labels = dict(zip(ATTRIBUTES, (4, 3, 2, 1, 0), strict=True))
    rows = [{"prompt": f"Question {k}?", "response": f"Human answer {k}.", **labels} for k in "ab"]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(name: str, word: str = "Fine") -> Path:
        path = tmp_path / "results" / name
        path.mkdir(parents=True)
        config = CellConfig(model="m", data=str(data), name=name, judge="some-judge", samples=2)
        write_text(path / "config.json", json.dumps(dataclasses.asdict(config)))
        for p in load_prompts(data):
            for k in range(2):
                r = make_rollout(tokenizer, f"{word} {k}.", (5, 5, 5, 5, 5), (5, 4, 6, 9, 0),
                                 sample=k)  # fmt: skip
                if (p, k) == (load_prompts(data)[1], 1):
                    r = dataclasses.replace(r, answer=None, self_scores=None, judge_scores=None)
                append_rollout(path / "rollouts.jsonl", dataclasses.replace(r, prompt_id=p.id))
        return path

    return make


def command(*sources, **options) -> Command:
    client = dataclasses.replace(Command(()).client, backoff=0.01, concurrency=4)
    return Command(sources, client=client, **options)


def test_what_is_on_file_is_shown(folder):
    said = run(command(folder("a")))
    assert "well_formed              0.7500" in said and "n = 4" in said
    # Errors 0, 1, 1, 4, 5: MAE 2.2.
    assert f"calibration              {(1 - 2.2 / 9) ** 2:.4f}" in said
    assert "no judgement on file" in said


def test_the_sources_own_judge_is_asked_where_it_was_asked(folder):
    config = load_sources(folder("a"))[0].config
    config["endpoint"] |= {"base_url": "http://127.0.0.1:1/v1", "temperature": 0.7}
    same = as_before(command("a", endpoint=Endpoint(max_tokens=9)), config)
    expected = Endpoint("http://127.0.0.1:1/v1", temperature=0.7, max_tokens=9)
    assert (same.judge, same.endpoint) == ("some-judge", expected)
    other = command("a", judge="another")
    assert as_before(other, config) == other


def test_all_cells_of_an_evaluation(folder, tmp_path):
    cell = folder("x/one/a")
    folder("x/two/a")
    whole = tmp_path / "results" / "x"
    assert [s.name for s in load_sources(whole)] == [str(whole / b / "a") for b in ("one", "two")]
    assert run(command(whole)).count("well_formed") == 2
    with pytest.raises(ValueError, match="new judgements need one folder"):
        run(command(whole, judge="another"))
    assert run(command(cell)) in run(command(whole))


def test_a_run_with_checkpoints_is_one_source(fake_judge, folder, tmp_path, tokenizer):
    """Each checkpoint has a config.json too, the model's; export leaves nothing out."""
    config = folder("x/one/a") / "config.json"
    data = json.loads(config.read_text())["data"]
    path = tmp_path / "runs" / "r"
    (path / "rollouts").mkdir(parents=True)
    write_text(path / "config.json", json.dumps(dataclasses.asdict(Config(data=data))))
    write_text(path / "window.json", "[]")
    prompt = load_prompts(data)[0].id
    for cycle in (1, 2):
        (path / "checkpoints" / f"cycle_{cycle:02d}").mkdir(parents=True)
        write_text(path / "checkpoints" / f"cycle_{cycle:02d}" / "config.json", "{}")
        for k in range(2):
            r = make_rollout(tokenizer, f"Said {cycle}{k}.", sample=k, prompt=prompt)
            r = dataclasses.replace(r, cycle=cycle)
            append_rollout(path / "rollouts" / f"cycle_{cycle:02d}.jsonl", r)
    assert "4 well-formed answers" in run(command(path, judge="another"))
    file = tmp_path / "all.jsonl"
    said = run(command(path, tmp_path / "results" / "x", export=file))
    # The run's four answers, and the cell's four, one of them malformed.
    assert said == (
        f"{file}: 2 source(s) with 8 answers, 7 of them with scores; 4 judgements on file from "
        "4 calls"
    )
    one, two = load_sources(file)
    assert [(r.cycle, r.sample) for r in one.rollouts] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(one.attempts) == 4 and len(two.rollouts) == 4


def test_another_judge_its_agreement_and_its_ceiling(fake_judge, folder):
    path = folder("a")
    said = run(command(path, judge="another", repeat=3))
    assert len(fake_judge.bodies) == 9  # three well-formed answers, three draws each
    assert "3 well-formed answers" in said and "another and the scores on file" in said
    assert "another and itself, 3 judgements of each answer" in said
    # The fake judge says the same each time: full agreement, and a ceiling of 1.
    assert said.count("1.000 [-]") == 10 and "median of the others     1.0000" in said
    assert all("Reference Response 1" in b["messages"][1]["content"] for b in fake_judge.bodies)
    # Again for nothing; and a third judge is compared with the second.
    assert run(command(path, judge="another", repeat=3)) == said and len(fake_judge.bodies) == 9
    assert "third and another" in run(command(path, judge="third"))
    without = run(command(path, judge="third", use_references="no"))
    assert len(fake_judge.bodies) == 15 and "third and another" not in without
    shown = run(command(path))
    assert "another at http" in shown and "judgements   9 (9 scores), 0 of them paid twice" in shown
    assert "served as    served-2026 (9)" in shown and "tokens       8,100 in, 360 out" in shown


def test_human_labels(fake_judge, folder):
    said = run(command(folder("a"), judge="another", human=True))
    assert len(fake_judge.bodies) == 2 and "another and the human labels" in said
    for body in fake_judge.bodies:
        asked = body["messages"][1]["content"]
        assert "Human answer" in asked and "Reference Response" not in asked
    # Labels 4, 3, 2, 1, 0 doubled, against what the server said.
    said_first = [json.loads(fake_judge.judge(b))["correctness"] for b in fake_judge.bodies]
    mae = sum(abs(6 - s) for s in said_first) / 2
    [line] = [line for line in said.splitlines() if line.startswith("correctness")]
    assert f"{mae:.3f}" in line


def test_preference_over_pairs_that_both_answered(fake_judge, folder):
    ours, theirs = folder("a", "Fine"), folder("b", "Bad")

    def prefers_fine(body):
        asked = body["messages"][1]["content"]
        first = asked.index("Fine") < asked.index("Bad")
        return json.dumps({"better": "A" if first else "B"})

    fake_judge.judge = prefers_fine
    said = run(command(ours, against=theirs))  # by the judge of config.json
    assert len(fake_judge.bodies) == 6 and fake_judge.bodies[0]["model"] == "some-judge"
    assert "win-rate                 1.0000 [-]                n = 2 prompts" in said
    assert "order_bias               0.0000" in said
    run(command(ours, against=theirs))
    assert len(fake_judge.bodies) == 6


def test_export_rebuilds_the_figures_and_replays_the_judge(fake_judge, folder, tmp_path):
    one, two = folder("a"), folder("b", "Bad")
    first = run(command(one, judge="another"))
    run(command(two, judge="another"))
    file = tmp_path / "all.jsonl"
    assert "2 source(s) with 8 answers, 6 of them" in run(command(one, two, export=file))
    assert run(command(file)) == run(command(one, two))
    assert [s.rollouts for s in load_sources(file)] == [
        s.rollouts for p in (one, two) for s in load_sources(p)
    ]

    asked = len(fake_judge.bodies)
    (one / "judge_cache.jsonl").unlink()
    assert run(command(one, judge=f"replay:{file}")) == first
    assert len(fake_judge.bodies) == asked
    with pytest.raises(JudgeError, match="has no scores of another"):
        run(command(one, judge=f"replay:{file}", use_references="no"))


def test_an_offline_judge_with_noise_agrees_with_itself_in_part(folder, monkeypatch):
    class Noisy:
        name = "noisy"

        async def score(self, conversation, answer, references=(), draw=0):
            return ((5, 5, 5, 5, 5), (6, 5, 5, 5, 5), (8, 5, 5, 5, 5))[draw]

    monkeypatch.setattr(judgements, "make_judge", lambda *_: Noisy())
    said = run(command(folder("a"), judge="noisy", repeat=3))
    # Pairs 5-6, 5-8, 6-8: exact 0, within 1 a third, MAE 2.
    line = next(x for x in said.split("itself")[1].splitlines() if x.startswith("helpfulness"))
    assert "0.000 [-]" in line and "0.333" in line and "2.000" in line
    # Held out 5: 6 and 8, which count half each, are 1 and 3 off; 6: 1 and 2; 8: 3 and 2.
    expected = sum((1 - off / 45) ** 2 for off in (1, 3, 1, 2, 3, 2)) / 6
    assert f"median of the others     {expected:.4f}" in said
    assert reward.calibration((6, 5, 5, 5, 5), (5, 5, 5, 5, 5)) == pytest.approx((44 / 45) ** 2)


MISTAKES = {
    "nothing": ([], {}, "no source is given"),
    "no folder": (["nowhere"], {}, "neither a file nor a folder"),
    "a wrong file": (["data.jsonl"], {}, "data.jsonl:1: not a line of an export"),
    "other data": (["results/a"], {"data": "other.jsonl", "judge": "x"}, "not in the prompt file"),
    "no labels": (["results/a"], {"data": "other.jsonl", "human": True}, "no human labels"),
    "other data, pairs": (
        ["results/a"], {"data": "other.jsonl", "against": Path("results/a")},
        "not in the prompt file",
    ),
    "against many": (
        ["results/a"], {"against": Path("results/x")},
        "results/x: one model's answers are needed; name one of results/x/one/b, results/x/two/b",
    ),
    "against none": (["results/a"], {"against": Path("results/c")}, "no prompt that both answered"),
    "no key": (["results/a"], {"judge": "claude-sonnet-4-6"}, "set ANTHROPIC_API_KEY"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(fake_judge, folder, tmp_path, monkeypatch, case):
    for name in ("a", "c", "x/one/b", "x/two/b"):
        folder(name)
    (tmp_path / "results" / "c" / "rollouts.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"prompt": "Hello?"}\n')
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    sources, options, said = MISTAKES[case]
    with pytest.raises(ValueError, match=said):
        run(command(*map(Path, sources), **options))
    assert not fake_judge.bodies


def test_the_command_itself(folder):
    done = [sys.executable, "-m", "evaluation.judgements"]
    good = subprocess.run([*done, str(folder("a"))], capture_output=True, text=True, cwd=ROOT)
    assert good.returncode == 0 and "calibration" in good.stdout
    bad = subprocess.run([*done, "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert bad.returncode == 1 and bad.stderr.startswith("error: nowhere: neither")


def test_agreement_and_win_rate_by_hand():
    pairs = [("a", (1, 2, 3, 4, 5), (1, 3, 5, 4, 0)), ("b", (9,) * 5, (8,) * 5)]
    table = metrics.agreement(pairs)
    assert [table[a].mae.mean for a in ATTRIBUTES] == [0.5, 1, 1.5, 0.5, 3]
    assert [table[a].exact.mean for a in ATTRIBUTES] == [0.5, 0, 0, 0.5, 0]
    assert [table[a].within_1.mean for a in ATTRIBUTES] == [1, 1, 0.5, 1, 0.5]
    # A win, a loss, an agreed tie, a disagreement in favour of what is shown first.
    found = [(1, 1, 1), (-1, -1, -1), (0, 0, 0), (0, 1, -1)]
    rates = metrics.win_rate(list("abcd"), found)
    assert {k: e.mean for k, e in rates.items()} == {
        "win-rate": 0.5, "first_order": 0.625, "ties": 0.5, "order_bias": 0.25, "disagreement": 0.25
    }  # fmt: skip
