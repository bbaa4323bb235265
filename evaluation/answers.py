"""The answers that the page's browser shows, as plain data for its script (page/answers.js)."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML

from evaluation.results import TRAINING, Cell, key_of
from judge import offline_judge
from prompts import ATTRIBUTES, why_malformed
from storage.record import Rollout

JUDGED, MALFORMED, NOT_JUDGED = "judged", "malformed", "not judged"


class _Renderer(RendererHTML):
    """Headings as paragraphs: those of an answer are not headings of the page."""

    def heading_open(self, tokens, i, options, env) -> str:
        return '<p class="heading">'

    def heading_close(self, tokens, i, options, env) -> str:
        return "</p>\n"


# An answer is untrusted: its HTML is shown as text, and its links and images as they are written.
MARKDOWN = (
    MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer)
    .enable(["table", "strikethrough"])
    .disable(["link", "image", "autolink", "reference"])
)


def shown(cells: Sequence[Cell], limit: int) -> dict:
    """{"attributes", "prompts": [{"id", "text"}], "answers": [...]}; an answer's "prompt" is an
    index. Of each cell and cycle `choose` says which; of the base, whose answers stand beside those
    of others, also its answers to the same prompts."""
    chosen = [choose(cell, limit) for cell in cells]
    for k, cell in enumerate(cells):
        if cell.evaluation and cell.model == cells[0].model:
            wanted = {
                (r.prompt_id, r.sample)
                for other, rollouts in zip(cells, chosen, strict=True)
                if other.benchmark == cell.benchmark
                for r in rollouts
            }
            chosen[k] = [r for r in cell.rollouts if (r.prompt_id, r.sample) in wanted]
    places: dict[tuple[str, str], int] = {}
    prompts, answers = [], []
    for cell, rollouts in zip(cells, chosen, strict=True):
        verdicts = {key_of(line): verdict(cell, line) for line in cell.preferences}
        for r in rollouts:
            place = places.setdefault((cell.benchmark, r.prompt_id), len(prompts))
            if place == len(prompts):
                text = cell.questions.get(r.prompt_id, "(its prompt file is not at hand)")
                prompts.append({"id": r.prompt_id, "text": text})
            answers.append(
                {"benchmark": cell.benchmark, "model": cell.model, "prompt": place}
                | of_rollout(cell, r)
                | {"verdict": verdicts.get((r.prompt_id, r.sample))}
            )
    return {"attributes": ATTRIBUTES, "prompts": prompts, "answers": answers}


def choose(cell: Cell, limit: int) -> list[Rollout]:
    """At most `limit` judged answers of a cell (0: all), the biggest disagreements first, evenly
    from its cycles; then as many malformed ones, and as many that the judge refused."""
    cycles = sorted({r.cycle for r in cell.rollouts})
    most = max(1, limit // len(cycles)) if limit and cycles else None
    chosen = []
    for cycle in cycles:
        kinds = {JUDGED: [], MALFORMED: [], NOT_JUDGED: []}
        for r in sorted(cell.rollouts, key=disagreement, reverse=True):
            if r.cycle == cycle:
                kinds[state(r)].append(r)
        chosen += [r for rollouts in kinds.values() for r in rollouts[:most]]
    return chosen


def state(r: Rollout) -> str:
    if r.self_scores is None:
        return MALFORMED
    return NOT_JUDGED if r.judge_scores is None else JUDGED


def disagreement(r: Rollout) -> float:
    """Sum of |s - j| over the attributes, -1 without a judgement."""
    if state(r) != JUDGED:
        return -1.0
    return float(np.abs(np.subtract(r.self_scores, r.judge_scores)).sum())


def of_rollout(cell: Cell, r: Rollout) -> dict:
    """What the browser shows of one answer. A malformed one is shown as it was written."""
    kind, training = state(r), cell.benchmark == TRAINING
    reasons = {MALFORMED: why_malformed(r.text), NOT_JUDGED: r.refused}
    return {
        "sample": r.sample,
        "cycle": r.cycle if training else cycle_of(cell),
        "step": r.step if training else None,
        "end": r.finish_reason,
        "state": kind,
        "why": reasons.get(kind),
        "text": r.text,
        "html": None if kind == MALFORMED else MARKDOWN.render(r.answer),
        "self": r.self_scores,
        "judge": r.judge_scores,
        "quality": r.quality and round(r.quality, 3),
        "calibration": r.calibration and round(r.calibration, 3),
    }


def cycle_of(cell: Cell) -> int | None:
    """The cycle after which an evaluated model was exported; None for other models."""
    name = re.fullmatch(r"cycle_(\d+).*", Path(cell.config["model"]).name)
    return int(name[1]) if name else None


def verdict(cell: Cell, line: dict) -> str:
    """A line of preferences.jsonl in a sentence."""
    base, judge = next(iter(cell.evaluation.cells))[1], cell.config["judge"]
    better = {1: f"{cell.model}'s answer", -1: f"{base}'s answer", 0: "neither answer"}
    if offline_judge(judge):
        return f"Better by {judge}'s scores: {better[line['result']]}."
    first, second = better[line["shown_first"]], better[line["shown_second"]]
    if first == second:
        return f"Better by {judge}, in both orders: {first}."
    return (
        f"A tie by {judge}: better is {first} with {cell.model}'s shown first, and {second} with "
        f"{base}'s shown first."
    )


def counts(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """Answers by state."""
    states = [state(r) for r in rollouts]
    return {kind: states.count(kind) for kind in (JUDGED, MALFORMED, NOT_JUDGED)}
