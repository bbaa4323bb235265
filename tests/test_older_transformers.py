"""Exports in transformers 4.57, which most people have (make transformers-4.57):
.venv/bin/python -m pytest tests/test_older_transformers.py"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.model_folder import check_model_folder, check_weights
from backend.policy import PolicyConfig, export, load_policy

OLDER = ROOT / ".venv" / "transformers-4.57"
pytestmark = pytest.mark.skipif(
    not OLDER.is_dir(), reason="transformers 4.57 is not installed: make transformers-4.57"
)

MAKE = """
import sys, torch
from transformers import {0}Config, {0}ForCausalLM, PreTrainedTokenizerFast
tokenizer_file, folder, vocabulary = sys.argv[1:]
rope = {{"rope_theta": 500000.0}}
if "{0}" == "Llama":
    rope["rope_scaling"] = {{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}
torch.manual_seed(0)
config = {0}Config(vocab_size=int(vocabulary), hidden_size=64, intermediate_size=128, head_dim=32,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0,
    eos_token_id=0, pad_token_id=0, max_position_embeddings=1024, initializer_range=0.1, **rope)
{0}ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|end|>").save_pretrained(folder)
"""
READ = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.57")
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
logp = model(torch.arange(1, 301)[None]).logits.log_softmax(-1)
torch.save({"logp": logp.detach(), "ids": tokenizer.encode("Say something.")}, out)
"""


def older(code: str, *args: object) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(OLDER)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_an_older_model_is_exported_so_that_its_version_reads_it(tmp_path, tokenizer, kind):
    """RoPE's base and scaling, which 4.57 reads elsewhere than 5, and the tokenizer's files."""
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    older(MAKE.format(kind), tmp_path / "tokenizer.json", source, len(tokenizer))
    check_model_folder(source, 1000)
    check_weights(source)
    export(load_policy(source, PolicyConfig("float32")), source, out)
    older(READ, out, tmp_path / "read.pt")
    read = torch.load(tmp_path / "read.pt")
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        logp = ours(torch.arange(1, 301)[None]).logits.log_softmax(-1)
    torch.testing.assert_close(read["logp"], logp, rtol=0, atol=1e-5)
    assert read["ids"] == AutoTokenizer.from_pretrained(Path(out)).encode("Say something.")
