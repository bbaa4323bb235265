"""Names of models and prompt files: .venv/bin/python -m pytest tests/test_hub.py"""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from storage import hub


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """What was asked of the hub, which answers with a folder that holds `files`."""
    asked, folder = [], tmp_path / "snapshot"
    folder.mkdir()

    def snapshot_download(name, repo_type, allow_patterns, ignore_patterns=None):
        asked.append((name, repo_type, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked, folder


def test_only_what_is_named_is_fetched(fetched):
    asked, folder = fetched
    assert hub.model_folder("Qwen/Qwen3-4B-Base") == folder
    [(name, kind, patterns)] = asked
    assert (name, kind) == ("Qwen/Qwen3-4B-Base", "model")
    assert "config.json" in patterns and not [p for p in patterns if "safetensors" in p]

    (folder / "a.safetensors").touch()
    hub.fetch_weights("Qwen/Qwen3-4B-Base")
    assert "*.safetensors" in asked[1][2]
    assert not [p for p in asked[1][2] if p == "*" or ".bin" in p or ".py" in p]

    (folder / "train.jsonl.gz").touch()
    assert hub.data_file("nvidia/HelpSteer2") == folder / "train.jsonl.gz"
    assert asked[2] == ("nvidia/HelpSteer2", "dataset", ["train.jsonl.gz"])
    (folder / "validation.jsonl.gz").touch()
    hub.data_file("nvidia/HelpSteer2/validation.jsonl.gz")
    assert asked[3] == ("nvidia/HelpSteer2", "dataset", ["validation.jsonl.gz"])
    with pytest.raises(ValueError, match="allenai/WildBench has no file v2/test"):
        hub.data_file("allenai/WildBench")


def test_local_paths_are_never_asked_for(fetched, tmp_path):
    asked, _ = fetched
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "x.safetensors").touch()
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "HelpSteer2").touch()
    assert str(hub.model_folder("models/mine")) == "models/mine"
    hub.fetch_weights("models/mine")
    assert str(hub.data_file("nvidia/HelpSteer2")) == "nvidia/HelpSteer2"
    assert str(hub.data_file("prompts.jsonl")) == "prompts.jsonl"
    assert str(hub.data_file("data/prompts.jsonl")) == "data/prompts.jsonl"
    assert asked == []
    with pytest.raises(ValueError, match="model none: no such folder, and no hub id"):
        hub.model_folder("none")


def test_an_offline_machine_is_told_the_local_path(fetched, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("a long story with https://user:secret@host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    for call, name, remedy in (
        (hub.model_folder, "Qwen/Qwen3-4B-Base", "`hf download Qwen/Qwen3-4B-Base --local-dir"),
        (hub.fetch_weights, "Qwen/Qwen3-4B-Base", "--model DIR"),
        (hub.data_file, "nvidia/HelpSteer2", "HelpSteer2 train.jsonl.gz --repo-type dataset"),
    ):
        with pytest.raises(ValueError, match=remedy) as error:
            call(name)
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_missing_weights_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        hub.fetch_weights(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        hub.fetch_weights(str(tmp_path))
    (tmp_path / "m-1.safetensors").touch()
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"m-2.safetensors missing"):
        hub.fetch_weights(str(tmp_path))
