"""File names in the folders of runs and evaluations; no other module spells them out.

runs/NAME/                        RunFolder
    config.json  env.json         the options; commit, versions and devices of each launch
    window.json                   ids of the training prompts
    lock.json                     the launch at work here, or the last one (storage/lock.py)
    metrics.jsonl                 one line per RL step, SFT update and cycle
    rollouts/cycle_NN.jsonl       every response with its self-scores and the judge's scores
    judge_cache.jsonl             every request to the judge (judging/ledger.py)
    checkpoints/cycle_NN/         Hugging Face folders in bf16; within phase 1 cycle_NN_step_NNNNN
    state/                        fp32 shards to resume from, and where.json
    wandb_id.txt                  the Weights & Biases run
results/NAME/                     EvaluationFolder
    models.json                   the models in the order of their first evaluation, base first,
                                  without a run's earlier checkpoints
    declared.json                 benchmarks in their order; the primary endpoint, as declared
    window.jsonl                  the base's self-scores for the training window's answers
    window_states.npz             the base's last hidden states of the training prompts
    BENCHMARK/prompt_states.npz   those of the benchmark's prompts
    BENCHMARK/stronger.jsonl      judgements of a stronger model's answers
    BENCHMARK/MODEL/              CellFolder: config.json, env.json, judge_cache.jsonl and
        rollouts.jsonl            the answers
        summary.json              metrics of the answers
        digits_SCORER.jsonl       SCORER's log-probabilities of the score digits for these answers
        sensitivity.jsonl         self-scores for exchanged and truncated answers
        scores_JUDGE.jsonl        judgements by JUDGE beyond those in rollouts.jsonl
        preferences.jsonl         pairwise preferences against the base's answers
OUT/                              PredictionFolder, of predict.py --out: config.json, lock.json and
    predictions.jsonl             a line for each prompt
    kept.jsonl  dropped.jsonl     with --screen: answers worth keeping, and the others
"""

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from storage.files import FileError, read_json, read_lines, write_text
from storage.record import Rollout, read_rollouts


@dataclass(frozen=True)
class Folder:
    """Files that the folders of runs and of cells have in common."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def env_file(self) -> Path:
        return self.path / "env.json"

    @property
    def judge_cache(self) -> Path:
        return self.path / "judge_cache.jsonl"

    def config(self) -> dict:
        return read_json(self.config_file)

    def __str__(self) -> str:
        return str(self.path)


class RunFolder(Folder):
    @property
    def window_file(self) -> Path:
        return self.path / "window.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def wandb_id_file(self) -> Path:
        return self.path / "wandb_id.txt"

    @property
    def states(self) -> Path:
        return self.path / "state"

    def state(self, cycle: int, step: int) -> Path:
        return self.states / f"cycle_{cycle:03d}_step_{step:05d}"

    def rollouts(self, cycle: int) -> Path:
        return self.path / "rollouts" / f"cycle_{cycle:02d}.jsonl"

    def checkpoint(self, cycle: int, step: int | None = None) -> Path:
        """The checkpoint after a cycle, or after an RL step within its phase 1."""
        name = f"cycle_{cycle:02d}" if step is None else f"cycle_{cycle:02d}_step_{step:05d}"
        return self.path / "checkpoints" / name

    def checkpoints(self) -> list[Path]:
        """Oldest first; a cycle's last one follows those of its steps."""

        def age(path: Path) -> tuple[int, float]:
            cycle, step = checkpoint_place(path)
            return cycle, math.inf if step is None else step

        paths = (self.path / "checkpoints").glob("cycle_*")
        return sorted((p for p in paths if not p.name.endswith(".tmp")), key=age)

    def delete_checkpoints(self, keep: int) -> None:
        """All but the newest `keep`, at least one."""
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)

    def all_rollouts(self) -> list[Rollout]:
        paths = sorted((self.path / "rollouts").glob("cycle_*.jsonl"),
                       key=lambda path: int(path.stem.split("_")[1]))  # fmt: skip
        return [rollout for path in paths for rollout in read_rollouts(path)]

    def first_cycle(self) -> list[Rollout]:
        """The judged rollouts of the first cycle."""
        return [r for r in read_rollouts(self.rollouts(1)) if r.judge_scores is not None]

    def last_cycle(self) -> list[Rollout]:
        """The judged rollouts of the last cycle that has some."""
        newest_first = sorted((self.path / "rollouts").glob("cycle_*.jsonl"),
                              key=lambda path: -int(path.stem.split("_")[1]))  # fmt: skip
        cycles = ([r for r in read_rollouts(p) if r.judge_scores is not None] for p in newest_first)
        return next(filter(None, cycles), [])

    def window_ids(self) -> list[str]:
        return read_json(self.window_file, list)

    def metrics(self) -> list[dict]:
        if not self.metrics_file.exists():
            return []
        lines = []
        for number, _, row in read_lines(self.metrics_file, what="a line of metrics"):
            if not _is_metrics(row):
                raise FileError(
                    f"{self.metrics_file}:{number}: not a line of metrics; restore the file, or "
                    "delete this line"
                )
            lines.append(row)
        return lines

    def keep_metrics_until(self, cycle: int, step: int) -> None:
        """Drop the lines that were written after the state (cycle, step): the continued run writes
        them again."""
        lines = [line for line in self.metrics() if not _after(line, cycle, step)]
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))


def _is_metrics(row: dict) -> bool:
    """Whether a line says when it was written, and has numbers where figures stand."""
    figures = (value for name, value in row.items() if name not in ("seconds", "judge", "phase"))
    numbers = all(x is None or type(x) in (int, float) for x in figures)
    when = type(row.get("cycle")) is int and type(row.get("step", 0)) is int
    return when and numbers and isinstance(row.get("phase"), str)


def _after(line: dict, cycle: int, step: int | None) -> bool:
    """Whether a line of metrics.jsonl was written after an RL step of a cycle; with step None,
    whether it was written after the end of the cycle."""
    if line["cycle"] != cycle or step is None:
        return line["cycle"] > cycle
    return line["phase"] not in ("rl", "setup") or line["step"] > step


def checkpoint_place(checkpoint: Path) -> tuple[int, int | None]:
    """(cycle, RL step) of cycle_NN_step_NNNNN, (cycle, None) of cycle_NN."""
    _, cycle, *rest = checkpoint.name.split("_")
    return int(cycle), int(rest[1]) if rest else None


def metrics_until(checkpoint: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl up to one of its checkpoints; [] if the file is
    missing."""
    cycle, step = checkpoint_place(checkpoint)
    lines = RunFolder(checkpoint.parent.parent).metrics()
    return [line for line in lines if not _after(line, cycle, step)]


class CellFolder(Folder):
    """One model's answers to one benchmark."""

    @property
    def rollouts_file(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def sensitivity_file(self) -> Path:
        return self.path / "sensitivity.jsonl"

    @property
    def preferences_file(self) -> Path:
        return self.path / "preferences.jsonl"

    def digits_file(self, scorer: str) -> Path:
        return self.path / f"digits_{scorer}.jsonl"

    def digits_files(self) -> dict[str, Path]:
        """Path by scorer."""
        paths = self.path.glob("digits_*.jsonl")
        return {path.stem.removeprefix("digits_"): path for path in paths}

    def scores_file(self, judge: str) -> Path:
        return self.path / f"scores_{file_name(judge)}.jsonl"

    def scores_files(self) -> dict[str, Path]:
        """Path by the judge's name in its `file_name` form."""
        paths = self.path.glob("scores_*.jsonl")
        return {path.stem.removeprefix("scores_"): path for path in paths}

    def summary(self) -> dict:
        return read_json(self.summary_file) if self.summary_file.exists() else {}

    def add_to_summary(self, values: dict) -> None:
        write_text(self.summary_file, json.dumps(self.summary() | values, indent=2))

    def answers(self) -> list[Rollout]:
        """The rollouts of the newest weights, one per sample, ordered by key and not by the time at
        which they finished."""
        rows = read_rollouts(self.rollouts_file)
        if not rows:
            return []
        newest = [r for r in rows if r.weight_version == rows[-1].weight_version]
        by_sample = {(r.prompt_id, r.sample): r for r in newest}
        return sorted(by_sample.values(), key=lambda r: r.key)


class PredictionFolder(Folder):
    @property
    def predictions_file(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def kept_file(self) -> Path:
        return self.path / "kept.jsonl"

    @property
    def dropped_file(self) -> Path:
        return self.path / "dropped.jsonl"


@dataclass(frozen=True)
class EvaluationFolder:
    path: Path

    @property
    def models_file(self) -> Path:
        return self.path / "models.json"

    @property
    def declared_file(self) -> Path:
        return self.path / "declared.json"

    def declared(self) -> dict:
        return read_json(self.declared_file) if self.declared_file.exists() else {}

    @property
    def window_scores_file(self) -> Path:
        return self.path / "window.jsonl"

    @property
    def window_states_file(self) -> Path:
        return self.path / "window_states.npz"

    def states_file(self, benchmark: str) -> Path:
        return self.path / benchmark / "prompt_states.npz"

    def stronger_file(self, benchmark: str) -> Path:
        return self.path / benchmark / "stronger.jsonl"

    def stronger_files(self) -> dict[str, Path]:
        """Path by benchmark."""
        return {path.parent.name: path for path in self.path.glob("*/stronger.jsonl")}

    def cell(self, benchmark: str, model: str) -> CellFolder:
        return CellFolder(self.path / benchmark / model)

    def models(self) -> list[str]:
        """Those of models.json: not a run's earlier checkpoints, which only Figure 2 shows."""
        return read_json(self.models_file, list) if self.models_file.exists() else []

    def cells(self) -> dict[tuple[str, str], CellFolder]:
        """Cells by (benchmark, model), in the order in which models and benchmarks were given; by
        name where that is not on file."""
        if RunFolder(self.path).window_file.exists():
            return {}  # a run, whose checkpoints have a config.json too
        models = self.models()
        benchmarks = self.declared().get("benchmarks", [])

        def sort_key(path: Path) -> tuple[int, int, Path]:
            names = ((path.name, models), (path.parent.name, benchmarks))
            return *(o.index(x) if x in o else len(o) for x, o in names), path

        paths = [path.parent for path in self.path.glob("*/*/config.json")]
        return {(p.parent.name, p.name): CellFolder(p) for p in sorted(paths, key=sort_key)}


def file_name(judge: str) -> str:
    """A judge's name as part of a file name, with "_" for other characters than letters, digits,
    ".", "+" and "-"."""
    return re.sub(r"[^A-Za-z0-9.+-]", "_", judge)
