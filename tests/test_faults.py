"""Faults that must end in one sentence, or not at all: full disks, broken model folders, non-finite
steps, two launches, lost launchers. .venv/bin/python -m pytest tests/test_faults.py"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, finish, free_port, make_rollout, make_tokenizer, small_args, start_ranks
from fake_judge import Reply
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cycle
import prompts
import sft_masked
from backend import parallel
from backend.footprint import container_limit
from backend.model_folder import attention_window, check_model_folder, check_weights, load_tokenizer
from backend.packing import share_out
from backend.policy import PolicyConfig, export, load_policy
from config import PRESETS
from grpo import GRPOConfig, make_optimizer, reference_logps, response_row, rl_step
from judging.ledger import Ledger
from storage import files
from storage.data import DataError, load_prompts
from storage.files import WriteError, append_line, write_text
from storage.lock import locked
from storage.logbook import Clock, environment
from storage.run_folder import RunFolder

FP32 = PolicyConfig("float32")


# --------------------------------------------------------------------------------------------------
# Writing


class Limited:
    """An open file that writes what `take(data)` leaves of its data."""

    def __init__(self, f, take):
        self.f, self.take = f, take

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.f.close()

    def write(self, data):
        return self.f.write(self.take(data))


def limit(monkeypatch, take) -> None:
    monkeypatch.setattr(files, "open", lambda *a, **k: Limited(open(*a, **k), take), raising=False)


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(bytes): all writes together may take so many; then the disk is full, after a part
    of the last write, as a real one has it."""

    def fill(room: int) -> None:
        left = room

        def take(data):
            nonlocal left
            part = data[:left]
            buffered = isinstance(data, str)  # then all of it is written, or it is an error
            if len(part) < len(data) and (buffered or not part):
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= len(part)
            return part

        limit(monkeypatch, take)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize("room", [0, 1, 20, 45])
def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path, full_disk, monkeypatch, room):
    path = tmp_path / "x.jsonl"
    append_line(path, {"n": 1})
    full_disk(room)
    with pytest.raises(WriteError, match=r"x.jsonl cannot be written \(No space left on device\)"):
        for n in range(2, 9):
            append_line(path, {"n": n})
    monkeypatch.undo()
    rows = [row["n"] for _, _, row in files.read_lines(path)]
    assert rows == list(range(1, 2 + room // 9)) and path.read_bytes().endswith(b"}\n")


def test_a_write_that_takes_a_part_is_finished(tmp_path, monkeypatch):
    """A nearly full disk or a signal: write() says how much it took."""
    path = tmp_path / "x.jsonl"
    limit(monkeypatch, lambda data: data[:3])
    append_line(path, {"text": "naïve"})
    assert json.loads(path.read_text()) == {"text": "naïve"}


def test_a_whole_file_is_replaced_or_stays(tmp_path, full_disk):
    path = tmp_path / "config.json"
    write_text(path, "old")
    full_disk(3)
    with pytest.raises(WriteError, match="config.json cannot be written"):
        write_text(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_paid_reply_stays_in_memory_until_it_is_on_file(tmp_path, full_disk, monkeypatch):
    ledger = Ledger(tmp_path / "judge_cache.jsonl")
    row = {"key": "k", "outcome": "ok", "reply": "paid", "cost": 1.0}
    full_disk(10)
    with pytest.raises(WriteError):
        ledger.add(row)
    assert "cannot be written" in ledger.stop  # this rank asks no more
    monkeypatch.undo()
    ledger.write_pending()
    assert Ledger(tmp_path / "judge_cache.jsonl").replies == {"k": "paid"}


def test_a_run_on_a_full_disk_stops_and_goes_on(tmp_path, parrot_folder, prompt_file):
    """A limit on the size of files stands for the disk; the rollouts reach it in cycle 1."""
    args = small_args(parrot_folder, prompt_file, cycles=1)

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True,
                             text=True, preexec_fn=small_files)  # fmt: skip
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr[-3000:]
    assert "cycle_01.jsonl cannot be written (File too large)" in stopped.stderr
    on_file = len(RunFolder(tmp_path / "runs" / "tiny").all_rollouts())
    assert on_file > 0
    finish(start_ranks(1, args, tmp_path))
    assert len(RunFolder(tmp_path / "runs" / "tiny").all_rollouts()) == 32


# --------------------------------------------------------------------------------------------------
# Non-finite steps


def step_inputs(policy, tokenizer):
    rollouts = [make_rollout(tokenizer, sample=k, reward=k / 4) for k in range(4)]
    rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
    work = share_out(rows, [0] * 4, 10_000)
    return rollouts, work, reference_logps(policy, work.batches, 0.8)


def spoil(policy, monkeypatch) -> None:
    """An infinite element in one gradient, as an overflow in backward makes it."""
    clip = parallel.clip_grad_norm

    def spoilt(module, max_norm):
        next(module.parameters()).grad.to_local().view(-1)[0] = float("inf")
        return clip(module, max_norm)

    monkeypatch.setattr(parallel, "clip_grad_norm", spoilt)


@pytest.mark.parametrize("phase", ["rl", "sft"])
def test_an_infinite_gradient_changes_no_weight(random_folder, tokenizer, monkeypatch, phase):
    policy = load_policy(random_folder("qwen3"), FP32)
    before = [parallel.full_tensor(p.detach()).clone() for p in policy.parameters()]
    rollouts, work, ref_logps = step_inputs(policy, tokenizer)
    spoil(policy, monkeypatch)
    with pytest.raises(parallel.NonFiniteError, match="gradient norm (inf|nan) must be finite"):
        if phase == "rl":
            optimizer = make_optimizer(policy, GRPOConfig())
            rl_step(policy, optimizer, work, rollouts, torch.ones(4), ref_logps, 0.8, GRPOConfig())
        else:
            config = sft_masked.SFTConfig()
            optimizer = sft_masked.make_optimizer(policy, config)
            targets = [sft_masked.distillation_row(r, tokenizer) for r in rollouts]
            [update] = sft_masked.updates(targets, config, seed=0)
            sft_masked.sft_step(policy, optimizer, update, config, FP32)
    after = [parallel.full_tensor(p.detach()) for p in policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_rows_that_are_not_finite_are_named(random_folder, tokenizer):
    """An embedding that is NaN, of a token that one rollout alone has."""
    policy = load_policy(random_folder("qwen3", False), FP32)
    reference = load_policy(random_folder("qwen3", False), FP32, trainable=False)
    rollouts, *_ = step_inputs(reference, tokenizer)
    rollouts[2] = make_rollout(tokenizer, "Zebra!", sample=2, reward=0.5)
    others = {i for r in rollouts if r.sample != 2 for i in (*r.prompt_ids, *r.response_ids)}
    token = next(i for i in rollouts[2].response_ids if i not in others)
    rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
    work = share_out(rows, [0] * 4, 1)  # rows in one pack would spoil each other
    ref_logps = reference_logps(reference, work.batches, 0.8)
    with torch.no_grad():
        policy.model.model.embed_tokens.weight.to_local()[token] = float("nan")
    optimizer = make_optimizer(policy, GRPOConfig())
    with pytest.raises(parallel.NonFiniteError, match="prompt Say something., sample 2. Lower"):
        rl_step(policy, optimizer, work, rollouts, torch.ones(4), ref_logps, 0.8, GRPOConfig())


def test_a_run_that_diverges_ends_with_its_step_and_a_good_state(
    tmp_path, parrot_folder, prompt_file
):
    args = small_args(parrot_folder, prompt_file, cycles=1, save_every=1, **{"grpo.lr": 1e30})
    ranks = start_ranks(2, args, tmp_path)
    shown = [p.communicate(timeout=240)[0] for p in ranks]
    assert all(p.returncode for p in ranks) and "Traceback" not in shown[0], shown[0][-3000:]
    assert "error: cycle 1, RL step 2: loss " in shown[0] + shown[1]
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert not run.checkpoint(1).exists()
    weights = load_file(run.checkpoint(1, 1) / "model.safetensors")
    assert len(run.metrics()) == 2 and weights  # set-up and the one step that was taken


def test_dropout_of_the_model_is_off(random_folder, tmp_path, tokenizer):
    """With it the KL of a cycle's first step would not be 0."""
    model = AutoModelForCausalLM.from_pretrained(random_folder("qwen3"))
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    policy, reference = load_policy(tmp_path, FP32), load_policy(tmp_path, FP32, trainable=False)
    assert policy.training
    _, work, ref_logps = step_inputs(reference, tokenizer)
    for batch, ref in zip(work.batches, ref_logps, strict=True):
        torch.testing.assert_close(policy(batch, 0.8).logp.detach(), ref, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Model folders


@pytest.fixture
def folder(tmp_path, random_folder, tokenizer):
    """A good folder to spoil: `config` changes config.json, `weights` the tensors."""

    class Folder:
        path = tmp_path / "model"

        def config(self, **changes):
            file = self.path / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        def weights(self, change):
            file = self.path / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})

    shutil.copytree(random_folder("llama", False), Folder.path)
    return Folder()


def test_missing_strange_and_misshapen_tensors_are_named(folder):
    check_weights(folder.path)
    folder.weights(lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ValueError, match="lack model.layers.1.self_attn.k_proj.weight; fetch"):
        check_weights(folder.path)
    key = "model.layers.1.self_attn.k_proj.weight"
    folder.weights(lambda t: t.update({key: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=f"have in another shape than config.json says {key}"):
        check_weights(folder.path)


def test_an_untied_model_without_a_head_and_a_reward_model_are_refused(folder):
    folder.weights(lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:1].clone()}))
    with pytest.raises(ValueError, match="lack lm_head.weight"):
        check_weights(folder.path)
    folder.config(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="hold, unknown to this model type, score.weight"):
        check_weights(folder.path)


def test_pointers_and_cut_files_are_told_from_weights(folder):
    file = folder.path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors: cannot be read as safetensors"):
        check_weights(folder.path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer"):
        check_weights(folder.path)


UNUSABLE = {
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "of type 'longrope'"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic"}}, "of type 'dynamic'"),
    "no length": ({"max_position_embeddings": None}, "has no max_position_embeddings"),
    "window": ({"model_type": "mistral", "sliding_window": 512}, "over 512 tokens"),
    "a layer's window": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 99}, "over 99",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), UNUSABLE.values(), ids=UNUSABLE)
def test_models_that_would_be_wrong_are_refused(folder, changes, says):
    check_model_folder(folder.path, 600)
    folder.config(**changes)
    with pytest.raises(ValueError, match=says):
        check_model_folder(folder.path, 600)


def test_a_type_that_vllm_cannot_sample_here_names_the_other_sampler(folder):
    folder.config(model_type="olmo2")
    check_model_folder(folder.path, 600, "transformers")
    with pytest.raises(ValueError, match="'olmo2' cannot be sampled by vLLM .*--sampler transf"):
        check_model_folder(folder.path, 600, "vllm")


def test_a_window_as_long_as_the_rows_changes_nothing(folder):
    folder.config(model_type="mistral", sliding_window=600)
    check_model_folder(folder.path, 600)
    # As Qwen2 has it: a size that is not used.
    assert attention_window({"use_sliding_window": False, "sliding_window": 9}) is None
    assert attention_window({"layer_types": ["full_attention"], "sliding_window": 9}) is None


def test_adapters_and_broken_files_are_named(folder):
    for name, content in (("config.json", "{"), ("tokenizer.json", "{}")):
        good = (folder.path / name).read_text()
        (folder.path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            check_model_folder(folder.path, 600)
            load_tokenizer(folder.path)
        (folder.path / name).write_text(good)
    (folder.path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter"):
        check_model_folder(folder.path, 600)


def test_a_tokenizer_that_loses_text_is_refused_by_its_class(tokenizer):
    """As a Llama 3 vocabulary that is declared LlamaTokenizerFast: spaces and newlines are lost."""
    from tokenizers import decoders

    lossy = make_tokenizer()
    lossy.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n", "")]
    )
    with pytest.raises(ValueError, match=r"\(TokenizersBackend\) does not give back .*its class"):
        prompts.check_tokenizer(lossy, "short")
    prompts.check_tokenizer(tokenizer, "short", vocabulary=len(tokenizer))
    with pytest.raises(ValueError, match="the model has embeddings for 99"):
        prompts.check_tokenizer(tokenizer, "short", vocabulary=99)


def test_a_beginning_of_sequence_token_stays_where_the_tokenizer_adds_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    ask = [{"role": "user", "content": "Hm?"}]
    plain = prompts.prompt_ids(tokenizer, ask, "short")
    with_bos = make_tokenizer()
    with_bos.bos_token = "<|end|>"
    assert prompts.prompt_ids(with_bos, ask, "short") == plain  # known, but not added by itself
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", with_bos.bos_token_id)]
    )
    assert prompts.prompt_ids(with_bos, ask, "short") == (with_bos.bos_token_id, *plain)


# --------------------------------------------------------------------------------------------------
# Exports


def test_an_export_keeps_its_sources_settings(folder, tmp_path):
    """A generation_config.json that transformers would refuse to write, the tokenizer's files and
    a chat template, unchanged; RoPE where older versions look for it."""
    odd = {"temperature": 0.9, "top_p": 0.6}
    (folder.path / "generation_config.json").write_text(json.dumps(odd))
    (folder.path / "chat_template.jinja").write_text("{{ messages }}")
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
    folder.config(rope_parameters=llama3 | {"rope_theta": 500000.0})
    policy = load_policy(folder.path, FP32)
    export(policy, folder.path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == odd
    copied = ["chat_template.jinja", *(p.name for p in folder.path.glob("tokenizer*"))]
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (folder.path / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == llama3
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert back.config.rope_parameters == llama3 | {"rope_theta": 500000.0}
    check_weights(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("Hm?")


def test_the_newest_checkpoints_are_kept_from_cycle_100_on(tmp_path):
    run = RunFolder(tmp_path)
    for number in (2, 99, 100, 101):
        run.checkpoint(number).mkdir(parents=True)
    assert run.checkpoints()[-2:] == [run.checkpoint(100), run.checkpoint(101)]


# --------------------------------------------------------------------------------------------------
# Launches


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path):
    hold = "import sys, time; from pathlib import Path; from storage.lock import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .*`kill"),
        locked(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):  # freed by the kill
        pass


def test_a_second_launch_on_a_run_is_refused_on_all_ranks(tmp_path, parrot_folder, prompt_file):
    args = small_args(parrot_folder, prompt_file)
    with locked(tmp_path / "runs" / "tiny"):
        ranks = start_ranks(2, args, tmp_path)
        shown = "".join(p.communicate(timeout=120)[0] for p in ranks)
    assert all(p.returncode for p in ranks) and "Traceback" not in shown
    assert f"runs/tiny is in use by process {os.getpid()}" in shown
    assert not (tmp_path / "runs" / "tiny" / "config.json").exists()


def torchrun(args, cwd, **env) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", free_port()]  # fmt: skip
    return subprocess.Popen([*command, *args], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


def workers_of(launcher: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_launcher_and_keep_what_is_paid(
    tmp_path, parrot_folder, prompt_file, fake_judge, end
):
    """kill -9 of torchrun leaves its workers alone; SIGTERM is a preemption. Both while the judge
    is at work; what was in flight is on file, and the same command goes on."""
    fake_judge.delay = 0.5
    args = small_args(parrot_folder, prompt_file, judge="fake", **{"client.concurrency": 4})
    launcher = torchrun(args, tmp_path)
    wait_until(lambda: len(fake_judge.bodies) >= 6)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    os.kill(launcher.pid, end)
    wait_until(lambda: not any(map(alive, workers)), seconds=25)
    launcher.communicate(timeout=60)
    asked, answered = len(fake_judge.bodies), len(fake_judge.answered)
    cache = RunFolder(tmp_path / "runs" / "tiny").judge_cache
    on_file = [row for _, _, row in files.read_lines(cache) if row.get("outcome") == "ok"]
    assert asked == answered == len(on_file)  # nothing in flight was lost
    fake_judge.delay = 0.0
    finish([torchrun(args, tmp_path)])
    assert max(Counter(fake_judge.answered).values()) == 1  # and nothing was asked twice


def test_a_restart_by_torchrun_ends_at_once_with_a_remedy(tmp_path, parrot_folder, prompt_file):
    args = small_args(parrot_folder, prompt_file)
    [rank] = start_ranks(1, args, tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    shown = rank.communicate(timeout=60)[0]
    assert rank.returncode and "run the same command again without it" in shown
    assert "Traceback" not in shown


def test_wandb_gets_a_replayed_step_under_its_own_number(tmp_path):
    """So that wandb, which drops a step that it has, shows it once."""
    logged = []
    run = object.__new__(cycle.Run)
    run.folder, run.config, run.clock, run.logged = (
        RunFolder(tmp_path),
        PRESETS["small"],
        Clock(),
        0,
    )
    run.wandb = SimpleNamespace(log=lambda line, step: logged.append((step, line["step"])))
    for step in (1, 2, 3):
        run._log(1, "rl", step, {})
    run.folder.keep_metrics_until(1, 1)  # killed; the state is that after step 1
    run.logged = len(run.folder.metrics())
    for step in (2, 3, 4):
        run._log(1, "rl", step, {})
    assert logged == [(0, 1), (1, 2), (2, 3), (1, 2), (2, 3), (3, 4)]


def test_a_damaged_state_is_named(tmp_path, random_folder):
    policy = load_policy(random_folder("qwen3"), FP32)
    tensors = {name: p.detach() for name, p in policy.named_parameters()}
    parallel.save_state(tmp_path / "state_1", tensors, {"step": 1})
    parallel.load_state(tmp_path / "state_1", tensors)
    for path in (tmp_path / "state_1").glob("*.distcp"):
        path.unlink()
    with pytest.raises(files.FileError, match="state_1: this state cannot be read .* delete"):
        parallel.load_state(tmp_path / "state_1", tensors)


@pytest.mark.parametrize("name", ["config.json", "window.json", "env.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, parrot_folder, prompt_file, name):
    args = small_args(parrot_folder, prompt_file, cycles=1)
    finish(start_ranks(1, args, tmp_path))
    path = tmp_path / "runs" / "tiny" / name
    path.write_text("{\n")
    [again] = start_ranks(1, [*args, "--cycles", "2"], tmp_path)
    shown = again.communicate(timeout=120)[0]
    assert again.returncode == 1 and "Traceback" not in shown, shown[-2000:]
    assert f"error: runs/tiny/{name}" in shown and path.read_text() == "{\n"


def test_no_git_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment(1)["commit"] is None is environment(1)["uncommitted_changes"]


def test_a_judge_that_fails_while_another_rank_samples_stops_all(
    tmp_path, parrot_folder, prompt_file, fake_judge
):
    """The message is one line on one rank, and the others end too."""
    fake_judge.replies = [Reply(status=500)] * 400
    options = {"judge": "fake", "client.attempts": 1, "client.backoff": 0.0}
    ranks = start_ranks(2, small_args(parrot_folder, prompt_file, **options), tmp_path)
    shown = "".join(p.communicate(timeout=120)[0] for p in ranks)
    assert all(p.returncode for p in ranks) and "Traceback" not in shown


# --------------------------------------------------------------------------------------------------
# Data, machine


def test_lone_surrogates_and_byte_order_marks(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "One\\ud83d?"}\n{"prompt": "Two \\ud83d\\ude00?"}\n')
    with pytest.warns(UserWarning, match=r"x.jsonl: 1 lone surrogate\(s\) are read as U\+FFFD"):
        one, two = load_prompts(path)
    assert one.conversation[0]["content"] == "One\ufffd?"
    assert two.conversation[0]["content"] == "Two \U0001f600?"
    for p in (one, two):
        p.conversation[0]["content"].encode()  # what a tokenizer does


def test_the_preference_file_is_refused_by_name(tmp_path):
    path = tmp_path / "preference.jsonl"
    row = {"split": "train", "prompt": "<extra_id_1>User\na", "response_1": "b", "response_2": "c",
           "preference_strength": -1}  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="preference.jsonl:1: HelpSteer2's preference file"):
        load_prompts(path)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    own = "0::/a/b\n"
    monkeypatch.setattr("pathlib.Path.exists", lambda self: True)
    real = type(tmp_path).read_text
    monkeypatch.setattr(
        "pathlib.Path.read_text",
        lambda self, *a: own if str(self) == "/proc/self/cgroup" else real(self, *a),
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    assert container_limit(tmp_path) == float("inf")
    (tmp_path / "a" / "memory.max").write_text(f"{2 * 2**30}\n")
    assert container_limit(tmp_path) == 2 * 2**30


def test_a_long_block_of_white_space_is_read_in_linear_time(tokenizer):
    """As many token look-ups as tokens, whatever the text."""
    text = prompts.render_response("Fine.", (1, 2, 3, 4, 5)).replace(": 1", ":" + " " * 2000 + "1")
    ids = tokenizer.encode(text)

    class Counting:
        calls = 0

        def decode(self, ids, **options):
            Counting.calls += len(ids)
            return tokenizer.decode(ids, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    positions = prompts.score_positions(ids, Counting())
    assert [tokenizer.decode([ids[p]]) for p in positions] == list("12345")
    assert Counting.calls < 30 * len(ids)


def test_replaced_rows_keep_their_name(tokenizer):
    rollout = replace(make_rollout(tokenizer), prompt_id="p", sample=3)
    assert sft_masked.distillation_row(rollout, tokenizer).name == "prompt p, sample 3"
