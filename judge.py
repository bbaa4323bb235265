"""The judge: its questions and the valid replies (Sec. 4.1, App. B.2, B.3).

`score(conversation, answer, references)` gives five integers 0-9 for an answer without its
self-evaluation block. `prefer(judge, conversation, first, second)` says which of two answers is
better, and asks in both orders (departure: the authors ask in one; the report shows the first order
by itself too).

`LLMJudge` asks a model at an endpoint (judging/endpoint.py, judging/client.py), or takes a model's
replies from a file. Two judges work offline: judging/heuristic.py, for trying out the code, whose
scores say nothing about a real judge's; and the miniature's rubric (miniature/world.py). `python -m
evaluation.judgements` works with judgements on file.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import reward
from judging.client import ChatClient, JudgeError, Refused, connection
from judging.endpoint import Form, Service, prices, with_url
from judging.heuristic import HeuristicJudge
from judging.ledger import Ledger
from judging.replay import Replay
from miniature.world import RubricJudge
from prompts import ATTRIBUTES, JUDGE_SYSTEM, PAIR_SYSTEM, Scores, Turn, judge_user, pair_user
from storage.progress import progress

# --------------------------------------------------------------------------------------------------
# Parsing replies. The text of a ValueError is the recorded reason of the failed attempt


def _object(text: str, keys: Sequence[str]) -> dict:
    """The JSON object of a reply that must be exactly one object with these keys. ValueError if it
    is not."""
    text = text.strip(" \t\n\r")  # JSON's white space
    try:
        pairs, end = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
    except (ValueError, RecursionError):
        raise ValueError("text before the JSON" if "{" in text[1:] else "not JSON") from None
    if text[end:]:
        second_object = text[end:].lstrip().startswith("{")
        raise ValueError("two objects" if second_object else "text after the JSON")
    if not text.startswith("{") or sorted(key for key, _ in pairs) != sorted(keys):
        raise ValueError("other keys than asked for")
    return dict(pairs)


def parse_scores(text: str) -> Scores:
    """Five scores from a reply that is one JSON object with exactly the five keys. ValueError for
    any other reply."""
    row = _object(text, ATTRIBUTES)
    scores = tuple(row[a] for a in ATTRIBUTES)
    if not all(type(s) is int for s in scores):
        raise ValueError("a score that is no integer")
    if not all(0 <= s <= 9 for s in scores):
        raise ValueError("a score off the scale 0-9")
    return scores


def parse_preference(text: str) -> str:
    """ "A", "B" or "tie" from a reply that is one JSON object with exactly the key "better".
    ValueError for any other reply."""
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
    """1: the first answer is better, -1: the second is better, 0: neither."""

    result: int  # the verdict of both orders; 0 if the two differ
    shown_first: int  # the verdict with the first answer shown first
    shown_second: int  # the verdict with the first answer shown second


class LLMJudge:
    """Sec. 4.1: one LLM supplies all supervision. `client`: ChatClient or Replay."""

    def __init__(self, client: ChatClient | Replay):
        self.client = client  # None in an offline judge
        self.name = client.model

    async def score(
        self, conversation: Sequence[Turn], answer: str, references: Sequence = (), draw: int = 0
    ) -> Scores:
        """`draw` numbers independent judgements of an answer. Raises JudgeError if there is no
        valid reply."""
        user = judge_user(conversation, answer, references)
        return await self.client.ask(messages(JUDGE_SYSTEM, user), SCORES, draw)

    async def prefer(self, conversation: Sequence[Turn], first: str, second: str) -> Preference:
        """Asks in both orders; if the verdicts differ, the result is a tie. Raises JudgeError."""

        async def ask(a: str, b: str) -> int:
            user = pair_user(conversation, a, b)
            better = await self.client.ask(messages(PAIR_SYSTEM, user), PREFERENCE)
            return {"A": 1, "B": -1, "tie": 0}[better]

        orders = ask(first, second), ask(second, first)
        results = await asyncio.gather(*orders, return_exceptions=True)
        if failed := [r for r in results if isinstance(r, BaseException)]:
            raise min(failed, key=lambda error: isinstance(error, Refused))  # Refused is milder
        shown_first, reverse = results
        shown_second = -reverse
        result = shown_first if shown_first == shown_second else 0
        return Preference(result, shown_first, shown_second)


def messages(system: str, user: str) -> list[Turn]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


async def prefer(judge, conversation: Sequence[Turn], first: str, second: str) -> Preference:
    """Any judge's preference; an offline judge prefers the answer of higher quality."""
    if isinstance(judge, LLMJudge):
        return await judge.prefer(conversation, first, second)
    first_quality = reward.quality(await judge.score(conversation, first))
    second_quality = reward.quality(await judge.score(conversation, second))
    verdict = (first_quality > second_quality) - (first_quality < second_quality)
    return Preference(verdict, verdict, verdict)


async def ask_all(works: Sequence, label: str, names: Sequence[str]) -> list:
    """Run coroutines that ask a judge, with a progress bar, and return their results, None where
    the judge refused and --client.skip_refused allows that. If one fails, its JudgeError is raised
    after requests in flight have finished: they are paid for, and their replies are recorded.
    `names` says what each is about, for the error."""
    bar = progress(total=len(works), desc=label)

    async def with_progress(work):
        try:
            return await work
        finally:
            bar.update()

    with bar:
        results = await asyncio.gather(*map(with_progress, works), return_exceptions=True)
    results = [None if isinstance(result, Refused) else result for result in results]
    for name, result in zip(names, results, strict=True):
        if isinstance(result, JudgeError):
            raise result.named(name)
        if isinstance(result, BaseException):
            raise result
    return results


# --------------------------------------------------------------------------------------------------
# The judge of a configuration


def offline_judge(name: str) -> HeuristicJudge | RubricJudge | None:
    """The offline judge of that name: heuristic, rubric, or rubric:NOISE; None for other names."""
    if name == "heuristic":
        return HeuristicJudge()
    if re.fullmatch(r"rubric(:(0?\.\d+|0|1))?", name):
        return RubricJudge(float(name.partition(":")[2] or 0))
    return None


def _replay(config) -> LLMJudge | None:
    """The judge for a name replay:FILE, replay:FILE@MODEL or replay:FILE@MODEL@URL, with the
    replies in that file; None for other names."""
    found = re.fullmatch(r"replay:([^@]*)(?:@(.*?))?(?:@(https?://.*))?", config.judge)
    if not found:
        return None
    path, model, url = (part or "" for part in found.groups())
    return LLMJudge(Replay(Path(path), model, url, config.client.skip_refused))


def with_judge_url(config):
    """The configuration with the judge's URL filled in, if its judge is asked at an endpoint: a run
    keeps it. Raises ValueError."""
    if offline_judge(config.judge) or config.judge.startswith("replay:"):
        return config
    return replace(config, endpoint=with_url(config.judge, config.endpoint))


def _service(config, ranks: int) -> Service:
    if config.client.concurrency < ranks:
        raise ValueError(
            f"--client.concurrency {config.client.concurrency} is shared by {ranks} ranks, and "
            f"each needs at least one; give {ranks} or more"
        )
    return Service(config.judge, config.endpoint, config.client)


def check_judge(config, ranks: int = 1) -> str:
    """The name of the judge of `config` (any command's). Raises ValueError for every mistake that
    can be found before the first request."""
    if judge := offline_judge(config.judge) or _replay(config):
        return judge.name
    service = _service(config, ranks)
    connection(service)
    return service.model


def judge_prices(config) -> tuple[float | None, float | None]:
    """US dollars per million tokens in and out; 0 for a judge that works offline, None if
    unknown."""
    if offline_judge(config.judge) or config.judge.startswith("replay:"):
        return 0.0, 0.0
    return prices(config.judge, config.client)


def make_judge(config, cache: Path, ranks: int = 1, rank: int = 0, launch: int | None = None):
    """The judge of `config` (any command's). Replies are recorded in `cache`. The ranks share the
    concurrency and `launch`, a number that identifies this launch (parallel.launch_id). Raises
    ValueError as check_judge does."""
    if judge := offline_judge(config.judge) or _replay(config):
        return judge
    service, total = _service(config, ranks), config.client.concurrency
    share = total // ranks + (rank < total % ranks)
    return LLMJudge(ChatClient(service, share, Ledger(cache, launch)))
