"""Replies: the attempt from the body of an HTTP 200 response.

Whether a reply counts is decided by its text, which must be whole and as the caller's form wants
it. So any server's name for a regular end is accepted, and none at all. A text in parts is put
together, and text that a server has filed under reasoning is read there if there is no other. One
fence around the reply is accepted where the endpoint is not asked for a schema.
"""

import json
import re

from judging.endpoint import Form, Service
from judging.errors import ADDRESS, Attempt, Fault, filled_in, plain, read_error

FINISHED = {"none", "stop", "stop_sequence", "end_turn", "eos", "eos_token"}


def read_reply(text: str, form: Form, request: dict, service: Service) -> Attempt:
    """The attempt from the body of an HTTP 200 response."""
    if not text.strip():
        return Attempt("empty body", fault=Fault.PASSING)
    try:
        body = json.loads(text)
        if error := _error_within(body):
            attempt = read_error(None, json.dumps(error), {}, request, service)
            return attempt._replace(reply=service.without_key(text))
        choice = body["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason")).lower()
        refusal, reply = message.get("refusal"), _text(message.get("content"))
        thoughts = _text(message.get("reasoning_content") or message.get("reasoning"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        kept = service.without_key(text)
        remedy = filled_in(f"{ADDRESS}, which often ends in /v1", service)
        return Attempt("not a chat completion", kept, said=plain(kept), remedy=remedy)
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    attempt = Attempt(
        reply=reply if (reply or "").strip() else thoughts or reply,
        served_model=str(body["model"]) if body.get("model") else None,
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )
    if refusal or finish == "content_filter":
        said = str(refusal or "")
        return attempt._replace(
            outcome="refusal", reply=attempt.reply or said, fault=Fault.DECLINED, said=plain(said)
        )
    if finish == "length":
        remedy = "raise --endpoint.max_tokens"
        return attempt._replace(outcome="cut at the token limit", remedy=remedy)
    if finish not in FINISHED:
        return attempt._replace(outcome=f"finish reason {finish}")
    if not (attempt.reply or "").strip():
        return attempt._replace(outcome="empty reply")
    try:
        form.parse(attempt.reply if service.output == "schema" else unfenced(attempt.reply))
    except ValueError as reason:
        if attempt.reply is thoughts:
            remedy = "turn reasoning down or off by --endpoint.request"
            return attempt._replace(outcome="reasoning without a reply", remedy=remedy)
        return attempt._replace(outcome=str(reason))
    return attempt


def unfenced(reply: str) -> str:
    """A reply that is one fenced block, without the fence; any other as it is."""
    found = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", reply, re.DOTALL | re.IGNORECASE)
    return found[1] if found else reply


def _text(content: object) -> str | None:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        return "".join(p for p in parts if isinstance(p, str))
    return content if content is None else str(content)


def _count(tokens: object) -> int | None:
    try:
        return max(0, int(float(tokens)))
    except (TypeError, ValueError, OverflowError):
        return None


def _error_within(body: object) -> object:
    """The error in the body of an HTTP 200 response; None if there is none."""
    body = body[0] if isinstance(body, list) else body
    if body.get("choices"):
        return body["choices"][0].get("error")
    is_error = body.keys() & {"errors", "detail", "message"} and "choices" not in body
    return body.get("error") or (body if is_error else None)
