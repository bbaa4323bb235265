"""bench/parity.py: .venv/bin/python -m pytest tests/test_parity.py"""

import pytest
import torch

from backend import packing
from bench import parity


@pytest.mark.parametrize("kind", ["llama", "olmo3"])
def test_a_family_that_agrees(random_folder, capsys, kind):
    assert parity.run(str(random_folder(kind, True))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["packs", "padding", "sampler"]
    assert all(line.endswith("pass") for line in lines)


def test_packs_that_see_each_other_fail(random_folder, capsys, monkeypatch):
    """Without its mask a row of a pack sees the others and what comes later."""
    right = packing.attention_calls

    def all_seen(*args):
        return [call._replace(mask=torch.zeros_like(call.mask)) for call in right(*args)]

    monkeypatch.setattr(packing, "attention_calls", all_seen)
    assert parity.run(str(random_folder("llama", True))) == 1
    packs, padding, sampler = capsys.readouterr().out.splitlines()
    assert "FAIL" in packs and padding.endswith("pass") and sampler.endswith("pass")


def test_a_wrong_folder(tmp_path):
    for folder, message in (
        (tmp_path, "no config.json; --model must be"),
        (tmp_path / "none", "no such folder, and no hub id"),
    ):
        with pytest.raises(SystemExit, match=message):
            parity.run(str(folder))
