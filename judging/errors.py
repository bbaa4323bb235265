"""Failed attempts: their causes, and what follows from them.

Servers word one error in many ways and shapes. `CAUSES` tells causes apart by the error's codes and
its sentence; an error that fits no row is judged by its HTTP status. The server's own sentence is
kept for the message, and its text for the ledger, both without the key.
"""

import errno
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from judging.endpoint import Server
from judging.ledger import OK


class Fault(Enum):
    """Kinds of failure, by what follows from them."""

    PASSING = "ask again"
    REPLY = "ask again, another reply may be valid"
    DECLINED = "ask again; if no reply says otherwise, this text is refused for good"
    NO_ROUTE = "ask again, but not often while the endpoint has never answered"
    REFUSED = "this text is refused for good"
    SETTINGS = "stop: asking again cannot help"


class Attempt(NamedTuple):
    """Outcome of one request."""

    outcome: str = OK  # or the reason of the failure
    reply: str | None = None  # the reply's text; of an error its body
    served_model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    fault: Fault = Fault.REPLY  # if it failed
    said: str = ""  # the server's own sentence
    remedy: str = ""
    retry_after: float = 0.0  # seconds to wait, from the server's headers

    def __str__(self) -> str:
        """A failure as part of a message."""
        said = f": {self.said.rstrip('.')}" if self.said else ""
        return self.outcome + said + (f"; {self.remedy}" if self.remedy else "")


class Cause(NamedTuple):
    """A cause that an error tells by its words or its status."""

    name: str
    fault: Fault
    # {key} stands for the variable that holds the key, {model} and {url} for options.
    remedy: str
    words: str = ""  # regular expression, looked for in the error's codes and its sentence
    always: bool = False  # also at a status that is retried


CREDIT = "add credit to the account of the key in {key}, then run the same command again"
KEY = "put a valid one into {key}"
LONGER = "a judge with a longer context can read it"
MODEL = "check {model}, and that the key in {key} may use this model"
ADDRESS = "check {url}"
# The first that fits. A quota that is exceeded is no sign of an empty account: Gemini says so at
# its limit of requests per minute.
CAUSES = [
    Cause(
        "no credit", Fault.SETTINGS, CREDIT,
        r"insufficient_quota|exceeded_current_quota_error|billing_(hard_limit|not_active)|"
        r"credit balance|insufficient (balance|credit|fund)|any credits|arrearage", always=True,
    ),
    Cause(
        "too long", Fault.REFUSED, LONGER,
        r"context_length_exceeded|string_above_max_length|maximum context length|context limit|"
        r"exceeds? (the |this )?(available |model's )?context|context size has been exceeded|"
        r"exceed_context_size|(longer|greater) than the (maximum model|model's context|context) "
        r"length|input token count .*exceeds|(prompt|input) is too long|max_new_tokens. must be|"
        r"request[ _]too[ _]large|range of input length|context the overflows", always=True,
    ),
    Cause(
        "key refused", Fault.SETTINGS, KEY,
        r"api[ _-]?key (is )?(not valid|invalid|incorrect|expired)|api_key_invalid|"
        r"(invalid|incorrect|expired)[ _](x-)?api[ _-]?key|account_deactivated",
    ),
    Cause(
        "content filter", Fault.REFUSED, "",
        r"content[ _]filter|ResponsibleAIPolicyViolation|content[ _](management )?policy|"
        r"usage polic|(input|prompt) (was|has been) flagged|data_?inspection_?failed|"
        r"inappropriate content|content exists risk|considered high risk|prohibited_content",
    ),
    Cause(
        "country not served", Fault.SETTINGS, "choose an endpoint that serves this country",
        r"unsupported_country|country, region|location is not supported",
    ),
    Cause(
        "no such model", Fault.SETTINGS, MODEL,
        r"model_not_found|DeploymentNotFound|(unknown|invalid|no such) model\b|"
        r"model .*(does not exist|not found)|access to (the )?model|not a valid model",
    ),
]  # fmt: skip
NOTHING_THERE = Cause(
    "nothing there", Fault.SETTINGS,
    "check {model} and {url}, which often ends in /v1",
)  # fmt: skip
BY_STATUS = {
    401: Cause("key refused", Fault.SETTINGS, KEY),
    402: Cause("no credit", Fault.SETTINGS, CREDIT),
    403: Cause("access denied", Fault.SETTINGS, "check what the key in {key} may use (model, "
               "project, permissions), and any proxy or firewall on the way"),
    404: NOTHING_THERE,
    405: NOTHING_THERE,
    407: Cause("proxy refused", Fault.SETTINGS, "check user and password of the proxy"),
    413: Cause("too long", Fault.REFUSED, LONGER),
}  # fmt: skip
RETRIED = {408, 409, 425, 429}  # and from 500 on


# --------------------------------------------------------------------------------------------------
# Errors


def read_error(
    status: int | None, text: str, headers: Mapping[str, str], request: dict, service: Server
) -> Attempt:
    """The attempt from an error's HTTP status and body; status None: the error came as HTTP 200."""
    said = _Said.of(service.without_key(text))
    words = f"{said.codes} {said.sentence}"
    fits = [c for c in CAUSES if re.search(c.words, words, re.IGNORECASE | re.DOTALL)]
    outcome = "error in HTTP 200" if status is None else f"HTTP {status}"
    if status is None:
        final = fits or re.search(r"invalid|bad_?request|unsupported|not_?found|auth|permission",
                                  said.codes, re.IGNORECASE)  # fmt: skip
        status = said.status or (400 if final else 500)
    passing = status in RETRIED or status >= 500
    cause = next((c for c in fits if c.always or not passing), BY_STATUS.get(status))
    if status in (401, 403) or (cause and cause.remedy == KEY):
        said = said._replace(text=_masked(said.text), sentence=_masked(said.sentence))
    attempt = Attempt(
        outcome if cause is None else f"{outcome}, {cause.name}",
        reply=said.text,
        said=said.sentence,
        retry_after=retry_after(headers),
    )
    if cause:
        remedy = filled_in(cause.remedy, service)
        return attempt._replace(fault=cause.fault, remedy=remedy)
    if passing:
        return attempt._replace(fault=Fault.PASSING)
    return attempt._replace(fault=Fault.SETTINGS, remedy=_change(said, request, service))


def filled_in(remedy: str, service: Server) -> str:
    return remedy.format(
        key=service.key_variable, model=service.model_option, url=service.url_option
    )


class _Said(NamedTuple):
    """What the body of an error says."""

    text: str  # the body, at most 10,000 characters of it
    sentence: str
    codes: str  # all that stands under code, type, status and reason
    parameters: list[str]  # request parameters that it names in fields of their own
    status: int | None  # if a code is a number that can be one

    @classmethod
    def of(cls, text: str) -> "_Said":
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = text
        codes, parameters = [], []
        for row in _dicts(body):
            codes += [row.get(name) for name in ("code", "type", "status", "reason", "error_type")]
            where = row.get("param") or row.get("loc")
            where = re.split(r"[.\[\]]", where) if isinstance(where, str) else where
            parameters += map(str, where) if isinstance(where, list) else ()
        numbers = [int(c) for c in codes if re.fullmatch("[45][0-9][0-9]", str(c))]
        return cls(
            text[:10_000],
            plain(_sentence(body)),
            " ".join(c for c in codes if isinstance(c, str)),
            parameters,
            next(iter(numbers), None),
        )


def _dicts(body: object) -> Iterator[dict]:
    """All objects within a body, from the outside in."""
    if isinstance(body, dict):
        yield body
        body = list(body.values())
    for inner in body if isinstance(body, list) else ():
        yield from _dicts(inner)


def _sentence(body: object) -> str:
    """The sentence meant for the reader, wherever a server puts it; a body may hold another as
    text."""
    if isinstance(body, list):
        return "; ".join(filter(None, map(_sentence, body)))
    if isinstance(body, dict):
        names = ("message", "msg", "error", "errors", "detail")
        found = next(filter(None, (_sentence(body.get(name)) for name in names)), "")
        inner = body.get("metadata")  # of a router: what the provider said to it
        raw = _sentence(inner.get("raw")) if isinstance(inner, dict) else ""
        return f"{found} ({raw})" if raw else found
    if not isinstance(body, str):
        return ""
    try:
        return _sentence(json.loads(body)) if body.lstrip()[:1] in ("{", "[") else body
    except (ValueError, RecursionError):
        return body


def plain(text: str) -> str:
    """One line of at most 400 characters, without HTML."""
    text = re.sub(r"<(script|style)\b.*?</\1>|<[/!a-z][^>]*>", " ", text, flags=re.S | re.I)
    return " ".join(text.split())[:400]


def _masked(text: str) -> str:
    """Text without words that show a part of a key and hide the rest, as sk-ab****yz."""
    return re.sub(r"[\w-]*(\*{2,}|\.{3}|…)[\w*-]+", "[key]", text)


def _change(said: _Said, request: dict, service: Server) -> str:
    """Which option to change for a request whose form is refused: that of the parameter which the
    error names in a field, else of the first that its sentence mentions. "model" and "messages" are
    words of many sentences."""
    mentioned = {p: re.search(rf"\b{re.escape(p)}\b", said.sentence) for p in request}
    spoken = [p for p, found in mentioned.items() if found and p not in ("model", "messages")]
    named = [p for p in said.parameters if p in request]
    refused = next(iter(named + sorted(spoken, key=lambda p: mentioned[p].start())), None)
    option = service.option(refused)
    return (
        f"it refuses the parameter {refused} so change {option}" if refused else f"check {option}"
    )


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait by a response's headers: retry-after-ms, or Retry-After with a number or a
    date; 0 without one."""
    try:
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    except ValueError:
        pass
    header = headers.get("retry-after", "")
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


# --------------------------------------------------------------------------------------------------
# No response


class Route(NamedTuple):
    """A reason why no connection came about."""

    name: str
    fits: Callable[[BaseException], bool]
    fault: Fault
    remedy: str


UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
ROUTES = [
    Route("proxy refused", lambda e: type(e).__name__ == "ProxyError", Fault.NO_ROUTE, ""),
    Route(
        "certificate not accepted", lambda e: isinstance(e, ssl.SSLCertVerificationError),
        Fault.SETTINGS, f"{ADDRESS} and this machine's clock; SSL_CERT_FILE can name the file of "
        "an authority of your own",
    ),
    Route(
        "no TLS", lambda e: isinstance(e, ssl.SSLError), Fault.NO_ROUTE,
        f"{ADDRESS}: a local server's often begins with http://",
    ),
    Route("host not found", lambda e: isinstance(e, socket.gaierror), Fault.NO_ROUTE, ADDRESS),
    Route(
        "connection refused", lambda e: isinstance(e, ConnectionRefusedError), Fault.NO_ROUTE,
        f"start the server, or {ADDRESS}",
    ),
    Route(
        "network unreachable", lambda e: getattr(e, "errno", None) in UNREACHABLE, Fault.NO_ROUTE,
        "check this machine's network, and {url}",
    ),
]  # fmt: skip


def read_no_response(error: BaseException, service: Server) -> Attempt:
    """The attempt from the exception that a connection ended with."""
    chain = list(_chain(error))
    for route in ROUTES:
        if found := next(filter(route.fits, chain), None):
            name, remedy = route.name, filled_in(route.remedy, service)
            if route.fault is Fault.NO_ROUTE and (variable := _proxy_variable(service.base_url)):
                host = urlsplit(service.base_url).hostname
                name = "proxy: " + name.removeprefix("proxy ")
                remedy = (
                    f"correct or unset {variable}, which names the proxy, or put {host} into "
                    "NO_PROXY"
                )
            return Attempt(name, fault=route.fault, said=plain(str(found)), remedy=remedy)
    return Attempt("connection lost", fault=Fault.PASSING)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that it came from."""
    todo, seen = [error], set()
    while todo:
        if (e := todo.pop(0)) is not None and id(e) not in seen:
            seen.add(id(e))
            yield e
            todo += [e.__cause__, e.__context__, *getattr(e, "exceptions", ())]


def _proxy_variable(base_url: str) -> str | None:
    """The environment variable whose proxy is used for this URL; None if none is."""
    url, proxies = urlsplit(base_url), getproxies()
    if proxy_bypass(url.hostname):
        return None
    return next((f"{s.upper()}_PROXY" for s in (url.scheme, "all") if proxies.get(s)), None)
