"""Watches a model in use: logged predictions and later judgements -> calibration over time, an
alarm when it drifts from the evaluation, and a page. For a cron job.

    python watch.py log.jsonl --reference results/paper/helpsteer2/see --judgements scores.jsonl
    python watch.py log.jsonl --reference results/paper/helpsteer2/see --share 0.05 \\
        --client.max_cost 20

`log.jsonl` is what predict.py writes. Judgements are lines with `id` and `scores`, or a
judge_cache.jsonl, or a file of `python -m evaluation.judgements --export`. With --share, that share
of the log is judged here, by the judge of the evaluation unless --judge says otherwise: the same
answers each time, since a hash of the id decides, and each once. What was judged is in the folder
--out, beside the page.

Exit status: 0 no alarm, 3 alarm, 1 error (2: a wrong option). Without drift the alarm is raised
with probability --false_alarms at most over the whole log, however often this runs
(evaluation/drift.py says which test, docs/monitoring.md what it has been measured to find).
"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from evaluation import answers, drift, page, use_figures
from evaluation.drift import Alarm, Log
from evaluation.intervals import over_prompts
from evaluation.judgements import Answer, as_before, judge_again
from evaluation.metrics import render, summarise
from evaluation.results import Cell, load_one_cell
from evaluation.summary import COMMANDS
from evaluation.table import Table
from evaluation.threshold import Threshold
from judge import make_judge
from judging.client import JudgeError
from judging.endpoint import ClientConfig, Endpoint
from prompts import Scores
from storage.data import Prompt
from storage.files import WriteError, append_line, write_text
from storage.lock import locked
from storage.options import Count, CountOrZero, Options, in_range

ALARM = 3  # exit status
FEWEST = 2  # judged prompts
BAD_BELOW = 0.5  # quality, where no threshold.json says otherwise


@dataclass(frozen=True)
class Command(Options):
    """Calibration of logged predictions over time, with an alarm for drift."""

    log: tyro.conf.Positional[Path]
    """What predict.py wrote, JSON lines."""
    reference: Path
    """The evaluation with which the log is compared, a folder results/NAME/BENCHMARK/MODEL of the
    same model."""
    judgements: tuple[Path, ...] = ()
    """Judgements of the log's answers: JSON lines with `id` and `scores`, judge_cache.jsonl, or a
    file made by `python -m evaluation.judgements --export`."""
    out: Path = Path("watch")
    """Folder for the page, the figures and the judgements made here."""
    threshold: Path | None = None
    """The threshold.json by which the log's answers were sent, to compare its promise with what
    was sent."""
    false_alarms: in_range(float, "(0, 1)") = 0.05
    """Probability of an alarm without drift, over the whole log."""
    batch: Count = 25
    """Judged answers in a point of the control chart."""
    show: CountOrZero = 200
    """Judged answers on the page, the biggest disagreements first; 0: all."""
    share: in_range(float, "[0, 1]") = 0.0
    """Share of the log's answers that is judged here."""
    judge: str = ""
    """Who judges them: a model's name (see endpoint.py), replay:FILE, or an offline judge; empty:
    the evaluation's judge, where and as it was asked then."""
    seed: in_range(int, "[0, 4294967000]") = 42
    """Seed of the hash that chooses answers, and of ties in the test."""
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)


class Watched(NamedTuple):
    text: str
    alarm: bool


def run(command: Command, words: Sequence[str] = ("watch.py",)) -> Watched:
    """Judge what is to be judged, compare, write the page. `words`: the command line, for the page.
    Raises ValueError or JudgeError."""
    reference = load_one_cell(command.reference)
    threshold = Threshold.load(command.threshold) if command.threshold else None
    if not reference.valid:
        raise ValueError(f"{command.reference}: no answer was judged there; finish evaluate.py")
    log = drift.read_log(command.log)
    given = [drift.read_judgements(path, log) for path in command.judgements]
    with locked(command.out):
        own = command.out / "judgements.jsonl"
        if own.exists():
            given.append(drift.read_judgements(own, log))
        judgements: dict[str, Scores] = {}  # in their order; the first of an answer counts
        for scores in given:
            judgements |= {k: x for k, x in scores.items() if k not in judgements}
        judgements |= judge_share(command, reference.config, log, judgements, own)
        cell = drift.judged_cell(log, judgements, reference, command.log.stem)
        if len(set(cell.prompts)) < FEWEST:
            raise ValueError(
                f"{command.log}: {len(cell.valid)} of its answers are judged; give --judgements of "
                "them, or have some judged with --share"
            )
        before, after = drift.watched(reference), drift.watched(cell)
        found = drift.alarms(before, after, command.false_alarms, command.seed)
        decisions = [log[k].decision or "none" for k in judgements]
        lines = told(command, reference, cell, log, found)
        if threshold:
            lines.append(kept(threshold, cell, decisions))
        bad_below = threshold.bad_below if threshold else BAD_BELOW
        tables = [
            drift.by_attribute(reference, cell, command.seed),
            drift.by_decision(cell, decisions, bad_below),
            drift.moved(reference, cell),
        ]
        write_page(command, reference, cell, found, lines, tables, words)
    return Watched("\n".join(lines), any(a.at for a in found.values()))


# --------------------------------------------------------------------------------------------------
# Judging


def chosen(id: str, share: float, seed: int) -> bool:
    """Whether an answer is among those that are judged here."""
    digest = hashlib.blake2b(f"{seed} {id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def judge_share(
    command: Command, config: dict, log: Log, judged: dict[str, Scores], path: Path
) -> dict[str, Scores]:
    """Have the chosen answers judged that are not yet, and add their scores to `path`. Raises
    ValueError or JudgeError; paid replies are then in judge_cache.jsonl."""
    wanted = [
        p
        for p in log.values()
        if p.scores and p.answer and p.id not in judged
        and chosen(p.id, command.share, command.seed)
    ]  # fmt: skip
    if not wanted:
        return {}
    command = as_before(command, config)
    judge = make_judge(command, command.out / "judge_cache.jsonl")
    asked = [Answer(Prompt(p.id, p.conversation), (), p.answer, p.scores, None) for p in wanted]
    draws = judge_again(judge, asked, [1] * len(asked))
    found = {p.id: scores for p, [scores] in zip(wanted, draws, strict=True) if scores}
    for k, scores in found.items():
        key = drift.answer_key(log[k].answer)
        append_line(path, {"id": k, "answer_key": key, "scores": scores, "judge": judge.name})
    return found


# --------------------------------------------------------------------------------------------------
# What is said


def told(
    command: Command, reference: Cell, cell: Cell, log: Log, found: dict[str, Alarm]
) -> list[str]:
    """The result in sentences."""
    lines = []
    for name, a in found.items():
        if a.at:
            way = "below" if a.after < a.before else "above"
            lines.append(
                f"ALARM: {name} has drifted, found at judged prompt {a.at:,} of {len(a.values):,}; "
                f"its mean of {a.after:.3f} is {way} the evaluation's {a.before:.3f}"
            )
    level = command.false_alarms
    if not lines:
        largest = max(a.values.max() for a in found.values())
        lines.append(
            f"no alarm: the evidence for drift has reached {largest:.3g}, and "
            f"{len(found) / level:.3g} would be an alarm"
        )
    lines.append(f"without drift there is an alarm with probability {level:g} at most, in all")
    malformed = sum(p.scores is None for p in log.values())
    lines.append(
        f"{len(log):,} predictions, {malformed:,} of them malformed; "
        f"{len(cell.valid):,} judged, of {len(set(cell.prompts)):,} prompts"
    )
    if reference.summary.get("with_references"):
        lines.append(
            "the evaluation's judge saw reference responses, which a log does not have: part of a "
            "drift may be due to that"
        )
    return lines


def kept(threshold: Threshold, cell: Cell, decisions: Sequence[str]) -> str:
    """The threshold's promise beside what was sent. decisions: of each judged answer."""
    sent = np.array([d == "send" for d in decisions])
    quality, prompts = cell.quality[sent], cell.prompts[sent]
    if threshold.measure == "quality":
        figure = over_prompts(quality, prompts)
    else:
        figure = over_prompts(quality < threshold.bad_below, prompts, proportion=True)
    return (
        f"promised {threshold.promise()}; measured on {sent.sum():,} sent answers: {figure.text()}"
    )


def write_page(
    command: Command,
    reference: Cell,
    cell: Cell,
    found: dict[str, Alarm],
    lines: Sequence[str],
    tables: Sequence[Table],
    words: Sequence[str],
) -> None:
    """watch.html, with the figures as PNG files too. Raises WriteError."""
    charts = {name: drift.batches(x, command.batch) for name, x in drift.watched(cell).items()}
    usual = {
        name: (float(x.mean()), float(x.std(ddof=1)))
        for name, x in drift.watched(reference).items()
    }
    out, values = command.out, {name: a.values for name, a in found.items()}
    drawn = [
        use_figures.control_chart(charts, usual, command.batch, out / "control.png"),
        use_figures.evidence_chart(values, command.false_alarms / len(found), out / "evidence.png"),
    ]
    rows = {
        name: [(r.prompt_id, r.self_scores, r.judge_scores) for r in c.rollouts]
        for name, c in (("evaluation", reference), ("log", cell))
    }
    summary = [
        ("Drift", list(lines)),
        *((f"In the {name}", render(summarise(x)).split("\n")[:5])
          for name, x in rows.items()),
        ("Compared with", [str(command.reference)]),
        (COMMANDS, [shlex.join(words)]),
    ]  # fmt: skip
    html = page.page(
        command.log.name, summary, "prompts", drawn, tables, None,
        answers.shown([cell], command.show),
    )  # fmt: skip
    write_text(out / "watch.html", html)


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        watched = run(command, [Path(sys.argv[0]).name, *sys.argv[1:]])
    except (ValueError, JudgeError, WriteError) as error:
        raise SystemExit(f"error: {error}") from None
    print(watched.text)
    print(f"written to {command.out}/watch.html")
    sys.exit(ALARM if watched.alarm else 0)


if __name__ == "__main__":
    main()
