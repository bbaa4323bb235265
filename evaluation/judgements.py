"""Judgements on file: figures, cost, another judge, agreement, preference, export.

`SOURCE` is a folder runs/NAME, results/NAME or results/NAME/BENCHMARK/MODEL, or a file made by
--export:

    python -m evaluation.judgements SOURCE                  figures, calls, tokens, cost, failures
    python -m evaluation.judgements SOURCE --judge NAME     the same answers by another judge
        --repeat 5                                          does the judge agree with itself?
        --human                                             with HelpSteer2's human labels?
        --against BASE                                      which model's answers are better?
    python -m evaluation.judgements SOURCE SOURCE ... --export FILE        all of it in one file

A judgement is asked for once: the same command again costs nothing. `--judge replay:FILE` (or
replay:FILE@MODEL, if the file holds several judges) takes the judgements of an exported file or of
a judge_cache.jsonl, here and in cycle.py and evaluate.py, and stops at a question that is not
there. With --judge, SOURCE is one folder: new judgements are added to its judge_cache.jsonl.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from evaluation import metrics
from evaluation.intervals import Interval
from judge import ask_all, make_judge, messages, parse_scores, prefer
from judging.client import Background, JudgeError
from judging.endpoint import ClientConfig, Endpoint
from judging.ledger import OK, question_key, read_attempts, render_totals, totals
from judging.replies import unfenced
from prompts import JUDGE_SYSTEM, Scores, judge_user
from storage.data import Prompt, load_prompts
from storage.files import read_lines, write_text
from storage.hub import data_file
from storage.options import CountOrZero, Options, in_range
from storage.record import Rollout, rollout_from_row
from storage.run_folder import CellFolder, EvaluationFolder, Folder, RunFolder

# --------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """Answers and judgements of one model on one prompt file."""

    name: str
    config: dict
    rollouts: list[Rollout]
    attempts: list[dict]  # lines of judge_cache.jsonl

    def table(self) -> dict[str, Interval]:
        rows = [(r.prompt_id, r.self_scores, r.judge_scores) for r in self.rollouts]
        return metrics.summarise(rows)


def load_sources(path: Path) -> list[Source]:
    """The sources of a run, an evaluation, one of its cells, or an exported file. Raises ValueError
    for anything else."""
    if path.is_file():
        return _read_export(path)
    if Folder(path).config_file.is_file():  # a run's checkpoints have one of their own
        return [_load_folder(Folder(path))]
    if cells := EvaluationFolder(path).cells():
        return [_load_folder(cell) for cell in cells.values()]
    raise ValueError(
        f"{path}: neither a file nor a folder with a config.json; give runs/NAME, results/NAME, "
        "one of its BENCHMARK/MODEL, or a file made by --export"
    )


def load_one_source(path: Path) -> Source:
    """The source of a folder or file that holds one. Raises ValueError."""
    sources = load_sources(path)
    if len(sources) != 1:
        names = ", ".join(source.name for source in sources) or "none"
        raise ValueError(f"{path}: one model's answers are needed; name one of {names}")
    return sources[0]


def _load_folder(folder: Folder) -> Source:
    rollouts = RunFolder(folder.path).all_rollouts() or CellFolder(folder.path).answers()
    attempts = list(read_attempts(folder.judge_cache)) if folder.judge_cache.exists() else []
    return Source(str(folder), folder.config(), rollouts, attempts)


def _read_export(path: Path) -> list[Source]:
    sources: dict[str, Source] = {}
    for number, _, row in read_lines(path):
        try:
            kind, content = row["kind"], row["content"]
            source = sources.setdefault(row["source"], Source(row["source"], {}, [], []))
            if kind == "config":
                source.config = content
            elif kind == "rollout":
                source.rollouts.append(rollout_from_row(content))
            else:
                source.attempts.append(content)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a line of an export ({error}); give a run's folder, or "
                "a file made by --export"
            ) from None
    return list(sources.values())


def export(sources: Sequence[Source], path: Path) -> str:
    """Write one file from which every figure can be computed again, and which replay:FILE reads.
    Returns what it holds, as a sentence."""
    lines = []
    for source in sources:
        rows = [("config", source.config)]
        rows += [("rollout", asdict(r)) for r in source.rollouts]
        rows += [("attempt", attempt) for attempt in source.attempts]
        lines += [{"source": source.name, "kind": kind, "content": row} for kind, row in rows]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    answers = [r for source in sources for r in source.rollouts]
    scored = sum(r.judge_scores is not None for r in answers)
    asked = [totals(source.attempts) for source in sources]
    return (
        f"{path}: {len(sources)} source(s) with {len(answers):,} answers, {scored:,} of them with "
        f"scores; {sum(t['judgements'] for t in asked):,} judgements on file from "
        f"{sum(t['calls'] for t in asked):,} calls"
    )


# --------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class Command(Options):
    """Judgements on file: figures, cost, another judge, agreement, pairwise preference, export."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Folders runs/NAME, results/NAME or results/NAME/BENCHMARK/MODEL, or files made by
    --export."""
    judge: str = ""
    """Judge the first source's answers: a model's name (see endpoint.py), replay:FILE, or an
    offline judge; empty: only show what is on file, or, with the options below, the judge that
    judged it."""
    repeat: CountOrZero = 0
    """Judgements of each answer, to see how far the judge agrees with itself."""
    against: Path | None = None
    """Ask the judge which answer is better, the first source's or this one's (Sec. 4.1: the base
    model's), in both orders."""
    human: bool = False
    """Judge the human-labelled responses of the prompt file and compare with the labels."""
    limit: CountOrZero = 0
    """Answers that are judged, drawn by seed; 0: all."""
    data: str = ""
    """Prompt file; empty: the one in the source's config.json."""
    use_references: Literal["as before", "yes", "no"] = "as before"
    """Show the judge reference responses where the data has them (App. B.3); as before: as in the
    source's config.json. Never shown with --human, nor to the pairwise referee."""
    export: Path | None = None
    """Write all sources' answers and judgements to this file."""
    seed: in_range(int, "[0, 4294967000]") = 42
    """Seed of the draw."""
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)


class Answer(NamedTuple):
    """An answer to be judged."""

    prompt: Prompt
    references: tuple  # shown to the judge
    text: str
    self_scores: Scores | None
    scores: Scores | None  # the judge's on file, or a human's

    @classmethod
    def of(cls, r: Rollout, prompt: Prompt, text: str, use_references: bool) -> "Answer":
        references = prompt.references if use_references else ()
        return cls(prompt, references, text, r.self_scores, r.judge_scores)


def well_formed(source: Source, prompts: dict[str, Prompt]) -> list[Rollout]:
    """The well-formed answers. Raises ValueError for a prompt that the file does not have."""
    valid = [r for r in source.rollouts if r.self_scores is not None]
    for r in valid:
        if r.prompt_id not in prompts:
            raise ValueError(
                f"{source.name}: prompt {r.prompt_id!r} is not in the prompt file; give the file "
                "that the answers were made from with --data"
            )
    return valid


def judge_again(
    judge, answers: Sequence[Answer], repeats: Sequence[int]
) -> list[list[Scores | None]]:
    """As many independent score vectors for each answer as `repeats` says, None where the judge
    refused. Once for each judge: its open connections belong to one event loop."""
    asked = [
        (a, draw) for a, repeat in zip(answers, repeats, strict=True) for draw in range(repeat)
    ]
    if not asked:
        return [[] for _ in answers]
    works = [
        judge.score(a.prompt.conversation, a.text, a.references, draw=draw) for a, draw in asked
    ]
    names = [f"prompt {a.prompt.id}, answer {a.text[:40]!r}" for a, _ in asked]
    work = ask_all(works, f"judging by {judge.name}", names)
    scores = iter(Background().submit(work).result())
    return [[next(scores) for _ in range(repeat)] for repeat in repeats]


def other_judges(source: Source, answers: Sequence[Answer], name: str) -> dict[str, list]:
    """First scores on file of these answers by judges other than `name`: judge -> one per answer,
    None where there is none."""
    scores: dict[str, dict[str, Scores]] = {}  # judge -> question -> scores
    for t in source.attempts:
        if (t["outcome"], t["form"], t["draw"]) == (OK, "scores", 0) and t["model"] != name:
            question = question_key(t["request"]["messages"])
            scores.setdefault(t["model"], {}).setdefault(
                question, parse_scores(unfenced(t["reply"]))
            )
    shown = [judge_user(a.prompt.conversation, a.text, a.references) for a in answers]
    questions = [question_key(messages(JUDGE_SYSTEM, user)) for user in shown]
    return {judge: [given.get(q) for q in questions] for judge, given in scores.items()}


def report(command: Command, source: Source, judge, answers: Sequence[Answer]) -> str:
    """Judge the answers; figures, and agreement with scores on file, other judges and itself."""
    draws = judge_again(judge, answers, [max(1, command.repeat)] * len(answers))
    asked = len(answers)
    judged = [(a, d) for a, d in zip(answers, draws, strict=True) if None not in d]
    answers, draws = [a for a, _ in judged], [d for _, d in judged]
    ids = [a.prompt.id for a in answers]
    parts = []
    if asked > len(answers):
        parts.append(f"{asked - len(answers):,} answers not judged: {judge.name} refused them")

    def compare(title: str, other: Sequence[Scores | None]) -> None:
        pairs = [(i, d[0], o) for i, d, o in zip(ids, draws, other, strict=True) if o is not None]
        if pairs:
            table = metrics.agreement(pairs)
            parts.append(f"{judge.name} and {title}\n{metrics.render_agreement(table)}")

    if command.human:
        compare("the human labels", [a.scores for a in answers])
    else:
        rows = [(i, a.self_scores, d[0]) for i, a, d in zip(ids, answers, draws, strict=True)]
        parts.append(
            f"{len(answers):,} well-formed answers of {source.name}, judged by {judge.name}\n"
            + metrics.render(metrics.summarise(rows))
        )
        compare("the scores on file", [a.scores for a in answers])
        for name, scores in other_judges(source, answers, judge.name).items():
            compare(name, scores)
    if command.repeat > 1:
        table = metrics.self_agreement(ids, draws)
        parts.append(
            f"{judge.name} and itself, {command.repeat} judgements of each answer\n"
            + metrics.render_agreement(table)
        )
        parts.append(
            "calibration that others reach against each judgement left out\n"
            + metrics.render(metrics.repeated_agreement(ids, draws))
        )
    return "\n\n".join(parts)


def compare_pairs(judge, ours: Source, theirs: Source, prompts: dict, limit: int, seed: int) -> str:
    """The response win-rate (Sec. 4.1) over prompts and samples that both answered well-formed."""
    other = {(r.prompt_id, r.sample): r.answer for r in theirs.rollouts if r.self_scores}
    pairs = [
        (r.prompt_id, r.answer, other[r.prompt_id, r.sample])
        for r in well_formed(ours, prompts)
        if (r.prompt_id, r.sample) in other
    ]
    if not pairs:
        raise ValueError(
            f"{ours.name} and {theirs.name} have no prompt that both answered well-formed; give "
            "another model's answers to the same prompts to --against"
        )
    pairs = draw(pairs, limit, seed)
    works = [prefer(judge, prompts[i].conversation, one, two) for i, one, two in pairs]
    names = [f"prompt {i}" for i, _, _ in pairs]
    asked = ask_all(works, f"comparing by {judge.name}", names)
    preferences = Background().submit(asked).result()
    judged = [(i, p) for (i, _, _), p in zip(pairs, preferences, strict=True) if p is not None]
    table = metrics.win_rate([i for i, _ in judged], [p for _, p in judged])
    title = f"{ours.name} against {theirs.name}, by {judge.name}, both orders"
    return f"{title}\n{metrics.render(table)}"


def draw(items: Sequence, limit: int, seed: int) -> list:
    """`limit` items in their order, drawn by seed; 0: all. Raises ValueError if there are none."""
    if not items:
        raise ValueError("there is no well-formed answer to judge")
    if not limit or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def as_before(command: Command, config: dict) -> Command:
    """Without --judge, the judge that judged the source, asked where and as it was asked then;
    options --endpoint.* override that."""
    if command.judge:
        return command
    given = {f.name: getattr(command.endpoint, f.name) for f in fields(Endpoint)}
    usual, former = asdict(Endpoint()), config["endpoint"]
    endpoint = Endpoint(**{k: former.get(k, v) if v == usual[k] else v for k, v in given.items()})
    return replace(command, judge=config["judge"], endpoint=endpoint)


def run(command: Command) -> str:
    """The command's output. Raises ValueError or JudgeError."""
    if not command.sources:
        raise ValueError("no source is given, such as results/NAME; --help shows the ways")
    sources = [source for path in command.sources for source in load_sources(path)]
    if command.export:
        return export(sources, command.export)
    if not (command.judge or command.repeat or command.against or command.human):
        return "\n\n".join(
            f"{s.name}\n{metrics.render(s.table())}\n\n{render_totals(s.attempts)}" for s in sources
        )
    source, folder = sources[0], command.sources[0]
    if not Folder(folder).config_file.is_file():
        raise ValueError(
            f"{folder}: new judgements need one folder; give runs/NAME or "
            "results/NAME/BENCHMARK/MODEL"
        )
    command = as_before(command, source.config)
    judge = make_judge(command, Folder(folder).judge_cache)
    prompts = {p.id: p for p in load_prompts(data_file(command.data or source.config["data"]))}
    if command.against:
        theirs = load_one_source(command.against)
        return compare_pairs(judge, source, theirs, prompts, command.limit, command.seed)
    if command.human:
        labelled = [(p, reference) for p in prompts.values() for reference in p.references]
        answers = [Answer(p, (), r.response, None, r.scores) for p, r in labelled]
        if not answers:
            raise ValueError("the prompt file has no human labels; give HelpSteer2's with --data")
    else:
        shown = {"as before": source.config["use_references"]}.get(
            command.use_references, command.use_references == "yes"
        )
        rollouts = well_formed(source, prompts)
        answers = [Answer.of(r, prompts[r.prompt_id], r.answer, shown) for r in rollouts]
    return report(command, source, judge, draw(answers, command.limit, command.seed))


def main() -> None:
    try:
        print(run(tyro.cli(Command, description=__doc__)))
    except (ValueError, JudgeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
