"""Whole runs of a tiny model: .venv/bin/python -m pytest tests/test_cycle.py"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import REQUESTS, ROOT, finish, free_port, make_tokenizer, small_args, start_ranks
from transformers import AutoModelForCausalLM

import buffer
import cycle
import prompts
from cycle import PRESETS, parse, prepare, step_batches
from logbook import Clock, read_metrics

# --------------------------------------------------------------------------------------------------
# Configuration and bad input


def test_the_paper_preset_is_the_papers():
    c = parse([])
    assert c == PRESETS["paper"] and c.preset == "paper"
    assert (c.cycles, c.window, c.rl_steps, c.batch, c.rollouts) == (15, 160, 10, 16, 8)
    assert c.cycles * c.window == 2400  # sample-passes
    assert (c.grpo.lr, c.grpo.kl_coef, c.grpo.entropy_coef, c.grpo.clip) == (1e-6, 0.01, 0.001, 0.2)
    assert (c.grpo.betas, c.grpo.weight_decay, c.grpo.grad_clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (c.sft.max_samples, c.sft.per_prompt_limit, c.sft.batch, c.sft.lr) == (400, 4, 32, 2e-6)
    assert (c.sft.warmup, c.sft.weight_decay, c.sft.grad_clip) == (0.03, 0.0, 1.0)
    s = c.sampling
    assert (s.temperature, s.top_p, s.top_k, s.max_tokens, c.prompt_tokens) == (
        0.8,
        0.9,
        25,
        8192,
        4096,
    )
    assert dataclasses.astuple(c.reward) == (0.7, 0.3, 2.0, -1.0)
    assert (c.model, c.judge, c.seed, c.reference) == ("Qwen/Qwen3-4B-Base", "gpt-5.4", 42, "cycle")
    assert (c.client.tries, c.client.timeout, c.client.concurrency) == (8, 90.0, 24)
    assert parse(["--cycles", "15"]) == c
    assert parse(["--preset=small", "--grpo.loss_mean", "token"]).template == "short"


@pytest.fixture
def tiny(tmp_path, random_folder, prompt_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = small_args(random_folder(), prompt_file)[1:]

    def config(**changes):
        return dataclasses.replace(parse(args), **changes)

    return config


def test_a_good_configuration_is_prepared(tiny):
    setup = prepare(tiny())
    window = [p.conversation[0]["content"] for p in setup.window]
    drawn = sorted(random.Random(42).sample(range(12), 8))
    assert window == [REQUESTS[i] for i in drawn] and setup.inputs.too_long == 0


def test_long_prompts_are_left_out_before_the_draw(tiny, tmp_path, tokenizer):
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": "long " * 300}] + [{"prompt": r} for r in REQUESTS[:8]]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    setup = prepare(tiny(data=str(data)))
    assert setup.inputs.too_long == 1 and len(setup.window) == 8


BAD = {
    "no file": ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    "window": ({"window": 16, "rl_steps": 4}, "window of 16 .* 12 unique prompts"),
    "steps": ({"rl_steps": 3}, r"rl_steps 3 .* 1 epoch.* window of 8 .* batches of 4 are 2 steps"),
    "model": ({"model": "none"}, "model none: no such folder"),
    "context": ({"prompt_tokens": 4096}, "reads 1024 tokens, fewer than prompt_tokens .* = 4216"),
    "rollouts": ({"rollouts": 1}, "rollouts must be at least 2"),
    "cycles": ({"cycles": 0}, "cycles must be at least 1"),
    "key": ({"judge": "gpt-5.4"}, "OPENAI_API_KEY"),
    "paper": ({"preset": "paper"}, "needs CUDA .* --preset small"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(tiny, monkeypatch, changes, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(cycle, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    if changes.get("preset") == "paper" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(SystemExit, match=f"error: .*{says}") as caught:
        cycle.main(tiny(**changes))
    assert "\n" not in str(caught.value)


def test_uneven_ranks_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch 4 cannot be shared evenly by 3 ranks"):
        prepare(tiny())


def test_a_tokenizer_without_single_digits_is_refused(tiny, tmp_path, random_folder):
    folder = tmp_path / "merged"
    shutil.copytree(random_folder(), folder)
    make_tokenizer("merged").save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer .*merged: .*one token"):
        prepare(tiny(model=str(folder)))


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    setup = prepare(tiny())
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(tiny())))
    (folder / "window.json").write_text(json.dumps([p.id for p in setup.window]))
    prepare(tiny(cycles=9))  # more cycles go on with a run
    with pytest.raises(ValueError, match="another configuration .*rollouts, seed.*--name"):
        prepare(tiny(seed=7, rollouts=8))
    (folder / "window.json").write_text("[]")
    with pytest.raises(ValueError, match="other prompts"):
        prepare(tiny())


def test_batches_are_a_permutation_by_cycle(tiny):
    window = prepare(tiny()).window
    config = tiny(batch=3, epochs=2, rl_steps=4)
    batches = step_batches(config, window, cycle=2)
    assert [len(b) for b in batches] == [3] * 4  # the two prompts left over are dropped
    assert len({p.id for b in batches[:2] for p in b}) == 6
    assert batches == step_batches(config, window, 2) != step_batches(config, window, 3)


def test_the_clock_adds_up():
    clock = Clock()
    with clock("a"):
        time.sleep(0.01)
        with pytest.raises(RuntimeError, match="inside another part"), clock("b"):
            pass
    lap = clock.lap()
    assert set(lap) == {"a", "other", "wall"} and lap["a"] >= 0.01
    assert lap["a"] + lap["other"] == pytest.approx(lap["wall"], abs=2e-3)
    assert set(clock.lap()) == {"other", "wall"}


# --------------------------------------------------------------------------------------------------
# Runs


def weights(run) -> bytes:
    return (run / "checkpoints" / "cycle_02" / "model.safetensors").read_bytes()


def test_two_ranks_under_torchrun(tmp_path, parrot_folder, prompt_file):
    """The whole of Algorithm 1 on two ranks, then evaluation of what came out."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--master_port", free_port()]  # fmt: skip
    args = small_args(parrot_folder, prompt_file)
    done = subprocess.run(launch + args, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "tiny"

    metrics = read_metrics(run)
    assert [(m["cycle"], m["step"]) for m in metrics if m["phase"] == "rl"] == [
        (1, 1), (1, 2), (2, 1), (2, 2)
    ]  # fmt: skip
    assert [m["sample_passes"] for m in metrics if m["phase"] == "rl"] == [4, 8, 12, 16]
    named = """cycle phase step sample_passes reward quality calibration mae well_formed truncated
        response_tokens score_entropy kl clip_fraction entropy grad_norm logprob_gap
        zero_variance_groups seconds""".split()
    for m in metrics:
        if m["phase"] == "rl":
            assert set(named) <= set(m)
            assert m["clip_fraction"] == 0 and m["logprob_gap"] < 1e-3
            assert m["kl"] < 1e-6 if m["step"] == 1 else m["kl"] > 1e-6
    assert any(m["phase"] == "sft" for m in metrics)

    for number in (1, 2):
        rollouts = buffer.read(run / "rollouts" / f"cycle_{number:02d}.jsonl")
        keys = Counter((r.step, r.prompt_id) for r in rollouts)
        assert len(keys) == 8 and set(keys.values()) == {4}
        assert {r.weight_version for r in rollouts} == {f"c{number}s0", f"c{number}s1"}
        for r in rollouts:
            block = prompts.parse_self_eval(r.text)
            assert (block is None) == (r.reward == -1) == (r.judge_scores is None)
            assert block is None or (block.answer, block.scores) == (r.answer, r.self_scores)
    [start] = json.loads((run / "env.json").read_text())
    assert start["ranks"] == 2 and start["versions"]["torch"] == torch.__version__
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "cycle_02").num_parameters()
    assert sorted(p.name for p in (run / "state").iterdir()) == [
        "cycle_002_step_00002", "cycle_003_step_00000"
    ]  # fmt: skip

    options = {
        "model": run / "checkpoints" / "cycle_02", "data": prompt_file, "name": "after",
        "judge": "heuristic", "sampler": "transformers", "samples": 3, "exclude_window": run,
        "template": "short",
        "sampling.max_tokens": 120, "prompt_tokens": 700, "sample_rows": 6,
    }  # fmt: skip
    evaluate = [str(ROOT / "evaluate.py")]
    evaluate += [word for k, v in options.items() for word in (f"--{k}", str(v))]
    finish(start_ranks(2, evaluate, tmp_path))
    answers = buffer.read(tmp_path / "results" / "after" / "rollouts.jsonl")
    first = (tmp_path / "results" / "after" / "summary.json").read_text()
    finish(start_ranks(2, evaluate, tmp_path))  # all is on file: nothing is sampled
    assert (tmp_path / "results" / "after" / "summary.json").read_text() == first
    finish(start_ranks(1, [*evaluate, "--sample_rows", "3"], tmp_path))  # other steps: all anew
    again = json.loads((tmp_path / "results" / "after" / "summary.json").read_text())
    assert again["metrics"]["well_formed"]["n"] == 12
    (tmp_path / "results" / "after" / "summary.json").write_text(first)
    window = set(json.loads((run / "window.json").read_text()))
    assert len(answers) == 4 * 3 and not {r.prompt_id for r in answers} & window
    summary = json.loads((tmp_path / "results" / "after" / "summary.json").read_text())
    well_formed = summary["metrics"]["well_formed"]
    assert well_formed["n"] == 12
    assert well_formed["mean"] == pytest.approx(sum(r.reward != -1 for r in answers) / 12)


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path, parrot_folder, prompt_file, fake_judge, save_every
):
    """kill -9 at random moments; the same command again; same weights, nothing judged twice."""
    fake_judge.delay = 0.05
    options = {"judge": "fake", "client.concurrency": 4, "save_every": save_every}
    args = small_args(parrot_folder, prompt_file, **options)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    started = time.monotonic()
    finish(start_ranks(2, args, whole))
    took = time.monotonic() - started
    questions = Counter(fake_judge.answered)
    assert set(questions.values()) == {1}  # the cache answers for equal answers

    fake_judge.answered.clear()
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    kills = 0
    for _ in range(3):
        ranks = start_ranks(2, args, killed)
        deadline = time.monotonic() + rng.uniform(0.3, 1.0) * took
        while time.monotonic() < deadline and any(p.poll() is None for p in ranks):
            time.sleep(0.01)
        kills += any(p.poll() is None for p in ranks)
        for p in ranks:
            p.kill()
            p.communicate()
    finish(start_ranks(2, args, killed))

    assert weights(killed / "runs" / "tiny") == weights(whole / "runs" / "tiny"), f"seed {seed}"
    again = Counter(fake_judge.answered)
    assert again.keys() == questions.keys(), f"seed {seed}"
    twice = sum(n - 1 for n in again.values())
    assert twice <= 4 * kills, f"seed {seed}: only what was in flight may be asked again"
    lines = [[m for m in read_metrics(d / "runs" / "tiny") if m["phase"] in ("rl", "sft")]
             for d in (whole, killed)]  # fmt: skip
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}, f"seed {seed}"


def test_a_failing_judge_stops_all_ranks_and_the_run_can_go_on(
    tmp_path, parrot_folder, prompt_file, fake_judge
):
    options = {"judge": "fake", "client.tries": 2, "client.backoff": 0.01, "cycles": 1}
    args = small_args(parrot_folder, prompt_file, **options)
    fake_judge.replies = [(200, {}, FAKE)] * 3 + [(500, {}, {})] * 40
    ranks = start_ranks(2, args, tmp_path)
    said = "".join(p.communicate(timeout=120)[0] for p in ranks)
    assert all(p.returncode for p in ranks)
    assert "no usable reply in 2 tries" in said and "sk-secret" not in said
    asked = len(fake_judge.answered)
    fake_judge.replies = []
    finish(start_ranks(2, args, tmp_path))
    assert len(fake_judge.answered) > asked
    for r in buffer.read(tmp_path / "runs" / "tiny" / "rollouts" / "cycle_01.jsonl"):
        assert (r.judge_scores is None) == (r.self_scores is None)
    secrets = subprocess.run(["grep", "-r", "sk-secret", tmp_path], capture_output=True)
    assert secrets.returncode == 1  # the key is in no file


FAKE = json.dumps(dict.fromkeys(prompts.ATTRIBUTES, 4))


def test_more_cycles_go_on_from_a_finished_run(tmp_path, parrot_folder, prompt_file):
    env = {"PATH": os.environ["PATH"]}
    one = small_args(parrot_folder, prompt_file, cycles=1)
    two = small_args(parrot_folder, prompt_file, cycles=2)
    for name, commands in (("steps", [one, two]), ("whole", [two])):
        (tmp_path / name).mkdir()
        for args in commands:
            done = subprocess.run([sys.executable, *args], cwd=tmp_path / name, env=env,
                                  capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "steps/runs/tiny") == weights(tmp_path / "whole/runs/tiny")
