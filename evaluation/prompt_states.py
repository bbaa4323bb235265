"""The base model's last hidden states of prompts, on file: what a predictor that sees the prompt
alone is fitted on (predictors.PromptOnly). evaluate.py's stage `digits` writes them."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from storage.files import FileError, publish, writing


def write_states(path: Path, version: str, states: Mapping[str, np.ndarray]) -> None:
    """states: prompt id -> (D,). version: of the weights."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            np.savez(
                f, version=np.array(version), ids=np.array(list(states)),
                states=np.array(list(states.values()), np.float32),
            )  # fmt: skip
        publish(temporary, path)


def read_states(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """(version, prompt id -> (D,)); ("", {}) if there is no file. Raises FileError for a file that
    cannot be read."""
    if not path.exists():
        return "", {}
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, states = file["ids"].tolist(), file["states"]
            return str(file["version"]), dict(zip(ids, states, strict=True))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise FileError(
            f"{path}: not a file of hidden states ({error}); delete it and run evaluate.py's stage "
            "digits again"
        ) from None
