"""Tables, figures and a page from what evaluate.py and cycle.py left on file (Sec. 4); no model and
no judge is asked.

    python report.py results/paper --out report
    python report.py results/seed-0 results/seed-1 results/seed-2 --out report
    python report.py results/paper --beside results/paper-greedy results/paper-varied
    python report.py --runs runs/see

Several folders are evaluations of runs with other seeds; a model that only some of them have is
shown for these, and the tables say for how many. Those given to --beside have other settings and
get columns of their own. Writes

    tables.txt  tables.md  csv/         all tables; in csv/ one file for each table
    figure2.png ... training.png        where there is something to draw
    report.html                         one file that needs no network, with a browser over the
                                        answers (the first folder's, and the runs')
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sklearn
import tyro

from evaluation import (
    answers,
    comparison_tables,
    control_tables,
    efficiency,
    error_tables,
    figures,
    page,
    paper_tables,
    summary,
    use_tables,
)
from evaluation.figures import Drawn
from evaluation.results import load_evaluation, load_run
from evaluation.table import Results, Table, by_settings
from storage.files import write_text
from storage.options import CountOrZero, Options


@dataclass(frozen=True)
class Command(Options):
    """Tables, figures and a page from result files."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders results/NAME of evaluate.py; several: runs with other seeds."""
    beside: tuple[Path, ...] = ()
    """Folders results/NAME of evaluations under other settings, such as greedy decoding or other
    few-shot examples."""
    runs: tuple[Path, ...] = ()
    """Folders runs/NAME of cycle.py, whose training and rollouts are shown."""
    out: Path = Path("report")
    """Folder for tables, figures and page."""
    models: tuple[str, ...] = ()
    """Which models the tables show, the base first; none: all but runs' earlier checkpoints.
    Figure 2 shows all checkpoints on file."""
    against: str = ""
    """The model that the others are compared with; none: the base."""
    show: CountOrZero = 200
    """Judged answers of each model to each benchmark on the page, and of each run, evenly from its
    cycles; at most as many malformed ones, and ones that the judge refused. The base's answers to
    the same prompts are added. 0: all."""


def run(command: Command, words: Sequence[str] = ("report.py",)) -> str:
    """Write everything; returns the tables as text. `words`: the command line, for the page. Raises
    ValueError."""
    if not (command.results or command.runs):
        raise ValueError("no results are given, such as results/NAME of evaluate.py, nor --runs")
    trained = [load_run(folder) for folder in command.runs]
    results, tables, every, first = None, [], trained, trained
    if command.results:
        evaluations = [load_evaluation(folder) for folder in command.results]
        results = Results(evaluations, command.models, command.against)
        others = by_settings([load_evaluation(folder) for folder in command.beside])
        tables = make_tables(results, others)
        every = [cell for _, _, cells in results.each() for cell in cells] + trained
        shown_first = results.evaluations[0]
        first = [c for _, _, cells in results.each() for c in cells if c.evaluation is shown_first]
        first += trained
    out = command.out
    (out / "csv").mkdir(parents=True, exist_ok=True)
    for table in tables:
        write_text(out / "csv" / f"{table.file_name}.csv", table.csv())
    head = summary.summary(every, tables, shlex.join(words))
    text = "\n\n\n".join(table.text() for table in tables) + "\n"
    if unfinished := dict(head).get(summary.UNFINISHED):
        text = "\n".join(["Unfinished:", *unfinished, "", text])
    write_text(out / "tables.txt", text)
    write_text(out / "tables.md", "\n\n".join(table.markdown() for table in tables) + "\n")
    title = ", ".join(map(str, (*command.results, *command.runs)))
    drawn = draw(results, command.runs, out)
    shown = answers.shown(first, command.show)
    units = summary.units(every)
    html = page.page(title, head, units, drawn, tables, results, shown)
    write_text(out / "report.html", html)
    return text


def make_tables(results: Results, others: Sequence[Results] = ()) -> list[Table]:
    """All tables for which there are results. `others`: evaluations under other settings."""
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # for speed
        makers = (
            *paper_tables.TABLES, *comparison_tables.TABLES, *efficiency.TABLES,
            *control_tables.TABLES, *error_tables.TABLES, *use_tables.TABLES,
        )  # fmt: skip
        tables = [make(results) for make in makers]
        tables.append(use_tables.other_settings(results, others))
    note = results.note()
    return [replace(table, note=table.note + note) for table in tables if len(table.frame)]


def draw(results: Results | None, runs: Sequence[Path], out: Path) -> list[Drawn]:
    """Draw what there is to draw."""
    drawn = []
    if results:
        drawn += [
            figures.figure_2(results, out / "figure2.png"),
            figures.figure_3(results, out / "figure3.png"),
            figures.figure_4(results, out / "figure4.png"),
            figures.reliability(results, out / "reliability.png"),
        ]
    drawn.append(figures.training(runs, out / "training.png", results))
    return [figure for figure in drawn if figure]


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        print(run(command, [Path(sys.argv[0]).name, *sys.argv[1:]]))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written to {command.out}/")


if __name__ == "__main__":
    main()
