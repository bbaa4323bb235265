"""Models and prompt files by name: a local path, or a Hugging Face hub id.

    models    Qwen/Qwen3-4B-Base
    data      nvidia/HelpSteer2, tatsu-lab/alpaca_eval, lmarena-ai/arena-hard-auto,
              allenai/WildBench, or any file of a dataset repository as ORG/NAME/PATH, such as
              nvidia/HelpSteer2/validation.jsonl.gz

`nvidia/HelpSteer2` alone is its training split for cycle.py and its validation split for
evaluate.py. An existing path takes precedence over a hub id. Only these files are fetched: of a
model its configuration, tokenizer, model card and safetensors, of a dataset one file. They are
stored in the cache of huggingface_hub."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load

# The file of a dataset that is given by its id alone.
FILES = {
    "nvidia/HelpSteer2": "train.jsonl.gz",
    "tatsu-lab/alpaca_eval": "alpaca_eval.json",
    "lmarena-ai/arena-hard-auto": "data/arena-hard-v2.0/question.jsonl",
    "allenai/WildBench": "v2/test-00000-of-00001.parquet",
}
# Sec. 4.1 evaluates on HelpSteer2's validation split and trains on its other one.
_BENCHMARK_FILES = {"nvidia/HelpSteer2": "validation.jsonl.gz"}
_SETTINGS = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
             "special_tokens_map.json", "added_tokens.json", "README.md",
             "self_eval.json")  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:/(.+))?")


def model_folder(name: str) -> Path:
    """The model's local folder with configuration and tokenizer. A hub model's weights are not
    fetched yet. Raises ValueError."""
    if Path(name).is_dir():
        return Path(name)
    if not _MODEL_ID.fullmatch(name):
        raise ValueError(
            f"model {name}: no such folder, and no hub id (ORG/NAME); give a Hugging Face model "
            "folder with --model DIR"
        )
    return _fetch(name, "model", _SETTINGS, f"model {name}: no such folder", "--model DIR")


def fetch_weights(name: str) -> None:
    """Fetch a hub model's weights; check that the model's folder has all its safetensors files.
    Raises ValueError."""
    folder = Path(name)
    if not folder.is_dir():
        problem = f"model {name}: its weights are not on this machine"
        folder = _fetch(name, "model", (*_SETTINGS, *_WEIGHTS), problem, "--model DIR")
    weight_files = {path.name for path in folder.glob("*.safetensors")}
    if not weight_files:
        raise ValueError(
            f"model {folder}: no *.safetensors file; other weight formats can run code and are "
            "not loaded"
        )
    for index in folder.glob("*.safetensors.index.json"):
        indexed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := indexed - weight_files:
            raise ValueError(
                f"model {folder}: {', '.join(sorted(missing))} missing; fetch it again"
            )


def is_id(name: str) -> bool:
    """Whether a name is a hub model's id and no path on this machine."""
    return bool(_MODEL_ID.fullmatch(name)) and not Path(name).exists()


def licence(folder: Path) -> dict[str, str]:
    """The licence fields of a model's card; "unknown" where it has none that can be read."""
    try:
        fields = metadata_load(folder / "README.md") or {}
    except Exception:  # no card, or whatever the parser makes of it
        fields = {}
    names = ("license", "license_name", "license_link")
    found = {name: fields[name] for name in names if isinstance(fields.get(name), str)}
    return {"license": "unknown"} | found


def card_header(**fields: object) -> str:
    """The header of a model card in the hub's form; a field that is None is left out."""
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def data_file(name: str) -> Path:
    """The prompt file's local path. Raises ValueError for a hub file that cannot be fetched."""
    path = Path(name)
    match = _DATA_ID.fullmatch(name)
    repository, file = match.groups() if match else (None, None)
    file = file or FILES.get(repository)
    if path.is_file() or not file:
        return path  # load_prompts reports a missing file
    remedy = f"--data DIR/{file}"
    path = _fetch(repository, "dataset", (file,), f"data {name}: no such file", remedy) / file
    if not path.is_file():
        raise ValueError(f"data {name}: the hub's dataset {repository} has no file {file}")
    return path


def benchmark(name: str) -> str:
    """The name of a benchmark's data: a dataset whose file above is for training, given by its id
    alone, becomes that of its evaluation split."""
    file = None if Path(name).exists() else _BENCHMARK_FILES.get(name)
    return f"{name}/{file}" if file else name


def _fetch(name: str, kind: str, files: tuple[str, ...], problem: str, remedy: str) -> Path:
    try:
        top_level = {"ignore_patterns": "*/*"} if kind == "model" else {}
        folder = snapshot_download(name, repo_type=kind, allow_patterns=list(files), **top_level)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        arguments = name if kind == "model" else f"{name} {files[0]} --repo-type dataset"
        raise ValueError(
            f"{problem}, and it cannot be fetched from the hub ({type(error).__name__}); on a "
            f"machine with a network, `hf download {arguments} --local-dir DIR`, then give {remedy}"
        ) from None
    return Path(folder)
