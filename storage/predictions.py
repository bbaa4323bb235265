"""A prediction on file: predict.py writes it as a line of JSON, watch.py and --screen read it.

The fields of a line are those of `Prediction`; the prompt is `prompt` where it is one request and
`conversation` where it has several turns, so that a file of predictions is a file of prompts too
(storage/data.py).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from prompts import ATTRIBUTES, Scores, Turn, valid_scores
from storage.data import as_prompt
from storage.files import FileError, append_line, read_lines, write_text
from storage.model_card import is_far

Decision = Literal["send", "retry", "escalate"]


@dataclass(frozen=True)
class Prediction:
    """An answer with what the model says about it. Scores are in the order of
    prompts.ATTRIBUTES."""

    id: str
    conversation: tuple[Turn, ...]
    answer: str | None  # None if the response is malformed or there is none
    text: str | None  # the whole response; None for a prompt that is too long
    scores: Scores | None  # as sampled; None without an answer
    # Of each attribute the probabilities of the digits 0-9, given that one of them is written, (5,
    # 10); None where the server gives none, and where a score digit is not a token of its own.
    digits: tuple[tuple[float, ...], ...] | None
    expected: tuple[float, ...] | None  # means of `digits`
    spread: tuple[float, ...] | None  # standard deviations of `digits`
    # reward.quality of `expected`, of `scores` where there are no digits; None without an answer.
    expected_quality: float | None
    p_below: float | None  # P(correctness < --below), from `digits`
    unlike: float | None  # storage/model_card.ModelCard.unlike; None where it is not known
    # retry: send this one, the best of several; None without a threshold.
    decision: Decision | None
    sample: int  # which of the prompt's answers, from 0
    model: str
    time: str  # ISO 8601

    def row(self) -> dict:
        """A line of the file."""
        row = asdict(self)
        turns = row.pop("conversation")
        single = len(turns) == 1 and turns[0]["role"] == "user"
        prompt = {"prompt": turns[0]["content"]} if single else {"conversation": turns}
        return {"id": row.pop("id")} | prompt | row


def from_row(row: dict) -> Prediction:
    """Raises ValueError, KeyError or TypeError."""
    names = ("answer", "text", "scores", "digits", "expected", "spread", "expected_quality",
             "p_below", "unlike", "decision", "sample", "model", "time")  # fmt: skip
    values = {name: _tuples(row[name]) for name in names}
    if values["scores"] is not None and not valid_scores(values["scores"]):
        raise ValueError(f"scores {row['scores']} are not five integers 0-9")
    for name in ("expected_quality", "p_below", "unlike"):
        x = values[name]
        if x is not None and not (type(x) in (int, float) and math.isfinite(x)):
            raise ValueError(f"{name} is {x!r:.40}")
    prompt = as_prompt(row["prompt"] if "prompt" in row else row["conversation"])
    return Prediction(id=str(row["id"]), conversation=prompt.conversation, **values)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def append_prediction(path: Path, prediction: Prediction) -> None:
    append_line(path, prediction.row())


def read_predictions(path: Path) -> list[Prediction]:
    """All predictions of a file, of several of one id the last; [] without a file. Raises FileError
    with file and line."""
    if not path.exists():
        return []
    found: dict[str, Prediction] = {}
    for number, _, row in read_lines(path, what="a prediction"):
        try:
            prediction = from_row(row)
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"{path}:{number}: not a prediction ({error}); delete this line, and it is made "
                "again"
            ) from None
        found.pop(prediction.id, None)
        found[prediction.id] = prediction
    return list(found.values())


# --------------------------------------------------------------------------------------------------
# For a reader


def summary(predictions: Sequence[Prediction]) -> str:
    decisions = [p.decision for p in predictions if p.decision]
    parts = [f"{len(predictions)} predictions"]
    parts += [f"{decisions.count(d)} {d}" for d in ("send", "retry", "escalate") if decisions]
    malformed = sum(p.answer is None for p in predictions)
    unlike = sum(is_far(p.unlike) for p in predictions)
    return ", ".join([*parts, f"{malformed} without an answer", f"{unlike} unlike the window"])


def render(p: Prediction, below: int, threshold: float | None) -> str:
    """A prediction for a reader."""
    if p.text is None:
        return "the prompt is too long to be answered"
    lines = [p.text if p.answer is None else p.answer, ""]
    if p.answer is None:
        lines.append("malformed: no scores")
    for k, name in enumerate(ATTRIBUTES if p.scores else ()):
        shown = f"  expected {p.expected[k]:.1f} ± {p.spread[k]:.1f}" if p.expected else ""
        lines.append(f"{name:<12} {p.scores[k]}{shown}")
    if p.expected_quality is not None:
        lines.append(f"expected quality {p.expected_quality:.2f}")
    if p.p_below is not None:
        lines.append(f"P(correctness < {below}) {p.p_below:.2f}")
    if p.unlike is not None:
        lines.append(f"less like the training window than {p.unlike:.0%} of its own prompts")
    if is_far(p.unlike):
        lines.append("warning: the scores may mean nothing for such a prompt")
    if p.decision:
        lines.append(f"decision: {p.decision} (threshold {threshold:g})")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Screening: which answers are worth keeping as training data


def why_dropped(p: Prediction) -> str | None:
    """None if the answer is worth keeping."""
    if p.decision in ("send", "retry"):
        return None
    if p.text is None:
        return "the prompt is too long"
    if p.answer is None:
        return "malformed"
    if is_far(p.unlike):
        return "unlike the training window"
    return "below the threshold"


def screen(predictions: Sequence[Prediction], kept: Path, dropped: Path) -> dict[str, int]:
    """Write the answers worth keeping as conversations, and the others with the reason; return the
    number of each. Raises WriteError."""
    counts = {"kept": 0}
    rows: dict[Path, list[dict]] = {kept: [], dropped: []}
    for p in predictions:
        row = {"id": p.id, "expected_quality": p.expected_quality, "model": p.model}
        if (reason := why_dropped(p)) is None:
            answer = {"role": "assistant", "content": p.answer}
            rows[kept].append(row | {"messages": [*p.conversation, answer]})
        else:
            turns = {"conversation": p.conversation, "answer": p.answer}
            rows[dropped].append(row | {"reason": reason} | turns)
        counts[reason or "kept"] = counts.get(reason or "kept", 0) + 1
    for path, lines in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        write_text(path, text)
    return counts
