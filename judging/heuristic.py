"""An offline judge from text statistics, for trying out the code: deterministic and free. It cannot
tell true from false, so its scores say nothing about a real judge's."""

import math
import re
from collections.abc import Sequence

from prompts import Scores, Turn, stray

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_COMMON = frozenset(
    "a an and are as at be by can could do does for from give have how i if in is it its me my of "
    "on or please so some that the their there they this to us was we what when where which who "
    "why will with would you your".split()
)
_SHORT = re.compile(
    r"\b(short|brief|briefly|one word|one sentence|single sentence|concise|in a few words)\b", re.I
)
_LONG = re.compile(
    r"\b(essay|story|article|detailed|in detail|report|paragraphs|recipe|code|program|letter)\b",
    re.I,
)


class HeuristicJudge:
    """Scores an answer by text statistics."""

    name = "heuristic (text statistics, a stand-in)"
    client = None  # sends no requests

    async def score(
        self, conversation: Sequence[Turn], answer: str, references: Sequence = (), draw: int = 0
    ) -> Scores:
        request = conversation[-1]["content"]
        words = [w.lower() for w in _WORD.findall(answer)]
        topic = {_stem(w) for w in map(str.lower, _WORD.findall(request)) if w not in _COMMON}
        relevance = len(topic & {_stem(w) for w in words}) / len(topic) if topic else 1.0

        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        fresh = len(set(trigrams)) / len(trigrams) if trigrams else 1.0  # 1: no repetition

        flaws = stray(answer)
        ended = bool(re.search(r"([.!?:)\"'”’*\]]|```)$", answer.rstrip()))
        form = (ended + (not flaws["open_fence"]) + (not flaws["stray_label"])) / 3

        expected = 15 if _SHORT.search(request) else 150 if _LONG.search(request) else 60  # words
        size = math.log2((len(words) + 1) / expected)  # 0: as long as expected
        fit = max(0.0, 1 - abs(size) / 4)

        long_words = sum(len(w) >= 8 for w in words) / len(words) if words else 0.0
        return (
            _scale(0.4 * relevance + 0.3 * fit + 0.3 * fresh),
            _scale(0.6 * relevance + 0.2 * fresh + 0.2 * fit),
            _scale(0.6 * fresh + 0.4 * form),
            _scale(long_words / 0.4),
            _scale(0.5 + size / 6),
        )


def _stem(word: str) -> str:
    return word[:5]


def _scale(share: float) -> int:
    return round(9 * min(1.0, max(0.0, share)))
