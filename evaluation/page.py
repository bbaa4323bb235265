"""report.html: tables, figures, and a browser over the answers, in one file that needs no network
(page.html is its template)."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from evaluation.results import TRAINING, Cell
from evaluation.table import Table
from prompts import ATTRIBUTES
from storage.record import Rollout


def page(
    title: str, judge: str, tables: Sequence[Table], figures: dict[str, Path], shown: Sequence[dict]
) -> str:
    """The page. `figures`: title -> PNG file; `shown`: of `answers`. The template escapes what
    models and prompts say."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template("page.html").render(
        title=title,
        judge=judge,
        tables=[(table.title, table.note, table.strings()) for table in tables],
        figures={t: base64.b64encode(file.read_bytes()).decode() for t, file in figures.items()},
        answers=shown,
        attributes=ATTRIBUTES,
        benchmarks=dict.fromkeys(answer["benchmark"] for answer in shown),
        models=dict.fromkeys(answer["model"] for answer in shown),
    )


def answers(cells: Sequence[Cell], limit: int) -> list[dict]:
    """The answers that the page shows: of each cell at most `limit` well-formed ones (0: all), the
    biggest disagreements first, evenly from its cycles; then as many malformed ones."""
    shown = []
    for cell in cells:
        trained = cycle_of(cell)
        cycles = sorted({r.cycle for r in cell.rollouts})
        most = max(1, limit // len(cycles)) if limit and cycles else None
        for cycle in cycles:
            rollouts = [r for r in cell.rollouts if r.cycle == cycle]
            valid = [r for r in rollouts if r.judge_scores is not None]
            malformed = [r for r in rollouts if r.judge_scores is None]
            valid.sort(key=distance, reverse=True)
            for r in (*valid[:most], *malformed[:most]):
                nothing = [None] * 5
                scores = (ATTRIBUTES, r.self_scores or nothing, r.judge_scores or nothing)
                shown.append({
                    "benchmark": cell.benchmark,
                    "model": cell.model,
                    "cycle": cycle if trained is None else trained,
                    "prompt": cell.questions.get(r.prompt_id, r.prompt_id),
                    "rollout": r,
                    "scores": list(zip(*scores, strict=True)),
                    "distance": distance(r),
                })  # fmt: skip
    return shown


def cycle_of(cell: Cell) -> int | None:
    """The cycle after which a model was exported, None for other models and for training itself."""
    name = re.fullmatch(r"cycle_(\d+).*", Path(cell.config["model"]).name)
    return int(name[1]) if name and cell.benchmark != TRAINING else None


def distance(r: Rollout) -> float:
    """Sum of |s - j| over the attributes, -1 without a judgement."""
    if r.judge_scores is None:
        return -1.0
    return float(np.abs(np.subtract(r.self_scores, r.judge_scores)).sum())
