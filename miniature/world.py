"""The miniature's closed world: ten kinds of small tasks with computable solutions, and a rubric as
judge.

What it is: tasks that a model of 0.4 M parameters learns in minutes, judged by a program, so that
the whole recipe runs on two CPU cores with the same code as the paper's run.
What it is not: evidence for the paper's claim about language models. The base model's ability to
judge its answers is trained into it, and then obscured, by its pretraining (base_model.py). So the
miniature tests the recipe and the code only.
"""

import math
import random
import re
import zlib
from collections.abc import Sequence

from prompts import Scores, Turn

# --------------------------------------------------------------------------------------------------
# The world: ten kinds of tasks and their solutions

LETTERS = "abcdefghij"
THINGS = {
    "colours": "red blue green black white brown pink grey gold orange".split(),
    "animals": "cat dog cow hen fox owl bee ant pig bear".split(),
    "foods": "rice bread soup cake egg plum corn milk salt bean".split(),
}
VERBS = ("sees", "likes", "finds", "has")


def letters(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def draw_prompt(rng: random.Random) -> str:
    """A random task as text."""
    things = rng.choice(list(THINGS))
    start, gap = rng.randint(1, 60), rng.randint(2, 12)
    return rng.choice((
        lambda: f"copy {letters(rng, 4, 7)}",
        lambda: f"reverse {letters(rng, 4, 7)}",
        lambda: f"sort {letters(rng, 4, 7)}",
        lambda: f"count {rng.choice('abc')} in {' '.join(rng.choice('abcd') for _ in range(8))}",
        lambda: f"add {rng.randint(10, 399)} and {rng.randint(10, 399)}",
        lambda: f"multiply {rng.randint(11, 99)} by {rng.randint(2, 9)}",
        lambda: f"largest of {' '.join(str(rng.randint(10, 999)) for _ in range(4))}",
        lambda: f"next after {' '.join(str(start + k * gap) for k in range(3))}",
        lambda: f"list {rng.randint(2, 6)} {things}",
        lambda: "use {} and {} in a sentence".format(*rng.sample(THINGS[things], 2)),
    ))()  # fmt: skip


def solve(prompt: str) -> tuple[str, list[str]]:
    """(kind, the parts of a correct answer in order); for `list` the parts to choose from."""
    kind, *words = prompt.split()
    numbers = [int(w) for w in words if w.isdigit()]
    if kind == "copy":
        return kind, words
    if kind == "reverse":
        return kind, words[::-1]
    if kind == "sort":
        return kind, sorted(words)
    if kind == "count":
        return kind, [str(words[2:].count(words[0]))]
    if kind == "add":
        return kind, [str(sum(numbers))]
    if kind == "multiply":
        return kind, [str(numbers[0] * numbers[1])]
    if kind == "largest":
        return kind, [str(max(numbers))]
    if kind == "next":
        return kind, [str(2 * numbers[2] - numbers[1])]
    if kind == "list":
        return kind, THINGS[words[1]]
    return "use", [words[0], words[2]]


# --------------------------------------------------------------------------------------------------
# The judge: a rubric


def _match(prompt: str, answer: str) -> float:
    """Correctness of the answer's content, 0 to 1."""
    kind, parts = solve(prompt)
    words = re.findall(r"[a-z]+|\d+", answer.rpartition(" is ")[2])
    if kind in ("copy", "reverse", "sort"):
        sequence = [w for w in words if w in LETTERS and len(w) == 1]
        same = sum(a == b for a, b in zip(sequence, parts, strict=False))
        return (same / max(len(sequence), len(parts)) + _common(sequence, parts)) / 2
    if kind == "list":
        required = int(prompt.split()[1])
        items = [w for w in words if w in parts]
        distinct = len(set(items))
        errors = abs(distinct - required) + len(items) - distinct
        return max(0.0, 1 - errors / required)
    if kind == "use":
        share_used = sum(w in words for w in parts) / 2
        return share_used * (1.0 if any(v in words for v in VERBS) else 0.7)
    numbers = [int(w) for w in words if w.isdigit()]
    if not numbers:
        return 0.0
    solution = int(parts[0])
    error = abs(numbers[-1] - solution)
    return 1.0 if error == 0 else max(0.0, 0.7 - 3 * error / max(solution, 4))


def _common(a: Sequence[str], b: Sequence[str]) -> float:
    """Length of the longest common subsequence as a share of the longer sequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for k, y in enumerate(b, 1):
            previous, row[k] = row[k], previous + 1 if x == y else max(row[k], row[k - 1])
    return row[-1] / max(len(a), len(b), 1)


def rubric(prompt: str, answer: str) -> Scores:
    """Five scores, determined by the prompt and the answer. To imitate a judge's taste, half of the
    scores are shifted by one, as a hash of prompt and answer decides: no predictor can be exact."""
    kind, parts = solve(prompt)
    words = re.findall(r"[a-z]+|\d+", answer)
    style = answer.partition(" is ")[0].split()  # before the content, where letters may repeat
    correct = 9 * _match(prompt, answer) ** 1.3
    coherent = 9 - 3 * (not answer.endswith("."))
    coherent -= 4 * any(a == b for a, b in zip(style, style[1:], strict=False))
    coherent -= 1.5 * ("maybe" in words)
    helpful = 0.7 * correct + 0.3 * coherent - 2 * ("sorry" in words) + 0.5 * ("sure" in words)
    hard = {"copy": 1, "list": 2, "count": 2, "use": 3, "next": 3, "reverse": 3, "largest": 3,
            "sort": 4, "add": 4, "multiply": 6}[kind]  # fmt: skip
    worked = 2.0 * ("first" in words)
    size = len(parts) if kind != "list" else int(prompt.split()[1])
    exact = (helpful, correct, coherent, hard + worked + 0.2 * size,
             4 + 2 * math.log2((len(words) + 1) / (size + 4)))  # fmt: skip
    taste = zlib.crc32(f"{prompt}|{answer}".encode())
    shifts = [(0, 1, 0, -1)[(taste >> (2 * k)) & 3] for k in range(len(exact))]
    return tuple(min(9, max(0, round(x) + s)) for x, s in zip(exact, shifts, strict=True))


class RubricJudge:
    """The judge of the miniature. `noise` is the probability of each score to be shifted by one,
    drawn anew at each call, so that repeated judgements differ."""

    client = None  # sends no requests

    def __init__(self, noise: float = 0.0, seed: int = 0):
        self.name = "rubric (the miniature's)" if not noise else f"rubric, noise {noise:g}"
        self.noise, self.rng = noise, random.Random(seed)

    async def score(
        self, conversation: Sequence[Turn], answer: str, references: Sequence = (), draw: int = 0
    ) -> Scores:
        scores = rubric(conversation[-1]["content"], answer)
        if not self.noise:
            return scores
        return tuple(
            min(9, max(0, s + self.rng.choice((-1, 1)))) if self.rng.random() < self.noise else s
            for s in scores
        )
