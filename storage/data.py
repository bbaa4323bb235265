"""Prompt files -> `Prompt(id, conversation, references)` (Sec. 4.1, Benchmarks).

The fields of a file's first row decide its kind:

    HelpSteer2    prompt, response, helpfulness, correctness, coherence, complexity, verbosity
    (labels 0-4)
    Arena-Hard    uid, prompt (v2.0)
    AlpacaEval    instruction
    WildBench     session_id, conversation_input (v2: multi-turn)
    plain         prompt, or conversation (a list of {"role", "content"} turns); optionally id

A file is JSONL, JSONL.gz, one JSON list, or parquet. HelpSteer2 rows with the same prompt become
one Prompt, whose reference responses have the human labels doubled to the 0-9 scale (App. B.3). In
files of the other kinds, duplicate prompts are removed. Errors name the file and the line (in a
JSON list or parquet: the row).
"""

import gzip
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import linear_kernel

from prompts import ATTRIBUTES, Scores, Turn

ROLES = ("system", "user", "assistant")

_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A prompt file that cannot be used. The message names file, line and remedy."""


class Reference(NamedTuple):
    response: str
    scores: Scores  # on the 0-9 scale


@dataclass(frozen=True)
class Prompt:
    id: str
    conversation: tuple[Turn, ...]  # the last turn is the user's
    references: tuple[Reference, ...] = ()
    category: str = ""  # as the file names it


def load_prompts(path: str | Path, text: str | None = None) -> list[Prompt]:
    """All unique prompts of a file, in file order. `text`: the file's content, if it is read
    already; then `path` is its name. Raises DataError if the file or a row of it is not valid."""
    path = Path(path)
    if text is None and not path.is_file():
        raise DataError(
            f"{path}: no such file; give a JSONL file of prompts with --data (kinds: see "
            "storage/data.py), or a hub id (see storage/hub.py)"
        )
    prompts: dict[str, Prompt] = {}
    kind = None
    for where, row in read_rows(path, text):
        kind = kind or _kind(where, row)
        prompt = replace(KINDS[kind](where, row), category=_category(row))
        if earlier := prompts.get(prompt.id):
            if earlier.conversation != prompt.conversation:
                raise DataError(
                    f"{where}: id {prompt.id!r} was used before for another conversation; make "
                    "ids unique"
                )
            references = earlier.references + prompt.references
            prompt = replace(prompt, references=references)
        prompts[prompt.id] = prompt
    if not prompts:
        raise DataError(f"{path}: the file holds no prompt; give one JSON object per line")
    return list(prompts.values())


def read_rows(path: Path, text: str | None = None) -> Iterator[tuple[str, dict]]:
    """("file:line", row) for each row of a file, or of its text if that is read already. Lone
    surrogates, which no tokenizer takes, become U+FFFD; a warning counts them."""
    replaced = 0
    for number, row in _raw_rows(path, text):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        row, count = _without_surrogates(row)
        replaced += count
        yield f"{path}:{number}", row
    if replaced:
        warnings.warn(f"{path}: {replaced} lone surrogate(s) are read as U+FFFD", stacklevel=2)


def _without_surrogates(value: object) -> tuple[object, int]:
    """The value with U+FFFD for lone surrogates in its strings, and how many there were."""
    if isinstance(value, str):
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return whole, 0 if whole == value else len(_SURROGATE.findall(value))
    if isinstance(value, list):
        pairs = [_without_surrogates(x) for x in value]
        return [x for x, _ in pairs], sum(count for _, count in pairs)
    if isinstance(value, dict):
        pairs = {key: _without_surrogates(x) for key, x in value.items()}
        return {key: x for key, (x, _) in pairs.items()}, sum(n for _, n in pairs.values())
    return value, 0


def _raw_rows(path: Path, text: str | None) -> Iterator[tuple[int, object]]:
    """(line number, value); rows of a JSON list or of parquet are counted from 1."""
    if text is None and path.suffix == ".parquet":
        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read as parquet ({error})") from error
        return
    try:
        if text is None:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except (json.JSONDecodeError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            message = getattr(error, "msg", "too deeply nested")
            raise DataError(f"{path}:{line}: not a JSON list ({message})") from error
        return
    # Not splitlines(), which splits at a U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _loads(path, number, line)


def _loads(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        message = getattr(error, "msg", "too deeply nested")
        raise DataError(
            f"{path}:{number}: not JSON ({message}); each line must be one JSON object"
        ) from error


def _kind(where: str, row: dict) -> str:
    if "prompt" in row and "response" in row:
        return "helpsteer2"
    if "response_1" in row and "response_2" in row:
        raise DataError(
            f"{where}: HelpSteer2's preference file has pairs of responses and no labels 0-4; give "
            "its train.jsonl.gz or validation.jsonl.gz"
        )
    if "uid" in row and "prompt" in row:
        return "arena_hard"
    if "instruction" in row:
        return "alpaca_eval"
    if "conversation_input" in row:
        return "wildbench"
    if "prompt" in row or "conversation" in row:
        return "plain"
    raise DataError(
        f"{where}: no field prompt, conversation, conversation_input or instruction; fields found: "
        f"{', '.join(row) or 'none'}"
    )


def _category(row: dict) -> str:
    """Arena-Hard's, WildBench's and AlpacaEval's field, or a plain file's; "" without one."""
    names = (row.get(field) for field in ("category", "primary_tag", "dataset"))
    return next((name for name in names if isinstance(name, str) and name), "")


def _text(where: str, row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {field!r} is missing, empty or not text")
    return value


def as_prompt(value: "str | Sequence[Turn] | Prompt") -> Prompt:
    """A request or a conversation as a prompt, its id a hash of the text. Raises DataError."""
    if isinstance(value, Prompt):
        return value
    field = "prompt" if isinstance(value, str) else "conversation"
    row, _ = _without_surrogates({field: value if isinstance(value, str) else list(value)})
    return _plain("the prompt", row)


def _hash(conversation: tuple[Turn, ...]) -> str:
    return hashlib.blake2b(json.dumps(conversation).encode(), digest_size=8).hexdigest()


def _single(text: str) -> tuple[Turn, ...]:
    return ({"role": "user", "content": text},)


_MARKER = re.compile(r"<extra_id_1>(User|Assistant)[ \t]*\n?")


def helpsteer2_turns(prompt: str) -> tuple[Turn, ...]:
    """The turns of HelpSteer2's prompt text; text before the first marker is the user's."""
    pieces = _MARKER.split(prompt)  # text, role, text, role, text ...
    turns = [
        ("user", pieces[0]),
        *zip((r.lower() for r in pieces[1::2]), pieces[2::2], strict=True),
    ]
    return tuple({"role": role, "content": text.strip()} for role, text in turns if text.strip())


def _helpsteer2(where: str, row: dict) -> Prompt:
    response = _text(where, row, "response")
    conversation = helpsteer2_turns(_text(where, row, "prompt"))
    if not conversation or conversation[-1]["role"] != "user":
        raise DataError(f"{where}: the prompt's last turn must be the user's")
    labels = [row.get(a) for a in ATTRIBUTES]
    for attribute, label in zip(ATTRIBUTES, labels, strict=True):
        if type(label) is not int or not 0 <= label <= 4:
            raise DataError(
                f"{where}: label {attribute} must be an integer 0-4 (HelpSteer2's scale); found "
                f"{label!r}"
            )
    # App. B.2: "doubling the original 0-4 human annotations"
    doubled = tuple(2 * label for label in labels)
    return Prompt(_hash(conversation), conversation, (Reference(response, doubled),))


def _arena_hard(where: str, row: dict) -> Prompt:
    return Prompt(_text(where, row, "uid"), _single(_text(where, row, "prompt")))


def _alpaca_eval(where: str, row: dict) -> Prompt:
    conversation = _single(_text(where, row, "instruction"))
    return Prompt(_hash(conversation), conversation)


def _wildbench(where: str, row: dict) -> Prompt:
    return Prompt(_text(where, row, "session_id"), _turns(where, row, "conversation_input"))


def _plain(where: str, row: dict) -> Prompt:
    if "conversation" in row:
        conversation = _turns(where, row, "conversation")
    else:
        conversation = _single(_text(where, row, "prompt"))
    return Prompt(
        str(row["id"]) if row.get("id") is not None else _hash(conversation), conversation
    )


def _turns(where: str, row: dict, field: str) -> tuple[Turn, ...]:
    """The turns in a row's field, each with its role and content only."""
    turns = row[field]
    valid = isinstance(turns, list) and all(
        isinstance(t, dict) and t.get("role") in ROLES and isinstance(t.get("content"), str)
        for t in turns
    )
    if not valid or not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise DataError(
            f"{where}: {field} must be a list of turns {{'role': user|assistant|system, "
            f"'content': text}} that ends with the user's"
        )
    return tuple({"role": t["role"], "content": t["content"]} for t in turns)


KINDS = {
    "helpsteer2": _helpsteer2,
    "arena_hard": _arena_hard,
    "alpaca_eval": _alpaca_eval,
    "wildbench": _wildbench,
    "plain": _plain,
}


def near_duplicates(
    prompts: Sequence[Prompt], others: Sequence[Prompt], threshold: float = 0.8
) -> list[bool]:
    """For each of `prompts`, whether it nearly duplicates one of `others`: cosine similarity of
    TF-IDF vectors of character 5-grams at or above the threshold."""
    if not prompts or not others:
        return [False] * len(prompts)
    texts = ["\n".join(t["content"] for t in p.conversation) for p in (*others, *prompts)]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(5, 5)).fit_transform(texts)
    similarity = linear_kernel(vectors[len(others) :], vectors[: len(others)])  # (prompts, others)
    return (similarity.max(axis=1) >= threshold).tolist()
