"""How many prompts of a window's own source are taken for unlike it (storage/model_card.py)?

    python bench/unlike.py --model DIR --data alpaca_eval.jsonl [--others arena_hard_v2.jsonl]

Draws a window from a prompt file and counts the file's other prompts, or those of another file,
that have less in common with the window than its own have. Exchangeable prompts are counted once
in window + 1, on average over draws.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend.model_folder import load_tokenizer  # noqa: E402
from config import PAPER  # noqa: E402
from judging.heuristic import HeuristicJudge  # noqa: E402
from storage.data import as_prompt, load_prompts  # noqa: E402
from storage.model_card import conversation_tokens, is_far, of_run  # noqa: E402

ASKED = ("What is the capital of France?", "Why is the sky blue?", "asdf qwer zxcv")


@dataclass(frozen=True)
class Options:
    """Prompts of one source, and of others."""

    model: str
    """Folder of the tokenizer."""
    data: str
    """Prompt file of the windows."""
    others: str = ""
    """Prompt file to compare with them; empty: the rest of --data."""
    window: int = 160
    """Prompts of a window."""
    draws: int = 10
    """Windows."""


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    tokenizer, prompts = load_tokenizer(o.model), load_prompts(o.data)
    known = {p.id: conversation_tokens(tokenizer, p.conversation) for p in prompts}
    other = load_prompts(o.others) if o.others else []
    known |= {p.id: conversation_tokens(tokenizer, p.conversation) for p in other}
    asked = [conversation_tokens(tokenizer, as_prompt(text).conversation) for text in ASKED]
    shares, answers = [], []
    for seed in range(o.draws):
        window = random.Random(seed).sample(prompts, o.window)
        ids = {p.id for p in window}
        card = of_run(PAPER, Path(o.model), (1, None), HeuristicJudge(), window, tokenizer, None)
        rest = [p.id for p in other or prompts if p.id not in ids]
        shares.append(np.mean([is_far(card.unlike(known[i])) for i in rest]))
        answers.append([card.unlike(tokens) for tokens in asked])
    print(f"{o.draws} windows of {o.window} from {Path(o.data).name}, {len(rest)} others each")
    print(f"unlike: {np.mean(shares):.2%} of the others in the mean, {min(shares):.2%} to "
          f"{max(shares):.2%}; one in window + 1 is {1 / (o.window + 1):.2%}")  # fmt: skip
    for text, values in zip(ASKED, np.array(answers).T, strict=True):
        print(f"{text!r}: unlike {values.min():.2f} to {values.max():.2f}")


if __name__ == "__main__":
    main()
