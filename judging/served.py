"""A trained model behind an OpenAI-compatible server: its answers and its distributions over
digits.

A prompt is sent as token ids to /completions, so that the model reads what it read in training
whatever the server's own template. The text holds the block. Its ten-digit distributions are read
from the server's log-probabilities, where it gives them, by the text of the tokens: at most
`LOGPROBS` tokens a position, so that a digit which is not among them counts as 0. Where a server
does not know vLLM's include_stop_str_in_output, the end of the block, which it has cut off, is put
back.
"""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from judging.client import connection, send
from judging.endpoint import ClientConfig, Server, checked_url
from judging.errors import Attempt, filled_in, plain
from prompts import CLOSE, OPEN, digit_offsets

LOGPROBS = 20  # the most that vLLM gives by default


class ServedError(RuntimeError):
    """No answer, although it was asked for again. The message names the remedy."""


class ServedModel(Server):
    """The server of --url."""

    url_option, model_option, key_option = "--url", "--served_name", "--key_variable"
    without_a_key = f", or leave {key_option} out for a server that needs none"

    def __init__(self, url: str, key_variable: str, config: ClientConfig):
        """Raises ValueError. `config`: attempts and time-out count."""
        self.base_url = checked_url(url, ServedModel)
        self.name, self.config = f"the model at {self.base_url}", config
        self.key_variable = key_variable or "the variable that --key_variable names"
        self.key = self.read_key() if key_variable else ""

    def option(self, parameter: str | None) -> str:
        return {
            "model": self.model_option,
            "logprobs": f"the server's limit to {LOGPROBS} (vLLM: --max-logprobs)",
            "max_tokens": "the server's longest row (vLLM: --max-model-len), or --max_tokens",
            "prompt": "the server: it must take token ids",
        }.get(parameter, "the server: vLLM's own takes what this program sends")


class Completion(NamedTuple):
    """One answer."""

    text: str  # with its block
    finish_reason: str  # "stop" or "length"
    digits: list[list[float]] | None  # (5, 10), see digit_probabilities


class CompletionClient:
    """Asks for answers, at most `config.concurrency` at once. The openai package asks again after
    passing failures, `config.attempts` times in all."""

    def __init__(self, server: ServedModel, served_name: str = ""):
        """`served_name`: of the model at the server; empty: the only one that it lists. Raises
        ValueError."""
        self.server, self._name = server, served_name
        self._api = connection(server, retries=server.config.attempts - 1)
        self._slots = asyncio.Semaphore(server.config.concurrency)

    async def find_name(self) -> None:
        """Ask the server what it serves. Raises ServedError."""
        if self._name:
            return
        answer = await send(self._api.models.with_raw_response.list, {}, self.server, None)
        if answer.failed:
            raise self._error(answer.failed)
        try:
            names = [str(row["id"]) for row in json.loads(answer.body)["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if len(names) != 1:
            listed = ", ".join(names) or "nothing that can be read"
            raise ServedError(f"{self.server.name}: it lists {listed}; say which by --served_name")
        [self._name] = names

    async def complete(self, prompt: Sequence[int], sampling: Mapping, seed: int) -> Completion:
        """`sampling`: temperature, top_p, top_k, max_tokens. Raises ServedError."""
        request = {
            "model": self._name, "prompt": list(prompt), **sampling, "seed": seed, "stop": [CLOSE],
            "logprobs": LOGPROBS, "include_stop_str_in_output": True, "skip_special_tokens": False,
            # A server may take other defaults from the folder's generation_config.json.
            "repetition_penalty": 1.0, "min_p": 0.0,
        }  # fmt: skip
        body = dict(request)
        model, ids = body.pop("model"), body.pop("prompt")
        create = self._api.completions.with_raw_response.create
        call = partial(create, model=model, prompt=ids, extra_body=body)
        async with self._slots:
            answer = await send(call, request, self.server, None)
        if answer.failed:
            raise self._error(answer.failed)
        try:
            return read_completion(answer.body)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            said = plain(self.server.without_key(answer.body))
            remedy = filled_in("check {url}, which often ends in /v1", self.server)
            failed = Attempt(f"not a completion ({error})", said=said[:200], remedy=remedy)
            raise self._error(failed) from None

    def _error(self, failed: Attempt) -> ServedError:
        return ServedError(
            f"{self.server.name}: {failed}. Answers that are on file stay there, and the same "
            "command goes on"
        )


def read_completion(body: str) -> Completion:
    """Raises ValueError, KeyError, IndexError, TypeError or AttributeError for a body that is no
    completion."""
    choice = json.loads(body)["choices"][0]
    finish = choice["finish_reason"]
    text = choice["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if finish not in ("stop", "length"):
        raise ValueError(f"finish reason {finish}")
    # vLLM says which text it stopped at, and none at the end of the sequence.
    stopped_at = choice.get("stop_reason", CLOSE)
    if finish == "stop" and stopped_at == CLOSE and OPEN in text and CLOSE not in text:
        text += CLOSE
    return Completion(text, finish, digit_probabilities(text, choice.get("logprobs")))


def digit_probabilities(text: str, logprobs: dict | None) -> list[list[float]] | None:
    """(5, 10): at each score position the probabilities of the ten digits, given that one of them
    is written. None for a malformed response, without log-probabilities, and where a score digit is
    not a token of its own. `logprobs`: a choice's, in either of the two forms in use."""
    if digit_offsets(text) is None or not logprobs:
        return None
    if "content" in logprobs:
        tokens = [row["token"] for row in logprobs["content"]]
        top = [{x["token"]: x["logprob"] for x in row["top_logprobs"]}
               for row in logprobs["content"]]  # fmt: skip
    else:
        tokens, top = logprobs["tokens"], logprobs["top_logprobs"] or []
    # The tokens' texts may differ from the text in what is not ASCII, so count from the block on.
    joined = "".join(tokens)
    begin = joined.rfind(OPEN)
    block = joined[begin:].partition("}")[0] + "}" + CLOSE
    offsets = digit_offsets("." + block) if begin >= 0 else None
    if offsets is None or len(top) != len(tokens):
        return None
    found, k, end = [], -1, 0  # token k ends at character `end`
    for offset in offsets:
        at = begin + offset - 1
        while end <= at:
            k += 1
            end += len(tokens[k])
        space, digit = tokens[k][:-1], tokens[k][-1]
        if space.strip(" ") or digit != joined[at] or tokens[k] not in (top[k] or {}):
            return None
        p = [math.exp(top[k].get(f"{space}{d}", -math.inf)) for d in range(10)]
        if not (total := sum(p)):
            return None
        found.append([x / total for x in p])
    return found
