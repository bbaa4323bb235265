"""One OpenAI-compatible chat client: concurrency, retries, cache. The only file that uses the
network to score.

Authors' request settings: temperature 0.1, at most 128 output tokens, 8 tries, back-off from 2 s
doubling to 120 s with jitter, 24 requests at once, 90 s time-out. A reply counts only if the
caller's `parse` accepts it; anything else is a failed try. After the last try the run stops: a
score is never made up.

The cache is a JSONL file shared by all ranks, one line per accepted reply, found by a hash of
everything that decides the reply. It holds no key and no header."""

import asyncio
import hashlib
import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import openai

from files import append_line

T = TypeVar("T")


class JudgeError(RuntimeError):
    """No usable reply after the last try, or a request that no retry can mend. The message says
    what to do."""


@dataclass(frozen=True)
class ClientConfig:
    concurrency: int = 24
    """Requests in flight at once, all ranks together (authors' configuration)."""
    tries: int = 8
    """Tries per answer before the run stops (authors' configuration)."""
    timeout: float = 90.0
    """Seconds that one try may take (authors' configuration)."""
    backoff: float = 2.0
    """Seconds of the first back-off; doubles with each try, with full jitter (authors'
    configuration)."""
    backoff_max: float = 120.0
    """Longest back-off in seconds (authors' configuration)."""
    temperature: float | None = 0.1
    """Judge's sampling temperature (authors' configuration); None leaves it out, for models that
    refuse it."""
    max_tokens: int = 128
    """Longest reply in tokens, sent as max_completion_tokens (authors' configuration)."""
    price_in: float = 2.5
    """US dollars per million input tokens, for --dry_run's estimate (list price of gpt-5.4)."""
    price_out: float = 15.0
    """US dollars per million output tokens, likewise."""


def check_environment() -> None:
    """Raise JudgeError now if an API judge could not even be asked."""
    if not os.environ.get("OPENAI_API_KEY"):
        raise JudgeError(
            "an API judge needs a key: set OPENAI_API_KEY (any word for a local server named by "
            "OPENAI_BASE_URL), or use --judge heuristic, an offline stand-in that says nothing "
            "about real judging"
        )


class ChatClient:
    """Asks one model, at most `concurrency` at once, and remembers what it said."""

    def __init__(self, model: str, config: ClientConfig, concurrency: int, cache: Path | None):
        self.model = model
        self.config = config
        self._api = openai.AsyncOpenAI(
            max_retries=0, timeout=config.timeout
        )  # retries are counted here
        self._slots = asyncio.Semaphore(concurrency)
        self._cache = cache
        self._cache_read = 0  # bytes of the cache file that are in _replies
        self._replies: dict[str, dict] = {}
        self._asking: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ask(self, messages: list[dict[str, str]], parse: Callable[[str], T]) -> T:
        """The parsed reply. `parse` raises ValueError for a reply that does not count. Raises
        JudgeError."""
        request = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.config.max_tokens,
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        identity = json.dumps([str(self._api.base_url), request], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()
        async with self._asking[key]:  # two equal questions at once become one
            if key not in self._replies:
                self._read_cache()
            if key not in self._replies:
                record = await self._ask_server(key, request, parse)
                self._replies[key] = record
                if self._cache:
                    append_line(self._cache, record)
            return parse(self._replies[key]["reply"])

    def _read_cache(self) -> None:
        """Take in what this rank and the others have added to the file since the last look. A line
        that a kill cut short is passed over: its reply is asked again."""
        if self._cache is None or not self._cache.exists():
            return
        with open(self._cache, "rb") as f:
            f.seek(self._cache_read)
            new = f.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._cache_read += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                self._replies[record["key"]] = record

    async def _ask_server(self, key: str, request: dict, parse: Callable[[str], object]) -> dict:
        reason = ""
        for attempt in range(1, self.config.tries + 1):
            wait = random.uniform(
                0, min(self.config.backoff_max, self.config.backoff * 2 ** (attempt - 1))
            )
            try:
                async with self._slots:
                    started = time.monotonic()
                    reply = await self._api.chat.completions.create(**request)
                    seconds = time.monotonic() - started
                choice = reply.choices[0] if reply.choices else None
                text = choice.message.content if choice else None
                if not text or choice.finish_reason != "stop":
                    raise ValueError(
                        f"finish reason {choice and choice.finish_reason}, {len(text or '')} "
                        "characters"
                    )
                parse(text)
                usage = reply.usage
                return {
                    "key": key,
                    "model": self.model,
                    "served_model": reply.model,
                    "reply": text,
                    "tries": attempt,
                    "seconds": round(seconds, 3),
                    "tokens_in": usage and usage.prompt_tokens,
                    "tokens_out": usage and usage.completion_tokens,
                }
            except ValueError as error:
                reason = f"unusable reply ({error})"
            except openai.APIConnectionError as error:  # time-outs too
                reason = type(error).__name__
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    raise JudgeError(_remedy(error, self.model)) from None
                wait = max(wait, _retry_after(error))
            if attempt < self.config.tries:
                await asyncio.sleep(wait)
        raise JudgeError(
            f"judge {self.model}: no usable reply in {self.config.tries} tries, the last: "
            f"{reason}. What was judged is on file; run the same command again to go on"
        )


def _remedy(error: openai.APIStatusError, model: str) -> str:
    """One sentence for a request that no retry can mend. A 401's body can quote the key, so it is
    left out."""
    if error.status_code in (401, 403):
        return f"judge {model}: HTTP {error.status_code}: key refused; set a valid OPENAI_API_KEY"
    said = error.body.get("message") if isinstance(error.body, dict) else None
    said = said or "request refused"
    return f"judge {model}: HTTP {error.status_code}: {said}; check --judge and --client.*"


def _retry_after(error: openai.APIStatusError) -> float:
    try:
        return float(error.response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


class Background:
    """An asyncio loop in a thread of its own, so that judging goes on while the main thread
    samples."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self.loop)
