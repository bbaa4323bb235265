"""The record of one rollout, and JSONL files of rollouts.

A run appends every rollout, malformed ones included, as soon as it is judged, so that a killed run
loses no judgement that was paid for.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from prompts import OPEN, valid_scores
from storage.files import FileError, append_line


@dataclass(frozen=True)
class Rollout:
    """One response of the policy with its self-scores, the judge's scores and its reward. A line of
    rollouts/cycle_NN.jsonl has the same fields."""

    cycle: int  # from 1, as in Algorithm 1
    step: int  # RL step within the cycle, from 1
    prompt_id: str
    sample: int  # number of the rollout within its group, from 0
    seed: int  # with which it was sampled
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # as sampled, stop text included
    text: str  # the tokenizer's decoding of response_ids
    finish_reason: str  # "stop" (stop text or end-of-sequence token) or "length" (cut at the limit)
    answer: str | None  # text before the self-evaluation block; None if malformed
    self_scores: tuple[int, ...] | None  # None if malformed
    # Indices into response_ids; None if malformed, or if a score digit is not a separate token.
    score_positions: tuple[int, ...] | None
    # None if malformed, which is never judged, or if the judge refused.
    judge_scores: tuple[int, ...] | None
    judge_model: str | None
    reward: float | None  # None if the judge refused: there is no reward then
    quality: float | None
    calibration: float | None  # with the paper's gamma, whatever the reward's
    weight_version: str  # weights that it was sampled with: "c2s7" is cycle 2 after 7 RL steps
    # The sampler's log-probabilities at temperature 1, compared with the trainer's (grpo.py, note
    # 2).
    sampled_logp: tuple[float, ...] | None = None
    sampled_after: float | None = None  # seconds from the beginning of its step's sampling
    refused: str | None = None  # the judge's words, if it refused to judge a well-formed response

    @property
    def key(self) -> tuple[int, str, int]:
        return (self.step, self.prompt_id, self.sample)


_TYPES = get_type_hints(Rollout)


def answer_text(r: Rollout, special: tuple[str, ...]) -> str:
    """The answer; of a malformed response the text before its first [SELF_EVAL], without special
    tokens at its end, such as that of the end of the text (`special`: prompts.special_tokens)."""
    if r.answer is not None:
        return r.answer
    text = r.text.partition(OPEN)[0].strip()
    while text.endswith(special):
        text = next(text.removesuffix(s) for s in special if text.endswith(s)).rstrip()
    return text


def answer_id(r: Rollout) -> str:
    """Identifies the response, so that lines of other files can refer to it."""
    return hashlib.blake2b(repr(r.response_ids).encode(), digest_size=6).hexdigest()


def append_rollout(path: Path, rollout: Rollout) -> None:
    """Append one rollout to a file; ranks may share the file."""
    append_line(path, asdict(rollout))


def rollout_from_row(row: dict) -> Rollout:
    """A rollout from its line; unknown fields are ignored. Raises TypeError or ValueError."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in _TYPES}
    for name, value in values.items():
        if not _has_type(value, _TYPES[name]):
            raise ValueError(f"{name} is {value!r:.40}")
    for scores in (values.get("self_scores"), values.get("judge_scores")):
        if scores is not None and not valid_scores(scores):
            raise ValueError(f"scores {scores} are not five integers 0-9")
    return Rollout(**values)


def _has_type(value: object, hint) -> bool:
    """For the kinds of types that a Rollout has: int, float, str, tuple[x, ...], x | None."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(x, get_args(hint)[0]) for x in value)
    if options := get_args(hint):
        return any(_has_type(value, option) for option in options)
    return type(value) is hint or (hint is float and type(value) is int)


def read_rollouts(path: Path) -> list[Rollout]:
    """All rollouts of a file; of several with the same key the last one. An incomplete last line is
    left out with a warning.

    Raises FileError with file and line for any other line that is not a rollout.
    """
    if not path.exists():
        return []
    rollouts: dict[tuple, Rollout] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            warnings.warn(
                f"{path}:{number}: the last line is cut short and is left out", stacklevel=2
            )
            continue
        try:
            rollout = rollout_from_row(json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{path}:{number}: not a rollout ({error}); remove the line or the file"
            ) from error
        rollouts.pop(rollout.key, None)  # so that a rewritten rollout moves to the end
        rollouts[rollout.key] = rollout
    return list(rollouts.values())
