"""What judges will be asked, in calls, tokens and US dollars, before anything is sampled: for the
--dry_run of cycle.py and evaluate.py.

Tokens are counted with the policy's tokenizer, so a judge's own counts differ. The length of the
answers is unknown before sampling, so tokens and cost are given for three lengths.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from judging.endpoint import ClientConfig
from prompts import ATTRIBUTES, JUDGE_SYSTEM, PAIR_SYSTEM, judge_user, pair_user
from storage.data import Prompt

Prices = tuple[float | None, float | None]  # US dollars per million tokens in and out


class Questions(NamedTuple):
    """Questions of one form to one judge."""

    calls: int  # at most
    tokens: float  # mean of a question without the answers in it
    answers: int  # in a question
    reply: int  # tokens of a reply
    prices: Prices  # (None, None) if unknown

    def tokens_in(self, answer_length: float) -> float:
        return self.calls * (self.tokens + self.answers * answer_length)

    def cost(self, answer_length: float) -> float | None:
        """US dollars; None if the price is unknown."""
        price_in, price_out = self.prices
        if price_in is None or price_out is None:
            return None
        tokens_out = self.calls * self.reply
        return (self.tokens_in(answer_length) * price_in + tokens_out * price_out) / 1e6


class Lengths(NamedTuple):
    """Lengths of answers in tokens."""

    likely: float
    label: str  # what `likely` is
    longest: int


def count(tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def scoring(tokenizer, prompts: Sequence[Prompt], use_references: bool) -> Questions:
    """One question about an answer to each prompt; calls and prices are to be replaced."""
    shown = [
        judge_user(p.conversation, "", p.references if use_references else ()) for p in prompts
    ]
    tokens = mean([count(tokenizer, JUDGE_SYSTEM + user) for user in shown])
    reply = count(tokenizer, json.dumps(dict.fromkeys(ATTRIBUTES, 8)))
    return Questions(len(prompts), tokens, 1, reply, (None, None))


def comparing(tokenizer, prompts: Sequence[Prompt]) -> Questions:
    """As `scoring`, to the pairwise referee: two answers in a question."""
    shown = [PAIR_SYSTEM + pair_user(p.conversation, "", "") for p in prompts]
    reply = count(tokenizer, json.dumps({"better": "A"}))
    tokens = mean([count(tokenizer, text) for text in shown])
    return Questions(len(prompts), tokens, 2, reply, (None, None))


def answer_lengths(tokenizer, prompts: Sequence[Prompt], max_tokens: int) -> Lengths:
    """Answers are likely as long as the reference responses, where the data has them."""
    references = [count(tokenizer, r.response) for p in prompts for r in p.references]
    if references:
        return Lengths(mean(references), "as long as the reference responses", max_tokens)
    guess = min(300, max_tokens)
    why = f"of {guess} tokens, a guess: this data has no reference responses"
    return Lengths(guess, why, max_tokens)


def dollars(cost: float | None) -> str:
    return "cost unknown" if cost is None else f"${cost:,.2f}"


def total(costs: Sequence[float | None]) -> float | None:
    """None if one is unknown."""
    return None if None in costs else sum(costs)


def by_length(asked: Sequence[tuple[Questions, Lengths]]) -> list[str]:
    """A line for each of the three lengths, over all questions."""
    likely = "; ".join(dict.fromkeys(lengths.label for _, lengths in asked))
    lines = []
    for label, length in (
        ("empty answers", lambda lengths: 0),
        (f"answers {likely}", lambda lengths: lengths.likely),
        ("the longest answers", lambda lengths: lengths.longest),
    ):
        millions = sum(q.tokens_in(length(lengths)) for q, lengths in asked) / 1e6
        cost = dollars(total([q.cost(length(lengths)) for q, lengths in asked]))
        lines.append(f"{millions:9,.1f} M tokens in, {cost:>12}   {label}")
    return lines


def budget(client: ClientConfig) -> str:
    max_cost = "none" if client.max_cost is None else f"${client.max_cost:,.2f}"
    max_calls = "none" if client.max_calls is None else f"{client.max_calls:,} calls"
    return f"budget: {max_cost} (--client.max_cost), {max_calls} (--client.max_calls)"
