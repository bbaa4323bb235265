"""Another model's answers on file -> text by prompt (evaluate.py --stronger).

Rows are JSON lines, one JSON list, or parquet, in one of these forms:

    AlpacaEval    instruction, output
    Arena-Hard    uid, messages (v2.0: the conversation, the answer its last turn), or
                  question_id, choices (v0.1: [{"turns": [{"content": answer}]}])
    WildBench     session_id, output (a list with the answer)
    HelpSteer2    prompt (turns separated by its markers), response
    others        id, prompt or conversation, and answer

A row's prompt is found by uid, session_id or question_id, else by its text, and by id where there
is no text. Texts are compared turn by turn, in Unicode NFC and with runs of white space as one
space. An empty answer is an answer, and is judged as one.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prompts import Turn
from storage.data import DataError, Prompt, helpsteer2_turns, read_rows

_ANSWERS = ("answer", "output", "response")
_TURNS = ("conversation_input", "conversation", "messages", "prompt", "instruction")


class Answers(NamedTuple):
    """Answers to a benchmark's prompts, and what a file lacks or has too much."""

    texts: dict[str, str]  # by prompt id, in the order of the prompts
    missing: int  # prompts without an answer
    empty: int  # answers without text
    repeated: int  # further answers to a prompt; the first counts
    unmatched: int  # rows about none of the prompts

    def __str__(self) -> str:
        return (
            f"answers to {len(self.texts):,} of {len(self.texts) + self.missing:,} prompts, "
            f"{self.empty:,} of them empty; {self.missing:,} prompts lack one; left out: "
            f"{self.repeated:,} further answers to a prompt, {self.unmatched:,} rows about other "
            "prompts"
        )

    def counts(self) -> dict[str, int]:
        numbers = {name: n for name, n in self._asdict().items() if name != "texts"}
        return {"answers": len(self.texts)} | numbers


def load_answers(path: str | Path, prompts: Sequence[Prompt]) -> Answers:
    """Another model's answers to these prompts. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give answers as JSON lines or one JSON list")
    by_text: dict[tuple, list[str]] = {}
    for p in prompts:
        by_text.setdefault(_key(p.conversation), []).append(p.id)
    ids = {p.id for p in prompts}
    found: dict[str, str] = {}
    repeated = unmatched = 0
    for where, row in read_rows(path):
        answer = _answer(where, row)
        prompt_id = _prompt_id(row, ids, by_text)
        if prompt_id is None:
            unmatched += 1
        elif prompt_id in found:
            repeated += 1
        else:
            found[prompt_id] = answer.strip()
    if not found:
        raise DataError(
            f"{path}: no row answers one of the {len(prompts)} prompts; rows need a prompt's id "
            "(uid, session_id, id) or its text (prompt, instruction, conversation, messages)"
        )
    texts = {p.id: found[p.id] for p in prompts if p.id in found}
    empty = sum(not text for text in texts.values())
    return Answers(texts, len(prompts) - len(texts), empty, repeated, unmatched)


def _answer(where: str, row: dict) -> str:
    """The row's answer, as it is."""
    value = next((row[field] for field in _ANSWERS if field in row), None)
    match row.get("choices"):
        case [{"turns": turns}, *_] if value is None:
            value = turns
    if value is None and (turns := _turns(row)) and turns[-1].get("role") == "assistant":
        value = turns[-1]
    if isinstance(value, list) and value:
        value = value[-1]
    if (text := _content(value)) is None:
        raise DataError(
            f"{where}: no text in a field answer, output or response, in choices, or in an "
            "assistant's turn at the end of messages or conversation"
        )
    return text


def _content(value: object) -> str | None:
    """The text of "text", {"content": "text"} or {"content": {"answer": "text"}}."""
    for field in ("content", "answer"):
        if isinstance(value, dict) and field in value:
            value = value[field]
    return value if isinstance(value, str) else None


def _turns(row: dict) -> list[dict]:
    """The row's conversation; [] if it has none."""
    value = next((row[field] for field in _TURNS if field in row), None)
    if isinstance(value, str):
        return list(helpsteer2_turns(value))
    valid = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return value if valid else []


def _prompt_id(row: dict, ids: set[str], by_text: dict[tuple, list[str]]) -> str | None:
    for field in ("uid", "session_id", "question_id"):
        if str(row.get(field)) in ids:
            return str(row[field])
    own, turns = str(row.get("id")), _turns(row)
    if not turns:
        return own if own in ids else None
    if turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    alike = by_text.get(_key(turns), [])
    return own if own in alike else next(iter(alike), None)


def _key(turns: Sequence[Turn]) -> tuple:
    """The same for two conversations that differ in white space or Unicode form alone."""
    texts = ((str(turn.get("role")), _content(turn) or "") for turn in turns)
    return tuple(
        (role, " ".join(unicodedata.normalize("NFC", text).split())) for role, text in texts
    )
