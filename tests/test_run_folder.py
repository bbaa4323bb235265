"""Run folders, configurations of older launches, progress: .venv/bin/python -m pytest
tests/test_run_folder.py"""

import dataclasses
import json

import pytest

from config import EVALUATION_MAY_CHANGE, RENAMED, CellConfig
from storage import progress
from storage.logbook import check_same_config
from storage.run_folder import EvaluationFolder, RunFolder


def test_metrics_after_the_state_are_dropped(tmp_path):
    """State after RL step 1 of cycle 2: what came later is written again by the continuation."""
    run = RunFolder(tmp_path)
    lines = [(1, "setup", 0), (1, "rl", 1), (1, "rl", 2), (1, "sft", 1), (1, "cycle", 0),
             (2, "rl", 1), (2, "rl", 2), (2, "sft", 1), (2, "cycle", 0), (3, "rl", 1)]  # fmt: skip
    names = ("cycle", "phase", "step")
    run.metrics_file.write_text(
        "".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    )
    run.keep_metrics_until(cycle=2, step=1)
    assert [tuple(m[n] for n in names) for m in run.metrics()] == lines[:6]
    run.keep_metrics_until(cycle=2, step=0)  # the state at the end of cycle 1
    assert [tuple(m[n] for n in names) for m in run.metrics()] == lines[:5]


def test_checkpoints_are_in_order_of_training(tmp_path):
    run = RunFolder(tmp_path)
    made = [run.checkpoint(1, 5), run.checkpoint(1, 10), run.checkpoint(1), run.checkpoint(2, 5)]
    for path in reversed(made):
        path.mkdir(parents=True)
    assert run.checkpoints() == made


def test_cells_stand_in_the_order_of_the_models(tmp_path):
    folder = EvaluationFolder(tmp_path)
    for benchmark in ("b", "a"):
        for model in ("base", "other", "added"):
            cell = folder.cell(benchmark, model)
            cell.path.mkdir(parents=True)
            cell.config_file.write_text("{}")
    folder.models_file.write_text(json.dumps(["other", "base"]))
    models = ["other", "base", "added"]
    assert list(dict.fromkeys(m for _, m in folder.cells())) == models


def test_an_evaluation_with_the_older_name_of_an_option_goes_on(tmp_path, monkeypatch):
    """--training_run was called --window."""
    monkeypatch.chdir(tmp_path)
    cell = CellConfig(model="m", data="d", name="x", training_run="runs/see")
    stored = dataclasses.asdict(cell)
    stored["window"] = stored.pop("training_run")
    cell.folder.path.mkdir(parents=True)
    cell.folder.config_file.write_text(json.dumps(stored))
    check_same_config(cell.folder, cell, EVALUATION_MAY_CHANGE, RENAMED)
    other = dataclasses.replace(cell, training_run="runs/other")
    with pytest.raises(ValueError, match=r"it differs in training_run\)"):
        check_same_config(other.folder, other, EVALUATION_MAY_CHANGE, RENAMED)


def test_without_a_terminal_progress_is_lines(monkeypatch, capsys):
    """One line now and then, no carriage returns, nothing for work that is done at once."""
    for _ in progress.progress(range(5), desc="quick"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for _ in progress.progress(range(5), desc="steps"):
        pass
    with progress.progress(total=2, desc="inner", leave=False) as bar:
        bar.update()
        bar.update()
    for _ in progress.progress(range(5), desc="of another rank", rank=1):
        pass
    shown = capsys.readouterr().err
    assert "\r" not in shown and "rank" not in shown
    assert "steps: 5/5" in shown and "inner: 2/2" in shown
    assert all(line.startswith(("steps: ", "inner: ")) for line in shown.splitlines())
