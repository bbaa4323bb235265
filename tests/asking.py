"""How tests ask a judge at the fake server (tests/fake_judge.py)."""

import asyncio

from judge import LLMJudge
from judging.client import Background, ChatClient
from judging.endpoint import ClientConfig, Endpoint, Service
from judging.ledger import Ledger, read_attempts

TURNS = [{"role": "user", "content": "Why is the sky blue?"}]
LOOP = Background()
FAST = ClientConfig(backoff=0.01, backoff_max=0.02, attempts=4)


def make(folder, config=FAST, concurrency=4, model="some-judge", endpoint=Endpoint(), start=None):  # noqa: B008
    service = Service(model, endpoint, config)
    return LLMJudge(ChatClient(service, concurrency, Ledger(folder / "ledger.jsonl", start)))


def score(judge, *answers):
    """Scores or JudgeErrors of all answers, asked for together."""

    async def together():
        works = [judge.score(TURNS, a) for a in answers]
        return await asyncio.gather(*works, return_exceptions=True)

    return LOOP.submit(together()).result()


def score_in_turn(judge, *answers):
    """The same, each asked for when the one before is done."""
    return [got for answer in answers for got in score(judge, answer)]


def attempts(folder):
    return list(read_attempts(folder / "ledger.jsonl"))
