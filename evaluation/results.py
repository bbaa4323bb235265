"""Reads what evaluate.py left on file.

Cell         one model's answers to one benchmark
Evaluation   one folder results/NAME: a cell for each benchmark and model
Results      what a table shows: one evaluation, or several that differ in their seed alone
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from evaluation.controls import Ordering, within_prompts
from evaluation.predictors import (
    PromptOnly,
    Shuffled,
    Surface,
    attribute_calibrations,
    best_constant,
    calibrations,
    qualities,
    shuffled,
)
from evaluation.prompt_states import read_states
from prompts import Scores, transcript
from storage.data import Prompt, load_prompts
from storage.files import read_lines
from storage.hub import data_file
from storage.record import Rollout, answer_id
from storage.run_folder import CellFolder, EvaluationFolder, RunFolder, file_name

Key = tuple[str, int]  # prompt id, sample
TRAINING = "training"  # stands for the benchmark where a run's own rollouts are shown
T = TypeVar("T")

# --------------------------------------------------------------------------------------------------
# One model, one benchmark


@dataclass
class Cell:
    """One model's answers to one benchmark, and everything that was recorded about them.

    N is the number of well-formed answers that were judged: only these enter the scores (Sec. 4.1).
    """

    benchmark: str
    model: str
    config: dict
    rollouts: list[Rollout]  # malformed ones too
    judged: dict[str, list[dict]] = field(default_factory=dict)  # judge -> its further scores
    digits: dict[str, dict[Key, dict]] = field(default_factory=dict)  # scorer -> lines by answer
    sensitivity: list[dict] = field(default_factory=list)
    preferences: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    evaluation: "Evaluation | None" = field(default=None, repr=False)  # that it is a part of
    run: Path | None = None  # whose own rollouts these are

    @cached_property
    def valid(self) -> list[Rollout]:
        """The N well-formed answers that were judged."""
        return [r for r in self.rollouts if r.judge_scores is not None]

    @cached_property
    def asked(self) -> frozenset[str]:
        """All prompts, malformed answers' too."""
        return frozenset(r.prompt_id for r in self.rollouts)

    @cached_property
    def keys(self) -> list[Key]:
        return [(r.prompt_id, r.sample) for r in self.valid]

    @cached_property
    def prompts(self) -> np.ndarray:
        """(N,) prompt ids."""
        return np.array([r.prompt_id for r in self.valid], object)

    @cached_property
    def s(self) -> np.ndarray:
        """(N, 5) the model's scores."""
        return np.array([r.self_scores for r in self.valid], int).reshape(-1, 5)

    @cached_property
    def j(self) -> np.ndarray:
        """(N, 5) the judge's scores."""
        return np.array([r.judge_scores for r in self.valid], int).reshape(-1, 5)

    @cached_property
    def calibration(self) -> np.ndarray:
        """(N,)"""
        return calibrations(self.s, self.j)

    @cached_property
    def attribute_calibration(self) -> np.ndarray:
        """(N, 5) (1 - |s - j| / 9)^2 of each attribute alone (Figure 3)."""
        return attribute_calibrations(self.s, self.j)

    @cached_property
    def quality(self) -> np.ndarray:
        """(N,) as the judge sees it."""
        return qualities(self.j)

    @cached_property
    def own_quality(self) -> np.ndarray:
        """(N,) as the model sees it."""
        return qualities(self.s)

    @cached_property
    def shuffled(self) -> Shuffled:
        return shuffled(self.s, self.j, self.prompts)

    @cached_property
    def within(self) -> dict[str, Ordering]:
        """By prompt: how far the model orders its answers by quality as the judge does."""
        return within_prompts(self.own_quality, self.quality, self.prompts)

    @cached_property
    def draws(self) -> dict[Key, list[Scores]]:
        """Repeated judgements by the judge, by answer; malformed answers have one."""
        draws: dict[Key, list[Scores]] = {}
        for line in self.judged.get(file_name(self.config["judge"]), []):
            draws.setdefault(key_of(line), []).append(tuple(line["scores"]))
        return draws

    @cached_property
    def data(self) -> list[Prompt]:
        """The prompt file; [] where it is not at hand."""
        files = self.evaluation.files if self.evaluation else {}
        path = self.config["data"]
        if path not in files:
            try:
                files[path] = load_prompts(data_file(path))
            except ValueError:
                files[path] = []
        return files[path]

    @cached_property
    def references(self) -> dict[str, list[Scores]]:
        """The human labels of each prompt's reference responses."""
        return {p.id: [r.scores for r in p.references] for p in self.data if p.references}

    @cached_property
    def questions(self) -> dict[str, str]:
        """Each prompt's conversation."""
        return {p.id: transcript(p.conversation) for p in self.data}

    @cached_property
    def categories(self) -> dict[str, str]:
        """Each prompt's category, where the prompt file has one."""
        return {p.id: p.category for p in self.data if p.category}

    @property
    def window(self) -> "Window | None":
        return self.evaluation.window

    @cached_property
    def prompt_states(self) -> dict[str, np.ndarray]:
        """The base model's last hidden state of each prompt, where they are on file."""
        return read_states(EvaluationFolder(self.evaluation.folder).states_file(self.benchmark))[1]

    @cached_property
    def surface_scores(self) -> np.ndarray:
        """(N, 5) what length and form alone predict; needs the window."""
        return self.window.surface.predict([r.answer for r in self.valid])

    @property
    def stronger(self) -> dict[str, Scores]:
        """The judge's scores of a stronger model's answers, by prompt."""
        return self.evaluation.stronger.get(self.benchmark, {})

    def of(self, model: str) -> "Cell":
        """Another model's answers to the same benchmark, in the same evaluation."""
        return self.evaluation.cells[self.benchmark, model]

    def match(self, by_answer: Mapping[Key, T]) -> tuple[list[int], list[T]]:
        """(indices of the well-formed answers that `by_answer` has, its values for these)."""
        indices = [i for i, key in enumerate(self.keys) if key in by_answer]
        return indices, [by_answer[self.keys[i]] for i in indices]

    def scores_by(self, scorer: str) -> dict[Key, Scores]:
        """A scorer's most probable digits after these answers, by answer."""
        lines = self.digits.get(scorer, {})
        return {key: line["scores"] for key, line in lines.items() if line["scores"]}

    def within_category(self, category: str) -> "Cell":
        """The answers to prompts of a category."""
        kept = [r for r in self.rollouts if self.categories.get(r.prompt_id) == category]
        return replace(self, rollouts=kept)

    def rejudged(self, judge: str) -> "Cell":
        """The well-formed answers with another judge's scores; those without are left out."""
        lines = self.judged.get(judge, [])
        indices, scores = self.match({key_of(line): tuple(line["scores"]) for line in lines})
        answers = [self.valid[i] for i in indices]
        changed = [replace(r, judge_scores=j) for r, j in zip(answers, scores, strict=True)]
        return replace(self, rollouts=changed)

    def rescored(self, scorer: str) -> "Cell":
        """The well-formed answers with a scorer's most probable digits as self-scores; those
        without are left out."""
        indices, scores = self.match(self.scores_by(scorer))
        answers = [self.valid[i] for i in indices]
        changed = [replace(r, self_scores=s) for r, s in zip(answers, scores, strict=True)]
        return replace(self, rollouts=changed)

    def log_probabilities(self, before: str) -> tuple[list[int], np.ndarray]:
        """(n indices of answers, (n, 5, 10) the model's log-probabilities of the ten digits at each
        score position), of the answers whose own block could be read. `before`: whose digits stand
        before a position, "own" or "judge"."""
        if before not in self._log_probabilities:
            lines = self.digits.get(self.model, {})
            indices, logp = self.match(
                {key: x[before] for key, x in lines.items() if x["own"] and x[before]}
            )
            self._log_probabilities[before] = indices, np.array(logp, float).reshape(-1, 5, 10)
        return self._log_probabilities[before]

    @cached_property
    def _log_probabilities(self) -> dict[str, tuple[list[int], np.ndarray]]:
        return {}


def key_of(line: dict) -> Key:
    return line["prompt_id"], line["sample"]


# --------------------------------------------------------------------------------------------------
# One folder


@dataclass
class Window:
    """The training window's judgements, on which the predictors that know less are fitted."""

    rollouts: list[Rollout]  # of the first cycle
    last: list[Rollout]  # of the last cycle, whose answers are the trained model's
    base: dict[tuple[str, str], Scores]  # the base model's most probable scores for the first
    # cycle's answers, by prompt and answer id
    states: dict[str, np.ndarray]  # the base model's last hidden state of each prompt

    @cached_property
    def j(self) -> np.ndarray:
        """(n, 5) the judge's scores of the first cycle."""
        return np.array([r.judge_scores for r in self.rollouts])

    @cached_property
    def constant(self) -> Scores:
        """The one vector that is best on the first cycle's judgements."""
        return best_constant(self.j.tolist())

    @cached_property
    def last_constant(self) -> Scores:
        """The one that is best on the last cycle's."""
        return best_constant([r.judge_scores for r in self.last])

    @cached_property
    def surface(self) -> Surface:
        """Fitted on the first cycle's answers."""
        return Surface([r.answer for r in self.rollouts], self.j)

    @cached_property
    def prompt_only(self) -> PromptOnly | None:
        """Fitted on the medians of the last cycle's judgements of each prompt; None where fewer
        than two prompts' hidden states are on file."""
        scores: dict[str, list[Scores]] = {}
        for r in self.last:
            scores.setdefault(r.prompt_id, []).append(r.judge_scores)
        known = [p for p in scores if p in self.states]
        if len(known) < 2:
            return None
        medians = np.array([np.median(scores[p], axis=0) for p in known])
        return PromptOnly(np.array([self.states[p] for p in known]), medians)

    @cached_property
    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, 5) twice: the base model's scores and the judge's, where the base has scores."""
        keys = [(r.prompt_id, answer_id(r)) for r in self.rollouts]
        scored = [k for k, key in enumerate(keys) if key in self.base]
        s = np.array([self.base[keys[k]] for k in scored], int).reshape(-1, 5)
        return s, self.j[scored].reshape(-1, 5)


@dataclass
class Evaluation:
    """One folder results/NAME."""

    folder: Path
    cells: dict[tuple[str, str], Cell]  # by (benchmark, model)
    window: Window | None
    stronger: dict[str, dict[str, Scores]]  # a stronger model's scores, by benchmark and prompt
    models: list[str] = field(default_factory=list)  # in order, without earlier checkpoints
    declared: dict = field(default_factory=dict)  # what evaluate.py was told beforehand
    files: dict[str, list[Prompt]] = field(default_factory=dict)  # prompt files that were read


def load_evaluation(path: Path) -> Evaluation:
    """Raises ValueError for a folder without results."""
    folder = EvaluationFolder(path)
    cells = {key: load_cell(*key, cell) for key, cell in folder.cells().items()}
    if not cells and RunFolder(path).window_file.exists():
        raise ValueError(
            f"{path} is a run; give it to --runs, and results/NAME of evaluate.py here"
        )
    if not cells:
        raise ValueError(f"{path}: no results of evaluate.py there; give results/NAME")
    first = next(iter(cells.values()))
    run = first.config["training_run"]
    if run and not RunFolder(Path(run)).rollouts(1).exists():
        raise ValueError(
            f"{run}: the training window's rollouts are not there; run this where evaluate.py ran"
        )
    rollouts = RunFolder(Path(run)).first_cycle() if run else []  # [] if all were malformed
    lines = read_newest(folder.window_scores_file)
    base = {(x["prompt_id"], x["answer_id"]): tuple(x["scores"]) for x in lines if x["scores"]}
    states = read_states(folder.window_states_file)[1]
    stronger = {
        benchmark: {x["prompt_id"]: tuple(x["scores"]) for x in read_newest(file)}
        for benchmark, file in folder.stronger_files().items()
    }
    window = None
    if rollouts:
        last = RunFolder(Path(run)).last_cycle()
        window = Window(rollouts, last, base, states)
    models = [m for m in folder.models() if any(model == m for _, model in cells)]
    models = models or list(dict.fromkeys(model for _, model in cells))
    evaluation = Evaluation(path, cells, window, stronger, models, folder.declared())
    for cell in cells.values():
        cell.evaluation = evaluation
    return evaluation


def load_cell(benchmark: str, model: str, folder: CellFolder) -> Cell:
    config = folder.config()
    config.setdefault("training_run", config.get("window", ""))  # "window": its older name
    rollouts = sorted(folder.answers(), key=lambda r: (r.prompt_id, r.sample))
    ids = {(r.prompt_id, r.sample): answer_id(r) for r in rollouts}

    def lines(path: Path) -> list[dict]:
        """The lines that are about these answers."""
        return [x for x in read_newest(path) if ids.get(key_of(x)) == x["answer_id"]]

    return Cell(
        benchmark=benchmark,
        model=model,
        config=config,
        rollouts=rollouts,
        judged={judge: lines(path) for judge, path in folder.scores_files().items()},
        digits={
            scorer: {key_of(x): x for x in lines(path)}
            for scorer, path in folder.digits_files().items()
        },
        sensitivity=lines(folder.sensitivity_file),
        preferences=lines(folder.preferences_file),
        summary=folder.summary(),
    )


def load_one_cell(path: Path) -> Cell:
    """The cell of a folder results/NAME/BENCHMARK/MODEL, or of a results/NAME that has one. Raises
    ValueError."""
    cells = EvaluationFolder(path).cells()
    if CellFolder(path).rollouts_file.exists():
        cells = {(path.parent.name, path.name): CellFolder(path)}
    if len(cells) != 1:
        names = ", ".join(map(str, cells.values())) or "results/NAME/BENCHMARK/MODEL of evaluate.py"
        raise ValueError(f"{path}: one model's answers to one benchmark are needed; give {names}")
    [(key, folder)] = cells.items()
    return load_cell(*key, folder)


def load_run(path: Path) -> Cell:
    """A run's training rollouts, as if they were a benchmark's. Raises ValueError."""
    run = RunFolder(path)
    if not run.config_file.is_file():
        raise ValueError(f"{path}: no run of cycle.py there; give runs/NAME")
    if not (rollouts := run.all_rollouts()):
        raise ValueError(f"{run.rollouts(1)}: no rollout there yet; let the run take a step")
    if not run.metrics_file.is_file():
        raise ValueError(f"{run.metrics_file}: no such file; restore it, or leave the run out")
    return Cell(TRAINING, path.name, run.config(), rollouts, run=path)


def read_newest(path: Path) -> list[dict]:
    """A file's lines about the newest weights; [] if there is no file."""
    lines = [row for _, _, row in read_lines(path)] if path.exists() else []
    return [row for row in lines if row["version"] == lines[-1]["version"]]
