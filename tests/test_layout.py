"""The structure holds: .venv/bin/python -m pytest tests/test_layout.py"""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

# The root, in reading order, and the folders, each of which may import those after it.
METHOD = """cycle rollout reward grpo buffer sft_masked prompts judge
evaluate report ablate predict watch plan config self_check""".split()
FOLDERS = ["miniature", "evaluation", "backend", "judging", "storage"]
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
    for folder in (".", *FOLDERS)
    for path in sorted((ROOT / folder).glob("*.py"))
}
# What a folder may import from the root; a command is imported by nobody.
FROM_ROOT = {
    "evaluation": {"prompts", "reward", "judge", "config"},
    "backend": {"prompts", "reward"},
    "judging": {"prompts", "reward"},
    "storage": {"prompts", "reward"},
    "miniature": {"prompts", "reward", "config"},
}
COMMANDS = {"cycle", "evaluate", "report", "ablate", "predict", "watch"}
ONLY_IN = {
    "torch.distributed": "backend.parallel",
    "vllm": "backend.sampler",
    "openai": "judging.client",
    "httpx": "judging.client",
    "huggingface_hub": "storage.hub",
    "wandb": "storage.logbook",
}
# All others can be imported without torch.
TORCH = {"cycle", "rollout", "grpo", "sft_masked", "evaluate", "plan", "config", "self_check",
         "storage.logbook", "evaluation.digits", "evaluation.stages", "evaluation.dry_run",
         "evaluation.responses", "predict",
         "miniature.base_model",
         "miniature.demo"}  # fmt: skip


def imports(module: str) -> set[str]:
    """What a module imports, functions included: "torch", "storage.files", "storage.files.name"."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name in MODULES and name not in FOLDERS}


def test_the_root_shows_the_method():
    assert {path.stem for path in ROOT.glob("*.py")} == set(METHOD)
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*FOLDERS, "ablations"}  # whose files are commands
    for folder in folders:  # one level deep, and nothing is re-exported
        assert not list((ROOT / folder).glob("*/*.py"))
        [statement] = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert isinstance(statement, ast.Expr)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    folder = module.partition(".")[0] if "." in module else None
    for name in own_imports(module):
        assert name not in COMMANDS, f"{module} imports the command {name}"
        if folder and "." not in name:
            assert name in FROM_ROOT[folder], f"{module} imports {name} from the root"
        if folder and "." in name:
            theirs = FOLDERS.index(name.partition(".")[0])
            assert FOLDERS.index(folder) <= theirs, f"{module} imports {name}"
    if folder == "evaluation":
        assert not own_imports(module) & {"cycle", "grpo", "sft_masked", "rollout"}


def test_no_circle():
    """Every module stands above all that it imports."""
    left = {module: own_imports(module) for module in MODULES}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("module", MODULES)
def test_each_outside_thing_is_known_in_one_file(module):
    for name in imports(module):
        for outside, owner in ONLY_IN.items():
            if name == outside or name.startswith(outside + "."):
                assert module == owner, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in TORCH and "backend" not in m])
def test_torch_is_not_needed_to_judge_reward_select_and_report(module):
    """Nor by anything that these import."""
    seen, todo = set(), {module}
    while todo:
        seen |= todo
        todo = set().union(*(own_imports(name) for name in todo)) - seen
    for name in seen:
        assert not any(x.split(".")[0] == "torch" for x in imports(name)), f"{name} imports torch"


def test_no_name_hides_an_installed_package():
    """The root and its folders come first on the path of every command."""
    ours = {*METHOD, *FOLDERS}
    hidden = {name for name in packages_distributions() if name in ours}
    assert not hidden


@pytest.mark.parametrize("module", MODULES)
def test_files_explain_themselves_and_keep_no_global_state(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert node.value.value is False


PLACES = {
    "cycle": ("--sampling.top-k", "--reward.gamma", "Table 5", "seconds", "tokens"),
    "evaluate": ("--sampling.top-k", "--reward.gamma", "Table 5", "seconds", "tokens"),
    "predict": ("--data", "--threshold", "--url", "--engine.gpu-memory", "tokens"),
    "report": ("--beside", "--runs", "Sec. 4", "results"),
    "ablate": ("--list", "--variants", "--against", "ablations/"),
    "watch": ("--false-alarms", "--client.max-cost", "results", "US dollars", "seconds"),
    "evaluation.judgements": (
        "--repeat", "--client.max-cost", "Sec. 4.1", "US dollars", "seconds", "tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", PLACES)
def test_help_names_every_option_with_its_place(command):
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for word in PLACES[command]:
        assert word in done.stdout.replace("\n", " "), word
