"""Using a trained model: .venv/bin/python -m pytest tests/test_predict.py"""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REQUESTS, ROOT
from fake_judge import FakeJudge, Reply

import predict
import prompts
from backend.policy import load_model
from config import PRESETS
from evaluation import risk
from evaluation.responses import Drawn
from evaluation.threshold import Threshold, Wish
from judging.heuristic import HeuristicJudge
from judging.served import ServedError
from predict import Command, Predictor
from storage import model_card
from storage.data import as_prompt, load_prompts
from storage.predictions import read_predictions, render, why_dropped

WINDOW = list(map(as_prompt, REQUESTS))
OPTIONS = {"max_tokens": 120, "sampler": "transformers", "dtype": "float32", "sample_rows": 5}


@pytest.fixture(scope="module")
def export(parrot_folder, tokenizer):
    """The parrot with what an export says about itself."""
    config = dataclasses.replace(PRESETS["small"], model="org/base", prompt_tokens=700)
    card = model_card.of_run(
        config, parrot_folder, (2, None), HeuristicJudge(), WINDOW, tokenizer, (8,) * 5
    )
    for name, text in model_card.card_files(card).items():
        (parrot_folder / name).write_text(text)
    yield parrot_folder
    for name in (model_card.FILE, model_card.README):
        (parrot_folder / name).unlink()


def one_hot(*scores):
    """(5, 10) probabilities, all on these digits."""
    return [[float(d == s) for d in range(10)] for s in scores]


def well_formed(*scores, answer="Fine.", digits=True):
    text = prompts.render_response(answer, scores)
    return Drawn(text, one_hot(*scores) if digits else None)


MALFORMED = Drawn("Fine.", None)


# --------------------------------------------------------------------------------------------------
# Figures and decisions


def test_figures_by_hand():
    """Helpfulness 0 or 9, correctness 2, 4 or 6, coherence 9 for certain."""
    digits = one_hot(0, 0, 9, 1, 0)
    digits[0] = [0.5, *[0.0] * 8, 0.5]
    digits[1] = [0, 0, 0.25, 0, 0.5, 0, 0.25, 0, 0, 0]
    got = Drawn(well_formed(9, 4, 9, 1, 0).text, digits).figures(below=4)
    assert got["expected"] == (4.5, 4.0, 9.0, 1.0, 0.0)
    assert got["spread"] == pytest.approx((4.5, 2**0.5, 0, 0, 0), abs=1e-4)
    assert got["expected_quality"] == pytest.approx((4.5 + 4 + 9) / 27, abs=1e-6)
    assert got["p_below"] == 0.25  # the 2; the threshold itself is not below
    assert got["scores"] == (9, 4, 9, 1, 0) and got["answer"] == "Fine."
    sampled = well_formed(9, 4, 9, 1, 0, digits=False).figures(4)
    assert sampled["expected_quality"] == pytest.approx(22 / 27, abs=1e-6)
    assert sampled["digits"] is sampled["p_below"] is sampled["expected"] is None
    assert MALFORMED.figures(4) == dict.fromkeys(sampled) | {"text": "Fine."}
    assert MALFORMED.confidence() == -1 < well_formed(0, 0, 0, 0, 0).confidence() == 0


def test_which_scores_a_threshold_is_about(export, tmp_path):
    """Sampled quality 22 / 27, expected 17.5 / 27, and a server without distributions."""
    digits = one_hot(0, 4, 9, 1, 0)
    digits[0] = [0.5, *[0.0] * 8, 0.5]
    text = well_formed(9, 4, 9, 1, 0).text
    full, plain = Drawn(text, digits), Drawn(text, None)
    quality = {None: 17.5 / 27, "expected": 17.5 / 27, "sampled": 22 / 27}
    for scores, expected in quality.items():
        assert full.confidence(scores) == pytest.approx(expected, abs=1e-5)
        assert MALFORMED.confidence(scores) == -1
    for scores in (None, "sampled"):
        assert plain.confidence(scores) == pytest.approx(22 / 27, abs=1e-5)
    assert plain.confidence("expected") == -1  # that promise was about distributions
    for scores, decision in (("expected", "escalate"), ("sampled", "send")):
        found = Threshold(0.7, 0.1, "bad", 0.5, 0.05, 100, 0.5, 0.0, scores)
        found.save(tmp_path / "threshold.json")
        predictor = scripted(export, Script(), threshold=str(tmp_path / "threshold.json"))
        assert predictor.settings().scores == scores
        predictor._source = Script(**{as_prompt("Hm?").id: [full]})
        assert predictor("Hm?").decision == decision


def test_calibrate_is_called(monkeypatch, capsys, tmp_path):
    made = []
    monkeypatch.setattr(risk, "calibrate", lambda *args: made.append(args) or "chosen")
    predict.run(Command(calibrate="results/x/one/see", wish=Wish(target=0.2), out=str(tmp_path)))
    assert made == [(Path("results/x/one/see"), Wish(target=0.2), tmp_path)]
    assert capsys.readouterr().out == "chosen\n"


class Script:
    """Responses by hand, in the order of the prompt's samples; `fail_at`: the call that fails."""

    def __init__(self, **drawn):
        self.drawn, self.asked, self.calls, self.fail_at = drawn, [], 0, None

    def draw(self, requests):
        self.calls += 1
        if self.calls == self.fail_at:
            raise ServedError("gone")
        self.asked += [(r.prompt_id, r.sample) for r in requests]
        return [self.drawn[r.prompt_id][r.sample] for r in requests]

    def close(self):
        pass


def scripted(export, script, **options):
    predictor = Predictor(export, **OPTIONS | options)
    predictor._source, predictor._unlike = script, lambda prompt: 0.0
    return predictor


def prompts_of(tmp_path, *ids):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"Say {i}."}) + "\n" for i in ids))
    return path


def test_send_retry_escalate(export, tmp_path):
    """Quality 6/9 is at the threshold."""
    threshold = 6 / 9
    script = Script(
        good=[well_formed(6, 6, 6, 0, 0)],
        better=[well_formed(5, 6, 6, 9, 9), MALFORMED,
                well_formed(7, 7, 7, 0, 0), well_formed(7, 7, 7, 1, 1)],
        bad=[MALFORMED, well_formed(1, 1, 1, 0, 0), well_formed(5, 6, 6, 0, 0), MALFORMED],
        strange=[well_formed(9, 9, 9, 9, 9)],
    )  # fmt: skip
    rows = load_prompts(prompts_of(tmp_path, "good", "better", "bad", "strange"))
    predictor = scripted(export, script, threshold=round(threshold, 6), samples=4)
    predictor._unlike = lambda prompt: 1.0 if prompt.id == "strange" else 0.99
    found = {p.id: p for p in predictor.predict(rows)}
    assert {i: (p.decision, p.sample) for i, p in found.items()} == {
        "good": ("send", 0), "better": ("retry", 2), "bad": ("escalate", 2),
        "strange": ("escalate", 0),
    }  # fmt: skip
    # What is sent or unlike is not asked again.
    assert [i for i, k in script.asked if k] == ["better"] * 3 + ["bad"] * 3
    assert [why_dropped(p) for p in found.values()] == [
        None, None, "below the threshold", "unlike the training window"
    ]  # fmt: skip
    assert "warning: the scores may mean nothing" in render(found["strange"], 5, threshold)
    assert "warning" not in render(found["better"], 5, threshold)


def test_without_a_threshold_nothing_is_decided_and_the_best_counts(export):
    script = Script()
    predictor = scripted(export, script, samples=2)
    script.drawn[as_prompt("Say a.").id] = [well_formed(1, 1, 1, 0, 0), well_formed(2, 2, 2, 0, 0)]
    found = predictor("Say a.")
    assert (found.decision, found.sample, found.answer) == (None, 1, "Fine.")
    long = predictor("Say " * 900)
    assert (long.text, long.answer, long.expected_quality, long.decision) == (None,) * 4
    assert "too long" in render(long, 5, None)
    assert scripted(export, Script(), threshold=0.5)("Say " * 900).decision == "escalate"


# --------------------------------------------------------------------------------------------------
# The model in this process


def test_a_models_distributions_are_those_of_a_plain_forward(export, tokenizer):
    predictor = Predictor(export, **OPTIONS, seed=3)
    found = list(predictor.predict(REQUESTS[:6]))  # two batches
    model = load_model(export, torch.float32).eval()
    assert len({p.text for p in found}) > 1 and sum(p.digits is not None for p in found) > 2
    for p in found:
        ids = prompts.prompt_ids(tokenizer, p.conversation, "short")
        response = tokenizer.encode(p.text, add_special_tokens=False)
        with torch.no_grad():
            logp = model(torch.tensor([[*ids, *response]])).logits[0].log_softmax(-1)
        if p.digits is None:
            continue
        for row, at in zip(p.digits, prompts.score_positions(response, tokenizer), strict=True):
            digits = list(prompts.digit_ids(response[at], tokenizer))
            known = logp[len(ids) + at - 1, digits].softmax(-1)
            assert row == pytest.approx(known.tolist(), abs=1e-4)
    assert all(p.unlike < 1 for p in found)  # of the window
    assert predictor("Ça va bien ?").unlike == 1
    predictor.close()


# --------------------------------------------------------------------------------------------------
# A served model


class FakeModel(FakeJudge):
    """Serves completions whose block holds the digits that stand in the prompt's seed."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        super().__init__()

    def completion(self, body, reply):
        if reply != Reply():
            return super().completion(body, reply)
        scores = [int(d) for d in f"{body['seed'] % 100_000:05d}"]
        ids = self.tokenizer.encode(prompts.render_response("It is fine.", scores))
        tokens = [self.tokenizer.decode([i]) for i in ids]
        top = [{t: -0.7} | {f" {d}": -9.0 for d in range(10)} for t in tokens]
        logprobs = {"tokens": tokens, "top_logprobs": top}
        choice = {"text": "".join(tokens), "finish_reason": "stop", "logprobs": logprobs,
                  "stop_reason": prompts.CLOSE}  # fmt: skip
        return json.dumps({"choices": [choice]})


@pytest.fixture
def served(tokenizer):
    model = FakeModel(tokenizer)
    yield model
    model.server.shutdown()


def test_a_served_model(export, served, tokenizer):
    """The same prompts as token ids; digits and answer from what the server says."""
    predictor = Predictor(export, url=served.url, max_tokens=120, threshold=0.9, samples=3)
    found = list(predictor.predict(REQUESTS[:4]))
    ids = [prompts.prompt_ids(tokenizer, p.conversation, "short") for p in found]
    assert {tuple(body["prompt"]) for body in served.bodies} == {*ids}
    for p in found:
        assert p.answer == "It is fine." and p.expected == p.scores and p.spread == (0.0,) * 5
    assert {(p.decision, p.sample > 0) for p in found} <= {
        ("send", False), ("retry", True), ("escalate", False), ("escalate", True)
    }  # fmt: skip
    assert len(served.bodies) > 4 and len({body["seed"] for body in served.bodies}) == len(
        served.bodies
    )


# --------------------------------------------------------------------------------------------------
# The command


def command(export, tmp_path, **options):
    return Command(model=str(export), out=str(tmp_path / "out"), **OPTIONS | options)


def test_a_killed_file_goes_on_by_id_and_is_screened(export, tmp_path, monkeypatch, capsys):
    ids = [f"p{k}" for k in range(7)]
    answers = {i: [well_formed(k, k, k, 0, 0, answer=i)] for k, i in enumerate(ids, 2)}
    script = Script(**answers)
    monkeypatch.setattr(Predictor, "_loaded", lambda self: script)
    monkeypatch.setattr(Predictor, "_unlike", lambda self, prompt: 0.0)
    wanted = command(export, tmp_path, data=str(prompts_of(tmp_path, *ids)), threshold=0.5,
                     screen=True)  # fmt: skip
    script.fail_at = 2
    with pytest.raises(ServedError):
        predict.run(wanted)
    log = tmp_path / "out" / "predictions.jsonl"
    assert [p.id for p in read_predictions(log)] == ids[:5]  # one batch
    log.write_bytes(log.read_bytes() + b'{"id": "p5", "pro')
    with pytest.warns(UserWarning, match="cut short"):
        predict.run(wanted)
    assert script.asked == [(i, 0) for i in ids]
    assert [p.id for p in read_predictions(log)] == ids
    assert [p.answer for p in read_predictions(log)] == ids
    assert load_prompts(log) == load_prompts(tmp_path / "prompts.jsonl")

    said = capsys.readouterr()
    assert "7 predictions, 4 send, 0 retry, 3 escalate" in said.out
    assert "kept: 4, below the threshold: 3" in said.out and "5 of 7 prompts are on" in said.err
    kept, dropped = (
        [json.loads(x) for x in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("kept", "dropped")
    )
    assert [row["id"] for row in kept] == ids[3:]  # 5/9 and above
    assert kept[0]["messages"] == [
        {"role": "user", "content": "Say p3."}, {"role": "assistant", "content": "p3"}
    ]  # fmt: skip
    assert [(row["id"], row["reason"]) for row in dropped] == [
        (i, "below the threshold") for i in ids[:3]
    ]

    for changed, says in (
        ({"threshold": 0.6, "seed": 1}, "another configuration .*seed, threshold.*--out"),
        ({"data": str(tmp_path / "other.jsonl")}, "another prompt of the id 'p0'"),
    ):
        (tmp_path / "other.jsonl").write_text('{"id": "p0", "prompt": "Something else."}\n')
        with pytest.raises(ValueError, match=says):
            predict.run(dataclasses.replace(wanted, **changed))
    log.write_text('{"id": "p0"}\n')
    with pytest.raises(ValueError, match="predictions.jsonl:1: not a prediction"):
        predict.run(wanted)


@pytest.mark.parametrize(
    ("given", "count"),
    [("Say something\nabout rain.\n", 1), ('{"prompt": "One?"}\n{"prompt": "Two?"}\n', 2),
     ('[{"prompt": "One?"}]', 1)],
)  # fmt: skip
def test_standard_input(export, monkeypatch, capsys, given, count):
    class Echo(Script):
        def draw(self, requests):
            return [well_formed(5, 5, 5, 5, 5) for _ in requests]

    monkeypatch.setattr(Predictor, "_loaded", lambda self: Echo())
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    predict.run(Command(model=str(export), **OPTIONS))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == count and rows[0]["expected_quality"] == pytest.approx(5 / 9, abs=1e-6)
    assert "prompt" in rows[0] and "conversation" not in rows[0]


BAD = {
    "no model": ({"model": ""}, "give a model folder"),
    "no folder": ({"model": "none"}, "model none: no such folder"),
    "template": (
        {"template": "bare"},
        "trained with --template short .*asked with --template bare",
    ),
    "few-shot": ({"few_shot": "varied"}, "trained with --few_shot paper-like"),
    "threshold": ({"threshold": "2"}, r"--threshold 2: must give a quality in \[0, 1\]"),
    "word": ({"threshold": "high"}, "--threshold high: neither a number nor a file"),
    "nan": ({"threshold": "nan"}, "must give a quality"),
    "both": ({"data": "x.jsonl"}, "not both"),
    "data": ({"prompt": "", "data": "x.jsonl"}, "x.jsonl: no such file"),
    "screen": ({"screen": True}, "--screen needs --threshold"),
    "url": ({"url": "localhost:8000"}, "--url must read"),
    "key": ({"url": "http://127.0.0.1:9/v1", "key_variable": "NOT_SET"}, "set NOT_SET"),
    "long": ({"max_tokens": 5000}, "reads 1024 tokens"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    export, tmp_path, monkeypatch, changes, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "_loaded", lambda self: pytest.fail("a model was loaded"))
    args = {"model": str(export), "prompt": "Say something.", **OPTIONS} | changes
    monkeypatch.setattr(predict.tyro, "cli", lambda *a, **k: Command(**args))
    with pytest.raises(SystemExit, match=f"error: .*{says}") as caught:
        predict.main()
    assert "\n" not in str(caught.value)


def test_a_model_without_a_card_needs_its_template(random_folder):
    with pytest.raises(ValueError, match="has no self_eval.json.*--template and --few_shot"):
        Predictor(random_folder(), **OPTIONS)
    options = OPTIONS | {"prompt_tokens": 700, "template": "short", "few_shot": "paper-like"}
    predictor = Predictor(random_folder(), **options)
    assert predictor.settings().sampling.top_k == 25


def test_the_command_line(export, tmp_path):
    """As a program, from prompt to JSON."""
    words = ["--sampler", "transformers", "--max-tokens", "120", "--threshold", "0.1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "predict.py"), str(export), REQUESTS[0], *words],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["prompt"] == REQUESTS[0] and row["decision"] in ("send", "escalate")
    assert row["unlike"] is not None
