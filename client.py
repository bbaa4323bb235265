"""The way to a judge: one OpenAI-compatible chat client with retries, deadline, budget and a record
of every try. The only file that uses the network to score.

Authors' request settings (Sec. 4.1's judge): temperature 0.1, at most 128 output tokens, 8 tries,
back-off from 2 s doubling to 120 s with jitter, 24 requests at once, 90 s time-out.

A reply counts only if the caller's form accepts it; anything else is a failed try, kept and counted
under its reason. After the last try, at the deadline, at the budget, or when a request is refused
in a way that no retry can mend, all ranks stop asking; what is in flight is still waited for and
kept, because it is paid for. A score is never made up, and the same command run again goes on.

Not in the paper: replies are held to a JSON schema where the endpoint can do that; the deadline and
the budget.
"""

import asyncio
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import openai

from endpoint import Form, Service
from ledger import OK, Ledger, key_of, question_of, read_tries


class JudgeError(RuntimeError):
    """No usable reply, and none to be had by asking again now. The message says what to do."""


class Tried(NamedTuple):
    """What became of one request."""

    outcome: str = OK  # or why the reply does not count
    reply: str | None = None
    served_model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    retry_after: float = 0.0  # seconds that the server asks for
    final: str | None = None  # why no retry can help


class ChatClient:
    """Asks one model, at most `concurrency` requests at once, and remembers what it said."""

    def __init__(self, service: Service, concurrency: int, ledger: Ledger):
        self.service, self.config, self.ledger = service, service.config, ledger
        self.model, self.endpoint = service.model, service.base_url
        self.counts: Counter[str] = Counter()  # of this process: calls, failed tries, US dollars
        self._api = openai.AsyncOpenAI(
            api_key=service.key,
            base_url=service.base_url,
            max_retries=0,  # retries are counted here
            timeout=self.config.timeout,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight = 0
        self._asking: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        """The parsed reply; `draw` tells several replies to the same question apart. Raises
        JudgeError."""
        request = self.service.request(messages, form)
        key = key_of(self.endpoint, request, draw)
        async with self._asking[key]:  # two equal questions at once become one
            self.ledger.refresh()
            if key not in self.ledger.replies:
                await self._ask_until_it_counts(key, request, form, draw)
            return form.parse(self.ledger.replies[key])

    async def _ask_until_it_counts(self, key: str, request: dict, form: Form, draw: int) -> None:
        c, began = self.config, None
        for attempt in range(1, c.tries + 1):
            async with self._slots:
                self._may_ask()
                began = began or time.monotonic()
                self._in_flight += 1
                started = time.monotonic()
                try:
                    tried = await self._try(request, form)
                finally:
                    self._in_flight -= 1
            self._keep(key, request, form, draw, attempt, tried, time.monotonic() - started)
            if tried.outcome == OK:
                return
            if tried.final:
                raise self._give_up(tried.final)
            jittered = random.uniform(0, min(c.backoff_max, c.backoff * 2 ** (attempt - 1)))
            wait = max(jittered, tried.retry_after)
            if attempt == c.tries:
                raise self._give_up(self._out_of(f"{c.tries} tries", tried))
            if time.monotonic() + wait - began > c.deadline:
                raise self._give_up(self._out_of(f"{c.deadline:g} s (--client.deadline)", tried))
            await self._pause(wait)

    def _may_ask(self) -> None:
        """JudgeError if a rank has given up, or at the budget."""
        c, ledger = self.config, self.ledger
        ledger.refresh()
        if ledger.stop:
            raise JudgeError(ledger.stop)
        on = "what was judged is on file; raise it and run the same command again to go on"
        if c.max_calls is not None and ledger.calls + self._in_flight >= c.max_calls:
            raise self._give_up(
                f"the budget of {c.max_calls:,} calls is used up (--client.max_calls); {on}"
            )
        if c.max_cost is not None and ledger.cost >= c.max_cost:
            raise self._give_up(
                f"the budget of ${c.max_cost:,.2f} is used up (--client.max_cost); {on}"
            )

    def _give_up(self, reason: str) -> JudgeError:
        """Tell all ranks; those that wait or have not asked yet stop too."""
        if not self.ledger.stop:
            self.ledger.give_up(reason)
        return JudgeError(self.ledger.stop)

    def _out_of(self, what: str, last: Tried) -> str:
        hint = "; raise --endpoint.max_tokens" if last.outcome == "cut at the token limit" else ""
        return (
            f"judge {self.model} at {self.endpoint}: no usable reply in {what}, the last: "
            f"{last.outcome}{hint}. What was judged is on file; run the same command again to go on"
        )

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.ledger.stop:
            await asyncio.sleep(min(left, 1.0))
            self.ledger.refresh()

    def _keep(
        self, key: str, request: dict, form: Form, draw: int, attempt: int, tried: Tried, s: float
    ) -> None:
        cost = self.service.cost(tried.tokens_in, tried.tokens_out)
        row = {
            "key": key,
            "model": self.model,
            "served_model": tried.served_model,
            "endpoint": self.endpoint,
            "form": form.name,
            "draw": draw,
            "attempt": attempt,
            "outcome": tried.outcome,
            "reply": tried.reply,
            "tokens_in": tried.tokens_in,
            "tokens_out": tried.tokens_out,
            "cost": cost,
            "seconds": round(s, 3),
        }
        self.ledger.add(row | ({"request": request} if tried.outcome == OK else {}))
        self.counts.update(calls=1, failed=tried.outcome != OK, cost=cost or 0.0)
        if cost is None and tried.reply is not None and self.config.max_cost is not None:
            raise self._give_up(
                f"{self.endpoint} reports no tokens, so --client.max_cost cannot be kept; use "
                "--client.max_calls"
            )

    async def _try(self, request: dict, form: Form) -> Tried:
        body = dict(request)
        model, messages = body.pop("model"), body.pop("messages")
        try:
            async with asyncio.timeout(self.config.timeout):
                response = await self._api.chat.completions.with_raw_response.create(
                    model=model, messages=messages, extra_body=body
                )
        except openai.APIStatusError as error:
            status = error.status_code
            again = status >= 500 or status in (408, 409, 425, 429)
            final = None if again else self.service.remedy(status, error.body, request)
            return Tried(f"HTTP {status}", retry_after=retry_after(error.response), final=final)
        except (TimeoutError, openai.APITimeoutError):
            return Tried("time-out")
        except openai.APIConnectionError:
            return Tried("connection lost")
        return read_reply(response.http_response.text, form)

    def lap(self) -> dict[str, float]:
        """This process's calls, failed tries and US dollars since the last lap."""
        spent = {name: float(self.counts[name]) for name in ("calls", "failed", "cost")}
        self.counts.clear()
        return spent


def read_reply(text: str, form: Form) -> Tried:
    """What the body of an HTTP 200 is worth."""
    if not text.strip():
        return Tried("empty body")
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        reply, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        tried = Tried(
            reply=reply if reply is None else str(reply),
            served_model=body.get("model"),
            tokens_in=usage.get("prompt_tokens"),
            tokens_out=usage.get("completion_tokens"),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Tried("not a chat completion", reply=text)
    if refusal or finish == "content_filter":
        return tried._replace(outcome="refusal", reply=tried.reply or str(refusal or ""))
    if finish == "length":
        return tried._replace(outcome="cut at the token limit")
    if finish != "stop":
        return tried._replace(outcome=f"finish reason {finish}")
    if not (tried.reply or "").strip():
        return tried._replace(outcome="empty reply")
    try:
        form.parse(tried.reply)
    except ValueError as reason:
        return tried._replace(outcome=str(reason))
    return tried


def retry_after(response) -> float:
    """Seconds that a response's Retry-After asks for, as a number or a date; 0 where it does
    not."""
    said = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


class Replay:
    """Judgements on file in the place of a model: an error for what is not there."""

    def __init__(self, path: Path, model: str = ""):
        """`path`: a run's judge_cache.jsonl or what judge.py exported. `model` is needed if it
        holds more than one. Raises ValueError."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --judge replay:FILE takes judgements on file")
        self.path = path
        self._replies: dict[tuple, dict[tuple, str]] = defaultdict(dict)
        for row in read_tries(path):
            if row["outcome"] == OK and model in ("", row["model"]):
                judge = (row["model"], row["endpoint"])
                question = (question_of(row["request"]["messages"]), row["form"], row["draw"])
                self._replies[judge].setdefault(question, row["reply"])
        if len(self._replies) != 1:
            held = ", ".join(sorted({name for name, _ in self._replies})) or "none"
            raise ValueError(
                f"{path}: judgements of one judge are needed, found {held}; say which by --judge "
                "replay:FILE@MODEL"
            )
        [((self.model, self.endpoint), self._known)] = self._replies.items()

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        question = (question_of(messages), form.name, draw)
        if question not in self._known:
            raise JudgeError(
                f"{self.path} has no {form.name} of {self.model} (draw {draw}) for the question "
                f"that ends in {messages[-1]['content'][-80:]!r}; replay judges only what was "
                "judged before, with the same references and template"
            )
        return form.parse(self._known[question])

    def lap(self) -> dict[str, float]:
        """As ChatClient's: nothing is asked."""
        return {"calls": 0.0, "failed": 0.0, "cost": 0.0}


class Background:
    """An asyncio loop in a thread of its own, so that judging goes on while the main thread
    samples."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self.loop)
