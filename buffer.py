"""Rollouts on file, and which of them are distilled (Sec. 3.2).

A run writes every rollout of a cycle, malformed ones too, to one append-only JSONL file as soon as
it is judged, so that a killed run loses nothing that was paid for. The buffer B of Algorithm 1
(line 20) is its well-formed part.

`select_stratified` is the round-robin over 5 attributes x 5 score bins. The paper leaves open, and
we fix:
1. The draw inside a cell is random: each cell is shuffled once.
2. At most `per_prompt_limit` rows of a prompt are taken (4 in the authors' configuration); a row
   over the limit is dropped for good.
3. When there are no more rows than asked for, all are taken and the limit is not applied, as in the
   authors' scripts.
4. The paper tops up with a random draw from the remainder if the grid empties first. Every row lies
   in five cells, so when the grid is empty each row has been taken or is over its prompt's limit:
   under the same limit there is nothing left to draw from, and the top-up needs no code.
"""

import json
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from files import append_line


@dataclass(frozen=True)
class Rollout:
    """One response of the policy and all that was said of it. Plain Python: it is a line of JSONL
    as it stands."""

    cycle: int  # from 1, as in Algorithm 1
    step: int  # RL step within the cycle, from 1
    prompt_id: str
    sample: int  # which of the prompt's rollouts, from 0
    seed: int  # of the sampler
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # as sampled, stop text included
    text: str  # the tokenizer's decoding of response_ids
    finish_reason: str  # "stop" (stop text or end-of-sequence token) or "length" (cut at the limit)
    answer: str | None  # text before the block, None if malformed
    self_scores: tuple[int, ...] | None  # None if malformed
    # In response_ids; None if malformed or a digit shares its token.
    score_positions: tuple[int, ...] | None
    judge_scores: tuple[int, ...] | None  # None if malformed: such a response is never judged
    judge_model: str | None
    reward: float
    quality: float | None
    calibration: float | None
    weight_version: str  # which weights sampled it: "c2s7" is cycle 2 after 7 RL steps
    sampled_logp: tuple[float, ...] | None = (
        None  # the sampler's log-probabilities at temperature 1, for the alarm
    )

    @property
    def key(self) -> tuple[int, str, int]:
        return (self.step, self.prompt_id, self.sample)


def append(path: Path, rollout: Rollout) -> None:
    """Add one rollout to a file that all ranks may share."""
    append_line(path, asdict(rollout))


def from_row(row: dict) -> Rollout:
    """A rollout from its line; fields of other versions are passed over."""
    names = {f.name for f in fields(Rollout)}
    return Rollout(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in names}
    )


def read(path: Path) -> list[Rollout]:
    """All rollouts of a file; of two with the same key the later one. A torn last line is left out
    with a warning.

    Raises ValueError with file and line for any other line that is not a rollout.
    """
    if not path.exists():
        return []
    found: dict[tuple, Rollout] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            warnings.warn(
                f"{path}:{number}: the last line is cut short and is left out", stacklevel=2
            )
            continue
        try:
            rollout = from_row(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number}: not a rollout ({error}); remove the line or the file"
            ) from error
        found.pop(rollout.key, None)  # so that the order is that of the last writing
        found[rollout.key] = rollout
    return list(found.values())


def select_stratified(
    judge_scores: Sequence[Sequence[int]],
    prompt_ids: Sequence[str],
    max_samples: int,
    per_prompt_limit: int,
    seed: int,
) -> list[int]:
    """Indices of the rows to distil, in draw order (Sec. 3.2; Algorithm 1, line 23).

    `judge_scores` are N vectors of five integers 0-9, `prompt_ids` the N prompts they belong to.
    Raises ValueError if the two differ in length or a score is off the scale."""
    if len(judge_scores) != len(prompt_ids):
        raise ValueError(f"{len(judge_scores)} score vectors for {len(prompt_ids)} prompt ids")
    if any(len(row) != 5 or not all(0 <= s <= 9 for s in row) for row in judge_scores):
        raise ValueError("every row needs five judge scores 0-9")
    if len(judge_scores) <= max_samples:
        return list(range(len(judge_scores)))

    rng = random.Random(seed)
    cells: dict[tuple[int, int], list[int]] = {(a, b): [] for a in range(5) for b in range(5)}
    for i, row in enumerate(judge_scores):
        for attribute, score in enumerate(row):
            cells[attribute, score // 2].append(i)  # bins {0,1}, {2,3}, ..., {8,9}
    for cell in cells.values():
        rng.shuffle(cell)

    selected: dict[int, None] = {}  # ordered set
    taken: Counter[str] = Counter()
    while len(selected) < max_samples and any(cells.values()):
        order = [name for name, cell in cells.items() if cell]
        rng.shuffle(order)
        for name in order:
            cell = cells[name]
            while cell and len(selected) < max_samples:
                i = cell.pop()
                if i not in selected and taken[prompt_ids[i]] < per_prompt_limit:
                    selected[i] = None
                    taken[prompt_ids[i]] += 1
                    break
    return list(selected)
