"""The structure holds: .venv/bin/python -m pytest tests/test_layout.py"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Imports go down this list only (README, Design).
ORDER = """demo report further_tables control_tables tables results evaluate cycle plan footprint
presets rollout grpo sft_masked digits sampler policy packing judge sources client ledger endpoint
heuristic inference controls metrics tiny data hub reward buffer logbook parallel files
prompts""".split()
ONLY_IN = {
    "torch.distributed": "parallel",
    "vllm": "sampler",
    "openai": "client",
    "httpx": "client",
    "huggingface_hub": "hub",
    "wandb": "logbook",
}
NO_TORCH = {"prompts", "reward", "buffer", "metrics", "data", "hub", "files", "judge", "sources",
            "client", "ledger", "endpoint", "heuristic", "inference", "controls",
            "results", "tables", "control_tables", "further_tables"}  # fmt: skip


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_stands_in_the_order():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module):
    below = ORDER[ORDER.index(module) + 1 :]
    assert {name for name in imports(module) if name in ORDER} <= set(below)


@pytest.mark.parametrize("module", ORDER)
def test_each_outside_thing_is_known_in_one_file(module):
    for name in imports(module):
        for outside, owner in ONLY_IN.items():
            if name == outside or name.startswith(outside + "."):
                assert module == owner, f"{module} imports {name}"
        if name.split(".")[0] == "torch":
            assert module not in NO_TORCH


@pytest.mark.parametrize("module", ORDER)
def test_files_explain_themselves_and_keep_no_global_state(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert node.value.value is False


PLACES = {
    "cycle.py": ("--sampling.top-k", "--reward.gamma", "Table 5", "seconds", "tokens"),
    "evaluate.py": ("--sampling.top-k", "--reward.gamma", "Table 5", "seconds", "tokens"),
    "report.py": ("--beside", "--runs", "Sec. 4", "results"),
    "judge.py": ("--repeat", "--client.max-cost", "Sec. 4.1", "US dollars", "seconds", "tokens"),
}


@pytest.mark.parametrize("command", PLACES)
def test_help_names_every_option_with_its_place(command):
    done = subprocess.run(
        [sys.executable, ROOT / command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in PLACES[command]:
        assert word in done.stdout.replace("\n", " "), word
