"""Memory by formula against a measured step: .venv/bin/python -m pytest tests/test_footprint.py"""

import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from transformers import LlamaConfig

import footprint
from policy import PolicyConfig, model_size
from presets import PRESETS

# Runs in a process of its own; prints what its resident memory grew by, in bytes.
STEP = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import parallel
from grpo import GRPOConfig, make_optimizer, micro_batches, reference_logps, response_row, rl_step
from policy import PolicyConfig, load_policy

folder, checkpointing = sys.argv[1], sys.argv[2] == "True"


def resident(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024


config = PolicyConfig(gradient_checkpointing=checkpointing, head_tokens=512)
rollouts = [
    SimpleNamespace(prompt_ids=[5] * 200, response_ids=[k] * 300, reward=k, sampled_logp=None,
                    score_positions=None)
    for k in range(8)
]
with parallel.process_group():
    before = resident("VmRSS:")
    policy = load_policy(folder, config)
    reference = load_policy(folder, config, trainable=False)
    optimizer = make_optimizer(policy, GRPOConfig())
    rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
    for _ in range(2):
        work = micro_batches(rows, 8, config)
        refs = reference_logps(reference, work.batches, 1.0)
        rl_step(policy, optimizer, work, refs, rollouts, 8, 1.0, GRPOConfig())
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


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_formula_is_near_a_measured_step(folder, checkpointing):
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(folder), str(checkpointing)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split()[-1])
    size = model_size(folder)
    tokens = 200 + 8 * 300
    policy = PolicyConfig(
        gradient_checkpointing=checkpointing, head_tokens=512, micro_batch_tokens=tokens
    )
    config = replace(PRESETS["small"], policy=policy)
    formula = footprint.training(config, size, ranks=1)
    assert 0.6 < sum(formula.values()) / measured < 1.1, (measured, formula)


def test_tokens_that_fit_use_up_what_is_free(folder):
    size, config = model_size(folder), PRESETS["paper"]
    tokens = footprint.tokens_that_fit(config, size, 4, 60e9)
    policy = replace(config.policy, micro_batch_tokens=tokens)
    used = sum(footprint.training(replace(config, policy=policy), size, 4).values())
    assert used == pytest.approx(60e9, rel=1e-3)
    assert footprint.tokens_that_fit(config, size, 4, 1e8) == 0
