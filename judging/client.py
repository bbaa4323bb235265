"""Judge client: retries, deadline, budget, and a record of every attempt, for one OpenAI-compatible
endpoint. The only file that uses the network to score.

The authors' request settings (for the judge of Sec. 4.1): temperature 0.1, at most 128 output
tokens, 8 attempts, back-off from 2 s doubling to 120 s with jitter, 24 concurrent requests, 90 s
time-out.

A reply is valid only if the caller's reply form accepts it. Any other outcome is a failed attempt,
recorded and counted by reason. After the last attempt, at the deadline, at the budget, or when a
request is refused and retrying cannot help, all ranks stop sending requests. Requests in flight are
still awaited and recorded, because they are paid for. A score is never made up. Running the same
command again continues the run.

Not in the paper: replies must follow a JSON schema where the endpoint supports it; the deadline;
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

from judging.endpoint import Form, Service
from judging.ledger import OK, Ledger, cache_key, question_key, read_attempts


class JudgeError(RuntimeError):
    """No valid reply, and retrying now would not help. The message names the remedy."""


class Refused(JudgeError):
    """The judge refuses this question for good, and --client.skip_refused allows going on without
    its reply."""


class Attempt(NamedTuple):
    """Outcome of one request."""

    outcome: str = OK  # or the reason of the failure
    reply: str | None = None
    served_model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    retry_after: float = 0.0  # seconds to wait, from the server's Retry-After
    final: str | None = None  # error message, if no retry can help


class ChatClient:
    """Sends requests to one model, at most `concurrency` at once, and caches valid replies."""

    def __init__(self, service: Service, concurrency: int, ledger: Ledger):
        self.service, self.config, self.ledger = service, service.config, ledger
        self.model, self.endpoint = service.model, service.base_url
        self._counts: Counter[str] = Counter()  # of this process since the last take_counts
        self._api = openai.AsyncOpenAI(
            api_key=service.key,
            base_url=service.base_url,
            max_retries=0,  # retries are counted here
            timeout=self.config.timeout,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight = 0
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by cache key

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        """The parsed reply. `draw` numbers independent replies to the same question. Raises
        JudgeError."""
        request = self.service.request(messages, form)
        key = cache_key(self.endpoint, request, draw)
        async with self._locks[key]:  # two identical concurrent questions become one request
            self.ledger.refresh()
            if key not in self.ledger.replies:
                await self._ask_with_retries(key, request, form, draw)
            return form.parse(self.ledger.replies[key])

    async def _ask_with_retries(self, key: str, request: dict, form: Form, draw: int) -> None:
        """Returns once a valid reply is on file. Raises JudgeError."""
        c, first_started = self.config, None
        for number in range(1, c.attempts + 1):
            async with self._slots:
                self._check_budget()
                first_started = first_started or time.monotonic()
                self._in_flight += 1
                started = time.monotonic()
                try:
                    attempt = await self._attempt(request, form)
                finally:
                    self._in_flight -= 1
            self._record(key, request, form, draw, number, attempt, time.monotonic() - started)
            if attempt.outcome == OK:
                return
            if attempt.final:
                raise self._give_up(attempt.final)
            jittered = random.uniform(0, min(c.backoff_max, c.backoff * 2 ** (number - 1)))
            wait = max(jittered, attempt.retry_after)
            if number == c.attempts:
                raise self._no_usable_reply(f"{c.attempts} attempts", attempt)
            if time.monotonic() + wait - first_started > c.deadline:
                raise self._no_usable_reply(f"{c.deadline:g} s (--client.deadline)", attempt)
            await self._pause(wait)

    def _check_budget(self) -> None:
        """Raise JudgeError if another rank has given up or the budget is used up."""
        c, ledger = self.config, self.ledger
        ledger.refresh()
        if ledger.stop:
            raise JudgeError(ledger.stop)
        remedy = "all judgements are on file; raise it and run the same command again to continue"
        if c.max_calls is not None and ledger.calls + self._in_flight >= c.max_calls:
            raise self._give_up(
                f"the budget of {c.max_calls:,} calls is used up (--client.max_calls); {remedy}"
            )
        if c.max_cost is not None and ledger.cost >= c.max_cost:
            raise self._give_up(
                f"the budget of ${c.max_cost:,.2f} is used up (--client.max_cost); {remedy}"
            )

    def _give_up(self, reason: str) -> JudgeError:
        """The error to raise, after telling all ranks to stop sending requests."""
        if not self.ledger.stop:
            self.ledger.give_up(reason)
        return JudgeError(self.ledger.stop)

    def _no_usable_reply(self, within: str, last: Attempt) -> JudgeError:
        hint = "; raise --endpoint.max_tokens" if last.outcome == "cut at the token limit" else ""
        return self._give_up(
            f"judge {self.model} at {self.endpoint}: no usable reply in {within}, the last: "
            f"{last.outcome}{hint}. All judgements are on file; run the same command again to "
            "continue"
        )

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer if another rank gives up meanwhile."""
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0 and not self.ledger.stop:
            await asyncio.sleep(min(remaining, 1.0))
            self.ledger.refresh()

    def _record(
        self,
        key: str,
        request: dict,
        form: Form,
        draw: int,
        number: int,
        attempt: Attempt,
        seconds: float,
    ) -> None:
        """Write an attempt to the ledger and count it."""
        cost = self.service.cost(attempt.tokens_in, attempt.tokens_out)
        row = {
            "key": key,
            "model": self.model,
            "served_model": attempt.served_model,
            "endpoint": self.endpoint,
            "form": form.name,
            "draw": draw,
            "attempt": number,
            "outcome": attempt.outcome,
            "reply": attempt.reply,
            "tokens_in": attempt.tokens_in,
            "tokens_out": attempt.tokens_out,
            "cost": cost,
            "seconds": round(seconds, 3),
        }
        if attempt.outcome == OK:
            row["request"] = request
        self.ledger.add(row)
        self._counts.update(calls=1, failed=attempt.outcome != OK, cost=cost or 0.0)
        if cost is None and attempt.reply is not None and self.config.max_cost is not None:
            raise self._give_up(
                f"{self.endpoint} reports no tokens, so --client.max_cost cannot be enforced; use "
                "--client.max_calls"
            )

    async def _attempt(self, request: dict, form: Form) -> Attempt:
        body = dict(request)
        model, messages = body.pop("model"), body.pop("messages")
        try:
            async with asyncio.timeout(self.config.timeout):
                response = await self._api.chat.completions.with_raw_response.create(
                    model=model, messages=messages, extra_body=body
                )
        except openai.APIStatusError as error:
            status = error.status_code
            retry = status >= 500 or status in (408, 409, 425, 429)
            final = None if retry else self.service.remedy(status, error.body, request)
            return Attempt(f"HTTP {status}", retry_after=retry_after(error.response), final=final)
        except (TimeoutError, openai.APITimeoutError):
            return Attempt("time-out")
        except openai.APIConnectionError:
            return Attempt("connection lost")
        return read_reply(response.http_response.text, form)

    def stop(self, reason: str) -> None:
        """Ask no more, on any rank of this launch; requests in flight go on."""
        self._give_up(reason)

    def close(self) -> None:
        """Write the replies that could not be written before, as on a full disk. Raises
        WriteError."""
        self.ledger.write_pending()

    def take_counts(self) -> dict[str, float]:
        """This process's calls, how many of them failed, and their cost in US dollars, since the
        last call of this method."""
        counts = {name: float(self._counts[name]) for name in ("calls", "failed", "cost")}
        self._counts.clear()
        return counts


def read_reply(text: str, form: Form) -> Attempt:
    """The attempt from the body of an HTTP 200 response."""
    if not text.strip():
        return Attempt("empty body")
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        reply, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        attempt = Attempt(
            reply=reply if reply is None else str(reply),
            served_model=body.get("model"),
            tokens_in=usage.get("prompt_tokens"),
            tokens_out=usage.get("completion_tokens"),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Attempt("not a chat completion", reply=text)
    if refusal or finish == "content_filter":
        return attempt._replace(outcome="refusal", reply=attempt.reply or str(refusal or ""))
    if finish == "length":
        return attempt._replace(outcome="cut at the token limit")
    if finish != "stop":
        return attempt._replace(outcome=f"finish reason {finish}")
    if not (attempt.reply or "").strip():
        return attempt._replace(outcome="empty reply")
    try:
        form.parse(attempt.reply)
    except ValueError as reason:
        return attempt._replace(outcome=str(reason))
    return attempt


def retry_after(response) -> float:
    """Seconds to wait by a response's Retry-After header, which holds a number or a date; 0 without
    one."""
    header = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


class Replay:
    """Answers questions from judgements on file; a question that is not on file is an error."""

    def __init__(self, path: Path, model: str = ""):
        """`path`: a run's judge_cache.jsonl, or a file made by evaluation.judgements --export.
        `model` is needed if the file has judgements of several models. Raises ValueError."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --judge replay:FILE takes judgements on file")
        self.path = path
        self._replies: dict[tuple, dict[tuple, str]] = defaultdict(dict)
        for row in read_attempts(path):
            if row["outcome"] == OK and model in ("", row["model"]):
                judge = (row["model"], row["endpoint"])
                question = (question_key(row["request"]["messages"]), row["form"], row["draw"])
                self._replies[judge].setdefault(question, row["reply"])
        if len(self._replies) != 1:
            models = ", ".join(sorted({name for name, _ in self._replies})) or "none"
            raise ValueError(
                f"{path}: judgements of one judge are needed, found {models}; say which by --judge "
                "replay:FILE@MODEL"
            )
        [((self.model, self.endpoint), self._cached)] = self._replies.items()

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        question = (question_key(messages), form.name, draw)
        if question not in self._cached:
            raise JudgeError(
                f"{self.path} has no {form.name} of {self.model} (draw {draw}) for the question "
                f"that ends in {messages[-1]['content'][-80:]!r}; replay has only the judgements "
                "on file, so use the same references and template as when they were made"
            )
        return form.parse(self._cached[question])

    def stop(self, reason: str) -> None:
        """As ChatClient.stop; no request is ever sent."""

    def close(self) -> None:
        """As ChatClient.close; there is nothing to write."""

    def take_counts(self) -> dict[str, float]:
        """As ChatClient.take_counts; no request is ever sent."""
        return {"calls": 0.0, "failed": 0.0, "cost": 0.0}


class Background:
    """An asyncio loop in a background thread, so that judging runs while the main thread
    samples."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self.loop)
