"""What variants of the method change: each one's figures minus the reference's (ablate.py). None of
these tables is in the paper.

A difference is paired by prompt within each seed, on the prompts that both models have, and each
response counts the same. intervals.py says what its interval is over.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation import figures, intervals
from evaluation.comparison_tables import Found, found, paired
from evaluation.control_tables import pairs_right
from evaluation.intervals import Interval
from evaluation.paper_tables import calibration, quality, well_formed
from evaluation.results import Cell
from evaluation.table import Results, Table, Values, mean, measure
from evaluation.use_tables import change
from storage.files import read_json
from storage.run_folder import RunFolder

LEVEL = 0.05


def pairs_within_prompts(c: Cell) -> Values:
    """Of each pair of a prompt's answers that the judge tells apart, how far the model's scores
    order the prompt's pairs alike."""
    prompts = zip(*pairs_right(c), strict=True)
    each = [(right / pairs, prompt) for right, pairs, prompt in prompts for _ in range(pairs)]
    return [value for value, _ in each], [prompt for _, prompt in each]


def swap_drop(c: Cell) -> Values:
    """By how many points the correctness score falls when the answer is exchanged for another
    prompt's."""
    changes, prompts = change(c, "another")
    return [-x for x in changes], prompts


# In all of them higher is better.
FIGURES: dict[str, Callable[[Cell], Values]] = {
    "calibration": calibration,
    "quality": quality,
    "well-formed": well_formed,
    "pairs within prompts": pairs_within_prompts,
    "swap drop": swap_drop,
}


class Difference(NamedTuple):
    """A variant's figure minus the reference's, over seeds."""

    benchmark: str
    variant: str
    figure: str
    seeds: int
    apart: Found
    corrected: float | None  # p-value

    @property
    def is_found(self) -> bool:
        return self.corrected is not None and self.corrected < LEVEL


def differences(results: Results, variants: list[str]) -> list[Difference]:
    """Of all variants and figures, corrected together by Holm."""
    other = results.reference
    rows = []
    for b in results.benchmarks:
        for m in variants:
            for name, side in FIGURES.items():
                cells = results.cells(b, m)
                apart = found(cells, paired(side, lambda c, side=side: side(c.of(other))))
                rows.append(Difference(b, m, name, len(cells), apart, None))
    corrected = intervals.holm({k: row.apart.p for k, row in enumerate(rows)})
    return [row._replace(corrected=corrected[k]) for k, row in enumerate(rows)]


def allows(row: Difference) -> str:
    """What may be said of a difference, and no more."""
    x = row.apart.figure
    if not isinstance(x, Interval) or x.low is None:
        same = isinstance(x, Interval) and x.mean == 0
        return f"{'no difference here' if same else 'nothing'}: there is no interval"
    if row.is_found:
        return f"difference found: {'higher' if x.mean > 0 else 'lower'} than the reference's"
    if x.low <= 0 <= x.high:
        return f"no difference found; below {x.low:+.3f} and above {x.high:+.3f} it is excluded"
    return "no difference found after correction, though its own interval lacks 0"


def table(results: Results, rows: list[Difference]) -> Table:
    other = results.reference
    return Table.of(
        f"Variants against {other}",
        f"The variant's figure minus {other}'s, paired by prompt within each seed; in all figures "
        "higher is better. Pairs within prompts: of the pairs of a prompt's answers that the judge "
        "tells apart, the share that the model's scores order alike. Swap drop: points by which "
        "its correctness score falls when the answer is exchanged for another prompt's. Intervals: "
        "95 %, each for itself; with one seed they are over prompts alone. Corrected p: by Holm "
        f"over all {sum(row.apart.p is not None for row in rows)} rows that have a p-value. What a "
        "row allows is about these seeds' setting, and goes by the corrected p.",
        [
            {"benchmark": row.benchmark, "variant": row.variant, "figure": row.figure,
             "difference": row.apart.figure, "p": row.apart.p, "corrected p": row.corrected,
             "seeds": row.seeds, "it allows": allows(row)}
            for row in rows
        ],
    )  # fmt: skip


def levels(results: Results) -> Table:
    columns = {name: mean(values) for name, values in FIGURES.items()}
    return Table.of(
        "The figures themselves",
        f"Judge {results.judge}; {results.settings['samples']} answers to each prompt.",
        [
            {"benchmark": b, "model": m} | measure(columns, cells) | {"seeds": len(cells)}
            for b, m, cells in results.each()
        ],
        higher=columns,
    )


def runs(trained: Mapping[str, Sequence[RunFolder]], lines: Mapping[str, int | None]) -> Table:
    """What training took; says which sources differ between the runs. lines: of a variant's file,
    None for the method."""
    rows, hashes = [], defaultdict(set)  # hashes: of each source file
    for model, folders in trained.items():
        minutes = [sum(m["seconds"]["wall"] for m in f.metrics()) / 60 for f in folders]
        rows.append({"model": model, "lines of code": lines[model], "seeds": len(folders),
                     "minutes each": float(np.mean(minutes))})  # fmt: skip
        for folder in folders:
            for path, digest in read_json(folder.env_file, list)[-1].get("sources", {}).items():
                hashes[path].add(digest)
    changed = ", ".join(sorted(path for path, digests in hashes.items() if len(digests) > 1))
    note = f"Not all were made with the same {changed}." if changed else "All by the same sources."
    return Table.of("The runs", note, rows)


def draw(results: Results, rows: list[Difference], path: Path) -> None:
    """A forest plot for each benchmark, `path`-BENCHMARK.png and .svg."""
    for b in results.benchmarks:
        panels: dict[str, dict] = {name: {} for name in FIGURES}
        for row in rows:
            if row.benchmark == b and isinstance(row.apart.figure, Interval):
                panels[row.figure][row.variant] = row.apart.figure, row.is_found
        title = f"Minus {results.reference}'s, {b}; filled: found after correction"
        figures.forest(panels, title, path.with_name(f"{path.name}-{b}"))
