"""What all tables share: the Results that a table is about, its columns, and the Table itself.

A table is declared as a mapping {header: Column}. A Column is a function of the cells of one
benchmark and model, one cell for each evaluation, and gives the figure of one row: an Interval, a
number, a text, or None where there is nothing to show. `mean`, `share`, `ratio` and `statistic`
make Columns from a function of one cell; intervals.py says what their intervals are over.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from evaluation import intervals
from evaluation.intervals import Estimate, Interval, Scale
from evaluation.results import Cell, Evaluation
from storage.run_folder import checkpoint_place

Figure = Interval | float | int | str | None
Column = Callable[[list[Cell]], Figure]
Values = tuple[Sequence[float], Sequence]  # one number per response, and its prompt's id
# The paper's settings; its evaluation's decoding is not given, so training's (App. A).
PAPER_SETTINGS = {
    "template": "paper", "few_shot": "paper-like", "limit": 0, "use_references": True,
    "drop_duplicates": False, "prompt_tokens": 4096, "temperature": 0.8, "top_p": 0.9, "top_k": 25,
    "max_tokens": 8192,
}  # fmt: skip
# Unique prompts of the whole benchmarks; HelpSteer2's validation split, not its training split.
PAPER_PROMPTS = {"helpsteer2": 519, "alpaca_eval": 805, "arena_hard": 750, "wildbench": 1024}
P_VALUES = ("p", "corrected p")

T = TypeVar("T")
PAPER = " (paper)"  # a column NAME (paper) holds the paper's figures beside those of NAME


# --------------------------------------------------------------------------------------------------
# What a table is about


# In one folder all cells share these, or their figures would differ for a reason unseen.
ALIKE = ("training_run", "seed", "sampler", "endpoint", "reward")


def settings(cell: Cell) -> dict:
    """What the figures in one table must share."""
    names = ("judge", "template", "few_shot", "samples", "limit", "prompt_tokens", "dtype",
             "use_references", "drop_duplicates")  # fmt: skip
    return {k: cell.config[k] for k in names} | cell.config["sampling"]


class Results:
    """One or more evaluations on the same benchmarks under the same settings. Several are runs with
    other seeds. Base and reference are in all of them; another model may be in some only, and the
    note under the tables says in how many."""

    def __init__(
        self, evaluations: Sequence[Evaluation], models: Sequence[str] = (), against: str = ""
    ):
        """`models`: which of them, in this order, the base first; (): all but runs' earlier
        checkpoints. `against`: the model that the others are compared with; "": the base. Raises
        ValueError if the evaluations do not have the same benchmarks or settings, lack the base or
        the reference, or share some of their prompts."""
        self.evaluations = list(evaluations)
        first, *others = self.evaluations
        self.benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in first.cells))
        for e in others:
            if differ := {benchmark for benchmark, _ in e.cells} ^ {*self.benchmarks}:
                raise ValueError(
                    f"{e.folder} and {first.folder} hold other benchmarks: {min(differ)}; give "
                    "evaluations of the same ones"
                )
        on_file = list(dict.fromkeys(m for e in self.evaluations for _, m in e.cells))
        if unknown := {*models, *filter(None, [against])} - set(on_file):
            raise ValueError(f"no results of model {min(unknown)}; there are {', '.join(on_file)}")
        known = list(dict.fromkeys(m for e in self.evaluations for m in e.models))
        self.models = list(models) or known or on_file
        self.chosen = bool(models)
        self.on_file = [m for m in on_file if all((b, m) in self for b in self.benchmarks)]
        self.base = self.models[0]
        self.reference = against or self.base
        for e in self.evaluations:
            for m in self.models:
                lacking = [b for b in self.benchmarks if (b, m) not in e.cells]
                needed = m in (self.base, self.reference) or lacking != self.benchmarks
                if lacking and (needed or (lacking[0], m) not in self):
                    raise ValueError(
                        f"{e.folder}: no answers of model {m} to {lacking[0]}; finish evaluate.py, "
                        "or choose models with --models"
                    )
        cells = [cell for e in self.evaluations for cell in e.cells.values()]
        self.settings = settings(cells[0])
        for name, value in self.settings.items():
            if any(settings(cell)[name] != value for cell in cells):
                raise ValueError(
                    f"the results differ in {name}, and such are not mixed; give evaluations of "
                    "one setting, and those of others with --beside"
                )
        for e in self.evaluations:
            cells = [e.cells.get((b, m)) for b in self.benchmarks for m in self.models]
            _check_alike(e, [cell for cell in cells if cell])
        _check_different(self.evaluations)
        for b in self.benchmarks:
            _check_prompts(b, [e.cells[b, self.base] for e in self.evaluations])
        self.judge = self.settings["judge"]

    def as_in_the_paper(self, benchmark: str) -> bool:
        """Whether the paper's figures for this benchmark are about the same: its judge, template,
        references, decoding, and all of its prompts."""
        cells = [cell for m in self.models for cell in self.cells(benchmark, m)]
        answered = [len({r.prompt_id for r in cell.rollouts}) for cell in cells]
        size = PAPER_PROMPTS.get(benchmark, 0)
        return (
            re.fullmatch(r"gpt-5\.4(-\d{4}-\d\d-\d\d)?", self.judge) is not None
            and all(self.settings[name] == value for name, value in PAPER_SETTINGS.items())
            and all(abs(n - size) <= 0.01 * size for n in answered)
            and not self.too_long(benchmark)
        )

    def too_long(self, benchmark: str) -> int:
        """How many prompts were left out because they are over the limit."""
        return max(
            c.summary.get("too_long", 0) for m in self.models for c in self.cells(benchmark, m)
        )

    def note(self) -> str:
        """What stands under every table; "" if there is nothing to say."""
        counts = {b: self.too_long(b) for b in self.benchmarks}
        lacking = ", ".join(f"{b} {n:,}" for b, n in counts.items() if n)
        limit = self.settings["prompt_tokens"]
        note = f" Prompts over {limit:,} tokens are left out: {lacking}." if lacking else ""
        if rare := ", ".join(f"{m} in {n}" for m, n in self.in_some().items()):
            note += f" Models that not all {len(self.evaluations)} evaluations have: {rare}."
        return note

    def in_some(self) -> dict[str, int]:
        """In how many evaluations those models are that not all have."""
        counts = {m: len(self.cells(self.benchmarks[0], m)) for m in self.models}
        return {m: n for m, n in counts.items() if n < len(self.evaluations)}

    def cells(self, benchmark: str, model: str) -> list[Cell]:
        """One for each evaluation that has the model."""
        key = benchmark, model
        return [e.cells[key] for e in self.evaluations if key in e.cells]

    def together(self, benchmark: str, models: Sequence[str]) -> list[list[Cell]]:
        """These models' cells, for each evaluation that has all of them."""
        every = [[e.cells.get((benchmark, m)) for m in models] for e in self.evaluations]
        return [cells for cells in every if all(cells)]

    def declared(self, name: str, default: T) -> T:
        """What all evaluations were told under this name before; the default if they differ."""
        values = [e.declared.get(name) for e in self.evaluations]
        return values[0] if values[0] is not None and values.count(values[0]) == len(values) else (
            default
        )  # fmt: skip

    def primary(self) -> tuple[tuple[str, str], bool]:
        """((benchmark, model) of the primary endpoint, whether it was declared)."""
        key = tuple(self.declared("primary", None) or ())
        if key in self:
            return key, True
        return (self.benchmarks[0], self.models[-1]), False

    def second_looks(self) -> list[tuple[str, str]]:
        """Other choices of the primary endpoint: declared later, or the last of --models."""
        later = {tuple(x) for e in self.evaluations for x in e.declared.get("later", ())}
        if self.chosen:
            later.add((self.benchmarks[0], self.models[-1]))
        return sorted(key for key in later - {self.primary()[0]} if key in self)

    def compared(self) -> list[str]:
        """The models that are compared: those asked for, or all but a run's earlier checkpoints."""
        if self.chosen:
            return self.models
        paths = {m: Path(self.cells(self.benchmarks[0], m)[0].config["model"]) for m in self.models}
        runs = {m: path.parent for m, path in paths.items() if path.parent.name == "checkpoints"}
        last = {run: max((paths[m] for m in runs if runs[m] == run), key=_place)
                for run in set(runs.values())}  # fmt: skip
        return [m for m in self.models if m not in runs or paths[m] == last[runs[m]]]

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether there are answers to a benchmark by a model: (benchmark, model)."""
        return any(key in e.cells for e in self.evaluations)

    def each(self) -> Iterator[tuple[str, str, list[Cell]]]:
        """(benchmark, model, their cells), the rows of most tables."""
        return ((b, m, self.cells(b, m)) for b in self.benchmarks for m in self.models)


def _check_alike(evaluation: Evaluation, cells: Sequence[Cell]) -> None:
    """Raises ValueError if cells of one folder differ in what is not shown."""
    data: dict[str, Cell] = {}
    for cell in cells:
        for name in ALIKE:
            if cell.config[name] != cells[0].config[name]:
                raise ValueError(
                    f"{evaluation.folder}: {cell.benchmark}/{cell.model} and {cells[0].benchmark}/"
                    f"{cells[0].model} differ in {name}; choose models with --models, or evaluate "
                    "again under another --name"
                )
        other = data.setdefault(cell.benchmark, cell)
        if cell.config["data"] != other.config["data"]:
            raise ValueError(
                f"{evaluation.folder}: {cell.model} and {other.model} answered other prompt files "
                f"as {cell.benchmark}; evaluate again under another --name"
            )


def _check_different(evaluations: Sequence[Evaluation]) -> None:
    """Raises ValueError if two are one and the same."""
    seen: dict[int, Evaluation] = {}
    for e in evaluations:
        answers = [
            (key, r.prompt_id, r.sample, r.response_ids, r.self_scores, r.judge_scores)
            for key, cell in e.cells.items()
            for r in cell.rollouts
        ]
        other = seen.setdefault(hash(tuple(answers)), e)
        if other is not e:
            raise ValueError(
                f"{e.folder} and {other.folder} hold the same answers, which are no evidence of "
                "each other; give each evaluation once"
            )


def _check_prompts(benchmark: str, cells: Sequence[Cell]) -> None:
    """Raises ValueError if evaluations share some of their prompts, and not all or hardly any."""
    for k, cell in enumerate(cells):
        for other in cells[:k]:
            both, either = len(cell.asked & other.asked), len(cell.asked | other.asked)
            if 0.05 < both / max(either, 1) < 0.95:
                raise ValueError(
                    f"{cell.evaluation.folder} and {other.evaluation.folder} share {both} of "
                    f"{either} prompts of {benchmark}; give evaluations that share their prompts, "
                    "or such that have prompts of their own each"
                )


def same_prompts(cells: Sequence[Cell]) -> bool:
    """Whether evaluations are of the same prompts (Results refuses what is in between)."""
    return len(cells[0].asked & cells[-1].asked) * 2 > len(cells[0].asked)


def _place(checkpoint: Path) -> tuple[int, float]:
    cycle, step = checkpoint_place(checkpoint)
    return cycle, math.inf if step is None else step


def by_settings(evaluations: Sequence[Evaluation]) -> list[Results]:
    """Evaluations with the same settings together, as runs with other seeds."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        key = repr(settings(next(iter(e.cells.values()))))
        groups.setdefault(key, []).append(e)
    return [Results(group) for group in groups.values()]


# --------------------------------------------------------------------------------------------------
# Columns


def estimates(
    prepare: Callable[[Cell], Estimate | None], cells: Sequence[Cell]
) -> list[Estimate] | str:
    """One for each evaluation; a text where only some have the figure, [] where none has."""
    found = [prepare(cell) for cell in cells]
    known = [x for x in found if x is not None]
    return known if len(known) in (0, len(cells)) else f"in {len(known)} of {len(cells)} only"


def statistic(
    prepare: Callable[[Cell], Estimate | None],
    scale: Scale = intervals.PLAIN,
    proportion: bool = False,
) -> Column:
    """Any figure. `prepare`: of a cell its estimate, on the scale."""

    def column(cells: list[Cell]) -> Figure:
        found = estimates(prepare, cells)
        if isinstance(found, str):
            return found
        return intervals.interval(found, same_prompts(cells), scale, proportion)

    return column


def mean(values: Callable[[Cell], Values]) -> Column:
    """Mean over responses. `values`: of a cell one number per response, and its prompt."""
    return statistic(lambda c: intervals.mean(*values(c)))


def share(values: Callable[[Cell], Values]) -> Column:
    """The same of numbers from 0 to 1 that may all be 0 or 1."""
    return statistic(lambda c: intervals.mean(*values(c)), proportion=True)


def ratio(parts: Callable[[Cell], tuple[Sequence[float], Sequence[float], Sequence]]) -> Column:
    """sum / sum. `parts`: numerators, denominators and ids, one of each per prompt."""
    return statistic(lambda c: intervals.ratio(*parts(c)))


def measure(columns: Mapping[str, Column], cells: list[Cell]) -> dict[str, Figure]:
    """The figures of one row, by header."""
    return {header: column(cells) for header, column in columns.items()}


def rows(
    results: Results,
    columns: Mapping[str, Column],
    keep: Callable[[Cell], object] = lambda cell: True,
    paper: Mapping[tuple[str, str, str], float] | None = None,
) -> list[dict[str, Figure]]:
    """A row for every benchmark and model for which `keep` is true. `paper`: the paper's figures by
    (benchmark, model, header); they stand beside these columns where our setting is the paper's."""
    alike = {b for b in results.benchmarks if results.as_in_the_paper(b)}
    published = {key: figure for key, figure in (paper or {}).items() if key[0] in alike}
    table = []
    for benchmark, model, cells in results.each():
        if keep(cells[0]):
            row = {"benchmark": benchmark, "model": model} | measure(columns, cells)
            for header in dict.fromkeys(header for _, _, header in published):
                row[header + PAPER] = published.get((benchmark, model, header))
            table.append(row)
    return table


# --------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    """`frame`: a row per benchmark, model, ...; key columns first, then a column per figure, whose
    entries are Figures. `higher`, `lower`: headers of the columns in which a higher, or a lower,
    figure is the better one."""

    title: str
    note: str
    frame: pd.DataFrame
    higher: Collection[str] = ()
    lower: Collection[str] = ()

    @classmethod
    def of(
        cls,
        title: str,
        note: str,
        rows: Sequence[Mapping[str, Figure]],
        higher: Collection[str] = (),
        lower: Collection[str] = (),
    ) -> "Table":
        if any(_measured(x) and x.low is None for row in rows for x in row.values()):
            note += (
                f" [-]: no interval, because there are fewer than {intervals.FEWEST} prompts, or "
                "just two evaluations of the same prompts, or the figure does not vary, or no "
                "interval is known to hold it."
            )
        return cls(title, note, pd.DataFrame(rows, dtype=object), higher, lower)

    @property
    def file_name(self) -> str:
        """The title in lower case, with "-" for everything but letters and digits."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def strings(self) -> pd.DataFrame:
        """The frame as it is shown. The paper's figures stand in brackets after ours. n: of a row's
        figures; one that is of another number of prompts says so."""
        shown = {}
        counts = [_usual_n(row) for row in self.frame.to_dict("records")]
        for header, column in self.frame.items():
            if not header.endswith(PAPER):
                shown[header] = [
                    show(x, header) + (f" (n {x.n:,})" if _measured(x) and x.n != n else "")
                    for x, n in zip(column, counts, strict=True)
                ]
            else:
                ours = header.removesuffix(PAPER)
                shown[ours] = [
                    text if paper is None else f"{text} (paper {paper:.3f})"
                    for text, paper in zip(shown[ours], column, strict=True)
                ]
        if any(counts):
            shown["n"] = [f"{n:,}" if n else "-" for n in counts]
        return pd.DataFrame(shown)

    def text(self) -> str:
        strings = self.strings()
        lines = [list(strings), *strings.to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, self.note, "", *body])

    def markdown(self) -> str:
        strings = self.strings()
        lines = [list(strings), ["---"] * len(strings.columns), *strings.to_numpy().tolist()]
        body = "\n".join(
            "| " + " | ".join(x.replace("|", r"\|") for x in line) + " |" for line in lines
        )
        return f"### {self.title}\n\n{self.note}\n\n{body}"

    def csv(self) -> str:
        """Each column NAME of intervals becomes NAME, NAME low, NAME high and NAME n."""
        columns = {}
        for header, column in self.frame.items():
            if any(isinstance(x, Interval) for x in column):
                parts = [x if isinstance(x, Interval) else intervals.NOTHING for x in column]
                for k, suffix in enumerate(("", " low", " high", " n")):
                    columns[header + suffix] = [x[k] for x in parts]
            else:
                columns[header] = column
        return pd.DataFrame(columns, dtype=object).to_csv(index=False)


def _measured(figure: Figure) -> bool:
    return isinstance(figure, Interval) and figure.mean is not None


def _usual_n(row: Mapping[str, Figure]) -> int:
    """The n of most of a row's figures; 0 if it has none."""
    counts = Counter(x.n for x in row.values() if _measured(x))
    return counts.most_common(1)[0][0] if counts else 0


def show(figure: Figure, header: str = "") -> str:
    """0.731 [0.702, 0.760]"""
    match figure:
        case None:
            return "-"
        case Interval():
            return figure.text()
        case str():
            return figure
        case int():
            return f"{figure:,}"
        case _ if header in P_VALUES and figure < 0.001:
            return "<0.001"
        case _:
            return f"{figure:.3f}"
