"""What endpoints send back when they do not judge, and replies in forms of their own:
.venv/bin/python -m pytest tests/test_errors.py"""

import json
import re
import socket
import ssl
import sys
from dataclasses import replace

import pytest
from asking import FAST, attempts, make, score
from fake_judge import GOOD, Reply

from judge import LLMJudge, make_judge
from judging.client import JudgeError
from judging.endpoint import Endpoint, Service
from judging.errors import Fault, read_no_response
from judging.replay import Replay

KEY = "sk-secret-for-tests"  # as the fixture fake_judge sets it
SCORES = (8, 7, 6, 1, 0)  # GOOD


# -------------------------------------------------------------------------------------- HTTP errors


def error(message, **more) -> dict:
    return {"error": {"message": message, **more}}


AZURE = "The response was filtered due to the prompt triggering a content management policy."
FILTERED = error(AZURE, type=None, param="prompt", code="content_filter",
                 innererror={"code": "ResponsibleAIPolicyViolation"})  # fmt: skip
GEMINI_KEY = [error("API key not valid. Please pass a valid API key.", code=400,
                    details=[{"reason": "API_KEY_INVALID"}])]  # fmt: skip
GEMINI_LONG = [error("The input token count (1200293) exceeds the maximum number of tokens allowed "
                     "(1048576).", code=400, status="INVALID_ARGUMENT")]  # fmt: skip
GEMINI_RATE = [error("You exceeded your current quota, please check your plan and billing details.",
                     code=429, status="RESOURCE_EXHAUSTED")]  # fmt: skip
FASTAPI = {"detail": [{"type": "less_than", "loc": ["body", "temperature"], "msg": "Too high",
                       "input": "the prompt, which says content_filter"}]}  # fmt: skip
ROUTER = error("Provider returned error", code=400,
               metadata={"raw": json.dumps(error("top_p is out of range"))})  # fmt: skip
CLOUD = (
    "<html><head><style>p {}</style></head><body><p>Access denied</p>\nby the wall</body></html>"
)

# HTTP status, body, what follows, how the attempt is counted, what the message says
ERRORS = {
    # The form of the request: the parameter is named in a field, or by the sentence alone.
    "parameter": (400, error("Unsupported value: 'temperature'", param="temperature"),
        Fault.SETTINGS, "HTTP 400", "temperature'; .*refuses .* temperature so change "
        "--endpoint.temperature"),
    "only the sentence": (400, error("Unsupported value: 'temperature' for this model", param=None),
        Fault.SETTINGS, "HTTP 400", "change --endpoint.temperature"),
    "the first it mentions": (400, error("response_format, max_completion_tokens: no"),
        Fault.SETTINGS, "HTTP 400", "change --endpoint.output"),
    "model as a word": (400, error("This model is tired", param=None),
        Fault.SETTINGS, "HTTP 400", r"model is tired; check --endpoint.\* \(and --judge\)$"),
    "model as parameter": (400, error("Not here", param="model"),
        Fault.SETTINGS, "HTTP 400", "Not here; .* change --judge$"),
    "detail as a list": (422, FASTAPI,
        Fault.SETTINGS, "HTTP 422", "Too high; .*change --endpoint.temperature"),
    "detail as text": (422, {"detail": "response_format is not known"},
        Fault.SETTINGS, "HTTP 422", "is not known; .*change --endpoint.output"),
    "error as text": (400, {"error": "top_k is no parameter"},
        Fault.SETTINGS, "HTTP 400", "top_k is no parameter; check --endpoint"),
    "flat": (400, {"object": "error", "message": "max_completion_tokens=9 is too large"},
        Fault.SETTINGS, "HTTP 400", "is too large; .*change --endpoint.token_limit or"),
    "router": (400, ROUTER, Fault.SETTINGS, "HTTP 400",
        r"Provider returned error \(top_p is out of range\)"),
    "text of JSON": (400, error(json.dumps(error("Deep inside"))),
        Fault.SETTINGS, "HTTP 400", "Deep inside; check"),
    # Account, key, address.
    "empty account": (429, error("You exceeded your current quota", code="insufficient_quota"),
        Fault.SETTINGS, "HTTP 429, no credit", "current quota; add credit .* OPENAI_API_KEY"),
    "credit balance": (400, error("Your credit balance is too low", type="invalid_request_error"),
        Fault.SETTINGS, "HTTP 400, no credit", "too low; add credit"),
    "to be paid": (402, error("Insufficient Balance"),
        Fault.SETTINGS, "HTTP 402, no credit", "Insufficient Balance; add credit"),
    "key": (401, error(f"Incorrect API key provided: {KEY}."),
        Fault.SETTINGS, "HTTP 401, key refused",
        r"provided: \[key\]; put a valid one into OPENAI_API_KEY"),
    "masked key": (401, error("Incorrect: sk-secr****ests, or sk-se...ests"),
        Fault.SETTINGS, "HTTP 401, key refused", r"Incorrect: \[key\], or \[key\]; put"),
    "key in a list": (400, GEMINI_KEY,
        Fault.SETTINGS, "HTTP 400, key refused", "API key not valid.* OPENAI_API_KEY"),
    "no right": (403, error("Permission denied on project x", status="PERMISSION_DENIED"),
        Fault.SETTINGS, "HTTP 403, access denied", "project x; check what the key in OPENAI_API_"),
    "country": (403, error("Not supported", code="unsupported_country_region_territory"),
        Fault.SETTINGS, "HTTP 403, country not served", "choose an endpoint that serves"),
    "no access": (403, error("Project x does not have access to model y", code="model_not_found"),
        Fault.SETTINGS, "HTTP 403, no such model", "check --judge, and that the key"),
    "firewall": (403, CLOUD, Fault.SETTINGS, "HTTP 403, access denied",
        "Access denied by the wall; .*firewall"),
    "no model": (404, error("The model `some-judge` does not exist."),
        Fault.SETTINGS, "HTTP 404, no such model", "does not exist; check --judge"),
    "no address": (404, {"detail": "Not Found"},
        Fault.SETTINGS, "HTTP 404, nothing there", "Not Found; check --judge and --endpoint.base_"),
    # This text.
    "filter": (400, FILTERED, Fault.REFUSED, "HTTP 400, content filter", "triggering a content"),
    "moderation": (403, error("x requires moderation and your input was flagged", code=403),
        Fault.REFUSED, "HTTP 403, content filter", "your input was flagged"),
    "long, OpenAI": (400, error("Reduce the length", code="context_length_exceeded"),
        Fault.REFUSED, "HTTP 400, too long", "a judge with a longer context can read it"),
    "long, vLLM": (400, error("This model's maximum context length is 64 tokens. However, your "
        "prompt contains at least 65 input tokens", param="input_tokens"),
        Fault.REFUSED, "HTTP 400, too long", "a judge with a longer context"),
    "long, older vLLM": (400, error("The decoder prompt (length 99) is longer than the maximum "
        "model length of 64."), Fault.REFUSED, "HTTP 400, too long", "model length of 64"),
    "long, llama.cpp": (400, error("request (4390 tokens) exceeds the available context size (4096 "
        "tokens)", type="exceed_context_size_error"), Fault.REFUSED, "HTTP 400, too long", "4390"),
    "long, llama.cpp 500": (500, error("Context size has been exceeded.", type="server_error"),
        Fault.REFUSED, "HTTP 500, too long", "Context size has been exceeded; a judge"),
    "long, Gemini": (400, GEMINI_LONG, Fault.REFUSED, "HTTP 400, too long", "1048576"),
    "long, Claude": (400, {"type": "error", **error("prompt is too long: 208310 tokens > 200000")},
        Fault.REFUSED, "HTTP 400, too long", "208310 tokens > 200000"),
    "long, in bytes": (413, CLOUD, Fault.REFUSED, "HTTP 413, too long", "by the wall"),
    # Passing.
    "rate": (429, error("Slow down", code="rate_limit_exceeded"), Fault.PASSING, "HTTP 429", ""),
    "rate, Gemini": (429, GEMINI_RATE, Fault.PASSING, "HTTP 429", ""),
    "loading": (503, error("model some-judge not found: loading"), Fault.PASSING, "HTTP 503", ""),
    # An error in the body of HTTP 200.
    "200, form": (200, error("No top_p", type="invalid_request_error"),
        Fault.SETTINGS, "error in HTTP 200", "No top_p; check --endpoint"),
    "200, key": (200, error("No auth", code=401),
        Fault.SETTINGS, "error in HTTP 200, key refused", "No auth; put a valid one"),
    "200, text": (200, error("No", code="content_filter"),
        Fault.REFUSED, "error in HTTP 200, content filter", r"No\. --client.skip_refused N"),
    "200, passing": (200, error("Busy", code=503), Fault.PASSING, "error in HTTP 200", ""),
    "200, unknown": (200, {"error": "Something broke"}, Fault.PASSING, "error in HTTP 200", ""),
    "200, in a choice": (200, {"choices": [{"message": {"content": GOOD}, "error": {"code": 502}}]},
        Fault.PASSING, "error in HTTP 200", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_told_by_its_cause_in_the_servers_words(fake_judge, tmp_path, case):
    status, body, fault, outcome, said = ERRORS[case]
    sent = body if isinstance(body, str) else json.dumps(body)
    fake_judge.replies = [Reply(status=status, body=sent)]
    [got] = score(make(tmp_path), "Scattering.")
    first = attempts(tmp_path)[0]
    assert first["outcome"] == outcome and len(first["reply"]) > 10  # its text is kept
    assert KEY not in (tmp_path / "ledger.jsonl").read_text()
    assert len(fake_judge.bodies) == 1 + (fault is Fault.PASSING)
    if fault is Fault.PASSING:
        assert isinstance(got, tuple)
        return
    assert type(got) is JudgeError and re.search(f"{outcome}: .*{said}", str(got))
    assert got.about_text == ("refused" in first) == (fault is Fault.REFUSED)
    assert ("--client.skip_refused" in str(got)) == (fault is Fault.REFUSED)


def test_the_last_failure_is_told_in_the_servers_words(fake_judge, tmp_path):
    fake_judge.replies = [Reply(status=503, body=json.dumps(error("Down for maintenance.")))] * 4
    [got] = score(make(tmp_path), "Scattering.")
    assert "no usable reply in 4 attempts, the last: HTTP 503: Down for maintenance." in str(got)
    assert not got.about_text and len(fake_judge.bodies) == 4
    assert all("maintenance" in row["reply"] for row in attempts(tmp_path))


def test_errors_without_tokens_do_not_end_a_budget_in_dollars(fake_judge, tmp_path):
    config = replace(FAST, max_cost=3.0, price_in=1.0, price_out=1.0)
    fake_judge.replies = [Reply(status=500)]
    assert isinstance(score(make(tmp_path, config), "Scattering.")[0], tuple)


# ----------------------------------------------------------------------------------- no connection


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.fixture
def dead_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, so that no other program takes it; not listening
        yield s.getsockname()[1]


UNREACHED = {
    "refused": ("http://127.0.0.1:{port}/v1", {}, "connection refused",
                r"start the server, or check --endpoint.base_url \(or OPENAI_BASE_URL\)"),
    "no host": ("http://no-such-host.invalid/v1", {}, "host not found", "check --endpoint.base_"),
    "dead proxy": ("http://judge.invalid/v1", {"HTTP_PROXY": "http://127.0.0.1:{port}"},
                   "proxy: connection refused", "correct or unset HTTP_PROXY, .* put judge.invalid "
                   "into NO_PROXY"),
    "dead proxy for all": ("https://judge.invalid/v1", {"all_proxy": "http://127.0.0.1:{port}"},
                           "proxy: connection refused", "correct or unset ALL_PROXY"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREACHED)
def test_an_endpoint_that_is_never_reached_is_a_mistake_in_the_settings(
    fake_judge, tmp_path, no_proxy, dead_port, case
):
    """At the first contact three attempts are enough to say so; eight are allowed."""
    url, environment, outcome, remedy = UNREACHED[case]
    for name, value in environment.items():
        no_proxy.setenv(name, value.format(port=dead_port))
    endpoint = Endpoint(base_url=url.format(port=dead_port))
    [got] = score(make(tmp_path, replace(FAST, attempts=8), endpoint=endpoint), "Scattering.")
    assert re.search(f"no usable reply in 3 attempts, the last: {outcome}: .*; {remedy}", str(got))
    assert [row["outcome"] for row in attempts(tmp_path)] == [outcome] * 3 and not got.about_text


def test_a_connection_that_is_lost_later_is_tried_again_as_often_as_any_fault(
    fake_judge, tmp_path, no_proxy
):
    judge = make(tmp_path, replace(FAST, attempts=5))
    assert isinstance(score(judge, "Scattering.")[0], tuple)
    fake_judge.fault = lambda: Reply(reset=True)  # the connection that is still open
    fake_judge.server.shutdown()
    fake_judge.server.server_close()
    [got] = score(judge, "Other.")
    assert "in 5 attempts, the last: connection refused" in str(got)
    outcomes = [row["outcome"] for row in attempts(tmp_path)]
    assert outcomes == ["ok", "connection lost"] + ["connection refused"] * 4


def test_an_endpoint_without_tls_is_told(fake_judge, tmp_path, no_proxy):
    endpoint = Endpoint(base_url=fake_judge.url.replace("http:", "https:"))
    [got] = score(make(tmp_path, endpoint=endpoint), "Scattering.")
    assert re.search("in 3 attempts, the last: no TLS: .*often begins with http://", str(got))


def test_a_certificate_that_is_not_accepted_stops_at_once(fake_judge, no_proxy):
    failure = RuntimeError("Connection error.")
    failure.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")
    attempt = read_no_response(failure, Service("some-judge", Endpoint(), FAST))
    assert attempt.outcome == "certificate not accepted" and attempt.fault is Fault.SETTINGS
    assert "self-signed" in attempt.said and "SSL_CERT_FILE" in attempt.remedy


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", "sk-\nsecret", "sk-secrét"])
def test_a_key_that_no_header_can_carry_is_refused_before_anything_is_asked(
    fake_judge, monkeypatch, key
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a line break") as caught:
        Service("some-judge", Endpoint(), FAST)
    assert "secr" not in str(caught.value)


@pytest.mark.parametrize("proxy, said", [
    ("socks5://user:sk-secret@127.0.0.1:9", "pip install socksio; or unset"),
    ("socks4://user:sk-secret@127.0.0.1:9", "give http://HOST:PORT; or unset"),
])  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_one_sentence(fake_judge, tmp_path, no_proxy, proxy, said):
    class Config:
        judge, endpoint, client = "some-judge", Endpoint(), FAST

    no_proxy.setitem(sys.modules, "socksio", None)  # as where it is not installed
    no_proxy.setenv("ALL_PROXY", proxy)
    with pytest.raises(ValueError, match=said) as caught:
        make_judge(Config, tmp_path / "ledger.jsonl")
    assert "sk-secret" not in str(caught.value)


# ------------------------------------------------------------------------------------ odd replies


def chat(content, finish="stop", usage=None, **message) -> Reply:
    choice = {"finish_reason": finish, "message": {"content": content, **message}}
    return Reply(body=json.dumps({"choices": [choice], "usage": usage, "model": "m"}))


FENCED = f"```json\n{GOOD}\n```"
PARTS = [{"type": "thinking", "thinking": [{"text": "Hm"}]}, {"type": "text", "text": GOOD[:20]},
         {"type": "text", "text": GOOD[20:]}]  # fmt: skip
# reply, --endpoint.output, the outcome, the reply's text on file
REPLIES = {
    "parts": (chat(PARTS), "schema", "ok", GOOD),
    "parts without text": (chat(PARTS[:1]), "schema", "empty reply", ""),
    "under reasoning": (chat(None, reasoning_content=GOOD), "schema", "ok", GOOD),
    "under reasoning, newer": (chat("", reasoning=GOOD), "schema", "ok", GOOD),
    "thoughts only": (chat("", reasoning_content=f"Say {GOOD}"), "schema",
                      "reasoning without a reply", f"Say {GOOD}"),
    "both": (chat("Eight.", reasoning_content=GOOD), "schema", "not JSON", "Eight."),
    "no reason": (chat(GOOD, None), "schema", "ok", GOOD),
    "no reason, cut": (chat(GOOD[:-1], None), "schema", "not JSON", GOOD[:-1]),
    "eos": (chat(GOOD, "eos_token"), "schema", "ok", GOOD),
    "capitals": (chat(GOOD, "STOP"), "schema", "ok", GOOD),
    "cut": (chat(GOOD, "length"), "schema", "cut at the token limit", GOOD),
    "filtered": (chat(GOOD, "content_filter"), "schema", "refusal", GOOD),
    "fence": (chat(FENCED), "text", "ok", FENCED),
    "fence, JSON mode": (chat(f"\n```\n{GOOD}\n```\n"), "json", "ok", f"\n```\n{GOOD}\n```\n"),
    "fence in spite of a schema": (chat(FENCED), "schema", "text before the JSON", FENCED),
    "text before a fence": (chat(f"Here: {FENCED}"), "text", "text before the JSON",
                            f"Here: {FENCED}"),
    "two fences": (chat(f"{FENCED}\n{FENCED}"), "text", "text after the JSON",
                   f"{FENCED}\n{FENCED}"),
    "two objects in a fence": (chat(f"```json\n{GOOD}\n{GOOD}\n```"), "text", "two objects",
                               f"```json\n{GOOD}\n{GOOD}\n```"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLIES)
def test_which_replies_count_and_what_is_kept(fake_judge, tmp_path, case):
    reply, output, outcome, kept = REPLIES[case]
    fake_judge.replies = [reply]
    endpoint = Endpoint(output=output)
    [got] = score(make(tmp_path, endpoint=endpoint), "Scattering.")
    first = attempts(tmp_path)[0]
    assert (first["outcome"], first["reply"]) == (outcome, kept)
    assert len(fake_judge.bodies) == (1 if outcome == "ok" else 2)
    if outcome == "ok":  # from the file too
        assert got == SCORES == score(make(tmp_path, endpoint=endpoint), "Scattering.")[0]
        assert score(LLMJudge(Replay(tmp_path / "ledger.jsonl")), "Scattering.") == [SCORES]
        assert len(fake_judge.bodies) == 1


@pytest.mark.parametrize("usage, tokens", [
    ({"prompt_tokens": "900", "completion_tokens": 40.0}, (900, 40)),
    ({"prompt_tokens": "many", "completion_tokens": None}, (None, None)),
    ({"prompt_tokens": -1, "completion_tokens": float("inf")}, (0, None)),
    (["900"], (None, None)),
    (None, (None, None)),
])  # fmt: skip
def test_a_paid_reply_is_kept_whatever_is_said_of_its_tokens(fake_judge, tmp_path, usage, tokens):
    fake_judge.replies = [chat(GOOD, usage=usage)]
    assert score(make(tmp_path), "Scattering.") == [SCORES]
    [row] = attempts(tmp_path)
    assert (row["tokens_in"], row["tokens_out"]) == tokens
