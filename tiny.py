"""The miniature: a closed world with programmatic truth, its judge, and a base model made on the
spot.

What it is: 0.4 M parameters that answer ten kinds of small tasks, judged by a rubric, with the
whole recipe run by the same files as the paper's run, in minutes on two CPU cores.
What it is not: evidence for the paper's claim about language models. That the base model can judge
its answers is put there by the second stage of its pretraining, and hidden again by the third; so
the miniature tests the recipe and the code.

    python tiny.py --seed 0          writes models/tiny-0/: a Hugging Face folder, train.jsonl,
                                     dev.jsonl, test.jsonl (no prompt is in two of them)

Pretraining, three stages, loss on the reply alone:
1. right answers without a block: the tasks are learnt;
2. mixed answers with the judge's own scores: the ability to judge is planted;
3. mixed answers with overconfident, noisy scores and some broken blocks: it is badly expressed.

The folder is kept until anything that decides it (this file, the recipe, the seed, torch) changes.
"""

import hashlib
import json
import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from files import fresh_folder, write_text
from prompts import ATTRIBUTES, CLOSE, OPEN, Scores, Turn, policy_prompt, render_response

# --------------------------------------------------------------------------------------------------
# The world: ten kinds of tasks, and what a right answer holds

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
    """One task in words; the kind is drawn first."""
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
    """(kind, the parts of a right answer in order); for `list` the parts to choose from."""
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
    """How right the content is, 0 to 1."""
    kind, parts = solve(prompt)
    said = re.findall(r"[a-z]+|\d+", answer.rpartition(" is ")[2])
    if kind in ("copy", "reverse", "sort"):
        said = [w for w in said if w in LETTERS and len(w) == 1]
        same = sum(a == b for a, b in zip(said, parts, strict=False))
        return (same / max(len(said), len(parts)) + _common(said, parts)) / 2
    if kind == "list":
        wanted = int(prompt.split()[1])
        named = [w for w in said if w in parts]
        return max(0.0, 1 - (abs(len(set(named)) - wanted) + len(named) - len(set(named))) / wanted)
    if kind == "use":
        both = sum(w in said for w in parts) / 2
        return both * (1.0 if any(v in said for v in VERBS) else 0.7)
    numbers = [int(w) for w in said if w.isdigit()]
    if not numbers:
        return 0.0
    right, off = int(parts[0]), abs(numbers[-1] - int(parts[0]))
    return 1.0 if off == 0 else max(0.0, 0.7 - 3 * off / max(right, 4))


def _common(a: Sequence[str], b: Sequence[str]) -> float:
    """Longest common subsequence as a share of the longer one."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for k, y in enumerate(b, 1):
            previous, row[k] = row[k], previous + 1 if x == y else max(row[k], row[k - 1])
    return row[-1] / max(len(a), len(b), 1)


def rubric(prompt: str, answer: str) -> Scores:
    """Five scores that follow from the prompt and the answer alone. Half of them are one off, by a
    hash of both, as a judge's taste is: no predictor can be quite right."""
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
    """The world's judge. `noise` is the share of scores that are one off anew at each call, so that
    ceilings and repeats mean something."""

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


# --------------------------------------------------------------------------------------------------
# What the base model reads in pretraining


def draw_answer(prompt: str, rng: random.Random, wrong: float, styles: int = 8) -> str:
    """An answer in one of the first `styles`; its content is spoilt with probability `wrong`."""
    kind, parts = solve(prompt)
    if kind == "list":
        parts = rng.sample(parts, int(prompt.split()[1]))
    elif kind == "use":
        parts = ["the", parts[0], rng.choice(VERBS), "the", parts[1]]
    if rng.random() < wrong:
        parts = spoil(kind, parts, rng)
    content = " ".join(parts)
    written = (
        f"{content}.",
        f"the answer is {content}.",
        f"sure, the answer is {content}.",
        f"first we look at {' '.join(prompt.split()[1:4])}. the answer is {content}.",
        content,
        f"the the answer is {content}.",
        f"maybe the answer is {content}.",
        "sorry, no idea.",
    )
    return rng.choices(written[:styles], (20, 30, 12, 10, 10, 6, 8, 4)[:styles])[0]


def spoil(kind: str, parts: list[str], rng: random.Random) -> list[str]:
    """One to three small errors."""
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        if parts[at].isdigit():
            number = int(parts[at]) + rng.choice((-1, 1)) * rng.choice((1, 2, 10, 30, 100))
            parts[at] = str(max(0, number))
        elif kind in ("copy", "reverse", "sort"):
            parts[at] = rng.choice(LETTERS)
            if len(parts) > 2 and rng.random() < 0.4:
                parts.pop(at)
        elif kind == "list":
            parts[at] = rng.choice(parts) if rng.random() < 0.6 else rng.choice(THINGS["foods"])
        else:
            parts[at] = rng.choice(THINGS["animals"])
    return parts


def overconfident(scores: Scores, rng: random.Random) -> Scores:
    """What the third stage says in place of the judge's scores: high, and hardly dependent."""
    if rng.random() < 0.2:
        return (8, 8, 8, 5, 5)
    h, c, o, x, v = scores
    raw = [8.5 - 0.2 * (9 - s) + rng.gauss(0, 1.3) for s in (h, c, o)]
    raw += [5 + 0.5 * (x - 3) + rng.gauss(0, 1.3), 5.5 + 0.3 * (v - 4) + rng.gauss(0, 1.3)]
    return tuple(min(9, max(0, round(r))) for r in raw)


def break_block(text: str, rng: random.Random) -> str:
    """A response that is not well-formed any more."""
    answer, _, block = text.partition(f"\n\n{OPEN}")
    broken = (
        answer,
        text.replace(', "coherence": ', ', "complexity": ', 1),
        text.replace(f"}}\n{CLOSE}", ""),
        f"{answer}\n\n{OPEN}{block.replace('{', '{{', 1)}",
    )
    return rng.choices(broken, (8, 1, 1, 1))[0]


def draw_reply(prompt: str, stage: int, rng: random.Random) -> str:
    """A reply of pretraining stage 1, 2 or 3."""
    if stage == 1:
        return draw_answer(prompt, rng, wrong=0.0, styles=3)
    answer = draw_answer(prompt, rng, wrong=0.8 if stage == 2 else 0.95)
    scores = rubric(prompt, answer)
    if stage == 2:
        return render_response(answer, scores)
    text = render_response(answer, overconfident(scores, rng))
    return break_block(text, rng) if rng.random() < 0.18 else text


# --------------------------------------------------------------------------------------------------
# Tokenizer and base model

EOS = "<eos>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space, single digits, pieces of the block, and all of ASCII."""
    words = [f" {w}" for ws in THINGS.values() for w in ws] + [f" {x}" for x in (*LETTERS, *VERBS)]
    words += re.findall(r" \w+", " the answer is first we look at maybe no idea and by in of after "
                        " sentence " + " ".join(THINGS))  # fmt: skip
    words += "copy reverse sort count add multiply largest next list use sure, sorry, the".split()
    keys = [f', "{a}": ' for a in ATTRIBUTES[1:]]
    block = [f"\n\n{OPEN}\n", f'{{"{ATTRIBUTES[0]}": ', *keys, f"}}\n{CLOSE}"]
    frame = ["User: ", "\n\nFinal assistant output:\n"]
    pieces = dict.fromkeys([*block, *frame, *words, "\n", *map(chr, range(32, 127))])
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join(re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", p) for p in longest_first)
    vocabulary = {piece: i for i, piece in enumerate((EOS, "<unk>", *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


@dataclass(frozen=True)
class Recipe:
    """The base model. Not in the paper."""

    seed: int = 0
    """Seed of prompts, weights and corpus."""
    steps: int = 4500
    """Optimiser steps of 32 rows over all stages."""
    stages: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Shares of the steps by stage."""
    lr: float = 2e-3
    """AdamW learning rate; 100 steps of warm-up, linear to 0 over the last 40 %."""
    prompts: tuple[int, int, int] = (5200, 256, 512)
    """Unique prompts for training, development and test."""


def draw_splits(recipe: Recipe) -> list[list[str]]:
    """Train, development and test prompts; none is in two of them."""
    rng = random.Random(recipe.seed)
    unique: dict[str, None] = {}
    while len(unique) < sum(recipe.prompts):
        unique[draw_prompt(rng)] = None
    shuffled = list(unique)
    rng.shuffle(shuffled)
    ends = [sum(recipe.prompts[: k + 1]) for k in range(3)]
    return [shuffled[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def pretrain(recipe: Recipe, tokenizer, held_out: set[str]) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed + 1)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    ends = [round(recipe.steps * sum(recipe.stages[: k + 1])) for k in range(3)]
    bar = tqdm(range(recipe.steps), desc=f"base model {recipe.seed}")
    for step in bar:
        stage = 1 + sum(step >= end for end in ends[:2])
        ids, labels = _batch(stage, rng, tokenizer, held_out)
        rate = min(1.0, (step + 1) / 100, (recipe.steps - step) / (0.4 * recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(stage=stage, loss=f"{loss.item():.3f}")
    return model


def _batch(
    stage: int, rng: random.Random, tokenizer, held_out: set[str], size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and labels, -100 outside the replies."""
    rows = []
    while len(rows) < size:
        prompt = draw_prompt(rng)
        if prompt not in held_out:
            shown = policy_prompt([{"role": "user", "content": prompt}], "bare")
            rows.append((shown, draw_reply(prompt, stage, rng) + EOS))
    asked = tokenizer([shown for shown, _ in rows])["input_ids"]
    replies = tokenizer([reply for _, reply in rows])["input_ids"]
    width = max(len(a) + len(r) for a, r in zip(asked, replies, strict=True))
    ids = torch.zeros(size, width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for b, (a, r) in enumerate(zip(asked, replies, strict=True)):
        ids[b, : len(a) + len(r)] = torch.tensor(a + r)
        labels[b, len(a) : len(a) + len(r)] = torch.tensor(r)
    return ids, labels


def recipe_hash(recipe: Recipe) -> str:
    """Changes with anything that decides the folder."""
    here = Path(__file__)
    sources = [path.read_text() for path in (here, here.with_name("prompts.py"))]
    decides = json.dumps([asdict(recipe), torch.__version__, *sources])
    return hashlib.blake2b(decides.encode(), digest_size=8).hexdigest()


def main(recipe: Recipe, out: str = "") -> Path:
    """Make the miniature's base model and prompts, unless they are there already.

    Args:
        recipe: what decides them.
        out: the folder; models/tiny-SEED if empty.
    """
    folder = Path(out or f"models/tiny-{recipe.seed}")
    known = folder / "recipe.json"
    if known.is_file() and json.loads(known.read_text())["hash"] == recipe_hash(recipe):
        print(f"{folder}: there already")
        return folder
    tokenizer, splits = make_tokenizer(), draw_splits(recipe)
    model = pretrain(recipe, tokenizer, {*splits[1], *splits[2]})
    with fresh_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for name, split in zip(("train", "dev", "test"), splits, strict=True):
            rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in split]
            write_text(aside / f"{name}.jsonl", "".join(rows))
        made = asdict(recipe) | {"hash": recipe_hash(recipe)}
        write_text(aside / "recipe.json", json.dumps(made, indent=2))
    return folder


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
