"""What all tables share: the Table, and how a column's figure comes from cells.

A table is declared as a mapping {header: Column}. A Column is a function of the cells of one
benchmark and model, one cell for each evaluation, and gives the figure of one row: an Interval, a
number, a text, or None where there is nothing to show. `mean`, `ratio` and `statistic` make Columns
from a function of one cell: their intervals are over prompts within one evaluation, and over
evaluations where there are several (intervals.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from evaluation import intervals
from evaluation.intervals import Interval
from evaluation.results import Cell, Results

Figure = Interval | float | int | str | None
Column = Callable[[list[Cell]], Figure]
Values = tuple[Sequence[float], Sequence]  # one number per response, and its prompt's id
PAPER = " (paper)"  # a column NAME (paper) holds the paper's figures beside those of NAME


# --------------------------------------------------------------------------------------------------
# Columns


def _column(interval: Callable[..., Interval], prepare: Callable[[Cell], tuple]) -> Column:
    """`prepare`: of a cell the arguments of `interval`."""

    def column(cells: list[Cell]) -> Interval:
        if len(cells) == 1:
            return interval(*prepare(cells[0]))
        runs = [interval(*prepare(cell), draws=0).mean for cell in cells]
        return intervals.over_seeds([x for x in runs if x is not None])

    return column


# Each takes a function of a cell. mean: (one number per response, its prompt), a mean over
# responses. ratio: (numerators, denominators) by prompt, sum / sum. statistic: (any figure as a
# function of response indices, the prompt of every response).
mean = partial(_column, intervals.over_prompts)
ratio = partial(_column, intervals.ratio)
statistic = partial(_column, intervals.of_statistic)


def figures(columns: Mapping[str, Column], cells: list[Cell]) -> dict[str, Figure]:
    """The figures of one row, by header."""
    return {header: column(cells) for header, column in columns.items()}


def rows(
    results: Results,
    columns: Mapping[str, Column],
    keep: Callable[[Cell], object] = lambda cell: True,
    paper: Mapping[tuple[str, str, str], float] | None = None,
) -> list[dict[str, Figure]]:
    """A row for every benchmark and model for which `keep` is true. `paper`: the paper's figures by
    (benchmark, model, header); they stand beside these columns if our setting is the paper's."""
    published = (paper if results.papers_setting else None) or {}
    table = []
    for benchmark, model, cells in results.each():
        if keep(cells[0]):
            row = {"benchmark": benchmark, "model": model} | figures(columns, cells)
            for header in dict.fromkeys(header for _, _, header in published):
                row[header + PAPER] = published.get((benchmark, model, header))
            table.append(row)
    return table


# --------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    """`frame`: a row per benchmark, model, ...; key columns first, then a column per figure, whose
    entries are Figures."""

    title: str
    note: str
    frame: pd.DataFrame

    @classmethod
    def of(cls, title: str, note: str, rows: Sequence[Mapping[str, Figure]]) -> "Table":
        return cls(title, note, pd.DataFrame(rows, dtype=object))

    @property
    def file_name(self) -> str:
        """The title in lower case, with "-" for everything but letters and digits."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def strings(self) -> pd.DataFrame:
        """The frame as it is shown. The paper's figures stand in brackets after ours."""
        shown = {}
        for header, column in self.frame.items():
            if not header.endswith(PAPER):
                shown[header] = list(map(show, column))
            else:
                ours = header.removesuffix(PAPER)
                shown[ours] = [
                    text if paper is None else f"{text} (paper {paper:.3f})"
                    for text, paper in zip(shown[ours], column, strict=True)
                ]
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


def show(figure: Figure) -> str:
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
        case _:
            return f"{figure:.3f}"
