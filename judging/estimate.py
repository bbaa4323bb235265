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


def answer_lengths(tokenizer, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, float]:
    """Three lengths of answers in tokens, by what they are; the second is the likely one."""
    references = [count(tokenizer, r.response) for p in prompts for r in p.references]
    if references:
        typical, label = mean(references), "as long as the reference responses"
    else:
        typical = min(300, max_tokens)
        label = f"of {typical} tokens, a guess: this data has no reference responses"
    return {"empty answers": 0, f"answers {label}": typical, "the longest answers": max_tokens}


def dollars(cost: float | None) -> str:
    return "cost unknown" if cost is None else f"${cost:,.2f}"


def total(costs: Sequence[float | None]) -> float | None:
    """None if one is unknown."""
    return None if None in costs else sum(costs)


def by_length(asked: Sequence[tuple[Questions, dict[str, float]]]) -> list[str]:
    """A line for each of the three lengths, over all questions. `asked`: with `answer_lengths`."""
    lines = []
    labels = [list(lengths) for _, lengths in asked]
    for k in range(3):
        pairs = [(q, list(lengths.values())[k]) for q, lengths in asked]
        millions = sum(q.tokens_in(n) for q, n in pairs) / 1e6
        cost = dollars(total([q.cost(n) for q, n in pairs]))
        label = "; ".join(dict.fromkeys(names[k] for names in labels))
        lines.append(f"{millions:9,.1f} M tokens in, {cost:>12}   {label}")
    return lines


def budget(client: ClientConfig) -> str:
    max_cost = "none" if client.max_cost is None else f"${client.max_cost:,.2f}"
    max_calls = "none" if client.max_calls is None else f"{client.max_calls:,} calls"
    return f"budget: {max_cost} (--client.max_cost), {max_calls} (--client.max_calls)"
