"""The miniature's figures by kind of task, from what evaluate.py left on file.

    python -m miniature.kinds results/demo/0-... results/demo/1-... --models base see

Several folders are evaluations of runs with other seeds; the figures are means over them, and
`--each` prints the folders one by one too. report.py knows nothing of kinds, and its pairs are
ordered by quality; here they are ordered by the correctness score, in which a fork's two ways
differ.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from evaluation import controls
from evaluation.results import Cell, Evaluation, load_evaluation
from miniature.world import FORKS, KINDS
from prompts import ATTRIBUTES

CORRECTNESS = ATTRIBUTES.index("correctness")
GROUPS = {"all": tuple(KINDS), "forks": FORKS} | {kind: (kind,) for kind in KINDS}


def kinds_of(cell: Cell, prompt_ids: Sequence[str]) -> np.ndarray:
    """(N,) the kind of each prompt: the first word of the task."""
    kinds = {p.id: p.conversation[-1]["content"].split()[0] for p in cell.data}
    return np.array([kinds[p] for p in prompt_ids], object)


def pairs(own: np.ndarray, judge: np.ndarray, prompts: np.ndarray) -> float | None:
    """Of the pairs of answers to one prompt that the judge tells apart, the share that the model
    orders alike; its ties count half. None where there is no such pair."""
    orderings = controls.within_prompts(own.tolist(), judge.tolist(), prompts.tolist()).values()
    total = sum(o.pairs for o in orderings)
    return sum(o.right for o in orderings) / total if total else None


FIGURES = ("well-formed", "quality", "calibration", "pairs", "expected pairs")


def figures(cell: Cell, kinds: Sequence[str]) -> dict[str, float | None]:
    """FIGURES of a model's answers to prompts of these kinds; all None where none is well-formed.
    `expected pairs`: ordered by the mean of its distribution over the first digit, which no earlier
    digit has moved; where evaluate.py's stage digits was run."""
    asked = np.isin(kinds_of(cell, [r.prompt_id for r in cell.rollouts]), kinds)
    chosen = np.isin(kinds_of(cell, cell.prompts), kinds)
    if not chosen.any():
        return dict.fromkeys(FIGURES)
    indices, logp = cell.log_probabilities("own")
    read = np.isin(indices, np.flatnonzero(chosen))
    where = np.array(indices, int)[read]
    expected = controls.expected_scores(logp[read])[:, 0]
    values = (
        chosen.sum() / asked.sum(),
        cell.quality[chosen].mean(),
        cell.calibration[chosen].mean(),
        pairs(cell.s[chosen, CORRECTNESS], cell.j[chosen, CORRECTNESS], cell.prompts[chosen]),
        pairs(expected, cell.j[where, CORRECTNESS], cell.prompts[where]),
    )
    return dict(zip(FIGURES, values, strict=True))


def table(evaluations: Sequence[Evaluation], models: Sequence[str]) -> str:
    """A line for every model and kind: means over the evaluations that have the figure."""
    lines = [f"{'model':<16}{'kind':<9}" + "".join(f"{name:>16}" for name in FIGURES)]
    for _, model in evaluations[0].cells:
        if models and model not in models:
            continue
        cells = [next(c for (_, m), c in e.cells.items() if m == model) for e in evaluations]
        for name, kinds in GROUPS.items():
            rows = [figures(cell, kinds) for cell in cells]
            shown = (mean([row[x] for row in rows]) for x in FIGURES)
            lines.append(f"{model:<16}{name:<9}" + "".join(f"{x:>16}" for x in shown))
    return "\n".join(lines)


def mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def main(
    results: tyro.conf.Positional[tuple[Path, ...]],
    models: tuple[str, ...] = (),
    each: bool = False,
) -> None:
    """Print the table.

    Args:
        results: folders results/NAME of evaluate.py on the miniature's prompts.
        models: which models; none: all.
        each: print each folder by itself too.
    """
    try:
        evaluations = [load_evaluation(folder) for folder in results]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if each:
        for e in evaluations:
            print(f"{e.folder}\n{table([e], models)}\n")
    print(table(evaluations, models))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
