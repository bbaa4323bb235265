"""Memory by formula against measured and traced steps: .venv/bin/python -m pytest
tests/test_footprint.py"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from transformers import LlamaConfig

from backend import footprint
from backend.model_folder import model_size
from backend.policy import PolicyConfig
from config import PRESETS

# Runs in a process of its own; prints what its resident memory grew by, in bytes.
STEP = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from backend import parallel
from backend.packing import share_out
from backend.policy import PolicyConfig, load_policy
from grpo import GRPOConfig, make_optimizer, reference_logps, response_row, rl_step

folder, n, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])


def resident(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024


config = PolicyConfig(**options)
rollouts = [
    SimpleNamespace(prompt_ids=[5] * 200, response_ids=[k] * 300, reward=k, sampled_logp=None,
                    score_positions=None)
    for k in range(n)
]
with parallel.process_group():
    before = resident("VmRSS:")
    policy = load_policy(folder, config)
    reference = load_policy(folder, config, trainable=False)
    optimizer = make_optimizer(policy, GRPOConfig())
    rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
    for k in (1, n):  # AdamW's state is there after the first step
        work = share_out(rows[:k], [0] * k, config.micro_batch_tokens, config.shared_prefix)
        refs = reference_logps(reference, work.batches, 1.0)
        advantages = torch.arange(k, dtype=torch.float32)
        rl_step(policy, optimizer, work, rollouts[:k], advantages, refs, 1.0, GRPOConfig())
    print(resident("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 million parameters: large beside what a process takes for itself."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=16_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


# (rows behind one prefix of 200 tokens, options)
CASES = {
    "plain": (8, {}),
    "more rows": (24, {}),  # so many that activations decide
    "kept": (8, {"gradient_checkpointing": False}),
}


def test_the_formula_is_near_measured_steps(folder):
    """The sum, and what each option changes of it, against processes of their own."""
    size, measured, formula = model_size(folder), {}, {}
    small = PRESETS["small"]
    for name, (rows, options) in CASES.items():
        options = {"head_tokens": 512, "micro_batch_tokens": 200 + rows * 300} | options
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(folder), str(rows), json.dumps(options)],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        measured[name] = int(done.stdout.split()[-1])
        config = replace(
            small, policy=PolicyConfig(**options), prompt_tokens=200,
            sampling=replace(small.sampling, max_tokens=300),
        )  # fmt: skip
        formula[name] = sum(footprint.training(config, size, ranks=1, gpu=False).values())
    for name in CASES:
        assert 0.7 < formula[name] / measured[name] < 1.1, (name, measured, formula)

    def changes(a: str, b: str) -> float:
        """Formula over measured of the difference."""
        return (formula[b] - formula[a]) / (measured[b] - measured[a])

    for pair in (("plain", "more rows"), ("plain", "kept")):
        assert 0.5 < changes(*pair) < 2, (pair, changes(*pair), measured, formula)


# Runs in a process of its own: peaks of the run's own RL step on a GPU that is not there.
TRACE = """
import json, sys
from pathlib import Path
import gpu_trace
from backend.policy import PolicyConfig

peaks = []
for folder, ranks, prompt, responses, options in json.loads(sys.argv[1]):
    with gpu_trace.rank(Path(folder), PolicyConfig(**options), ranks) as rank:
        rank.rl_steps(prompt, responses, 2 * ranks)
    assert rank.packs == 2
    peaks.append(rank.stages["RL step"].peak)
print(json.dumps(peaks), flush=True)
"""
QWEN3 = dict(
    model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_hidden_layers=2, vocab_size=151_936,
    max_position_embeddings=32_768, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = QWEN3 | dict(model_type="llama", num_key_value_heads=32, vocab_size=32_000)
# Model, ranks, prompt, responses, options: the largest moment is at the head, in a layer's MLP, in
# its attention (many rows behind a long prefix), or at the end.
SHAPES = {
    "paper's rows": (QWEN3, 4, 4096, [8192, 4096], {}),
    "layer": (QWEN3 | {"vocab_size": 8000}, 4, 1000, [1000] * 8, {"micro_batch_tokens": 9000}),
    "attention": (
        QWEN3 | {"vocab_size": 8000, "intermediate_size": 2560}, 4, 4096, [512] * 8,
        {"micro_batch_tokens": 8192},
    ),
    "kept": (QWEN3 | {"vocab_size": 32_000, "num_hidden_layers": 3}, 4, 4096, [8192, 4096],
             {"gradient_checkpointing": False}),
    "untied, one rank": (QWEN3 | {"tie_word_embeddings": False}, 1, 500, [500] * 3,
                         {"micro_batch_tokens": 2000}),
    "fp32 compute": (LLAMA, 2, 500, [500] * 7, {"micro_batch_tokens": 4000, "dtype": "float32"}),
    "padded": (LLAMA, 4, 4096, [4096, 4096], {"shared_prefix": False}),
    "official": (QWEN3, 4, 1000, [1000] * 8,
                 {"micro_batch_tokens": 9000, "parameters": "bfloat16"}),
}  # fmt: skip


def test_the_formula_is_within_a_tenth_of_the_trace(tmp_path):
    asked, formula = [], []
    for name, (model, ranks, prompt, responses, options) in SHAPES.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model))
        asked.append((str(folder), ranks, prompt, responses, options))
        tokens = prompt + sum(responses)
        if not options.get("shared_prefix", True):
            tokens = len(responses) * (prompt + max(responses))
        config = replace(
            PRESETS["paper"], policy=PolicyConfig(**options), prompt_tokens=prompt,
            rollouts=len(responses),
        )  # fmt: skip
        parts = footprint.training(config, model_size(folder), ranks, True, tokens)
        formula.append(sum(parts.values()))
    done = subprocess.run(
        [sys.executable, "-c", TRACE, json.dumps(asked)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    traced = json.loads(done.stdout)
    ratios = {n: f / t for n, f, t in zip(SHAPES, formula, traced, strict=True)}
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def test_tokens_that_fit_use_up_what_is_free(folder):
    size, config = model_size(folder), PRESETS["paper"]
    machine = footprint.Machine(96e9, cuda=True)
    tokens = footprint.tokens_that_fit(config, size, machine, 4, 60e9)
    policy = replace(config.policy, micro_batch_tokens=tokens)
    used = sum(footprint.training(replace(config, policy=policy), size, 4, True).values())
    assert used == pytest.approx((60e9 - footprint.CONTEXT) / footprint.MARGIN, rel=1e-3)
    assert footprint.tokens_that_fit(config, size, machine, 4, 1e8) == 0


def test_keys_and_values_of_rollouts_count_where_they_exceed_a_step(folder):
    """Transformers sampler, by hand: 10 layers x 2 x 4 heads x 64 numbers x 2 bytes a token."""
    config = replace(PRESETS["small"], sampler="transformers")
    size, machine = model_size(folder), footprint.Machine(96e9, cuda=False)
    extra = "keys and values of rollouts"
    few, many = (
        footprint.memory(replace(config, sample_rows=rows), size, machine) for rows in (1, 6400)
    )
    assert few[extra] == 0
    held = ("parameters", "gradients", "AdamW", "KL reference")
    others = (*held, extra, "margin", "copies being saved", "sampler")
    step = sum(v for k, v in few.items() if k not in others)
    rows = 6400 * config.longest_row * 10 * 2 * 4 * 64 * 2
    assert many[extra] == pytest.approx(rows - step)
    assert sum(many.values()) - sum(few.values()) == pytest.approx(many[extra] * footprint.MARGIN)


def test_what_a_thread_writes_is_a_copy(folder):
    """Bytes of a parameter, by hand: fp32 state (with AdamW's and a bf16 reference 4 + 8 + 2), and
    the checkpoint in bf16."""
    size, cpu = model_size(folder), footprint.Machine(96e9, cuda=False)
    for save_every, each in ((0, 4 + 2), (5, 14 + 2)):
        config = replace(PRESETS["small"], save_every=save_every)
        copies = footprint.memory(config, size, cpu)["copies being saved"]
        assert copies == each * size.parameters
    assert "copies being saved" not in footprint.memory(config, size, cpu._replace(cuda=True))
