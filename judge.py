"""The judge: what is asked, and what counts as an answer (Sec. 4.1, App. B.2, B.3).

`score(conversation, answer, references)` gives five integers 0-9 for an answer without its
self-evaluation block; `prefer(judge, conversation, first, second)` says which of two is better, and
asks in both orders.

`LLMJudge` asks a model (endpoint.py: which, client.py: how), or takes what one has said from a
file. heuristic.py has an offline stand-in that says nothing about real judging.

Judgements on file, with what they cost (`SOURCE` is a folder runs/NAME, results/NAME or
results/NAME/BENCHMARK/MODEL, or a file made by --export):

    python judge.py SOURCE                                   figures, calls, tokens, cost, failures
    python judge.py SOURCE --judge claude-sonnet-4-6         the same answers by another judge
    python judge.py SOURCE --judge gpt-5.4 --repeat 5        does the judge agree with itself?
    python judge.py SOURCE --judge gpt-5.4 --human           with HelpSteer2's human labels?
    python judge.py SOURCE --judge gpt-5.4 --against BASE    which of two models' answers is better?
    python judge.py SOURCE SOURCE ... --export FILE          all of it in one file

A judgement is asked for once: the same command again costs nothing. `--judge replay:FILE` (or
replay:FILE@MODEL, if the file holds several judges) takes the judgements of an exported file or of
a judge_cache.jsonl, here and in cycle.py and evaluate.py, and stops at what is not there. Under a
judge, SOURCE is one folder, because its new judgements are added there.
"""

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from tqdm import tqdm

import metrics
import reward
from buffer import Rollout
from client import Background, ChatClient, JudgeError, Replay
from data import Prompt, load_prompts
from endpoint import ClientConfig, Endpoint, Form, Service
from heuristic import HeuristicJudge
from hub import data_file
from ledger import LEDGER, OK, Ledger, question_of, render_totals
from prompts import ATTRIBUTES, JUDGE_SYSTEM, PAIR_SYSTEM, Scores, Turn, judge_user, pair_user
from sources import Source, export, load

# --------------------------------------------------------------------------------------------------
# What counts. The text of a ValueError is the reason under which a failed try is counted


def _object(text: str, keys: Sequence[str]) -> dict:
    """The one JSON object that the reply consists of."""

    text = text.strip(" \t\n\r")  # JSON's white space
    try:
        pairs, end = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
    except (ValueError, RecursionError):
        raise ValueError("text before the JSON" if "{" in text[1:] else "not JSON") from None
    if text[end:]:
        another = text[end:].lstrip().startswith("{")
        raise ValueError("two objects" if another else "text after the JSON")
    if not text.startswith("{") or sorted(key for key, _ in pairs) != sorted(keys):
        raise ValueError("other keys than asked for")
    return dict(pairs)


def parse_scores(text: str) -> Scores:
    """Five scores from a reply that is one JSON object with exactly the five keys. ValueError for
    anything else."""
    row = _object(text, ATTRIBUTES)
    scores = tuple(row[a] for a in ATTRIBUTES)
    if not all(type(s) is int for s in scores):
        raise ValueError("a score that is no integer")
    if not all(0 <= s <= 9 for s in scores):
        raise ValueError("a score off the scale 0-9")
    return scores


def parse_preference(text: str) -> str:
    """ "A", "B" or "tie", likewise."""
    better = _object(text, ["better"])["better"]
    if better not in ("A", "B", "tie"):
        raise ValueError("neither A, B nor tie")
    return better


def _schema(properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCORES = Form("scores", _schema(dict.fromkeys(ATTRIBUTES, _DIGIT)), parse_scores)
PREFERENCE = Form(
    "preference",
    _schema({"better": {"type": "string", "enum": ["A", "B", "tie"]}}),
    parse_preference,
)


# --------------------------------------------------------------------------------------------------
# The judges


class Preference(NamedTuple):
    """1: the first answer is better, -1: the second, 0: neither."""

    result: int  # what both orders say; 0 where they differ
    shown_first: int  # what was said when the first answer was shown first
    shown_second: int  # what was said when it was shown second


class LLMJudge:
    """Sec. 4.1: one LLM supplies all supervision. `client`: ChatClient or Replay."""

    def __init__(self, client: ChatClient | Replay):
        self.client = client
        self.name = client.model

    async def score(
        self, conversation: Sequence[Turn], answer: str, references: Sequence = (), draw: int = 0
    ) -> Scores:
        """`draw`: which of several independent judgements. Raises JudgeError when there is no
        usable reply."""
        user = judge_user(conversation, answer, references)
        return await self.client.ask(_messages(JUDGE_SYSTEM, user), SCORES, draw)

    async def prefer(self, conversation: Sequence[Turn], first: str, second: str) -> Preference:
        """Asked in both orders; a disagreement is a tie. Raises JudgeError."""

        async def ask(a: str, b: str) -> int:
            user = pair_user(conversation, a, b)
            better = await self.client.ask(_messages(PAIR_SYSTEM, user), PREFERENCE)
            return {"A": 1, "B": -1, "tie": 0}[better]

        one, other = await asyncio.gather(ask(first, second), ask(second, first))
        return Preference(one if one == -other else 0, one, -other)

    def lap(self) -> dict[str, float]:
        """This process's calls, failed tries and US dollars since the last lap."""
        return self.client.lap()


def _messages(system: str, user: str) -> list[Turn]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


async def prefer(judge, conversation: Sequence[Turn], first: str, second: str) -> Preference:
    """Any judge's preference; that of an offline judge is for the higher quality."""
    if isinstance(judge, LLMJudge):
        return await judge.prefer(conversation, first, second)
    one, other = [reward.quality(await judge.score(conversation, x)) for x in (first, second)]
    better = (one > other) - (one < other)
    return Preference(better, better, better)


def offline_judge(name: str):
    """The judge of that name if it needs no network: heuristic, rubric, or rubric:NOISE."""
    if name == "heuristic":
        return HeuristicJudge()
    if re.fullmatch(r"rubric(:(0?\.\d+|0|1))?", name):
        from tiny import RubricJudge  # brings torch, which judging needs for nothing else

        return RubricJudge(float(name.partition(":")[2] or 0))
    return None


def make_judge(config, ledger: Path, ranks: int = 1, rank: int = 0, start: int | None = None):
    """The judge that `config` (any command's) names. Concurrency is shared by the ranks; `start` is
    a number that they share. Raises ValueError for what can be seen to be wrong beforehand."""
    if offline := offline_judge(config.judge):
        return offline
    if config.judge.startswith("replay:"):
        path, _, model = config.judge.removeprefix("replay:").partition("@")
        return LLMJudge(Replay(Path(path), model))
    total = config.client.concurrency
    if total < ranks:
        raise ValueError(
            f"--client.concurrency {total} is shared by {ranks} ranks; give each at least one"
        )
    share = total // ranks + (rank < total % ranks)
    service = Service(config.judge, config.endpoint, config.client)
    return LLMJudge(ChatClient(service, share, Ledger(ledger, start)))


# --------------------------------------------------------------------------------------------------
# Judgements on file


@dataclass(frozen=True)
class Command:
    """Judgements on file: figures, cost, another judge, agreement, pairwise preference, export."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Folders runs/NAME, results/NAME or results/NAME/BENCHMARK/MODEL, or files made by
    --export."""
    judge: str = ""
    """Judge the first source's answers: a model's name (see endpoint.py), replay:FILE, or an
    offline judge; empty: only show what is on file, or, with the options below, the judge that
    judged it."""
    repeat: int = 0
    """Judgements of each answer, to see how far the judge agrees with itself."""
    against: Path | None = None
    """Ask the judge which answer is better, the first source's or this one's (Sec. 4.1: the base
    model's), in both orders."""
    human: bool = False
    """Judge the human-labelled responses of the prompt file and compare with the labels."""
    limit: int = 0
    """Answers that are judged, drawn by seed; 0: all."""
    data: str = ""
    """Prompt file; empty: the one in the source's config.json."""
    use_references: Literal["as before", "yes", "no"] = "as before"
    """Show the judge reference responses where the data has them (App. B.3); as before: as in the
    source's config.json. Never shown with --human, nor to the pairwise referee."""
    export: Path | None = None
    """Write all sources' answers and judgements to this file."""
    seed: int = 42
    """Seed of the draw."""
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)


class Answer(NamedTuple):
    """What is put before the judge, and what is known of it."""

    prompt: Prompt
    references: tuple
    text: str
    self_scores: Scores | None
    known: Scores | None  # the scores on file, or a human's

    @classmethod
    def of(cls, r: Rollout, prompt: Prompt, text: str, use_references: bool) -> "Answer":
        references = prompt.references if use_references else ()
        return cls(prompt, references, text, r.self_scores, r.judge_scores)


def answers_of(source: Source, prompts: dict[str, Prompt], use_references: bool) -> list[Answer]:
    """The well-formed ones. Raises ValueError for a prompt that the file does not have."""
    valid = [r for r in source.rollouts if r.self_scores is not None]
    for r in valid:
        if r.prompt_id not in prompts:
            raise ValueError(
                f"{source.name}: prompt {r.prompt_id!r} is not in the prompt file; give the file "
                "that the answers were made from with --data"
            )
    return [Answer.of(r, prompts[r.prompt_id], r.answer, use_references) for r in valid]


async def ask_all(works: Sequence, what: str) -> list:
    """The results of coroutines, with a bar. If one fails, the others' replies that are paid for
    are waited for and kept before its JudgeError is raised."""
    bar = tqdm(total=len(works), desc=what)

    async def one(work):
        try:
            return await work
        finally:
            bar.update()

    with bar:
        results = await asyncio.gather(*map(one, works), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def judge_again(judge, answers: Sequence[Answer], repeat: int) -> list[list[Scores]]:
    """Per answer `repeat` scores."""
    if not answers:
        return []
    works = [
        judge.score(a.prompt.conversation, a.text, a.references, draw=draw)
        for a in answers
        for draw in range(repeat)
    ]
    flat = Background().submit(ask_all(works, f"judging by {judge.name}")).result()
    return [flat[i : i + repeat] for i in range(0, len(flat), repeat)]


def other_judges(source: Source, answers: Sequence[Answer], name: str) -> dict[str, list]:
    """Cached first scores of these answers by other judges: name -> one per answer, None where
    there is none."""
    found: dict[str, dict[str, Scores]] = {}
    for t in source.tries:
        if (t["outcome"], t["form"], t["draw"]) == (OK, "scores", 0) and t["model"] != name:
            asked = question_of(t["request"]["messages"])
            found.setdefault(t["model"], {}).setdefault(asked, parse_scores(t["reply"]))
    asked = [
        question_of(
            _messages(JUDGE_SYSTEM, judge_user(a.prompt.conversation, a.text, a.references))
        )
        for a in answers
    ]
    return {model: [scores.get(q) for q in asked] for model, scores in found.items()}


def report(command: Command, source: Source, judge, answers: Sequence[Answer]) -> str:
    """Judge the answers and say how far the judge can be trusted."""
    draws = judge_again(judge, answers, max(1, command.repeat))
    ids = [a.prompt.id for a in answers]
    gamma = source.config["reward"]["gamma"]
    parts = []

    def compare(title: str, known: Sequence[Scores | None]) -> None:
        pairs = [(i, d[0], k) for i, d, k in zip(ids, draws, known, strict=True) if k is not None]
        if pairs:
            table = metrics.agreement(pairs)
            parts.append(f"{judge.name} and {title}\n{metrics.render_agreement(table)}")

    if command.human:
        compare("the human labels", [a.known for a in answers])
    else:
        rows = [(i, a.self_scores, d[0]) for i, a, d in zip(ids, answers, draws, strict=True)]
        parts.append(
            f"{len(answers):,} well-formed answers of {source.name}, judged by {judge.name}\n"
            + metrics.render(metrics.summarise(rows, gamma))
        )
        compare("the scores on file", [a.known for a in answers])
        for name, known in other_judges(source, answers, judge.name).items():
            compare(name, known)
    if command.repeat > 1:
        table = metrics.self_agreement(ids, draws)
        parts.append(
            f"{judge.name} and itself, {command.repeat} judgements of each answer\n"
            + metrics.render_agreement(table)
        )
        parts.append(
            "what calibration can reach with this judge: against each judgement held out\n"
            + metrics.render(metrics.ceiling(ids, draws, gamma))
        )
    return "\n\n".join(parts)


def compare_pairs(judge, ours: Source, theirs: Source, prompts: dict, limit: int, seed: int) -> str:
    """The response win-rate (Sec. 4.1) over prompts and samples that both answered well-formed."""
    other = {(r.prompt_id, r.sample): r.answer for r in theirs.rollouts if r.self_scores}
    pairs = [
        (r.prompt_id, r.answer, other[r.prompt_id, r.sample])
        for r in ours.rollouts
        if r.self_scores and (r.prompt_id, r.sample) in other
    ]
    pairs = draw(pairs, limit, seed)
    works = [prefer(judge, prompts[i].conversation, one, two) for i, one, two in pairs]
    found = Background().submit(ask_all(works, f"comparing by {judge.name}")).result()
    table = metrics.win_rate([i for i, _, _ in pairs], found)
    title = f"{ours.name} against {theirs.name}, by {judge.name}, both orders"
    return f"{title}\n{metrics.render(table)}"


def draw(items: Sequence, limit: int, seed: int) -> list:
    """`limit` of them in their order; 0: all. Raises ValueError if there are none."""
    if not items:
        raise ValueError("there is no well-formed answer to judge")
    if not limit or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def run(command: Command) -> str:
    """What the command prints. Raises ValueError or JudgeError."""
    if not command.sources:
        raise ValueError("no source is given, such as results/NAME; --help shows the ways")
    sources = [source for path in command.sources for source in load(path)]
    if command.export:
        export(sources, command.export)
        return f"{command.export}: {len(sources)} source(s)"
    if not (command.judge or command.repeat or command.against or command.human):
        return "\n\n".join(
            f"{s.name}\n{metrics.render(s.table())}\n\n{render_totals(s.tries)}" for s in sources
        )
    source, folder = sources[0], command.sources[0]
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: new judgements need one folder; give runs/NAME or "
            "results/NAME/BENCHMARK/MODEL"
        )
    command = replace(command, judge=command.judge or source.config["judge"])
    judge = make_judge(command, folder / LEDGER)
    prompts = {p.id: p for p in load_prompts(data_file(command.data or source.config["data"]))}
    if command.against:
        [theirs] = load(command.against)
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
        answers = answers_of(source, prompts, shown)
    return report(command, source, judge, draw(answers, command.limit, command.seed))


def main() -> None:
    try:
        print(run(tyro.cli(Command, description=__doc__)))
    except (ValueError, JudgeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
