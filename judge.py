"""The judge: what it is asked and what counts as an answer (Sec. 4.1, App. B.2, B.3).

`score(conversation, answer, references)` gives five integers 0-9 for an answer without its
self-evaluation block; `prefer(judge, conversation, first, second)` says which of two is better, and
asks in both orders.

`LLMJudge` asks a model (judging/endpoint.py: which one; judging/client.py: how), or takes what one
has said from a file. judging/heuristic.py is an offline stand-in that says nothing about real
judging; the miniature has a rubric of its own (miniature/world.py). `python -m
evaluation.judgements` works with judgements on file.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import reward
from judging.client import ChatClient, Replay
from judging.endpoint import Form, Service
from judging.heuristic import HeuristicJudge
from judging.ledger import Ledger
from miniature.world import RubricJudge
from prompts import ATTRIBUTES, JUDGE_SYSTEM, PAIR_SYSTEM, Scores, Turn, judge_user, pair_user
from storage.progress import progress

# --------------------------------------------------------------------------------------------------
# Parsing replies. The text of a ValueError is the reason under which a failed attempt is counted


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
    """1: the first answer is better, -1: the second is, 0: neither."""

    result: int  # what both orders say; 0 where they differ
    shown_first: int  # what was said when the first answer was shown first
    shown_second: int  # what was said when it was shown second


class LLMJudge:
    """Sec. 4.1: one LLM supplies all supervision. `client`: ChatClient or Replay."""

    def __init__(self, client: ChatClient | Replay):
        self.client = client  # None in an offline judge
        self.name = client.model

    async def score(
        self, conversation: Sequence[Turn], answer: str, references: Sequence = (), draw: int = 0
    ) -> Scores:
        """`draw`: which of several independent judgements. Raises JudgeError when there is no
        usable reply."""
        user = judge_user(conversation, answer, references)
        return await self.client.ask(messages(JUDGE_SYSTEM, user), SCORES, draw)

    async def prefer(self, conversation: Sequence[Turn], first: str, second: str) -> Preference:
        """Asked in both orders; a disagreement is a tie. Raises JudgeError."""

        async def ask(a: str, b: str) -> int:
            user = pair_user(conversation, a, b)
            better = await self.client.ask(messages(PAIR_SYSTEM, user), PREFERENCE)
            return {"A": 1, "B": -1, "tie": 0}[better]

        one, other = await asyncio.gather(ask(first, second), ask(second, first))
        return Preference(one if one == -other else 0, one, -other)


def messages(system: str, user: str) -> list[Turn]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


async def prefer(judge, conversation: Sequence[Turn], first: str, second: str) -> Preference:
    """Any judge's preference; that of an offline judge is for the higher quality."""
    if isinstance(judge, LLMJudge):
        return await judge.prefer(conversation, first, second)
    one, other = [reward.quality(await judge.score(conversation, x)) for x in (first, second)]
    better = (one > other) - (one < other)
    return Preference(better, better, better)


async def ask_all(works: Sequence, label: str) -> list:
    """The results of coroutines that ask a judge, with progress. If one fails, requests in flight
    are waited for and kept, because they are paid for, before its JudgeError is raised."""
    bar = progress(total=len(works), desc=label)

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


# --------------------------------------------------------------------------------------------------
# Which judge


def offline_judge(name: str) -> HeuristicJudge | RubricJudge | None:
    """The judge of that name if it needs no network: heuristic, rubric, or rubric:NOISE."""
    if name == "heuristic":
        return HeuristicJudge()
    if re.fullmatch(r"rubric(:(0?\.\d+|0|1))?", name):
        return RubricJudge(float(name.partition(":")[2] or 0))
    return None


def _replay(name: str) -> LLMJudge | None:
    """The judge whose replies on file replay:FILE or replay:FILE@MODEL names."""
    if not name.startswith("replay:"):
        return None
    path, _, model = name.removeprefix("replay:").partition("@")
    return LLMJudge(Replay(Path(path), model))


def _service(config, ranks: int) -> Service:
    if config.client.concurrency < ranks:
        raise ValueError(
            f"--client.concurrency {config.client.concurrency} is shared by {ranks} ranks; give "
            "each at least one"
        )
    return Service(config.judge, config.endpoint, config.client)


def check_judge(config, ranks: int = 1) -> str:
    """The name of the judge that `config` (any command's) asks for. Raises ValueError for every
    mistake that shows before the first request."""
    if judge := offline_judge(config.judge) or _replay(config.judge):
        return judge.name
    return _service(config, ranks).model


def make_judge(config, cache: Path, ranks: int = 1, rank: int = 0, launch: int | None = None):
    """The judge that `config` (any command's) asks for. Replies are kept in `cache`; the ranks
    share the concurrency, and `launch`, a number that no other launch has. Raises ValueError as
    check_judge does."""
    if judge := offline_judge(config.judge) or _replay(config.judge):
        return judge
    service, total = _service(config, ranks), config.client.concurrency
    share = total // ranks + (rank < total % ranks)
    return LLMJudge(ChatClient(service, share, Ledger(cache, launch)))
