"""Whole runs of a tiny model: .venv/bin/python -m pytest tests/test_cycle.py"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, finish, free_port, small_args, start_ranks
from fake_judge import Reply
from transformers import AutoModelForCausalLM

import cycle
import prompts
from config import PRESETS
from evaluation.predictors import best_constant
from storage.logbook import Clock
from storage.model_card import read_card
from storage.record import answer_id, read_rollouts
from storage.run_folder import RunFolder


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


@pytest.mark.parametrize(
    ("gap", "alarmed"), [(0.02, False), (0.2, True), (float("nan"), True), (None, False)]
)
def test_the_alarm(monkeypatch, capsys, gap, alarmed):
    """The sampler's log-probabilities far from the trainer's are told at once."""
    run = object.__new__(cycle.Run)
    run.config, run.clock = PRESETS["small"], Clock()
    run.policy = run.optimizer = None
    run.figures, run.policy_is_reference = {}, False
    monkeypatch.setattr(cycle, "rl_step", lambda *a, **k: {"logprob_gap": gap, "kl": 9.0})
    run.rl_step(None, [], None, [])
    assert run.figures == {"logprob_gap": gap, "kl": 9.0}
    assert ("alarm: sampler and trainer differ by" in capsys.readouterr().out) == alarmed


@pytest.mark.parametrize(
    ("dtype", "kl", "alarmed"),
    [("float32", 1e-7, False), ("float32", 1e-5, True), ("bfloat16", 9e-4, False),
     ("bfloat16", 2e-3, True), ("bfloat16", float("nan"), True)],
)  # fmt: skip
def test_the_kl_to_a_reference_of_the_same_weights_is_zero(monkeypatch, capsys, dtype, kl, alarmed):
    run = object.__new__(cycle.Run)
    small = PRESETS["small"]
    run.config = replace(small, policy=replace(small.policy, dtype=dtype))
    run.figures = {"logprob_gap": None, "kl": kl}
    for run.policy_is_reference in (False, True):
        run._alarms()
        shown = "alarm: the KL to the reference" in capsys.readouterr().out
        assert shown == (alarmed and run.policy_is_reference)


def summary_of(cell) -> dict:
    return json.loads((cell / "summary.json").read_text())


def weights(run) -> bytes:
    return (run / "checkpoints" / "cycle_02" / "model.safetensors").read_bytes()


def test_two_machines_give_what_one_gives(tmp_path, parrot_folder, prompt_file, fake_judge):
    """Two agents of one process each, on loopback, and one agent of two processes; the judge's two
    requests at once are two over both machines."""
    fake_judge.delay = 0.02
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master_port", free_port()]
    options = {"judge": "fake", "client.concurrency": 2}
    args = small_args(parrot_folder, prompt_file, **options)
    weights, figures = [], []
    for nodes in (1, 2):
        folder = tmp_path / str(nodes)
        folder.mkdir()
        agents = [
            subprocess.Popen(
                [*torchrun, "--nnodes", str(nodes), "--nproc_per_node", str(2 // nodes),
                 "--node_rank", str(node), "--master_addr", "127.0.0.1", *args],
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for node in range(nodes)
        ]  # fmt: skip
        finish(agents)
        run = folder / "runs" / "tiny"
        weights.append((run / "checkpoints" / "cycle_02" / "model.safetensors").read_bytes())
        lines = RunFolder(run).metrics()
        for line in lines:
            for own in ("seconds", "hand_over_s_per_gb", "judge"):  # two ranks may ask one question
                line.pop(own, None)
        figures.append(lines)
        assert [start["ranks"] for start in json.loads((run / "env.json").read_text())] == [2]
    assert figures[0] == figures[1] and weights[0] == weights[1]
    assert fake_judge.most_in_flight <= 2


def test_two_ranks_under_torchrun(tmp_path, parrot_folder, prompt_file):
    """The whole of Algorithm 1 on two ranks, then evaluation of what came out."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--master_port", free_port()]  # fmt: skip
    args = small_args(parrot_folder, prompt_file)
    done = subprocess.run(launch + args, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "tiny"

    metrics = RunFolder(run).metrics()
    assert [(m["cycle"], m["step"]) for m in metrics if m["phase"] == "rl"] == [
        (1, 1), (1, 2), (2, 1), (2, 2)
    ]  # fmt: skip
    assert [m["sample_passes"] for m in metrics if m["phase"] == "rl"] == [4, 8, 12, 16]
    named = """cycle phase step sample_passes reward quality calibration mae well_formed truncated
        response_tokens score_entropy kl clip_fraction entropy grad_norm logprob_gap
        zero_variance_groups imbalance hand_over_s_per_gb seconds""".split()
    for m in metrics:
        if m["phase"] == "rl":
            assert set(named) <= set(m)
            parts = {k: v for k, v in m["seconds"].items() if k != "wall"}
            assert parts.keys() >= {"sampling", "reference", "judge_tail", "training", "hand_over"}
            # All parts, "other" among them, are the wall time; each is rounded to a millisecond.
            assert sum(parts.values()) == pytest.approx(m["seconds"]["wall"], abs=1e-3 * len(parts))
            assert m["clip_fraction"] == 0 and m["logprob_gap"] < 1e-3
            assert m["kl"] < 1e-6 if m["step"] == 1 else m["kl"] > 1e-6
    assert any(m["phase"] == "sft" for m in metrics)

    for number in (1, 2):
        rollouts = read_rollouts(run / "rollouts" / f"cycle_{number:02d}.jsonl")
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
    card = read_card(run / "checkpoints" / "cycle_02")
    assert (card.cycle, card.template, card.window) == (2, "short", RunFolder(run).window_ids())
    assert len(card.tokens) == 8 and card.held_out == {}
    judged = [r.judge_scores for r in RunFolder(run).first_cycle()]
    assert card.best_constant == best_constant(judged)
    assert sorted(p.name for p in (run / "state").iterdir()) == [
        "cycle_002_step_00002", "cycle_003_step_00000"
    ]  # fmt: skip

    options = {
        "models": f"after={run / 'checkpoints' / 'cycle_02'}", "benchmarks": f"own={prompt_file}",
        "judge": "heuristic", "sampler": "transformers", "samples": 3, "training_run": run,
        "name": "x", "template": "short",
        "sampling.max_tokens": 120, "prompt_tokens": 700, "sample_rows": 6,
    }  # fmt: skip
    evaluate = [str(ROOT / "evaluate.py")]
    evaluate += [word for k, v in options.items() for word in (f"--{k}", str(v))]
    finish(start_ranks(2, evaluate, tmp_path))
    cell = tmp_path / "results" / "x" / "own" / "after"
    answers = read_rollouts(cell / "rollouts.jsonl")
    first = (cell / "summary.json").read_text()
    told = read_card(run / "checkpoints" / "cycle_02").held_out["own"]["metrics"]
    assert told == json.loads(first)["metrics"]  # the window's prompts were left out
    finish(start_ranks(2, evaluate, tmp_path))  # all is on file: nothing is sampled
    assert (cell / "summary.json").read_text() == first
    finish(start_ranks(1, [*evaluate, "--sample_rows", "3"], tmp_path))  # other steps, same answers
    assert read_rollouts(cell / "rollouts.jsonl") == answers
    ids = {(r.prompt_id, r.sample): answer_id(r) for r in answers}
    read = [json.loads(line) for line in (cell / "digits_after.jsonl").read_text().splitlines()]
    assert read and all(x["answer_id"] == ids[x["prompt_id"], x["sample"]] for x in read)
    window_read = (tmp_path / "results" / "x" / "window.jsonl").read_text().splitlines()
    assert len(window_read) == sum(
        r.judge_scores is not None for r in read_rollouts(run / "rollouts" / "cycle_01.jsonl")
    )
    assert summary_of(cell)["near_duplicates"] >= 0
    again = json.loads((cell / "summary.json").read_text())
    assert again["metrics"]["well_formed"]["n"] == 12
    (cell / "summary.json").write_text(first)
    window = set(json.loads((run / "window.json").read_text()))
    assert len(answers) == 4 * 3 and not {r.prompt_id for r in answers} & window
    summary = json.loads((cell / "summary.json").read_text())
    well_formed = summary["metrics"]["well_formed"]
    assert well_formed["n"] == 12
    assert well_formed["mean"] == pytest.approx(sum(r.reward != -1 for r in answers) / 12)


SPY = """
import sys
import cycle, torch
from backend import policy
from rollout import Collector

said = []


def spy(owner, name, what):
    before = getattr(owner, name)

    def after(self, *args, **kwargs):
        said.append(what(self))
        return before(self, *args, **kwargs)

    setattr(owner, name, after)


spy(policy.Policy, "forward",
    lambda p: f"{'policy' if p.training else 'reference'} {torch.is_grad_enabled()}")
spy(Collector, "sample", lambda _: "sample")
spy(Collector, "wait_for_judge", lambda _: "judged")
cycle.main()
print("SAID", *said, sep="|")
"""


def test_no_forward_is_wasted(tmp_path, parrot_folder, prompt_file):
    """A step is: sample, one reference pass without gradients while the judge is at work, then one
    pass of the policy, micro-batch by micro-batch; there is no "old" pass. Phase 2 asks no
    reference."""
    args = small_args(parrot_folder, prompt_file, cycles=1, **{"policy.micro_batch_tokens": 700})
    done = finish(start_ranks(1, ["-c", SPY, *args[1:]], tmp_path, PYTHONPATH=str(ROOT)))
    said = re.search(r"^SAID\|(.*)$", done, re.MULTILINE)[1].split("|")
    forward, ends = ("reference False", "policy True"), said.index("sample", 1)
    for step in (said[:ends], said[ends:]):
        n = step.count("reference False")
        assert n >= 4  # prompts; a pack is one prompt's
        assert step[: 2 + 2 * n] == ["sample", *[forward[0]] * n, "judged", *[forward[1]] * n]
    distilled = said[ends:][2 + 2 * said[ends:].count("reference False") :]
    assert distilled and set(distilled) == {"policy True"}


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
    lines = [[m for m in RunFolder(d / "runs" / "tiny").metrics() if m["phase"] in ("rl", "sft")]
             for d in (whole, killed)]  # fmt: skip
    for a, b in zip(*lines, strict=True):
        own = {"seconds": 0, "hand_over_s_per_gb": 0, "judge": 0}  # what a start has spent
        assert {**a, **own} == {**b, **own}, f"seed {seed}"


def test_a_run_goes_on_with_other_ranks_and_smaller_micro_batches(
    tmp_path, parrot_folder, prompt_file
):
    """Killed with two ranks after the first state, finished by one, as after running out of
    memory."""
    args = small_args(parrot_folder, prompt_file, save_every=1)
    ranks = start_ranks(2, args, tmp_path)
    run = tmp_path / "runs" / "tiny"
    state = run / "state" / "cycle_001_step_00001" / "where.json"
    while not state.exists() and any(p.poll() is None for p in ranks):
        time.sleep(0.01)
    for p in ranks:
        p.kill()
        p.communicate()
    smaller = ["--policy.micro_batch_tokens", "300", "--policy.head_tokens", "50",
               "--no-shared-prefix", "--sample_rows", "3"]  # fmt: skip
    assert "going on from" in finish(start_ranks(1, [*args, *smaller], tmp_path))
    steps = [m for m in RunFolder(run).metrics() if m["phase"] == "rl"]
    assert [(m["cycle"], m["step"]) for m in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(m["clip_fraction"] == 0 and m["logprob_gap"] < 1e-3 for m in steps)
    for number in (1, 2):
        rollouts = read_rollouts(run / "rollouts" / f"cycle_{number:02d}.jsonl")
        assert Counter((r.step, r.prompt_id) for r in rollouts).most_common()[0][1] == 4
        assert len(rollouts) == 2 * 4 * 4
    refused = start_ranks(1, [*args, "--policy.dtype", "bfloat16"], tmp_path)
    assert "it differs in policy.dtype" in refused[0].communicate()[0]


def test_a_run_can_be_repeated_from_its_judgements_alone(
    tmp_path, parrot_folder, reference_file, fake_judge
):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    finish(start_ranks(2, small_args(parrot_folder, reference_file, judge="fake"), first))
    asked = len(fake_judge.bodies)
    for body in fake_judge.bodies:  # App. B.3: with the prompt's own reference responses
        shown = body["messages"][1]["content"]
        request = re.search(r"\[User\]\n(.*)", shown)[1]
        assert f"--- Reference Response 1 ---\nHuman: {request}\n" in shown
    ledger = first / "runs" / "tiny" / "judge_cache.jsonl"
    line = next(m for m in RunFolder(ledger.parent).metrics() if m["phase"] == "rl")
    assert line["judge"]["calls"] > 0 == line["judge"]["failed"]
    finish(
        start_ranks(2, small_args(parrot_folder, reference_file, judge=f"replay:{ledger}"), again)
    )
    assert weights(again / "runs" / "tiny") == weights(first / "runs" / "tiny")
    assert len(fake_judge.bodies) == asked and asked > 0


def test_a_failing_judge_stops_all_ranks_and_the_run_can_go_on(
    tmp_path, parrot_folder, prompt_file, fake_judge
):
    options = {"judge": "fake", "client.attempts": 2, "client.backoff": 0.01, "cycles": 1}
    args = small_args(parrot_folder, prompt_file, **options)
    fake_judge.replies = [Reply()] * 3 + [Reply(status=500)] * 40
    ranks = start_ranks(2, args, tmp_path)
    said = "".join(p.communicate(timeout=120)[0] for p in ranks)
    assert all(p.returncode for p in ranks)
    assert "no usable reply in 2 attempts" in said and "sk-secret" not in said
    asked = len(fake_judge.answered)
    fake_judge.replies = []
    finish(start_ranks(2, args, tmp_path))
    assert len(fake_judge.answered) > asked
    for r in read_rollouts(tmp_path / "runs" / "tiny" / "rollouts" / "cycle_01.jsonl"):
        assert (r.judge_scores is None) == (r.self_scores is None)
    secrets = subprocess.run(["grep", "-r", "sk-secret", tmp_path], capture_output=True)
    assert secrets.returncode == 1  # the key is in no file


@pytest.mark.parametrize("preset", ["rlcr", "rlcr-matched"])
def test_the_baseline_with_resume_in_between(tmp_path, parrot_folder, prompt_file, preset):
    """Adapted RLCR in small: 12 steps of phase 1 alone, killed at a random moment after a state."""
    args = small_args(
        parrot_folder, prompt_file, preset, cycles=1, window=12, batch=2, epochs=2, rl_steps=12,
        rollouts=2, save_every=5, keep_checkpoints=2,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(start_ranks(2, args, whole))

    ranks = start_ranks(2, args, killed)
    state = killed / "runs" / "tiny" / "state" / "cycle_001_step_00005" / "where.json"
    wait = random.SystemRandom().uniform(0, 2)
    while not state.exists() and any(p.poll() is None for p in ranks):
        time.sleep(0.01)
    time.sleep(wait)
    for p in ranks:
        p.kill()
        p.communicate()
    said = finish(start_ranks(2, args, killed))
    assert "going on from" in said

    steps = [RunFolder(d / "runs" / "tiny").metrics() for d in (whole, killed)]
    spent = {"seconds": 0, "hand_over_s_per_gb": 0}
    steps = [[{**m, **spent} for m in lines if m["phase"] == "rl"] for lines in steps]
    assert steps[0] == steps[1], f"killed {wait:.2f} s after the state"
    assert [m["step"] for m in steps[0]] == list(range(1, 13))
    assert steps[0][-1]["sample_passes"] == 24
    assert not [m for m in RunFolder(whole / "runs" / "tiny").metrics() if m["phase"] == "sft"]
    # Steps 5 and 10 and the end; the newest two are kept.
    for run in (whole / "runs" / "tiny", killed / "runs" / "tiny"):
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert names == ["cycle_01", "cycle_01_step_00010"]
    a, b = ((d / "runs/tiny/checkpoints/cycle_01/model.safetensors").read_bytes()
            for d in (whole, killed))  # fmt: skip
    assert a == b


def test_wandb_and_the_shown_batch(tmp_path, parrot_folder, prompt_file, fake_judge):
    """Offline, one id over a continuation, and nothing in its files but options and metrics."""
    for cycles in (1, 2):
        args = small_args(parrot_folder, prompt_file, judge="fake", cycles=cycles)
        args += ["--wandb", "--show_batch"]
        said = finish(start_ranks(1, args, tmp_path, WANDB_MODE="offline"))
        # One row of each phase: the whole response in the loss, then five digits.
        rl, sft = re.findall(r"\[(\d+) tokens, (\d+) of them in the loss\]", said)
        assert int(rl[0]) > int(rl[1]) > 20 and sft[1] == "5"
        shown = re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", said, flags=re.DOTALL)
        assert prompts.OPEN in shown[0] and len(shown) == 6
        assert all(len(digit.strip()) == 1 and digit.strip().isdigit() for digit in shown[1:])
    run = tmp_path / "runs" / "tiny"
    [name] = {p.name.rsplit("-", 1)[1] for p in (run / "wandb").glob("offline-run-*")}
    assert name == (run / "wandb_id.txt").read_text()
    answer = read_rollouts(run / "rollouts" / "cycle_01.jsonl")[0].answer
    logged = b"".join(p.read_bytes() for p in (run / "wandb").rglob("*") if p.is_file())
    assert b"sample_passes" in logged and b"micro_batch_tokens" in logged
    for private in ("sk-secret", answer, "Say something about"):
        assert private.encode() not in logged, private


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
