"""A served model's replies: .venv/bin/python -m pytest tests/test_served.py"""

import asyncio
import json
import math

import pytest
from fake_judge import FakeJudge, Reply

import prompts
from judging.client import Background
from judging.endpoint import ClientConfig
from judging.served import (
    CompletionClient,
    ServedError,
    ServedModel,
    digit_probabilities,
    read_completion,
)

SCORES = (8, 7, 6, 1, 0)
TEXT = prompts.render_response("It is fine.", SCORES)
# Of each digit's position; the token text of the digit d is LEAD + d.
LOGP = {d: math.log(0.05 if d != 7 else 0.35) for d in range(10)}


def pieces(text: str, lead: str = "") -> list[str]:
    """The text as tokens: each score digit alone with `lead` before it, the rest in threes."""
    offsets, tokens, at = prompts.digit_offsets(text), [], 0
    for end in (*offsets, len(text)):
        plain = text[at:end].removesuffix(lead) if end < len(text) else text[at:]
        tokens += [plain[k : k + 3] for k in range(0, len(plain), 3)]
        if end < len(text):
            tokens.append(lead + text[end])
        at = end + 1
    assert "".join(tokens) == text
    return tokens


def logprobs(tokens, top, form="legacy"):
    if form == "legacy":
        return {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens), "top_logprobs": top}
    rows = [
        {"token": t, "logprob": -1.0,
         "top_logprobs": [{"token": x, "logprob": y} for x, y in (of or {}).items()]}
        for t, of in zip(tokens, top, strict=True)
    ]  # fmt: skip
    return {"content": rows}


def with_digits(tokens, lead=""):
    digits = {f"{lead}{d}": x for d, x in LOGP.items()}
    other = {("" if lead else " ") + str(d): -0.1 for d in range(10)}  # spelt otherwise
    return [{**other, **digits} if t.strip() in set("0123456789") else {t: -0.5} for t in tokens]


@pytest.mark.parametrize("form", ["legacy", "content"])
@pytest.mark.parametrize("lead", ["", " "])
def test_digits_are_read_by_the_text_of_their_tokens(form, lead):
    tokens = pieces(TEXT, lead)
    found = digit_probabilities(TEXT, logprobs(tokens, with_digits(tokens, lead), form))
    total = 9 * 0.05 + 0.35
    for row in found:
        assert row == pytest.approx([(0.35 if d == 7 else 0.05) / total for d in range(10)])


def test_each_position_has_its_own_distribution_and_a_missing_digit_counts_as_0():
    tokens = pieces(TEXT)
    top = with_digits(tokens)
    at = [k for k, t in enumerate(tokens) if t in set("0123456789")]
    for k, score in zip(at, SCORES, strict=True):
        top[k] = {str(score): math.log(0.6), str((score + 1) % 10): math.log(0.2), "x": -1.0}
    for row, score in zip(digit_probabilities(TEXT, logprobs(tokens, top)), SCORES, strict=True):
        assert row[score] == pytest.approx(0.75) and row[(score + 1) % 10] == pytest.approx(0.25)
        assert sum(row) == pytest.approx(1)


def test_tokens_that_spell_otherwise_than_the_text_do_not_move_the_digits():
    """Parts of one character, an end-of-sequence token, a stop text that the server cut off."""
    text = prompts.render_response("Grüße 8.", SCORES)
    tokens = pieces(text)
    known = digit_probabilities(text, logprobs(tokens, with_digits(tokens)))
    odd = [piece for t in tokens for piece in ([t] if "ü" not in t else ["�", "�", "x"])]
    assert digit_probabilities(text, logprobs([*odd, "<|end|>"], with_digits([*odd, "?"]))) == known
    cut = tokens[: next(k for k in range(len(tokens)) if "".join(tokens[k:]) in prompts.CLOSE)]
    assert digit_probabilities(text, logprobs(cut, with_digits(cut))) == known


def test_without_separate_digits_there_is_no_distribution():
    tokens = pieces(TEXT)
    top = with_digits(tokens)
    at = tokens.index("8")
    glued = [*tokens[: at - 1], tokens[at - 1] + "8", *tokens[at + 1 :]]
    for text, given in {
        "malformed": ("It is fine.", logprobs(tokens, top)),
        "none given": (TEXT, None),
        "no top": (TEXT, logprobs(tokens, None)),
        "glued": (TEXT, logprobs(glued, with_digits(glued))),
        "not its own": (TEXT, logprobs(tokens, [{"x": -1.0}] * len(tokens))),
    }.values():
        assert digit_probabilities(text, given) is None


def choice(text, finish="stop", **more):
    return json.dumps({"choices": [{"text": text, "finish_reason": finish, **more}]})


def test_the_end_of_the_block_is_put_back_where_a_server_cuts_it_off():
    cut = TEXT.removesuffix(prompts.CLOSE)
    assert read_completion(choice(TEXT)).text == TEXT
    assert read_completion(choice(cut)).text == TEXT
    assert read_completion(choice(cut, stop_reason=prompts.CLOSE)).text == TEXT
    # vLLM stopped at the end of the sequence: the model left the block open.
    assert read_completion(choice(cut, stop_reason=None)).text == cut
    assert read_completion(choice(cut, "length")).text == cut
    assert read_completion(choice("It is.")).text == "It is."


@pytest.fixture
def server(monkeypatch):
    found = FakeJudge()
    monkeypatch.setenv("MY_KEY", "sk-secret-of-mine")
    yield found
    found.server.shutdown()


def ask(server, key="", name="", url=None):
    model = ServedModel(url or server.url, key, ClientConfig(attempts=1, timeout=5.0))
    client, loop = CompletionClient(model, name), Background()

    async def both():
        await client.find_name()
        return await client.complete([5, 6], {"max_tokens": 3, "temperature": 0.8}, 7)

    return loop.submit(asyncio.wait_for(both(), 30)).result()


def test_what_is_asked(server):
    server.replies = [Reply(body=choice(TEXT))] * 2
    assert ask(server).text == TEXT
    [body] = server.bodies
    assert (body["model"], body["prompt"], body["seed"], body["max_tokens"]) == (
        "judge",
        [5, 6],
        7,
        3,
    )
    assert body["stop"] == [prompts.CLOSE] and body["logprobs"] == 20
    ask(server, "MY_KEY", "another")
    # No key goes to a server that none was named for.
    assert server.keys == ["Bearer none", "Bearer sk-secret-of-mine"]
    assert server.bodies[1]["model"] == "another"


FAULTS = {
    "key": (Reply(status=401, body='{"error": {"message": "wrong key sk-secret-of-mine"}}'),
            "HTTP 401, key refused.*put a valid one into MY_KEY"),
    "model": (Reply(status=404, body='{"error": {"message": "The model x does not exist"}}'),
              "no such model.*check --served_name"),
    "limit": (Reply(status=400, body='{"error": {"message": "logprobs 20 is too high"}}'),
              "refuses the parameter logprobs so change the server's limit to 20"),
    "path": (Reply(body="<html>hello</html>"), "not a completion .*check --url, which often ends"),
    "cut": (Reply(body=choice("x", "abort")), "not a completion .finish reason abort"),
    "no text": (Reply(body=choice(None)), "not a completion"),
}  # fmt: skip


@pytest.mark.parametrize(("reply", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_sentence_without_the_key(server, reply, says):
    server.replies = [reply]
    with pytest.raises(ServedError, match=says) as caught:
        ask(server, "MY_KEY")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_server_or_no_single_model(server, monkeypatch):
    with pytest.raises(ServedError, match="connection refused.*start the server, or check --url"):
        ask(server, url="http://127.0.0.1:9/v1")
    server.served = ["one", "two"]
    with pytest.raises(ServedError, match="it lists one, two; say which by --served_name"):
        ask(server)
    for url in ("127.0.0.1:8000", "http://user:word@host/v1"):
        with pytest.raises(ValueError, match="--url must read .*--key_variable names") as caught:
            ask(server, url=url)
        assert "word@" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="needs a key: set MY_KEY, or leave --key_variable out"):
        ask(server, "MY_KEY")
    with pytest.raises(ValueError, match="--key_variable takes the name") as caught:
        ask(server, "sk-secret-of-mine")
    assert "secret" not in str(caught.value)
