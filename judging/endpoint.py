"""Judge endpoints: URL, request parameters, key, price.

A judge is any model at an OpenAI-compatible endpoint. Request parameters differ between models, so
they are configuration: defaults per model in the table `JUDGES` below, which --endpoint.* and
--client.* override. Keys are read from environment variables and never stored.

    --judge gpt-5.4                                                    (Sec. 4.1)
    --judge claude-sonnet-4-6, --judge gemini-3.1-flash-lite           (Sec. 4.5, held-out judges)
    --judge NAME --endpoint.base_url http://127.0.0.1:8000/v1          (a local server)
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from storage.options import Count, CountOrZero, NotNegative, Options, Positive, in_range


class Form(NamedTuple):
    """The form that a valid reply must have."""

    name: str  # "scores" or "preference"
    schema: dict  # JSON schema
    # Raises ValueError for an invalid reply; its text is the reason of the failed attempt.
    parse: Callable[[str], object]


@dataclass(frozen=True)
class Endpoint(Options):
    """Settings that affect the judge's replies; fixed for a run."""

    prefix: ClassVar[str] = "endpoint."

    base_url: str = ""
    """URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; empty: the judge's
    from the table in endpoint.py, else OPENAI_BASE_URL, else OpenAI's. config.json has the one that
    is used."""
    temperature: in_range(float | None, "[0, inf)") = 0.1
    """Judge's sampling temperature (authors' configuration); None leaves it out, for models that
    refuse it."""
    max_tokens: Count = 128
    """Maximum reply length in tokens (authors' configuration)."""
    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """Name of the request parameter for max_tokens; older servers accept only the second."""
    output: Literal["auto", "schema", "json", "text"] = "auto"
    """How JSON output is requested: by schema, by JSON mode, or by the prompt alone; auto: by the
    table in endpoint.py, else by schema."""
    request: str = "{}"
    """Additional request parameters as a JSON object, such as '{"reasoning_effort": "low"}'; the
    value null removes a parameter."""


@dataclass(frozen=True)
class ClientConfig(Options):
    """Request settings that do not affect the replies; may change when a run is continued."""

    prefix: ClassVar[str] = "client."

    key_variable: str = ""
    """Name of the environment variable that holds the key; empty: from the table in endpoint.py,
    else OPENAI_API_KEY."""
    concurrency: Count = 24
    """Maximum number of requests in flight, over all ranks (authors' configuration)."""
    attempts: Count = 8
    """Attempts per answer before the run stops (authors' configuration)."""
    timeout: Positive = 90.0
    """Time-out of one attempt in seconds (authors' configuration)."""
    backoff: NotNegative = 2.0
    """First back-off in seconds; doubles with each attempt, with full jitter (authors'
    configuration)."""
    backoff_max: NotNegative = 120.0
    """Maximum back-off in seconds (authors' configuration); a longer Retry-After is obeyed."""
    deadline: in_range(float, "(0, 3600]") = 1200.0
    """Maximum time in seconds from an answer's first attempt to its last; then the run stops."""
    skip_refused: CountOrZero = 0
    """Maximum number of questions to this judge that may stay without a judgement because it
    refuses their text for good (content filter, refusal, too long); at one more the run stops. They
    are counted over all launches."""
    max_cost: in_range(float | None, "[0, inf)") = None
    """Budget in US dollars over all launches, at which the run stops; requests in flight at that
    moment are still paid."""
    max_calls: in_range(int | None, "[0, inf)") = None
    """Budget in calls, failed attempts included, over all launches, at which the run stops."""
    price_in: in_range(float | None, "[0, inf)") = None
    """US dollars per million input tokens; None: from the table in endpoint.py."""
    price_out: in_range(float | None, "[0, inf)") = None
    """US dollars per million output tokens; None: from the table in endpoint.py."""


class JudgeDefaults(NamedTuple):
    """Defaults of a judge model, for the options of the same names."""

    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    output: str = "schema"
    request: dict = {}
    price_in: float | None = None  # US dollars per million tokens, list price without discounts
    price_out: float | None = None


# From the providers' documentation of 2026; these endpoints have not been called in our tests.
JUDGES = {
    # Does not reason by default; with reasoning it would refuse a temperature.
    "gpt-5.4": JudgeDefaults(price_in=2.5, price_out=15.0),
    # This endpoint ignores response_format.
    "claude-sonnet-4-6": JudgeDefaults(
        "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", "text", {}, 3.0, 15.0
    ),
    # Reasons by default, and its reasoning counts as output tokens.
    "gemini-3.1-flash-lite": JudgeDefaults(
        "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY", "schema",
        {"reasoning_effort": "minimal"}, 0.25, 1.5,
    ),
}  # fmt: skip


def judge_defaults(model: str) -> JudgeDefaults:
    """The table's entry; a dated version of a model has the model's entry."""
    return JUDGES.get(re.sub(r"-20\d\d-?\d\d-?\d\d$", "", model), JudgeDefaults())


def prices(model: str, config: ClientConfig) -> tuple[float | None, float | None]:
    """US dollars per million input and output tokens; None if unknown."""
    defaults = judge_defaults(model)
    return (
        defaults.price_in if config.price_in is None else config.price_in,
        defaults.price_out if config.price_out is None else config.price_out,
    )


def with_url(model: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint with its URL filled in and without a slash at its end. Raises ValueError for a
    URL that cannot be used; the message does not quote it."""
    given = endpoint.base_url or judge_defaults(model).base_url or os.environ.get("OPENAI_BASE_URL")
    url = given or "https://api.openai.com/v1"
    try:
        return replace(endpoint, base_url=checked_url(url, Service))
    except ValueError as error:
        raise ValueError(f"judge {model}: {error}") from None


def checked_url(url: str, server: type["Server"]) -> str:
    """The URL without a slash at its end. Raises ValueError as with_url does."""
    url = url.rstrip("/")
    try:
        parts = urlsplit(url)
        plain = parts.hostname and not parts.query and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # brackets or port
        parts, plain = None, False
    if not plain or parts.scheme not in ("http", "https"):
        raise ValueError(
            f"{server.url_option} must read http(s)://HOST/PATH, without user, password or query; "
            f"keys belong in the environment variable that {server.key_option} names"
        )
    return url


class Server:
    """An OpenAI-compatible server, its key, and how messages name the options that it is made
    from."""

    url_option: ClassVar[str]
    model_option: ClassVar[str]
    key_option: ClassVar[str]
    without_a_key: ClassVar[str]  # what else can be done than to set it

    name: str  # as messages say it
    base_url: str
    key_variable: str
    key: str  # "" for a server that needs none
    config: ClientConfig

    def option(self, parameter: str | None) -> str:
        """What to change if the server refuses a request parameter; None: it does not say which."""
        raise NotImplementedError

    def read_key(self) -> str:
        """Raises ValueError, without the key."""
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_variable):
            raise ValueError(
                f"{self.key_option} takes the name of an environment variable in capitals, such "
                "as OPENAI_API_KEY, not the key itself"
            )
        if not (key := os.environ.get(self.key_variable)):
            raise ValueError(
                f"{self.name} needs a key: set {self.key_variable}{self.without_a_key}"
            )
        if not re.fullmatch("[!-~]([ -~]*[!-~])?", key):
            raise ValueError(
                f"{self.name}: {self.key_variable} holds a line break, white space around "
                "the key, or a character that is not ASCII; set it again, to the key alone"
            )
        return key

    def without_key(self, text: str) -> str:
        """Text from the server, which may quote the key."""
        if not self.key:
            return text
        whole = r"\b" if len(self.key) < 8 else ""  # a word for a local server
        return re.sub(f"{whole}{re.escape(self.key)}{whole}", "[key]", text)


class Service(Server):
    """A judge's model at its endpoint: the model's defaults, overridden by the options."""

    url_option = "--endpoint.base_url (or OPENAI_BASE_URL)"
    model_option, key_option = "--judge", "--client.key_variable"
    without_a_key = (
        " (any word for a local server), or use --judge heuristic, an offline judge for trying out "
        "the code: its scores say nothing about a real judge's"
    )

    def __init__(self, model: str, endpoint: Endpoint, config: ClientConfig):
        """Raises ValueError for every mistake that can be found before the first request."""
        defaults = judge_defaults(model)
        self.model, self.endpoint, self.config = model, endpoint, config
        self.name = f"judge {model}"
        self.output = defaults.output if endpoint.output == "auto" else endpoint.output
        self.key_variable = config.key_variable or defaults.key_variable
        self.base_url = with_url(model, endpoint).base_url
        self.price_in, self.price_out = prices(model, config)
        self.key = self.read_key()
        self.request_parameters = {**defaults.request, **self._read_request()}
        if config.max_cost is not None and None in (self.price_in, self.price_out):
            raise ValueError(
                f"judge {model}: its price is not known, so --client.max_cost cannot be enforced; "
                "give --client.price_in and --client.price_out, or use --client.max_calls"
            )

    def _read_request(self) -> dict:
        try:
            parameters = json.loads(self.endpoint.request)
        except ValueError:
            parameters = None
        reserved = {"model", "messages", "n", "stream"}
        if not isinstance(parameters, dict) or parameters.keys() & reserved:
            raise ValueError(
                "--endpoint.request takes a JSON object of request parameters, without model, "
                f"messages, n and stream; got {self.endpoint.request}"
            )
        return parameters

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
        body |= self.request_parameters
        return {name: value for name, value in body.items() if value is not None}

    def option(self, parameter: str | None) -> str:
        return {
            None: f"--endpoint.* (and {self.model_option})",
            "temperature": "--endpoint.temperature (None leaves it out)",
            "response_format": "--endpoint.output (json, or text)",
            "messages": f"{self.model_option}: this one does not take a system and a user message",
            "model": self.model_option,
            self.endpoint.token_limit: "--endpoint.token_limit or --endpoint.max_tokens",
        }.get(parameter, f"--endpoint.request ('{{\"{parameter}\": null}}' leaves it out)")

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """US dollars by list price; None if tokens or price are unknown."""
        if None in (tokens_in, tokens_out, self.price_in, self.price_out):
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
