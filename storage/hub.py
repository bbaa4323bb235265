"""Models and prompt files by name: a local path, or a Hugging Face hub id.

    models    Qwen/Qwen3-4B-Base
    data      nvidia/HelpSteer2, tatsu-lab/alpaca_eval, lmarena-ai/arena-hard-auto,
              allenai/WildBench, or any file of a dataset repository as ORG/NAME/PATH, such as
              nvidia/HelpSteer2/validation.jsonl.gz

A path that exists wins over a hub id. Only the files that are named here are fetched: of a model
its configuration, tokenizer and safetensors, of a dataset one file. They stay in the hub's own
cache."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# The file that a dataset's id alone stands for.
FILES = {
    "nvidia/HelpSteer2": "train.jsonl.gz",
    "tatsu-lab/alpaca_eval": "alpaca_eval.json",
    "lmarena-ai/arena-hard-auto": "data/arena-hard-v2.0/question.jsonl",
    "allenai/WildBench": "v2/test-00000-of-00001.parquet",
}
_SETTINGS = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
             "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:/(.+))?")


def model_folder(name: str) -> Path:
    """The model's local folder with configuration and tokenizer; a hub model's weights may be
    missing in it. Raises ValueError."""
    if Path(name).is_dir():
        return Path(name)
    if not _MODEL_ID.fullmatch(name):
        raise ValueError(
            f"model {name}: no such folder, and no hub id (ORG/NAME); give a Hugging Face model "
            "folder with --model DIR"
        )
    return _fetch(name, "model", _SETTINGS, f"model {name}: no such folder", "--model DIR")


def fetch_weights(name: str) -> None:
    """Have all of the model's safetensors files in its folder. Raises ValueError."""
    folder = Path(name)
    if not folder.is_dir():
        what = f"model {name}: its weights are not here"
        folder = _fetch(name, "model", (*_SETTINGS, *_WEIGHTS), what, "--model DIR")
    found = {path.name for path in folder.glob("*.safetensors")}
    if not found:
        raise ValueError(
            f"model {folder}: no *.safetensors file; other weight formats can run code and are "
            "not loaded"
        )
    for index in folder.glob("*.safetensors.index.json"):
        if missing := set(json.loads(index.read_text())["weight_map"].values()) - found:
            raise ValueError(
                f"model {folder}: {', '.join(sorted(missing))} missing; fetch it again"
            )


def data_file(name: str) -> Path:
    """The prompt file's local path. Raises ValueError for a hub file that cannot be fetched."""
    path = Path(name)
    known = _DATA_ID.fullmatch(name)
    repository, file = known.groups() if known else (None, None)
    file = file or FILES.get(repository)
    if path.is_file() or not file:
        return path  # if there is no such file, data.py says so
    remedy = f"--data DIR/{file}"
    path = _fetch(repository, "dataset", (file,), f"data {name}: no such file", remedy) / file
    if not path.is_file():
        raise ValueError(f"data {name}: the hub's dataset {repository} has no file {file}")
    return path


def _fetch(name: str, kind: str, files: tuple[str, ...], problem: str, remedy: str) -> Path:
    try:
        top_level = {"ignore_patterns": "*/*"} if kind == "model" else {}
        found = snapshot_download(name, repo_type=kind, allow_patterns=list(files), **top_level)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        arguments = name if kind == "model" else f"{name} {files[0]} --repo-type dataset"
        raise ValueError(
            f"{problem}, and the hub gives none ({type(error).__name__}); where there is a "
            f"network, `hf download {arguments} --local-dir DIR`, then give {remedy}"
        ) from None
    return Path(found)
