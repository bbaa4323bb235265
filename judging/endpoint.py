"""Judge endpoints: URL, request parameters, key, price.

A judge is any model at an OpenAI-compatible endpoint. Request parameters differ between models, so
they are configuration: the table `KNOWN` below, with --endpoint.* and --client.* laid over it. Keys
are read from environment variables and go nowhere else.

    --judge gpt-5.4                                                    (Sec. 4.1)
    --judge claude-sonnet-4-6, --judge gemini-3.1-flash-lite           (Sec. 4.5, held-out judges)
    --judge NAME --endpoint.base_url http://127.0.0.1:8000/v1          (a local server)
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from urllib.parse import urlsplit


class Form(NamedTuple):
    """The kind of reply that is asked for and counts."""

    name: str  # "scores" or "preference"
    schema: dict  # JSON schema
    parse: Callable[[str], object]  # raises ValueError; its text is the reason that is counted


@dataclass(frozen=True)
class Endpoint:
    """What decides the reply beside the question; fixed for a run."""

    base_url: str = ""
    """URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; empty: the judge's
    own from the table in endpoint.py, else OPENAI_BASE_URL, else OpenAI's."""
    temperature: float | None = 0.1
    """Judge's sampling temperature (authors' configuration); None leaves it out, for models that
    refuse it."""
    max_tokens: int = 128
    """Longest reply in tokens (authors' configuration)."""
    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """Request parameter that carries max_tokens; older servers know the second only."""
    output: Literal["auto", "schema", "json", "text"] = "auto"
    """How JSON is asked for: by schema, by JSON mode, or by the prompt alone; auto: by the table in
    endpoint.py, else by schema."""
    request: str = "{}"
    """More request parameters as a JSON object, such as '{"reasoning_effort": "low"}'; null takes
    one out."""


@dataclass(frozen=True)
class ClientConfig:
    """How replies are requested; may change between a run and its continuation."""

    key_variable: str = ""
    """Name of the environment variable that holds the key; empty: by the table in endpoint.py, else
    OPENAI_API_KEY."""
    concurrency: int = 24
    """Requests in flight at once, all ranks together (authors' configuration)."""
    attempts: int = 8
    """Attempts per answer before the run stops (authors' configuration)."""
    timeout: float = 90.0
    """Seconds that one attempt may take (authors' configuration)."""
    backoff: float = 2.0
    """Seconds of the first back-off; doubles with each attempt, with full jitter (authors'
    configuration)."""
    backoff_max: float = 120.0
    """Longest back-off in seconds (authors' configuration); a longer Retry-After is honoured."""
    deadline: float = 1200.0
    """Seconds from an answer's first attempt to its last before the run stops."""
    max_cost: float | None = None
    """US dollars at which the run stops, all launches together; what is in flight then is still
    paid."""
    max_calls: int | None = None
    """Calls, failed attempts included, at which the run stops, all launches together; likewise."""
    price_in: float | None = None
    """US dollars per million input tokens; None: by the table in endpoint.py."""
    price_out: float | None = None
    """US dollars per million output tokens, likewise."""


class Known(NamedTuple):
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    output: str = "schema"
    request: dict = {}
    price_in: float | None = None  # US dollars per million tokens, list price without discounts
    price_out: float | None = None


# From the providers' documentation of 2026; we have only called the tests' own servers.
KNOWN = {
    # Does not reason unless asked to, which is what lets it take a temperature.
    "gpt-5.4": Known(price_in=2.5, price_out=15.0),
    # This endpoint ignores response_format.
    "claude-sonnet-4-6": Known(
        "https://api.anthropic.com/v1/", "ANTHROPIC_API_KEY", "text", {}, 3.0, 15.0
    ),
    # Reasons unless told otherwise, and its reasoning counts as output.
    "gemini-3.1-flash-lite": Known(
        "https://generativelanguage.googleapis.com/v1beta/openai/", "GEMINI_API_KEY", "schema",
        {"reasoning_effort": "minimal"}, 0.25, 1.5,
    ),
}  # fmt: skip


def known_judge(model: str) -> Known:
    """The table's entry, for a model's dated versions too."""
    return KNOWN.get(re.sub(r"-20\d\d-?\d\d-?\d\d$", "", model), Known())


def prices(model: str, config: ClientConfig) -> tuple[float | None, float | None]:
    """US dollars per million input and output tokens; None where not known."""
    known = known_judge(model)
    return (
        known.price_in if config.price_in is None else config.price_in,
        known.price_out if config.price_out is None else config.price_out,
    )


class Service:
    """A judge's model at its endpoint: the table's entry with the options laid over it."""

    def __init__(self, model: str, endpoint: Endpoint, config: ClientConfig):
        """Raises ValueError for every mistake that shows before the first request."""
        known = known_judge(model)
        self.model, self.endpoint, self.config = model, endpoint, config
        self.output = known.output if endpoint.output == "auto" else endpoint.output
        self.key_variable = config.key_variable or known.key_variable
        self.base_url = (
            endpoint.base_url
            or known.base_url
            or os.environ.get("OPENAI_BASE_URL")
            or "https://api.openai.com/v1"
        )
        self.price_in, self.price_out = prices(model, config)
        if not (0 < config.deadline <= 3600 and config.timeout > 0 and config.attempts > 0):
            raise ValueError(
                "--client.deadline must be at most 3600 s, because the other ranks wait for it; "
                "--client.timeout and --client.attempts above 0"
            )
        self._check_url()
        self.key = self._read_key()
        self.more = {**known.request, **self._read_request()}
        if config.max_cost is not None and None in (self.price_in, self.price_out):
            raise ValueError(
                f"judge {model}: its price is not known, so --client.max_cost cannot be kept; give "
                "--client.price_in and --client.price_out, or use --client.max_calls"
            )

    def _check_url(self) -> None:
        url = urlsplit(self.base_url)
        bare = url.hostname and not url.query and "@" not in url.netloc
        if url.scheme not in ("http", "https") or not bare:
            raise ValueError(
                f"judge {self.model}: --endpoint.base_url (or OPENAI_BASE_URL) must read "
                "http(s)://HOST/PATH, without user, password or query; keys belong in the "
                "environment variable that --client.key_variable names"
            )

    def _read_key(self) -> str:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_variable):
            raise ValueError(
                "--client.key_variable takes the name of an environment variable in capitals, such "
                "as OPENAI_API_KEY, and not the key itself"
            )
        if not (key := os.environ.get(self.key_variable)):
            raise ValueError(
                f"judge {self.model} needs a key: set {self.key_variable} (any word for a local "
                "server), or use --judge heuristic, an offline stand-in that says nothing about "
                "real judging"
            )
        return key

    def _read_request(self) -> dict:
        try:
            more = json.loads(self.endpoint.request)
        except ValueError:
            more = None
        if not isinstance(more, dict) or more.keys() & {"model", "messages", "n", "stream"}:
            raise ValueError(
                "--endpoint.request takes a JSON object of request parameters, without model, "
                f"messages, n and stream; got {self.endpoint.request}"
            )
        return more

    def request(self, messages: Sequence[dict], form: Form) -> dict:
        """The request body."""
        e = self.endpoint
        body = {"model": self.model, "messages": list(messages), e.token_limit: e.max_tokens}
        body["temperature"] = e.temperature
        if self.output == "schema":
            schema = {"name": form.name, "strict": True, "schema": form.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.output == "json":
            body["response_format"] = {"type": "json_object"}
        body |= self.more
        return {name: value for name, value in body.items() if value is not None}

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """US dollars by list price; None where tokens or price are not known."""
        if None in (tokens_in, tokens_out, self.price_in, self.price_out):
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def remedy(self, status: int, error: object, request: dict) -> str:
        """One sentence for a request that no retry can mend; `error` is what the server said. A
        401's can quote the key, so it is left out."""
        where = f"judge {self.model} at {self.base_url}: HTTP {status}"
        if status in (401, 403):
            return f"{where}: key refused; put a valid one into {self.key_variable}"
        error = error if isinstance(error, dict) else {}
        said = str(error.get("message") or "request refused").replace(self.key, "[key]")[:400]
        if status == 404:
            return f"{where}: {said}; check --judge and --endpoint.base_url"
        named = str(error.get("param") or "").split(".")[0]
        refused = next((p for p in request if p == named), None) or next(
            (p for p in request if p != "messages" and re.search(rf"\b{p}\b", said)), None
        )
        field = {
            "temperature": "--endpoint.temperature (None leaves it out)",
            "response_format": "--endpoint.output (json, or text)",
            "messages": "--sampling.max_tokens, or choose a judge that reads more",
            "model": "--judge",
            self.endpoint.token_limit: "--endpoint.token_limit or --endpoint.max_tokens",
        }.get(refused, f"--endpoint.request ('{{\"{refused}\": null}}' leaves it out)")
        if refused:
            return f"{where}: refuses the parameter {refused} ({said}); change {field}"
        return f"{where}: {said}; check --judge and --endpoint.*"
