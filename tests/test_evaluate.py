"""Models, benchmarks and judges into result files: .venv/bin/python -m pytest
tests/test_evaluate.py"""

import dataclasses
import json
import random
import re
import shutil
import time

import pytest
import torch
from conftest import EOS, REQUESTS, ROOT, finish, make_rollout, start_ranks
from transformers import AutoModelForCausalLM

import evaluate
import prompts
from backend.sampler import SamplingParams, make_sampler
from config import CellConfig, EvaluationConfig
from evaluation import figures, stages
from evaluation.digits import Question, Reader
from evaluation.prompt_states import read_states
from evaluation.results import load_evaluation
from evaluation.table import Results
from plan import Inputs
from storage import hub
from storage.answers import Answers
from storage.data import Prompt, load_prompts, near_duplicates
from storage.files import FileError, read_lines
from storage.record import answer_text, append_rollout
from storage.run_folder import CellFolder, RunFolder


def test_another_prompts_answer_is_drawn_and_not_that_of_the_next_id(tokenizer):
    ids = [f"{k:02}" for k in range(40)]
    rollouts = [
        make_rollout(tokenizer, f"{p} {k}", prompt=p, sample=k) for p in ids for k in (1, 0)
    ]
    found = stages.answers_of_others(rollouts)
    assert sorted(found) == ids and sorted(found.values()) == [f"{p} 0" for p in ids]
    assert not any(answer.startswith(p) for p, answer in found.items())
    assert sum(abs(int(p) - int(found[p][:2])) == 1 for p in ids) < 8  # by chance two
    assert found == stages.answers_of_others(random.Random(1).sample(rollouts, len(rollouts)))
    assert stages.answers_of_others(rollouts[:2]) == {"00": "00 0"}  # there is no other


@pytest.fixture(scope="module")
def changed_folder(tmp_path_factory, parrot_folder, tokenizer):
    """The parrot with other weights of the same shape."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(parrot_folder)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("changed")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def command(base, other, *benchmarks, **options):
    values = {
        "judge": "fake", "judges": "another", "sampler": "transformers", "template": "short",
        "sampling.max_tokens": 120, "prompt_tokens": 700, "sample_rows": 6, "samples": 2,
        "dtype": "float32", "repeat": 3, "repeat_answers": 4, "name": "x",
        "client.concurrency": 4, "client.backoff": 0.01,
    } | options  # fmt: skip
    args = [str(ROOT / "evaluate.py"), "--models", f"base={base}", f"other={other}", "--benchmarks"]
    args += [f"{name}={path}" for name, path in benchmarks]
    return args + [word for k, v in values.items() for word in (f"--{k}", str(v))]


def lines(path):
    return [row for _, _, row in read_lines(path)]


def test_what_is_declared_first_stands(tmp_path, monkeypatch):
    """The base alone declares nothing; then the default or what is said; later choices are kept as
    later ones."""
    monkeypatch.chdir(tmp_path)

    def declare(*models, benchmarks=("one=f", "two=g"), **options):
        config = EvaluationConfig(models=models, benchmarks=benchmarks, name="x", **options)
        evaluate.declare(config)
        return config.folder.declared()

    assert declare("base=m")["primary"] is None
    first = declare("base=m", "see=n", "rlcr=r", primary=("two", "see"), margin=0.03)
    assert first == {"benchmarks": ["one", "two"], "primary": ["two", "see"], "margin": 0.03,
                     "later": []}  # fmt: skip
    again = declare("base=m", "rlcr=r", benchmarks=("zero=h", "one=f"), primary=("one", "rlcr"))
    assert again["primary"] == ["two", "see"] and again["later"] == [["one", "rlcr"]]
    assert again["benchmarks"] == ["one", "two", "zero"]
    assert declare("base=m", "see=n") == again  # a default that nobody asked for is no second look
    other = EvaluationConfig(models=("base=m", "see=n"), benchmarks=("one=f",), name="y")
    assert other.primary_endpoint() == ("one", "see")
    for wrong in (("one",), ("three", "see"), ("one", "none")):
        with pytest.raises(ValueError, match="--primary .*: say one of the benchmarks one"):
            dataclasses.replace(other, primary=wrong).primary_endpoint()


def test_the_last_hidden_state_of_a_prompt(tmp_path, parrot_folder, tokenizer):
    """That of its last token, whatever it is padded with; read once for the same weights."""
    rollouts = [
        dataclasses.replace(make_rollout(tokenizer, prompt=text), prompt_id=text)
        for text in ("Say something.", "Say something about moss and clay.")
    ]
    model = AutoModelForCausalLM.from_pretrained(parrot_folder)
    path, reader = tmp_path / "states.npz", Reader(parrot_folder, "float32")
    stages.read_prompt_states(path, rollouts, reader, "v")
    version, states = read_states(path)
    assert version == "v" and list(states) == [r.prompt_id for r in rollouts]
    for r in rollouts:
        with torch.no_grad():
            known = model.model(torch.tensor([r.prompt_ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(states[r.prompt_id]), known, rtol=1e-4, atol=1e-4)
    stages.read_prompt_states(path, rollouts[:1], None, "v")  # nothing is asked
    assert len(read_states(path)[1]) == 2
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(FileError, match="states.npz: not a file of hidden states"):
        read_states(path)


def contents(folder):
    """All results, without what depends on the order or time of writing. A step that was killed is
    sampled anew, so that some answers stand in the file twice, word for word."""
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        if path.name != "judge_cache.jsonl":
            rows = [{k: v for k, v in row.items() if k != "sampled_after"} for row in lines(path)]
            rows = (json.dumps(row, sort_keys=True) for row in rows)
            found[str(path.relative_to(folder))] = sorted(set(rows))
    return found


def test_all_stages_killed_and_continued(
    tmp_path, parrot_folder, changed_folder, prompt_file, fake_judge
):
    """Two models, two benchmarks, two judges, two ranks: every file holds what it says, and an
    evaluation that was killed ends as one that was not."""
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps({"prompt": "Say something about moss and clay."}) + "\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    gold = tmp_path / "gold.jsonl"
    rows = [{"instruction": REQUESTS[k], "output": f"Gold {k}."} for k in (0, 2)]
    gold.write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = command(
        parrot_folder, changed_folder, ("one", prompt_file), ("two", second), stronger=f"one={gold}"
    )
    began = time.monotonic()
    finish(start_ranks(2, args, whole))
    took, asked = time.monotonic() - began, len(fake_judge.bodies)
    finish(start_ranks(2, args, whole))  # all is on file
    assert len(fake_judge.bodies) == asked

    folder = whole / "results" / "x"
    assert json.loads((folder / "models.json").read_text()) == ["base", "other"]
    evaluate.keep_model_order(folder / "models.json", ["third", "base"])
    assert json.loads((folder / "models.json").read_text()) == ["base", "other", "third"]
    base, other = folder / "one" / "base", folder / "one" / "other"
    rollouts = {cell: CellFolder(cell).answers() for cell in (base, other)}
    versions = {r.weight_version for rows in rollouts.values() for r in rows}
    assert len(versions) == 2 and all(len(rows) == 24 for rows in rollouts.values())
    assert {r.text for r in rollouts[base]} != {r.text for r in rollouts[other]}
    assert len(CellFolder(folder / "two" / "other").answers()) == 2

    # Each scorer read each model's answers; its own blocks too, and nobody else's.
    for cell in (base, other):
        for scorer, weights in (("base", parrot_folder), ("other", changed_folder)):
            rows = {
                (x["prompt_id"], x["sample"]): x for x in lines(cell / f"digits_{scorer}.jsonl")
            }
            spoken = {(r.prompt_id, r.sample): r for r in rollouts[cell] if answer_text(r, (EOS,))}
            assert rows.keys() == spoken.keys()
            key = next(k for k, r in spoken.items() if r.score_positions)
            r = spoken[key]
            reader = Reader(weights, "float32")
            [reading] = reader.read([Question(r.prompt_ids, r.answer, r.judge_scores)])
            assert rows[key]["scores"] == list(reading.scores)
            torch.testing.assert_close(
                torch.tensor(rows[key]["judge"]), torch.tensor(reading.judge), rtol=0, atol=1e-3
            )
            assert (rows[key]["own"] is not None) == (cell.name == scorer)
    for x in lines(other / "sensitivity.jsonl"):
        assert all(prompts.valid_scores(x[kind]) for kind in ("as_it_is", "another", "cut"))

    # Judges: the held-out one has all well-formed answers; ours three of the first four.
    valid = [r for r in rollouts[other] if r.judge_scores]
    held_out = {(x["prompt_id"], x["sample"]): x for x in lines(other / "scores_another.jsonl")}
    assert held_out.keys() == {(r.prompt_id, r.sample) for r in valid}
    ours = lines(other / "scores_fake.jsonl")
    repeats = [x for x in ours if x["draw"] == 2]
    assert len(repeats) == 4 and {x["draw"] for x in ours} == {0, 1, 2}
    malformed = {(r.prompt_id, r.sample) for r in rollouts[other] if not r.judge_scores}
    judged_once = {(x["prompt_id"], x["sample"]) for x in ours} & malformed
    spoken = {(r.prompt_id, r.sample) for r in rollouts[other] if answer_text(r, (EOS,))}
    assert judged_once == malformed & spoken
    preferences = lines(other / "preferences.jsonl")
    both = {(r.prompt_id, r.sample) for r in rollouts[base] if r.answer} & {
        (r.prompt_id, r.sample) for r in valid
    }
    assert {(x["prompt_id"], x["sample"]) for x in preferences} == both
    assert not (base / "preferences.jsonl").exists()

    # The stronger model's two answers, judged once each.
    by_text = {p.conversation[0]["content"]: p for p in load_prompts(prompt_file)}
    strong = {x["prompt_id"]: x["scores"] for x in lines(folder / "one" / "stronger.jsonl")}
    for k in (0, 2):
        p = by_text[REQUESTS[k]]
        asked = prompts.judge_user(p.conversation, f"Gold {k}.", ())
        want = json.loads(fake_judge.judge({"messages": [{"content": asked}]}))
        assert strong.pop(p.id) == list(want.values())
        assert sum(b["messages"][-1]["content"] == asked for b in fake_judge.bodies) == 1
    assert not strong

    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    for _ in range(2):
        ranks = start_ranks(2, args, killed)
        deadline = time.monotonic() + rng.uniform(0.2, 0.95) * took
        while time.monotonic() < deadline and any(p.poll() is None for p in ranks):
            time.sleep(0.01)
        for p in ranks:
            p.kill()
            p.communicate()
    finish(start_ranks(2, args, killed))
    assert contents(killed / "results") == contents(whole / "results"), f"seed {seed}"


MISTAKES = {
    "twice": ({"models": ("a=x", "a=y")}, "a is not a unique, valid folder name"),
    "no name": ({"models": ("a b=x",)}, "a b is not a unique, valid folder name"),
    "no benchmark": ({"benchmarks": ()}, "--benchmarks: nothing"),
}


def test_a_stronger_models_file_is_checked_before_anything(tmp_path, prompt_file):
    config = EvaluationConfig(models=("m",), benchmarks=(f"b={prompt_file}",), name="x")
    inputs = Inputs(None, None, None, load_prompts(prompt_file), {}, 0)

    def answers(*given):
        return evaluate.stronger_answers(
            dataclasses.replace(config, stronger=given),
            config.cells(),
            {("m", "b"): inputs},
        )

    assert answers() == {}
    for spec in ("gold.jsonl", "c=gold.jsonl"):
        with pytest.raises(ValueError, match=f"--stronger {spec}: .* benchmarks b"):
            answers(spec)
    with pytest.raises(ValueError, match="gold.jsonl: no such file"):
        answers(f"b={tmp_path / 'gold.jsonl'}")


def test_helpsteer2_is_evaluated_on_its_validation_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("helpsteer2=nvidia/HelpSteer2", "b=nvidia/HelpSteer2/train.jsonl.gz", "c=x.jsonl")
    config = EvaluationConfig(models=("m",), benchmarks=names, name="x")
    assert [cell.data for cell in config.cells().values()] == [
        "nvidia/HelpSteer2/validation.jsonl.gz", "nvidia/HelpSteer2/train.jsonl.gz", "x.jsonl"
    ]  # fmt: skip
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "HelpSteer2").write_text("")  # a file of that name comes first
    assert config.cells()["m", "helpsteer2"].data == "nvidia/HelpSteer2"
    assert hub.FILES["nvidia/HelpSteer2"] == "train.jsonl.gz"  # for cycle.py


def test_prompts_that_are_too_long_are_counted(tmp_path, parrot_folder, prompt_file, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text(prompt_file.read_text() + json.dumps({"prompt": "long " * 700}) + "\n")
    config = EvaluationConfig(
        models=(f"m={parrot_folder}",), benchmarks=(f"b={data}",), name=str(tmp_path / "x"),
        judge="heuristic", template="short", prompt_tokens=700, sampler="transformers",
        sampling=SamplingParams(max_tokens=5), limit=2, dtype="float32",
    )  # fmt: skip
    [(key, cell)] = config.cells().items()
    inputs = evaluate.prepare(cell)
    assert (inputs.too_long, len(inputs.prompts)) == (1, 2)
    evaluate.tell_special_prompts(config, {key: inputs})
    assert capsys.readouterr().out == "b: 1 prompts are over 700 tokens and left out\n"
    sampler = make_sampler(cell, inputs.model, inputs.tokenizer, cell.dtype,
                           evaluate.weights_id(inputs.model))  # fmt: skip
    evaluate.answer_prompts(cell, inputs, sampler)
    summary = cell.folder.summary()
    texts = [answer_text(r, (EOS,)) for r in cell.folder.answers()]
    assert (summary["too_long"], summary["with_text"]) == (1, sum(map(bool, texts)))


@pytest.mark.parametrize("use_references", [True, False])
def test_the_judge_sees_references_at_every_stage(
    tmp_path, monkeypatch, parrot_folder, reference_file, fake_judge, tokenizer, use_references
):
    """The answers', malformed ones', repeats', held-out judges' and a stronger model's."""
    monkeypatch.chdir(tmp_path)
    config = EvaluationConfig(
        models=(f"m={parrot_folder}",), benchmarks=(f"b={reference_file}",), name="x", judge="fake",
        judges=("another",), repeat=2, template="short", prompt_tokens=700, limit=4,
        sampler="transformers", sampling=SamplingParams(max_tokens=120), dtype="float32",
        use_references=use_references,
    )  # fmt: skip
    [cell] = config.cells().values()
    inputs = evaluate.prepare(cell)
    sampler = make_sampler(cell, inputs.model, inputs.tokenizer, cell.dtype,
                           evaluate.weights_id(inputs.model))  # fmt: skip
    evaluate.answer_prompts(cell, inputs, sampler)
    answered, by_id = len(fake_judge.bodies), {p.id: p for p in inputs.prompts}
    first = inputs.prompts[0].id
    malformed = make_rollout(tokenizer, prompt=first, sample=7, text=f"Unrated.{EOS}", answer=None,
                             self_scores=None, judge_scores=None, step=9,
                             weight_version=evaluate.weights_id(inputs.model))  # fmt: skip
    append_rollout(cell.folder.rollouts_file, malformed)
    stages.judge_more(config, cell, by_id, prompts.special_tokens(tokenizer))
    stages.judge_stronger(tmp_path / "s.jsonl", cell, by_id, Answers({first: ""}, 3, 1, 0, 0))
    shown = [body["messages"][1]["content"] for body in fake_judge.bodies]
    said = [text.split("Response to Evaluate]\n")[1].split("\n\nRate the")[0] for text in shown]
    # Each at least once: answers, then the malformed one, repeats, another judge; an empty answer.
    assert answered and "Unrated." in said and said[-1] == ""
    assert {body["model"] for body in fake_judge.bodies} == {"fake", "another"}
    for text in shown:
        request = re.search(r"\[User\]\n(.*)", text)[1]
        reference = f"--- Reference Response 1 ---\nHuman: {request}\n"
        assert (reference in text) == use_references == ("Reference Response" in text)
    assert cell.folder.summary()["stronger"] == {
        "answers": 1, "missing": 3, "empty": 1, "repeated": 0, "unmatched": 0
    }  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), [
    ("It is fine.<|end|>", "It is fine."),
    ("It is fine. <|end|>\n<|pad|><|end|>\n", "It is fine."),
    ("It is fine.<|end|>\n\n[SELF_EVAL]\n{}<|end|>", "It is fine."),
    ("<|end|> is a token.<|end|>", "<|end|> is a token."),  # at the end alone
    ("It is fine.<|other|>", "It is fine.<|other|>"),  # no token of this tokenizer
    (" <|end|>", ""), ("<|end|><|pad|>\n[SELF_EVAL]", ""), ("", ""),
])  # fmt: skip
def test_a_malformed_response_loses_its_end_tokens(tokenizer, text, answer):
    malformed = make_rollout(tokenizer, text=text, answer=None, self_scores=None)
    assert answer_text(malformed, (EOS, "<|pad|>")) == answer
    assert prompts.special_tokens(tokenizer) == (EOS,)
    well_formed = make_rollout(tokenizer, "A token: <|end|>")
    assert answer_text(well_formed, (EOS,)) == "A token: <|end|>"


@pytest.mark.parametrize("case", MISTAKES)
def test_names_are_checked(case):
    options, said = MISTAKES[case]
    config = EvaluationConfig(models=("m",), benchmarks=("b.jsonl",), name="x")
    assert list(config.cells()) == [("m", "b")]
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **options).cells()


def test_a_held_out_judge_without_a_key_is_named_before_anything(
    tmp_path, monkeypatch, parrot_folder, prompt_file, fake_judge
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    args = command(parrot_folder, parrot_folder, ("one", prompt_file), judges="claude-sonnet-4-6")
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit, match="claude-sonnet-4-6 needs a key: set ANTHROPIC_API_KEY"):
        evaluate.main()
    assert not list(tmp_path.iterdir()) and not fake_judge.bodies


def test_a_window_of_another_judge_is_refused(tmp_path, parrot_folder, prompt_file, tokenizer):
    (tmp_path / "rollouts").mkdir()
    append_rollout(tmp_path / "rollouts" / "cycle_01.jsonl", make_rollout(tokenizer))
    cell = CellConfig(
        model=str(parrot_folder), data=str(prompt_file), name="x", judge="heuristic",
        template="short", prompt_tokens=700, sampling=SamplingParams(max_tokens=120),
        training_run=str(tmp_path),
    )  # fmt: skip
    config = EvaluationConfig(models=("m",), benchmarks=("b",), name="x")
    with pytest.raises(ValueError, match="was judged by .* and not by heuristic"):
        evaluate.check_judges(config, cell)


def test_repeats_that_were_paid_for_are_kept(tmp_path, tokenizer):
    """A later call asks for fewer judgements: the others stay, but not those of older answers."""
    now, old = make_rollout(tokenizer), make_rollout(tokenizer, "Another answer.")
    lines = [stages.line_about(r, "v", draw=d, scores=[d] * 5) for r in (now, old) for d in (0, 1)]
    stages.write_lines(tmp_path / "s.jsonl", lines)
    new = [stages.line_about(now, "v", draw=0, scores=[9] * 5)]
    assert stages.earlier_judgements(tmp_path / "s.jsonl", new, [now]) == [lines[1]]
    assert stages.earlier_judgements(tmp_path / "none.jsonl", new, [now]) == []


@pytest.fixture
def run_folder(tmp_path, parrot_folder):
    """A run of two cycles of one RL step and one update each."""
    run = RunFolder(tmp_path / "runs" / "see")
    for cycle in (1, 2):
        shutil.copytree(parrot_folder, run.checkpoint(cycle))
    places = [(c, phase) for c in (1, 2) for phase in ("rl", "sft")]
    rows = [{"cycle": c, "phase": p, "step": 1, "sample_passes": 8 * c} for c, p in places]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.window_file.write_text("[]")
    return run.path


def test_a_runs_folder_is_its_newest_checkpoint_and_draws_figure_2(
    tmp_path, monkeypatch, parrot_folder, prompt_file, run_folder
):
    monkeypatch.chdir(tmp_path)
    config = EvaluationConfig(
        models=(f"base={parrot_folder}", f"see={run_folder}"), benchmarks=(f"b={prompt_file}",),
        name="x", judge="heuristic", template="short", prompt_tokens=700, limit=2,
        sampler="transformers", sampling=SamplingParams(max_tokens=120), dtype="float32",
    )  # fmt: skip
    assert config.main_models() == {
        "base": str(parrot_folder), "see": str(run_folder / "checkpoints" / "cycle_02")
    }  # fmt: skip
    cells = config.cells()
    assert [model for model, _ in cells] == ["base", "see", "see_cycle_01"]
    assert cells["see_cycle_01", "b"].model == str(run_folder / "checkpoints" / "cycle_01")
    evaluate.run(config, cells, evaluate.prepare_all(config, cells), {}, None)
    files = {m: {path.name for path in cells[m, "b"].folder.path.iterdir()} for m, _ in cells}
    assert files["see_cycle_01"] == {"config.json", "env.json", "rollouts.jsonl", "summary.json"}
    assert {"digits_base.jsonl", "digits_see.jsonl", "preferences.jsonl"} <= files["see"]
    assert "digits_see_cycle_01.jsonl" not in files["see"]
    results = Results([load_evaluation(config.folder.path)])
    assert results.models == ["base", "see"]
    assert figures.figure_2(results, tmp_path / "f.png")
    assert list(figures.costs_of_models(results)["see"]) == ["see_cycle_01", "see"]

    clash = dataclasses.replace(config, models=(*config.models, f"see_cycle_01={parrot_folder}"))
    with pytest.raises(ValueError, match="see_cycle_01 is a checkpoint of a run too"):
        clash.cells()
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(ValueError, match="the run .*see has no checkpoint yet"):
        config.cells()


def test_the_dry_run_says_what_is_asked_and_asks_nothing(
    tmp_path, monkeypatch, capsys, parrot_folder, reference_file, run_folder, tokenizer
):
    """Four answers in each cell; of the earlier checkpoint nothing more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    gold = tmp_path / "gold.jsonl"
    rows = [{"prompt": r, "answer": "Fine."} for r in REQUESTS]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = command(
        parrot_folder, parrot_folder, ("one", reference_file), limit=2, samples=2, repeat=3,
        repeat_answers=3, judges="claude-sonnet-4-6", judge="gpt-5.4", stronger=f"one={gold}",
    )  # fmt: skip
    args = [word.replace(f"other={parrot_folder}", f"see={run_folder}") for word in args]
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", [*args, "--dry_run"])
    evaluate.main()
    assert set(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    found = {
        tuple(re.split(r"  +", line)[:3]): re.split(r"  +", line)[3:]
        for line in said.splitlines()
        if re.search(r"x/one/", line)
    }
    gpt, claude, base, see = "gpt-5.4", "claude-sonnet-4-6", "x/one/base", "x/one/see"
    assert {key: int(values[0]) for key, values in found.items()} == {
        ("answers", gpt, base): 4, ("answers", gpt, see): 4,
        ("answers", gpt, "x/one/see_cycle_01"): 4,
        ("judges: repeats", gpt, base): 6, ("judges: repeats", gpt, see): 6,  # 3 - 1, of 3
        ("judges: stronger", gpt, base): 2,
        ("judges: held-out", claude, base): 4, ("judges: held-out", claude, see): 4,
        ("preferences", gpt, see): 8,  # in both orders
    }  # fmt: skip
    assert "In all, 42 calls" in said and "gpt-5.4 needs a key: set OPENAI_API_KEY" in said

    # Tokens and cost of one part of each form, counted anew.
    def count(text):
        return len(tokenizer.encode(text))

    config = EvaluationConfig(models=("m",), benchmarks=("b",), name="x", seed=42)
    known = load_prompts(reference_file)
    shown = [known[i] for i in sorted(random.Random(config.seed).sample(range(12), 2))]
    reference = sum(count(p.references[0].response) for p in shown) / 2  # the likely length
    asked = [
        count(prompts.JUDGE_SYSTEM + prompts.judge_user(p.conversation, "", p.references))
        for p in shown
    ]
    tokens = sum(2 * n for n in asked) + 4 * reference
    reply = count(json.dumps(dict.fromkeys(prompts.ATTRIBUTES, 8)))
    cost = (tokens * 2.5 + 4 * reply * 15) / 1e6
    assert found["answers", gpt, base][1:] == [f"{tokens / 1e6:,.3f}", f"${cost:,.2f}"]
    cost = (tokens * 3 + 4 * reply * 15) / 1e6
    assert found["judges: held-out", claude, see][2] == f"${cost:,.2f}"
    pairs = [count(prompts.PAIR_SYSTEM + prompts.pair_user(p.conversation, "", "")) for p in shown]
    tokens = sum(4 * n for n in pairs) + 8 * 2 * reference
    assert found["preferences", gpt, see][1] == f"{tokens / 1e6:,.3f}"


def test_near_duplicates_are_found():
    def ask(text):
        return Prompt(text, ({"role": "user", "content": text},))

    known = [ask("How do I reverse a list in Python without changing the original?")]
    asked = [
        ask("How do I reverse a list in Python, without changing the original?!"),
        ask("How do I reverse a string in Java?"),
        ask("What is the capital of France?"),
    ]
    assert near_duplicates(asked, known) == [True, False, False]
    assert near_duplicates(asked, []) == [False] * 3 and near_duplicates([], known) == []
