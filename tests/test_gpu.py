"""The GPU's path without a GPU: .venv/bin/python -m pytest tests/test_gpu.py

bench/fake_gpu.py says how. Here one rank of four and one of one take every stage of a run with a
model of two layers, and faults are put into the code to see that they are noticed.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, start_ranks

from backend.launch import check_gpu, gpu_listed
from backend.model_folder import model_size
from backend.sampler import EngineConfig, engine_options
from evaluation import digits


def run_path(folder: Path, tmp: Path, *options: str) -> dict:
    paths = (ROOT, ROOT / "bench", ROOT / "tests", os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "gpu_path.py", folder, tmp, *options],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths)),
             "CUDA_VISIBLE_DEVICES": os.environ["GPU_OF_TESTS"] if options else "-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory, random_folder):
    folder = random_folder("qwen3")
    return run_path(folder, tmp_path_factory.mktemp("gpu")) | {"size": model_size(folder)}


@pytest.mark.skipif(not (gpu_listed() and torch.version.cuda), reason="no GPU")
def test_this_machines_gpu_waits_where_the_one_that_is_not_there_does(
    found, tmp_path, random_folder
):
    """Memory is compared at full size, by --self_check and bench/memory.py --measure: here a GPU's
    own workspaces are larger than the model."""
    real, fake = run_path(random_folder("qwen3"), tmp_path, "--real"), found["1"]
    for name, stages in real.items():
        for stage in ("reference", "RL step", "distillation"):
            assert stages[stage]["waits"] == fake[name][stage]["waits"], f"{name}, {stage}"


def waits_of(case: dict) -> dict:
    return {stage: case[stage]["waits"] for stage in case if stage != "packs"}


def test_the_host_waits_for_the_gpu_only_before_and_after_a_steps_micro_batches(found):
    """Everywhere else it runs ahead, so that the GPU always has work. What is counted a pack is
    copied before the loop."""
    for name, case in (*found["4"].items(), *found["1"].items()):
        packs, waits = case["packs"], waits_of(case)

        def looks(n, padded=name == "padded"):
            """Transformers looks for packed rows in the positions of padded ones."""
            return {"policy.py forward": n} if padded else {}

        assert waits["reference"] == looks(packs) and waits.get("hand-over", {}) == {}
        assert waits["RL step"] == looks(packs) | {
            "grpo.py <genexpr>": 5 * packs,  # recorded_values
            "parallel.py clip_grad_norm": 1,
            "grpo.py rl_step": 1,
        }
        packs = waits["distillation"]["packing.py _batch"] // 6
        ends = {} if name == "padded" else {"packing.py <genexpr>": 2 * packs}
        assert packs >= 2
        assert waits["distillation"] == looks(packs) | ends | {
            "packing.py _batch": 6 * packs,
            "parallel.py clip_grad_norm": 1,
            "sft_masked.py sft_step": 1,
        }
    assert found["1"]["shared"]["packs"] == 5  # one a prompt
    assert found["4"]["shared"]["packs"] == 2  # the second is a filler


def test_memory_is_that_of_the_shards(found):
    """fp32 parameters and a bf16 reference after loading; AdamW's state, twice the parameters,
    after the first step. Blocks of 512 bytes: the model has 26 tensors."""
    parameters = found["size"].parameters
    for ranks in (4, 1):
        stages = found[str(ranks)]["shared"]
        rounding, share = 26 * 512, parameters / ranks
        assert 0 <= stages["load"]["after"] - 6 * share < 2 * rounding + 4096
        assert 0 <= stages["RL step"]["after"] - 14 * share < 5 * rounding + 2**17
        assert stages["RL step"]["peak"] > stages["RL step"]["after"] + 4 * share
    official = found["4"]["official"]["RL step"]["after"]
    assert 0 <= official - 8 * parameters / 4 < 5 * 26 * 512 + 2**17
    kept, recomputed = (found["4"][name]["RL step"] for name in ("kept", "shared"))
    assert kept["peak"] > recomputed["peak"] and kept["flops"] < recomputed["flops"]


def test_seeded_faults_are_noticed(found):
    """By an error, or by another list of waits."""
    clean = waits_of(found["4"]["shared"])
    as_error = {
        "mask on the CPU", "zeros on the CPU", "head's values on the CPU", "advantages on the CPU",
        "rotary tables on the CPU", "a shard on the CPU", "AdamW's step on the CPU",
        "sampler's mask on the CPU", "sampler's model on the CPU", "digits' ids on the CPU",
        "an export from the GPU",
    }  # fmt: skip
    for fault, said in found["faults"].items():
        if fault in as_error:
            assert re.match("FakeTensorDeviceMismatchError|AssertionError", str(said)), fault
        else:  # FSDP itself brings a micro-batch to the device, and the host waits
            assert isinstance(said, dict), (fault, said)
            assert any(said[stage] != clean[stage] for stage in said), fault
    assert len(found["faults"]) == 21


# --------------------------------------------------------------------------------------------------
# What is chosen by device


def test_the_engines_options_by_device():
    config = EngineConfig(gpu_memory=0.4, kv_cache_gb=0.5)
    cpu = engine_options(config, "bfloat16", 12_288, 64, gpu=False)
    gpu = engine_options(config, "bfloat16", 12_288, 64, gpu=True)
    # A prompt is cut only where vLLM can do it; a token budget below a prompt's length needs it.
    assert cpu["enable_chunked_prefill"] is False and cpu["max_num_batched_tokens"] == 12_288
    assert "enable_chunked_prefill" not in gpu and gpu["max_num_batched_tokens"] == 8192
    assert gpu["async_scheduling"] is False and gpu["gpu_memory_utilization"] == 0.4
    assert cpu["kv_cache_memory_bytes"] == 2**29 and "gpu_memory_utilization" not in cpu
    both = {name for name in cpu if cpu[name] == gpu.get(name)}
    assert both >= {"dtype", "logprobs_mode", "generation_config", "max_model_len", "max_num_seqs"}
    if vllm := find_spec("vllm"):
        source = Path(vllm.submodule_search_locations[0], "engine", "arg_utils.py").read_text()
        known = set(re.findall(r"^    (\w+): ", source, re.MULTILINE))
        assert not (cpu.keys() | gpu.keys()) - known - {"use_tqdm_on_load"}


def test_a_gpu_that_pytorch_cannot_use_is_named(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, remedy in ((None, "is a CPU build; run make setup"), ("13.0", "driver .* update")):
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(ValueError, match=f"GPU 0: NVIDIA H100 cannot be used: .*{remedy}"):
            check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    check_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'No devices found'\n")
    check_gpu()


def test_the_digit_reader_takes_a_number_of_tokens_and_not_of_rows(monkeypatch):
    monkeypatch.setattr(digits, "BATCH_TOKENS", 20)
    # By length 12 9 9 5 5 3: 12 alone; 2 x 9 = 18; 3 x 5 = 15.
    assert digits._batches([5, 12, 9, 3, 9, 5]) == [[1], [2, 4], [0, 5, 3]]
    assert digits._batches([50, 1]) == [[0], [1]] and digits._batches([]) == []


def test_a_full_step_is_timed_part_by_part(random_folder):
    """bench/full_step.py, on CPU: 2 prompts of 12 tokens, 8 rollouts of 5 at most."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "full_step.py", "--model", random_folder("qwen3"),
         *"--prompts 2 --prompt_tokens 12 --response_tokens 5 --sampler transformers".split()],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 prompts of 12 tokens x 8 rollouts" in done.stdout
    sampled = int(re.search(r"(\d+) tokens sampled", done.stdout)[1])
    passed = int(re.search(r"(\d+) of rank 0 through the layers", done.stdout)[1])
    assert 16 <= sampled <= 80 and passed == 2 * 12 + sampled  # each prompt passes once
    assert float(re.search(r"trainer ([\d.]+)", done.stdout)[1]) < 0.05


# --------------------------------------------------------------------------------------------------
# cycle.py --self_check


def test_the_self_checks_parts_for_a_gpu_run(found):
    attention, memory = found["self_check"]
    assert attention[0].startswith("attention without a mask") and attention[1] is not None
    assert memory[1] is True, memory  # the traced peak is within a tenth of the formula


def test_self_check_is_one_page_of_what_is_as_promised(tmp_path):
    args = [str(ROOT / "cycle.py"), "--self_check", "--sampler", "transformers"]
    page = finish(start_ranks(3, args, tmp_path))  # three: shards of unequal size
    assert "3 rank(s)" in page and "11 as promised, 0 not, 2 not run" in page
    assert page.count("\nok ") == 11 and page.count("needs a GPU") == 2
    assert not list(tmp_path.iterdir())


STALE = """
import dataclasses
import cycle
from backend.sampler import TransformersSampler

real, calls = TransformersSampler.load_weights, []


def once(self, policy, version="handed over"):
    calls.append(version)
    if len(calls) == 1:
        real(self, policy, version)


TransformersSampler.load_weights = once
cycle.main()
"""


def test_self_check_notices_a_sampler_with_old_weights(tmp_path):
    args = ["-c", STALE, "--self_check", "--sampler", "transformers"]
    [process] = start_ranks(1, args, tmp_path, PYTHONPATH=str(ROOT))
    page = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and "10 as promised, 1 not, 2 not run" in page
    assert re.search(r"NOT AS PROMISED +RL step 2: sampler against trainer", page)
