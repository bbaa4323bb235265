"""What evaluate.py left on file, read for tables: one Cell per model and benchmark."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from evaluation import metrics
from evaluation.controls import (
    Ordering,
    Shuffled,
    calibrations,
    qualities,
    shuffled,
    within_prompts,
)
from prompts import Scores, transcript
from storage.data import Prompt, load_prompts
from storage.files import read_lines
from storage.hub import data_file
from storage.record import Rollout, answer_id
from storage.run_folder import CellFolder, EvaluationFolder, RunFolder, file_name

Key = tuple[str, int]  # prompt id, sample
TRAINING = "training"  # stands for the benchmark where a run's own rollouts are shown


@dataclass
class Cell:
    """One model's answers to one benchmark, with all that was said of them."""

    benchmark: str
    model: str
    config: dict
    rollouts: list[Rollout]
    judged: dict[str, list[dict]] = field(default_factory=dict)  # judge -> its further scores
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
        for x in self.judged.get(file_name(self.config["judge"]), []):
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


def load_evaluation(path: Path) -> Evaluation:
    """Raises ValueError for a folder without results."""
    folder = EvaluationFolder(path)
    cells = {key: _load_cell(*key, cell) for key, cell in folder.cells().items()}
    if not cells:
        raise ValueError(f"{path}: no results of evaluate.py there; give results/NAME")
    first = next(iter(cells.values()))
    run = first.config.get("training_run", first.config.get("window"))  # "window": its older name
    rollouts = RunFolder(Path(run)).first_cycle() if run else []
    if run and not rollouts:
        raise ValueError(
            f"{run}: the training window's rollouts are not there; run this where evaluate.py ran"
        )
    lines = read_newest(folder.window_scores_file)
    base = {x["answer_id"]: tuple(x["scores"]) for x in lines if x["scores"]}
    stronger = {
        benchmark: {x["prompt_id"]: tuple(x["scores"]) for x in read_newest(path)}
        for benchmark, path in folder.stronger_files().items()
    }
    window = Window(rollouts, base, first.gamma) if rollouts else None
    return Evaluation(path, cells, window, stronger)


def _load_cell(benchmark: str, model: str, folder: CellFolder) -> Cell:
    rollouts = sorted(folder.answers(), key=lambda r: (r.prompt_id, r.sample))
    ids = {(r.prompt_id, r.sample): answer_id(r) for r in rollouts}

    def read(path: Path) -> list[dict]:
        """The lines that are about these answers."""
        lines = read_newest(path)
        return [x for x in lines if ids.get((x["prompt_id"], x["sample"])) == x["answer_id"]]

    return Cell(
        benchmark=benchmark,
        model=model,
        config=folder.config(),
        rollouts=rollouts,
        judged={judge: read(path) for judge, path in folder.scores_files().items()},
        digits={
            scorer: {(x["prompt_id"], x["sample"]): x for x in read(path)}
            for scorer, path in folder.digits_files().items()
        },
        sensitivity=read(folder.sensitivity_file),
        preferences=read(folder.preferences_file),
        summary=folder.summary(),
    )


def load_run(path: Path) -> Cell:
    """A run's training rollouts, as if they were a benchmark's. Raises ValueError."""
    run = RunFolder(path)
    if not run.config_file.is_file() or not (rollouts := run.all_rollouts()):
        raise ValueError(f"{path}: no run of cycle.py there; give runs/NAME")
    return Cell(TRAINING, path.name, run.config(), rollouts)


def read_newest(path: Path) -> list[dict]:
    """A file's lines about the newest weights; [] if there is no file."""
    lines = [row for _, _, row in read_lines(path)] if path.exists() else []
    return [row for row in lines if row["version"] == lines[-1]["version"]]
