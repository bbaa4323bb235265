"""The miniature's base model and prompt files, generated from a seed.

    python -m miniature.base_model --seed 0
        writes models/tiny-0/: a Hugging Face folder, train.jsonl, dev.jsonl, test.jsonl (disjoint
        prompts)

Pretraining has three stages, with the loss on the reply only:
1. correct answers without a block: the model learns the tasks;
2. mixed answers with the judge's scores: it learns to judge;
3. mixed answers with overconfident, noisy scores and some malformed blocks: it learns to express
   its judgement badly.

An existing folder is used again unless something that determines it has changed: the world, the
recipe, the seed, the version of torch.
"""

import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import prompts
from miniature import world
from miniature.world import LETTERS, THINGS, VERBS, draw_prompt, rubric, solve
from prompts import ATTRIBUTES, CLOSE, OPEN, Scores, policy_prompt, render_response
from storage.files import fresh_folder, write_text
from storage.progress import progress

# --------------------------------------------------------------------------------------------------
# Pretraining data


def draw_answer(prompt: str, rng: random.Random, wrong: float, styles: int = 8) -> str:
    """An answer in one of the first `styles` styles; with probability `wrong` it has errors."""
    kind, parts = solve(prompt)
    if kind == "list":
        parts = rng.sample(parts, int(prompt.split()[1]))
    elif kind == "use":
        parts = ["the", parts[0], rng.choice(VERBS), "the", parts[1]]
    if rng.random() < wrong:
        parts = add_errors(kind, parts, rng)
    content = " ".join(parts)
    answers = (
        f"{content}.",
        f"the answer is {content}.",
        f"sure, the answer is {content}.",
        f"first we look at {' '.join(prompt.split()[1:4])}. the answer is {content}.",
        content,
        f"the the answer is {content}.",
        f"maybe the answer is {content}.",
        "sorry, no idea.",
    )
    return rng.choices(answers[:styles], (20, 30, 12, 10, 10, 6, 8, 4)[:styles])[0]


def add_errors(kind: str, parts: list[str], rng: random.Random) -> list[str]:
    """The parts of an answer with one to three small errors."""
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
    """Self-scores of stage 3: high, and only weakly dependent on the judge's `scores`."""
    if rng.random() < 0.2:
        return (8, 8, 8, 5, 5)
    h, c, o, x, v = scores
    raw = [8.5 - 0.2 * (9 - s) + rng.gauss(0, 1.3) for s in (h, c, o)]
    raw += [5 + 0.5 * (x - 3) + rng.gauss(0, 1.3), 5.5 + 0.3 * (v - 4) + rng.gauss(0, 1.3)]
    return tuple(min(9, max(0, round(r))) for r in raw)


def break_block(text: str, rng: random.Random) -> str:
    """A well-formed response made malformed."""
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
    """Tokens: words with a leading space, pieces of the prompt and of the block, and all printable
    ASCII characters, digits among them."""
    words = [f" {w}" for ws in THINGS.values() for w in ws] + [f" {x}" for x in (*LETTERS, *VERBS)]
    words += re.findall(r" \w+", " the answer is first we look at maybe no idea and by in of after "
                        " sentence " + " ".join(THINGS))  # fmt: skip
    words += "copy reverse sort count add multiply largest next list use sure, sorry, the".split()
    keys = [f', "{a}": ' for a in ATTRIBUTES[1:]]
    block = [f"\n\n{OPEN}\n", f'{{"{ATTRIBUTES[0]}": ', *keys, f"}}\n{CLOSE}"]
    template = ["User: ", "\n\nFinal assistant output:\n"]
    pieces = dict.fromkeys([*block, *template, *words, "\n", *map(chr, range(32, 127))])
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join(re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", p) for p in longest_first)
    vocabulary = {piece: i for i, piece in enumerate((EOS, "<unk>", *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


@dataclass(frozen=True)
class Recipe:
    """Settings of the base model. Not in the paper."""

    seed: int = 0
    """Seed of prompts, weights and pretraining data."""
    steps: int = 4500
    """Optimiser steps of all stages together, with 32 rows each."""
    stages: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Share of the steps for each stage."""
    lr: float = 2e-3
    """AdamW learning rate: 100 steps of warm-up, then constant, linear to 0 over the last 40 % of
    the steps."""
    prompts: tuple[int, int, int] = (5200, 256, 512)
    """Number of unique prompts for training, development and test."""


def draw_splits(recipe: Recipe) -> list[list[str]]:
    """Disjoint training, development and test prompts."""
    rng = random.Random(recipe.seed)
    unique: dict[str, None] = {}
    while len(unique) < sum(recipe.prompts):
        unique[draw_prompt(rng)] = None
    shuffled = list(unique)
    rng.shuffle(shuffled)
    ends = [sum(recipe.prompts[: k + 1]) for k in range(3)]
    return [shuffled[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def pretrain(recipe: Recipe, tokenizer, held_out: set[str]) -> Qwen3ForCausalLM:
    """Train the base model on prompts that are not in `held_out`."""
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
    bar = progress(range(recipe.steps), desc=f"base model {recipe.seed}")
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
            bar.set_postfix(stage=stage, loss=f"{loss.item():.3f}", refresh=False)
    return model


def _batch(
    stage: int, rng: random.Random, tokenizer, held_out: set[str], size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and labels, -100 outside the replies."""
    rows = []
    while len(rows) < size:
        prompt = draw_prompt(rng)
        if prompt not in held_out:
            text = policy_prompt([{"role": "user", "content": prompt}], "bare")
            rows.append((text, draw_reply(prompt, stage, rng) + EOS))
    prompt_rows = tokenizer([text for text, _ in rows])["input_ids"]
    reply_rows = tokenizer([reply for _, reply in rows])["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompt_rows, reply_rows, strict=True))
    ids = torch.zeros(size, width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for b, (p, r) in enumerate(zip(prompt_rows, reply_rows, strict=True)):
        ids[b, : len(p) + len(r)] = torch.tensor(p + r)
        labels[b, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all that determines the folder: the recipe, torch's version, and the sources."""
    sources = [Path(source).read_text() for source in (__file__, world.__file__, prompts.__file__)]
    content = json.dumps([asdict(recipe), torch.__version__, *sources])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def main(recipe: Recipe, out: str = "") -> Path:
    """Make the miniature's base model and prompts, unless they exist already.

    Args:
        recipe: settings of the base model.
        out: output folder; models/tiny-SEED if empty.
    """
    folder = Path(out or f"models/tiny-{recipe.seed}")
    recipe_file = folder / "recipe.json"
    if recipe_file.is_file() and json.loads(recipe_file.read_text())["hash"] == recipe_hash(recipe):
        print(f"{folder}: there already")
        return folder
    tokenizer, splits = make_tokenizer(), draw_splits(recipe)
    model = pretrain(recipe, tokenizer, {*splits[1], *splits[2]})
    disable_progress_bar()
    with fresh_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, split in zip(("train", "dev", "test"), splits, strict=True):
            rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in split]
            write_text(temporary / f"{name}.jsonl", "".join(rows))
        content = asdict(recipe) | {"hash": recipe_hash(recipe)}
        write_text(temporary / "recipe.json", json.dumps(content, indent=2))
    return folder


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
