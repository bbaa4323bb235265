"""What evaluate.py left on file, read for tables: one Cell per model and benchmark."""

import json
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

import metrics
from buffer import Rollout
from controls import (
    Ordering,
    Shuffled,
    calibrations,
    qualities,
    shuffled,
    within_prompts,
)
from data import Prompt, load_prompts
from hub import data_file
from ledger import read_lines
from prompts import Scores, transcript
from sources import MODELS, STRONGER, WINDOW, answer_id, first_cycle, rollouts_of, scores_file

Key = tuple[str, int]  # prompt id, sample
TRAINING = "training"  # stands for the benchmark where a run's own rollouts are shown


@dataclass
class Cell:
    """One model's answers to one benchmark, with all that was said of them."""

    benchmark: str
    model: str
    config: dict
    rollouts: list[Rollout]
    judged: dict[str, list[dict]] = field(default_factory=dict)  # file of a judge -> its lines
    digits: dict[str, dict[Key, dict]] = field(default_factory=dict)  # scorer -> lines by answer
    sensitivity: list[dict] = field(default_factory=list)
    preferences: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)

    @cached_property
    def valid(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.judge_scores is not None]

    @cached_property
    def keys(self) -> list[Key]:
        return [(r.prompt_id, r.sample) for r in self.valid]

    @cached_property
    def prompts(self) -> list[str]:
        return [r.prompt_id for r in self.valid]

    @cached_property
    def s(self) -> np.ndarray:
        return np.array([r.self_scores for r in self.valid]).reshape(-1, 5)

    @cached_property
    def j(self) -> np.ndarray:
        return np.array([r.judge_scores for r in self.valid]).reshape(-1, 5)

    @cached_property
    def data(self) -> list[Prompt]:
        """The prompt file; [] where it is not at hand."""
        try:
            return load_prompts(data_file(self.config["data"]))
        except ValueError:
            return []

    @cached_property
    def references(self) -> dict[str, list[Scores]]:
        """The human labels of each prompt's reference responses."""
        return {p.id: [r.scores for r in p.references] for p in self.data if p.references}

    @cached_property
    def questions(self) -> dict[str, str]:
        """Each prompt's conversation."""
        return {p.id: transcript(p.conversation) for p in self.data}

    @property
    def gamma(self) -> float:
        return self.config["reward"]["gamma"]

    @cached_property
    def calibration(self) -> np.ndarray:
        return calibrations(self.s, self.j, self.gamma)

    @cached_property
    def shuffled(self) -> Shuffled:
        return shuffled(self.s, self.j, self.prompts, self.gamma)

    @cached_property
    def within(self) -> list[Ordering]:
        """How far the model orders each prompt's responses by quality as the judge does."""
        return within_prompts(qualities(self.s), qualities(self.j), self.prompts)

    @cached_property
    def draws(self) -> dict[Key, list[tuple]]:
        """Repeated judgements of the judge, by answer; malformed answers have one."""
        found: dict[Key, list[tuple]] = {}
        for x in self.judged.get(scores_file(self.config["judge"]), []):
            found.setdefault((x["prompt_id"], x["sample"]), []).append(tuple(x["scores"]))
        return found


@dataclass
class Window:
    """The training window's judgements, on which trivial predictors are fitted."""

    rollouts: list[Rollout]
    base: dict[str, Scores]  # the base model's most probable scores for them, by answer's id
    gamma: float

    @cached_property
    def constant(self) -> Scores:
        """The one vector that is best on these judgements."""
        return metrics.best_constant(self.j.tolist(), self.gamma)

    @cached_property
    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, 5) twice: the base model's scores and the judge's."""
        read = [(self.base[a], r.judge_scores) for r in self.rollouts
                if (a := answer_id(r)) in self.base]  # fmt: skip
        s, j = zip(*read, strict=True) if read else ((), ())
        return np.array(s).reshape(-1, 5), np.array(j).reshape(-1, 5)

    @cached_property
    def j(self) -> np.ndarray:
        return np.array([r.judge_scores for r in self.rollouts])


@dataclass
class Evaluation:
    """One folder of results; several are runs with other seeds."""

    folder: Path
    cells: dict[tuple[str, str], Cell]  # by (benchmark, model)
    window: Window | None
    stronger: dict[str, dict[str, Scores]]  # the judge's of a stronger model, by benchmark, prompt

    def __getitem__(self, key: tuple[str, str]) -> Cell:
        return self.cells[key]


def load(folder: Path) -> Evaluation:
    """Raises ValueError for a folder without results."""
    cells = {}
    order = json.loads((folder / MODELS).read_text()) if (folder / MODELS).exists() else []

    def place(known: Path) -> tuple[int, Path]:
        model = known.parent.name
        return (order.index(model) if model in order else len(order)), known

    for known in sorted(folder.glob("*/*/config.json"), key=place):
        path, config = known.parent, json.loads(known.read_text())
        rollouts = sorted(rollouts_of(path), key=lambda r: (r.prompt_id, r.sample))
        known = {(r.prompt_id, r.sample): answer_id(r) for r in rollouts}
        about = partial(rows, answers=known)
        digits = {
            p.stem.removeprefix("digits_"): {(x["prompt_id"], x["sample"]): x for x in about(p)}
            for p in path.glob("digits_*.jsonl")
        }
        judged = {p.name: about(p) for p in path.glob("scores_*.jsonl")}
        cells[path.parent.name, path.name] = Cell(
            path.parent.name, path.name, config, rollouts, judged, digits,
            about(path / "sensitivity.jsonl"), about(path / "preferences.jsonl"),
            json.loads(summary.read_text()) if (summary := path / "summary.json").exists() else {},
        )  # fmt: skip
    if not cells:
        raise ValueError(f"{folder}: no results of evaluate.py there; give results/NAME")
    run = next(iter(cells.values())).config.get("window")
    judged = first_cycle(Path(run)) if run else []
    if run and not judged:
        raise ValueError(
            f"{run}: the training window's rollouts are not there; run this where evaluate.py ran"
        )
    base = {x["answer_id"]: tuple(x["scores"]) for x in rows(folder / WINDOW) if x["scores"]}
    stronger = {
        path.parent.name: {x["prompt_id"]: tuple(x["scores"]) for x in rows(path)}
        for path in folder.glob(f"*/{STRONGER}")
    }
    window = Window(judged, base, next(iter(cells.values())).gamma) if judged else None
    return Evaluation(folder, cells, window, stronger)


def load_run(folder: Path) -> Cell:
    """A run's training rollouts, as if they were a benchmark's. Raises ValueError."""
    if not (folder / "config.json").is_file() or not (folder / "rollouts").is_dir():
        raise ValueError(f"{folder}: no run of cycle.py there; give runs/NAME")
    config = json.loads((folder / "config.json").read_text())
    return Cell(TRAINING, folder.name, config, rollouts_of(folder))


def rows(path: Path, answers: dict[Key, str] | None = None) -> list[dict]:
    """A file's lines on the newest weights; those about `answers` (their ids), where given."""
    found = [row for _, _, row in read_lines(path)] if path.exists() else []
    found = [row for row in found if row["version"] == found[-1]["version"]]
    if answers is None:
        return found
    return [x for x in found if answers.get((x["prompt_id"], x["sample"])) == x["answer_id"]]
