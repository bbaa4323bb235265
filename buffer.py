"""Selection of the rollouts to distil: stratified round-robin over 5 attributes x 5 score bins
(Sec. 3.2).

Choices that the paper leaves open:
1. The draw within a cell is random: each cell is shuffled once.
2. At most `per_prompt_limit` rows of a prompt are selected (4 in the authors' configuration); a row
   over the limit is discarded.
3. If there are at most `max_samples` rows, all are selected and the limit is not applied. The
   authors' scripts do so at exactly that number and stop below it (departure).
4. The paper fills up with a random draw from the remaining rows if the grid is exhausted first.
   Every row is in five cells, so when the grid is empty each row has been selected or is over its
   prompt's limit. Under the same limit no row is left to draw, so no code is needed for this case.
"""

import random
from collections import Counter
from collections.abc import Sequence

from prompts import ATTRIBUTES
from storage.record import Rollout


def in_buffer(rollout: Rollout) -> bool:
    """Whether a rollout belongs to the buffer B (Algorithm 1, line 20): well-formed, judged, and
    with single-digit score tokens."""
    return rollout.judge_scores is not None and rollout.score_positions is not None


def select_stratified(
    judge_scores: Sequence[Sequence[int]],
    prompt_ids: Sequence[str],
    max_samples: int,
    per_prompt_limit: int,
    seed: int,
) -> list[int]:
    """Indices of the rows to distil, in the order of selection (Sec. 3.2; Algorithm 1, line 23).

    `judge_scores` are N vectors of five integers 0-9, `prompt_ids` the prompts of the N rows.
    Raises ValueError if the two differ in length or a score is off the scale."""
    if len(judge_scores) != len(prompt_ids):
        raise ValueError(f"{len(judge_scores)} score vectors for {len(prompt_ids)} prompt ids")
    n = len(ATTRIBUTES)
    if any(len(row) != n or not all(0 <= s <= 9 for s in row) for row in judge_scores):
        raise ValueError(f"every row needs {n} judge scores 0-9")
    if len(judge_scores) <= max_samples:
        return list(range(len(judge_scores)))

    rng = random.Random(seed)
    cells: dict[tuple[int, int], list[int]] = {(a, b): [] for a in range(n) for b in range(5)}
    for i, row in enumerate(judge_scores):
        for attribute, score in enumerate(row):
            cells[attribute, score // 2].append(i)  # bins {0,1}, {2,3}, ..., {8,9}
    for cell in cells.values():
        rng.shuffle(cell)

    selected: dict[int, None] = {}  # used as an ordered set
    per_prompt: Counter[str] = Counter()
    while len(selected) < max_samples and any(cells.values()):
        order = [name for name, cell in cells.items() if cell]
        rng.shuffle(order)
        for name in order:
            cell = cells[name]
            while cell and len(selected) < max_samples:
                i = cell.pop()
                if i not in selected and per_prompt[prompt_ids[i]] < per_prompt_limit:
                    selected[i] = None
                    per_prompt[prompt_ids[i]] += 1
                    break
    return list(selected)
