"""What stands at the top of a report: whether the primary endpoint held, what is unfinished, what
the judge cost, and how the results were made."""

import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from evaluation.answers import MALFORMED, NOT_JUDGED, counts
from evaluation.comparison_tables import PRIMARY, TOGETHER
from evaluation.intervals import Interval
from evaluation.results import TRAINING, Cell
from evaluation.table import Table, same_prompts, show
from judge import offline_judge
from judging.ledger import read_attempts, totals
from storage.files import read_json
from storage.program import commit, source_id
from storage.run_folder import EvaluationFolder, Folder

UNFINISHED, COMMANDS = "Unfinished", "Commands"  # terms
Entries = list[tuple[str, list[str]]]  # (term, sentences)


def summary(cells: Sequence[Cell], tables: Sequence[Table], command: str) -> Entries:
    """`cells`: all that the report is about. `command`: that made it."""
    folders = list(map(folder_of, cells))
    launches = [x for f in folders if f.env_file.exists() for x in read_json(f.env_file, list)]
    entries = [
        ("Primary endpoint", endpoint(tables, units(cells)) if tables else []),
        ("Result", result(tables[0]) if tables else []),
        (UNFINISHED, unfinished(cells)),
        ("Answers", answers(cells)),
        ("Judge", judges(cells, folders)),
        ("Models trained", trained(cells)),
        ("Results made", sorted({made(launch) for launch in launches})),
        ("Report made", [f"{datetime.now(UTC):%Y-%m-%d}, {at_commit(*commit())}"]),
        (COMMANDS, [*dict.fromkeys(map(command_of, launches)), command]),
    ]
    return [(term, sentences) for term, sentences in entries if sentences]


def units(cells: Sequence[Cell]) -> str:
    """What an interval's n counts."""
    alike = [c for c in cells if (c.benchmark, c.model) == (cells[0].benchmark, cells[0].model)]
    return "prompts" if same_prompts(alike) else "evaluations"


def endpoint(tables: Sequence[Table], units: str) -> list[str]:
    """Whether the primary endpoint held, from its table."""
    table = next((t for t in tables if t.title == PRIMARY), None)
    if table is None:
        return ["Cannot be computed: it needs evaluate.py's --training_run."]
    rows = table.frame.to_dict("records")
    *rivals, together = rows[: [r["calibration minus that of"] for r in rows].index(TOGETHER) + 1]
    about = f"{together['model']} on {together['benchmark']} ({together['this is']})"
    if together["p"] is None:
        verdict = "Cannot be computed: one of the three predictors is missing"
    else:
        held = "Held" if together["p"] < 0.05 else "Not held"
        verdict = f"{held}: p {show(together['p'], 'p')}"
    sentences = [f"{verdict}; {about}."]
    for row in rivals:
        apart, name = row["difference"], row["calibration minus that of"]
        n = f", n {apart.n:,} {units}" if isinstance(apart, Interval) else ""
        sentences.append(f"Calibration minus that of {name}: {show(apart)}{n}.")
    return sentences


def result(table: Table) -> list[str]:
    """Quality and calibration of the last model and the base, by benchmark; from Tables 1 and 2."""
    sentences = []
    for benchmark, rows in table.frame.groupby("benchmark", sort=False):
        figures = [
            f"{row['model']} has quality {row['quality'].text()} and calibration "
            f"{row['calibration'].text()}"
            for row in rows.to_dict("records")
        ]
        sentences.append(f"{benchmark}: {'; '.join(dict.fromkeys([figures[-1], figures[0]]))}.")
    return sentences


def unfinished(cells: Sequence[Cell]) -> list[str]:
    """What is missing of the evaluations, and answers that were not judged."""
    evaluated = [cell for cell in cells if cell.benchmark != TRAINING]
    sentences = [
        f"{folder_of(cell)}: evaluate.py has not finished the answers."
        for cell in evaluated
        if "prompts" not in cell.summary
    ]
    for cell in cells:
        refused = Counter(r.refused for r in cell.rollouts if r.refused)
        sentences += [
            f"{folder_of(cell)}: {n:,} not judged: {reason}" for reason, n in refused.items()
        ]
    lacking = {
        "digits": lambda c: len(c.digits.get(c.model, {})) < with_text(c),
        "sensitivity": lambda c: len(c.sensitivity) < sum(r.answer is not None for r in c.rollouts),
        "preferences": lambda c: c.model != evaluated[0].model and not c.preferences,
    }
    for stage, lacks in lacking.items():
        if where := [str(folder_of(cell)) for cell in evaluated if lacks(cell)]:
            sentences.append(f"Stage {stage} of evaluate.py: {', '.join(where)}.")
    return sentences


def with_text(cell: Cell) -> int:
    """Answers with any text, malformed ones too; of older evaluations the well-formed ones."""
    return cell.summary.get("with_text", sum(r.answer is not None for r in cell.rollouts))


def answers(cells: Sequence[Cell]) -> list[str]:
    sentences = []
    for kind, of_runs in (("to the benchmarks", False), ("in training", True)):
        rollouts = [r for c in cells if (c.benchmark == TRAINING) == of_runs for r in c.rollouts]
        n = counts(rollouts)
        if rollouts:
            sentences.append(
                f"{len(rollouts):,} {kind}, of which {n[MALFORMED]:,} malformed and "
                f"{n[NOT_JUDGED]:,} not judged; these enter neither figure."
            )
    return sentences


def judges(cells: Sequence[Cell], folders: Sequence[Folder]) -> list[str]:
    """Each judge that was paid, with what it cost; the others by name."""
    attempts = [x for f in folders if f.judge_cache.exists() for x in read_attempts(f.judge_cache)]
    by_model: dict[str, list[dict]] = {}
    for x in attempts:
        by_model.setdefault(x["model"], []).append(x)
    sentences = []
    for model, of_model in by_model.items():
        t = totals(of_model)
        unknown = f", {t['cost_unknown']:,} calls of unknown cost" if t["cost_unknown"] else ""
        sentences.append(
            f"{model}: ${t['cost']:,.2f} by list price{unknown}; {t['calls']:,} calls, "
            f"{t['tokens_in']:,} tokens in and {t['tokens_out']:,} out."
        )
    named = dict.fromkeys(cell.config["judge"] for cell in cells)
    for name in named:
        if name not in by_model:
            why = "an offline judge, at no cost" if offline_judge(name) else "no request on file"
            sentences.append(f"{name}: {why}.")
    return sentences


def trained(cells: Sequence[Cell]) -> list[str]:
    """The program and the sources of the runs that the models come from."""
    sentences = {}
    for cell in cells:
        run = Folder(cell.run or Path(cell.config["model"]).parent.parent)
        if run.env_file.is_file():
            launches = read_json(run.env_file, list)
            programs = dict.fromkeys(x.get("program") or "an older version" for x in launches)
            sources = dict.fromkeys(source_id(x) or "not recorded" for x in launches)
            sentences[f"{run}: by {', '.join(programs)}; sources {', '.join(sources)}."] = None
    return list(sentences)


def made(launch: dict) -> str:
    at = at_commit(launch.get("commit"), launch.get("uncommitted_changes"))
    return f"{launch['started'][:10]}, {at}"


def command_of(launch: dict) -> str:
    script, *words = launch["command"]
    return shlex.join([Path(script).name, *words])


def at_commit(name: str | None, changed: bool | None) -> str:
    if name is None:
        return "outside a git checkout"
    return f"commit {name[:10]}{' with uncommitted changes' if changed else ''}"


def folder_of(cell: Cell) -> Folder:
    if cell.evaluation:
        return EvaluationFolder(cell.evaluation.folder).cell(cell.benchmark, cell.model)
    return Folder(cell.run)
