"""Memory by formula against a measured step: .venv/bin/python -m pytest tests/test_footprint.py"""

import json
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
    for _ in range(2):
        work = share_out(rows, [0] * n, config.micro_batch_tokens, config.shared_prefix)
        refs = reference_logps(reference, work.batches, 1.0)
        advantages = torch.arange(n, dtype=torch.float32)
        rl_step(policy, optimizer, work, rollouts, advantages, refs, 1.0, GRPOConfig())
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
        formula[name] = sum(footprint.training(config, size, ranks=1).values())
    for name in CASES:
        assert 0.7 < formula[name] / measured[name] < 1.1, (name, measured, formula)

    def changes(a: str, b: str) -> float:
        """Formula over measured of the difference."""
        return (formula[b] - formula[a]) / (measured[b] - measured[a])

    for pair in (("plain", "more rows"), ("plain", "kept")):
        assert 0.5 < changes(*pair) < 2, (pair, changes(*pair), measured, formula)


def test_tokens_that_fit_use_up_what_is_free(folder):
    size, config = model_size(folder), PRESETS["paper"]
    tokens = footprint.tokens_that_fit(config, size, 4, 60e9)
    policy = replace(config.policy, micro_batch_tokens=tokens)
    used = sum(footprint.training(replace(config, policy=policy), size, 4).values())
    assert used == pytest.approx(60e9 / footprint.MARGIN, rel=1e-3)
    assert footprint.tokens_that_fit(config, size, 4, 1e8) == 0
