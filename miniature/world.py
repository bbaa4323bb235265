"""The miniature's closed world: five kinds of small tasks with computable solutions, and a rubric
as judge.

Letters, words and numbers lie in the west, south, east or north: a quarter of each sort, in order.
Three kinds are forks: the prompt offers two ways and names a side, and one way ends on that side.

    path   path to east of b f h, 7 12 3           -> b f h east      the way, and where it ends
    swap   swap to south of dog red milk, f a e    -> a f e south     the first two items swapped
    ends   ends to west of 9 4 2, cat dog soup     -> 9 2 west        the first and the last item

Before the answer is written both ways are equally likely in all of the base model's training, so
choosing the right one takes a look ahead that nobody teaches. The written answer shows which way
was taken, so checking is easy. In the plain kinds (copy, reverse) nothing is to be chosen.

What it is: tasks that a model of 0.3 M parameters learns in minutes, judged by a program, so that
the whole recipe runs on two CPU cores with the same code as the paper's run.
What it is not: evidence for the paper's claim about language models. The base model's ability to
judge its answers is trained into it, and then hidden, by its pretraining (base_model.py). So the
miniature tests the recipe and the code only.
"""

import math
import random
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from prompts import Scores, Turn

LETTERS = "abcdefghijkl"
WORDS = "red blue green black cat dog cow hen rice bread soup milk".split()
NUMBERS = [str(n) for n in range(1, 13)]
SIDES = ("west", "south", "east", "north")
SORTS = {"letters": LETTERS, "words": WORDS, "numbers": NUMBERS}
# kind -> (how often it is drawn, how complex it is for the rubric)
KINDS = {"path": (5, 3), "swap": (5, 5), "ends": (5, 4),
         "copy": (2, 1), "reverse": (2, 4)}  # fmt: skip
FORKS = ("path", "swap", "ends")


# --------------------------------------------------------------------------------------------------
# Tasks and their solutions


def draw_prompt(rng: random.Random, kinds: Sequence[str] = tuple(KINDS)) -> str:
    """A random task as text."""
    kind = rng.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    if kind not in FORKS:
        return f"{kind} {' '.join(rng.sample(LETTERS, 5))}"
    while True:
        ways = [rng.sample(SORTS[sort], 3) for sort in rng.sample(list(SORTS), 2)]
        if side(ways[0][-1]) != side(ways[1][-1]):
            break
    goal = side(rng.choice(ways)[-1])
    return f"{kind} to {goal} of {', '.join(map(' '.join, ways))}"


class Task(NamedTuple):
    kind: str
    ways: list[list[str]]  # the words of the possible answers: two of a fork, else one
    right: int  # which of them is right


def read_task(prompt: str) -> Task:
    kind, rest = prompt.split(" ", 1)
    if kind == "copy":
        return Task(kind, [rest.split()], 0)
    if kind == "reverse":
        return Task(kind, [rest.split()[::-1]], 0)
    _, goal, _, offered = rest.split(" ", 3)
    ways = [written(kind, way.split()) for way in offered.split(", ")]
    return Task(kind, ways, [goal in way for way in ways].index(True))


def side(item: str) -> str:
    """Where an item lies: the first quarter of each sort in the west, the second in the south."""
    items = next(items for items in SORTS.values() if item in items)
    return SIDES[items.index(item) * len(SIDES) // len(items)]


def written(kind: str, way: Sequence[str]) -> list[str]:
    """The answer that goes an offered way."""
    items = list(way)
    if kind == "swap":
        items = [items[1], items[0], items[2]]
    if kind == "ends":
        items = [items[0], items[2]]
    return [*items, side(items[-1])]


# --------------------------------------------------------------------------------------------------
# The judge: a rubric

WRONG_WAY = 0.2  # match of an answer that goes the wrong way without an error


def content(answer: str) -> list[str]:
    """The words of an answer without its introduction."""
    return re.findall(r"[a-z]+|\d+", answer.rpartition(" is ")[2])


def match(prompt: str, answer: str) -> float:
    """Correctness of the answer's content, 0 to 1."""
    task, words = read_task(prompt), content(answer)
    shares = [share_in_place(words, way) for way in task.ways]
    taken = max(range(len(shares)), key=lambda k: (shares[k], k == task.right))
    return shares[taken] * (1.0 if taken == task.right else WRONG_WAY)


def share_in_place(words: Sequence[str], way: Sequence[str]) -> float:
    """Share of the words that stand where the way has them."""
    return sum(a == b for a, b in zip(words, way, strict=False)) / max(len(words), len(way))


def rubric(prompt: str, answer: str) -> Scores:
    """Five scores, determined by the prompt and the answer. To imitate a judge's taste, a quarter
    of the scores are shifted by one, as a hash of prompt and answer decides: no predictor can be
    exact."""
    task = read_task(prompt)
    words = re.findall(r"[a-z]+|\d+", answer)
    correct = 9 * match(prompt, answer) ** 2
    coherent = 9 - 3 * (not answer.endswith(".")) - 2 * ("maybe" in words)
    coherent -= 4 * any(a == b for a, b in zip(words, words[1:], strict=False))
    helpful = 0.85 * correct + 0.15 * coherent
    complexity = KINDS[task.kind][1] + 2 * ("first" in words)
    verbosity = 4 + 2 * math.log2((len(words) + 1) / (len(task.ways[0]) + 4))
    taste = zlib.crc32(f"{prompt}|{answer}".encode())
    exact = (helpful, correct, coherent, complexity, verbosity)
    shifts = [(1, -1, 0, 0, 0, 0, 0, 0)[(taste >> (3 * k)) & 7] for k in range(len(exact))]
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
