"""Which program made a run: .venv/bin/python -m pytest tests/test_program.py"""

import json
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from storage import program as module
from storage.program import check_same_program, program, source_id, sources
from storage.run_folder import RunFolder

PRINT = """
import json
from storage.program import program, sources
print(json.dumps([program(), sources()]))
"""


@pytest.mark.parametrize("way", ["file", "module"])
def test_a_script_of_ones_own_is_another_program(tmp_path, way):
    """Run by its path or with -m; its source counts, whether git knows it or not."""
    (tmp_path / "mine.py").write_text("import helper\nimport reward\n" + PRINT)
    (tmp_path / "helper.py").write_text("X = 1\n")
    words = {"file": ["mine.py"], "module": ["-m", "mine"]}[way]

    def said() -> list:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    name, first = said()
    assert name == "mine" and {"mine.py", "helper.py", "reward.py", "storage/files.py"} <= {*first}
    assert "cycle.py" not in first and not any("site-packages" in path for path in first)
    (tmp_path / "helper.py").write_text("X = 2\n")
    _, second = said()
    assert {k for k in first if first[k] != second[k]} == {"helper.py"}
    assert source_id({"sources": first}) != source_id({"sources": second}) and len(first) > 4


def test_the_method_is_cycle(monkeypatch):
    main = types.ModuleType("__main__")
    main.__file__ = str(ROOT / "cycle.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert program() == "cycle"
    # torch.ops says that it is in a file _ops.py, which is nowhere.
    nowhere = types.ModuleType("nowhere")
    nowhere.__file__ = "_ops.py"
    monkeypatch.setitem(sys.modules, "nowhere", nowhere)
    monkeypatch.chdir(ROOT)
    assert "storage/program.py" in sources() and "_ops.py" not in sources()


def test_a_folder_is_continued_by_its_own_program(tmp_path, monkeypatch, recwarn):
    folder = RunFolder(tmp_path)
    check_same_program(folder)  # nothing is there yet
    folder.env_file.write_text(json.dumps([{"commit": "of an older version"}]))
    check_same_program(folder)
    launch = {"program": "ablations.no_mask", "sources": {"grpo.py": "1", "gone.py": "2"}}
    folder.env_file.write_text(json.dumps([launch]))
    monkeypatch.setattr(module, "program", lambda: "cycle")
    with pytest.raises(ValueError, match="made by ablations.no_mask and not by cycle"):
        check_same_program(folder)
    monkeypatch.setattr(module, "program", lambda: "ablations.no_mask")
    monkeypatch.setattr(module, "sources", lambda: {"grpo.py": "1", "new.py": "3"})
    check_same_program(folder)
    assert not recwarn
    monkeypatch.setattr(module, "sources", lambda: {"grpo.py": "9"})
    with pytest.warns(UserWarning, match=r"other sources \(grpo.py changed since\)"):
        check_same_program(folder)
