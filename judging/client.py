"""Judge client: retries, deadline, budget, and a record of every attempt, for one OpenAI-compatible
endpoint. The only file that uses the network to score.

The authors' request settings (for the judge of Sec. 4.1): temperature 0.1, at most 128 output
tokens, 8 attempts, back-off from 2 s doubling to 120 s with jitter, 24 concurrent requests, 90 s
time-out.

A reply is valid only if the caller's reply form accepts it. Any other outcome is a failed attempt,
recorded and counted by reason. After the last attempt, at the deadline, at the budget, or when
asking again cannot help, all ranks stop sending requests. Requests in flight are still awaited and
recorded, because they are paid for. A score is never made up. Running the same command again
continues the run.

A text that the judge refuses for good stops the run too, unless --client.skip_refused lets the run
go on without that judgement.

Departure: the back-off is drawn from 0-100 % of its time; the authors' from 50-100 %.

Not in the paper: replies must follow a JSON schema where the endpoint supports it; the deadline;
the budget; passing over refused texts.
"""

import asyncio
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import openai

from judging.endpoint import Form, Server, Service
from judging.errors import Attempt, Fault, read_error, read_no_response
from judging.ledger import OK, Ledger, cache_key
from judging.replies import read_reply, unfenced

# Attempts to reach an endpoint that has never answered this process: the server may be starting,
# but as a rule the URL, the proxy or the network is wrong.
FIRST_ATTEMPTS = 3


class JudgeError(RuntimeError):
    """No valid reply, and retrying now would not help. The message names the remedy.

    `about_text`: whether the cause lies in the text that was to be judged, so that the reader needs
    its name; else it lies in settings, network, account or budget, or in another question.
    """

    def __init__(self, message: str, about_text: bool = False):
        super().__init__(message)
        self.about_text = about_text

    def named(self, text: str) -> "JudgeError":
        """The error with the name of the text that was to be judged, if it is about that."""
        return JudgeError(f"{text}: {self}", True) if self.about_text else self


class Refused(JudgeError):
    """The judge refuses this text for good, and --client.skip_refused allows for it: the question
    stays without a judgement, and others are asked."""

    def __init__(self, message: str):
        super().__init__(message, about_text=True)


def connection(service: Server, retries: int = 0) -> openai.AsyncOpenAI:
    """`retries`: by the library itself; the judge's are counted here. Raises ValueError if the
    environment names a proxy that cannot be used."""
    try:
        return openai.AsyncOpenAI(
            api_key=service.key or "none",
            base_url=service.base_url,
            max_retries=retries,
            timeout=service.config.timeout,
        )
    except Exception as error:  # its text can hold the proxy's password
        socks = isinstance(error, ImportError)
        raise ValueError(
            "the proxy that ALL_PROXY, HTTPS_PROXY or HTTP_PROXY names cannot be used: "
            + ("SOCKS needs a package, pip install socksio" if socks else "give http://HOST:PORT")
            + "; or unset the variable"
        ) from None


class Answer(NamedTuple):
    """What came of a request: the body of an HTTP 200 response, or a failed attempt."""

    answered: bool  # whether the endpoint answered at all
    body: str = ""
    failed: Attempt | None = None


async def send(call: Callable, request: dict, service: Server, seconds: float | None) -> Answer:
    """`call`: sends the request and gives the library's raw response; `seconds`: the time-out over
    all of it."""
    try:
        async with asyncio.timeout(seconds):
            response = await call()
    except openai.APIStatusError as error:
        r = error.response
        return Answer(True, "", read_error(r.status_code, r.text, r.headers, request, service))
    except (TimeoutError, openai.APITimeoutError):
        return Answer(False, "", Attempt("time-out", fault=Fault.PASSING))
    except openai.APIConnectionError as error:
        return Answer(False, "", read_no_response(error, service))
    return Answer(True, response.http_response.text)


class ChatClient:
    """Sends requests to one model, at most `concurrency` at once, and caches valid replies."""

    def __init__(self, service: Service, concurrency: int, ledger: Ledger):
        self.service, self.config, self.ledger = service, service.config, ledger
        self.model, self.endpoint = service.model, service.base_url
        self._counts: Counter[str] = Counter()  # of this process since the last take_counts
        self._api = connection(service)
        self._answered = False  # whether the endpoint has answered this process at all
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight = 0
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by cache key

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        """The parsed reply. `draw` numbers independent replies to the same question. Raises
        JudgeError, and Refused where the run goes on without this judgement."""
        request = self.service.request(messages, form)
        key = cache_key(self.endpoint, request, draw)
        async with self._locks[key]:  # two identical concurrent questions become one request
            self.ledger.refresh()
            if key not in self.ledger.replies:
                if not (self.config.skip_refused and key in self._refused):
                    await self._ask_with_retries(key, request, form, draw)
                if key in self._refused:
                    raise self._refusal(key)
            return form.parse(unfenced(self.ledger.replies[key]))

    @property
    def _refused(self) -> dict[str, str]:
        """Cache key -> the judge's words, of the questions that it refuses for good."""
        return self.ledger.refused[self.model, self.endpoint]

    async def _ask_with_retries(self, key: str, request: dict, form: Form, draw: int) -> None:
        """Returns once a valid reply or a refusal for good is on file. Raises JudgeError."""
        c, first_started, faults = self.config, None, set()
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
            seconds = time.monotonic() - started
            if attempt.outcome == OK:
                return self._record(key, request, form, draw, number, attempt, seconds)
            faults.add(attempt.fault)
            wait, within = self._next(number, attempt, first_started)
            declined = attempt.fault is Fault.DECLINED and Fault.REPLY not in faults
            if within and declined:
                attempt = attempt._replace(fault=Fault.REFUSED)
            self._record(key, request, form, draw, number, attempt, seconds)
            if attempt.fault is Fault.REFUSED:
                return
            if attempt.fault is Fault.SETTINGS:
                raise self._give_up(f"{self._name}: {attempt}")
            if within:
                raise self._give_up(
                    f"{self._name}: no usable reply in {within}, the last: {attempt}. All "
                    "judgements are on file; run the same command again to continue",
                    about_text=attempt.fault in (Fault.REPLY, Fault.DECLINED),
                )
            await self._pause(wait)

    def _next(self, number: int, failed: Attempt, first: float) -> tuple[float, str | None]:
        """Seconds until the next attempt; and if there is none, within what they were made."""
        c = self.config
        jittered = random.uniform(0, min(c.backoff_max, c.backoff * 2 ** (number - 1)))
        wait = max(jittered, failed.retry_after)
        unreached = failed.fault is Fault.NO_ROUTE and not self._answered
        if number == c.attempts or (unreached and number >= FIRST_ATTEMPTS):
            return wait, f"{number} attempts"
        if time.monotonic() + wait - first > c.deadline:
            return wait, f"{c.deadline:g} s (--client.deadline)"
        return wait, None

    @property
    def _name(self) -> str:
        return f"judge {self.model} at {self.endpoint}"

    def _refusal(self, key: str) -> JudgeError:
        """The error for a question that is refused for good: Refused for the first
        --client.skip_refused of them, which are the same on all ranks."""
        allowed, place = self.config.skip_refused, [*self._refused].index(key)
        text = f"{self._name} refuses this text for good: {self._refused[key]}"
        if place < allowed:
            return Refused(text)
        return self._give_up(
            f"{text}. --client.skip_refused N lets a run pass over N such answers, which then have "
            f"no judgement; it is {allowed}, and this is number {place + 1}. All judgements are on "
            "file, and the same command continues",
            about_text=True,
        )

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

    def _give_up(self, reason: str, about_text: bool = False) -> JudgeError:
        """The error to raise, after telling all ranks to stop sending requests."""
        if self.ledger.stop:
            return JudgeError(self.ledger.stop)
        self.ledger.give_up(reason)
        return JudgeError(self.ledger.stop, about_text and self.ledger.stop == reason)

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
        if attempt.fault is Fault.REFUSED:
            row["refused"] = str(attempt)
        if attempt.outcome == OK or attempt.fault is Fault.REFUSED:
            row["request"] = request
        self.ledger.add(row)
        self._counts.update(calls=1, failed=attempt.outcome != OK, cost=cost or 0.0)
        paid = attempt.outcome == OK or attempt.fault in (Fault.REPLY, Fault.DECLINED)
        if paid and cost is None and self.config.max_cost is not None:
            raise self._give_up(
                f"{self._name} reports no tokens ({attempt}), so --client.max_cost cannot be "
                "enforced; use --client.max_calls"
            )

    async def _attempt(self, request: dict, form: Form) -> Attempt:
        body = dict(request)
        model, messages = body.pop("model"), body.pop("messages")
        create = self._api.chat.completions.with_raw_response.create
        call = partial(create, model=model, messages=messages, extra_body=body)
        answer = await send(call, request, self.service, self.config.timeout)
        self._answered |= answer.answered
        return answer.failed or read_reply(answer.body, form, request, self.service)

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


class Background:
    """An asyncio loop in a background thread, so that judging runs while the main thread
    samples."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self.loop)
