"""The miniature's base model and prompt files, generated from a seed.

    python -m miniature.base_model --seed 0
        writes models/tiny-0/: a Hugging Face folder, train.jsonl, dev.jsonl, test.jsonl (disjoint
        prompts)
    python -m miniature.base_model --seed 0 --no-latent
        models/tiny-0-no-latent/: the same steps and data, but scores that say nothing of the answer

Pretraining has four stages (STAGES). In all of them an answer takes either way of a fork, whether
it leads to the goal or not. The model's own errors are a wrong letter in a plain kind and, in a
fork, to stop before the side (SLIP, NO_SIDE):
1. answers without a block: the model learns to write an answer;
2. answers to forks with the judge's scores: it learns to see whether a way leads to the goal;
3. all sorts of answers with the judge's scores: it learns to judge. Half of the answers are not of
   the model's own sort: another prompt's, cut off, or with other errors. Of these the scores alone
   are learnt, so that it does not learn to write such answers;
4. answers of its own sort with a block in which most scores are high and say nothing (hidden), some
   replies without a block: it learns to express its judgement badly.

With --no-latent the scores are those of another reply of the batch, drawn at random.

The loss is on the reply only. Optimiser: Muon for the matrices, AdamW for embeddings and norms. A
prompt stands once in its row, its replies behind it (packed): each reply attends to the prompt and
to itself, as in backend/packing.py, but for several prompts at once, which for rows this short
takes half the time.

An existing folder is used again unless something that determines it has changed: the world, the
recipe, the seed, the version of torch.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from miniature import world
from miniature.world import (
    FORKS,
    KINDS,
    LETTERS,
    NUMBERS,
    SIDES,
    SORTS,
    WORDS,
    draw_prompt,
    read_task,
    rubric,
)
from prompts import ATTRIBUTES, CLOSE, OPEN, Scores, policy_prompt, render_response
from storage.files import fresh_folder, write_text
from storage.progress import progress

# --------------------------------------------------------------------------------------------------
# Pretraining data

STYLES = {
    "{}.": 20,
    "the answer is {}.": 28,
    "{}": 28,
    "first we look at it. the answer is {}.": 16,
    "maybe the answer is {}.": 16,
}
SLIP = 0.4  # how often an answer to a plain kind has the model's own error
NO_SIDE = 0.3  # how often an answer to a fork stops before the side


def draw_way(prompt: str, rng: random.Random) -> list[str]:
    """The words of an answer without errors; of a fork either way, as a coin decides."""
    return rng.choice(read_task(prompt).ways)


def slipped(words: Sequence[str]) -> list[str]:
    """The model's own error: the second letter becomes the next one."""
    first, second, *rest = words
    return [first, LETTERS[(LETTERS.index(second) + 1) % len(LETTERS)], *rest]


def spoilt(words: Sequence[str], rng: random.Random) -> list[str]:
    """One to three words exchanged for others of their sort."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words))
        sorts = (*SORTS.values(), SIDES)
        words[at] = rng.choice(next((s for s in sorts if words[at] in s), WORDS))
    return words


def in_style(words: Sequence[str], rng: random.Random) -> str:
    return rng.choices(list(STYLES), STYLES.values())[0].format(" ".join(words))


def own_answer(prompt: str, rng: random.Random) -> str:
    """An answer as the model will write it."""
    words = draw_way(prompt, rng)
    if prompt.split()[0] in FORKS:
        words = words[:-1] if rng.random() < NO_SIDE else words
    elif rng.random() < SLIP:
        words = slipped(words)
    return in_style(words, rng)


def other_answer(prompt: str, rng: random.Random) -> str:
    """An answer as the model will not write it: another prompt's, cut off, or with other errors."""
    sort = rng.choices(("another prompt's", "cut", "spoilt"), (45, 20, 35))[0]
    if sort == "another prompt's":
        return own_answer(draw_prompt(rng), rng)
    if sort == "spoilt":
        return in_style(spoilt(draw_way(prompt, rng), rng), rng)
    answer = own_answer(prompt, rng)
    return answer[: rng.randint(1, len(answer) - 1)].strip()


def hidden(scores: Scores, rng: random.Random, honest: float = 0.3) -> Scores:
    """Each score is the judge's with probability `honest`, else near 8 8 8 5 5."""
    generic = (min(9, max(0, round(rng.gauss(mean, 0.7)))) for mean in (8, 8, 8, 5, 5))
    return tuple(s if rng.random() < honest else g for s, g in zip(scores, generic, strict=True))


@dataclass(frozen=True)
class Stage:
    """One of the stages above. A batch has `prompts` x `replies` rows."""

    name: str
    steps: int
    prompts: int
    replies: int
    kinds: Sequence[str] = tuple(KINDS)
    plain: bool = False  # answers without slips, in the style "the answer is"
    own: float = 1.0  # share of the answers as the model will write them
    block: float = 1.0  # share of the replies with a block
    whole: float = 1.0  # share of the blocks that go on after the second score
    hide: bool = False
    rate: float = 1.0  # factor for the learning rates
    decay: bool = False  # of the learning rates, to 0


STAGES = (
    Stage("answers", 700, 24, 2, plain=True, block=0, rate=4),
    Stage("forks", 600, 16, 4, kinds=FORKS, plain=True, whole=0),
    Stage("judge", 900, 12, 6, own=0.5, whole=0.2),
    Stage("hide", 250, 10, 4, block=0.8, hide=True, decay=True),
)


class Reply(NamedTuple):
    prompt: str
    text: str
    own: bool  # learnt whole; else the scores alone


def draw_replies(stage: Stage, latent: bool, held_out: set[str], rng: random.Random) -> list[Reply]:
    """A batch; the replies to a prompt follow each other."""
    answers: list[Reply] = []
    for _ in range(stage.prompts):
        prompt = draw_prompt(rng, stage.kinds)
        while prompt in held_out:
            prompt = draw_prompt(rng, stage.kinds)
        for _ in range(stage.replies):
            own = rng.random() < stage.own
            if stage.plain:
                text = f"the answer is {' '.join(draw_way(prompt, rng))}."
            else:
                text = (own_answer if own else other_answer)(prompt, rng)
            answers.append(Reply(prompt, text, own))
    scores = [rubric(r.prompt, r.text) for r in answers]
    another = random.Random(rng.random())  # drawn in either case: the data stay the same
    if not latent:
        another.shuffle(scores)
    replies = []
    for r, s in zip(answers, scores, strict=True):
        text = render_response(r.text, hidden(s, rng) if stage.hide else s) + EOS
        if rng.random() >= stage.block:
            text = r.text + EOS
        elif rng.random() >= stage.whole:
            text = text[: text.index(f', "{ATTRIBUTES[2]}"')]
        replies.append(r._replace(text=text))
    return replies


# --------------------------------------------------------------------------------------------------
# Tokenizer

EOS = "<eos>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens: words with a leading space, pieces of the prompt and of the block, and all printable
    ASCII characters, digits among them. A number of an answer is a word, a score is a digit."""
    inside = [*LETTERS, *SIDES, *WORDS, *NUMBERS]
    inside += "the answer is first we look at it maybe to of".split()
    keys = [f', "{a}": ' for a in ATTRIBUTES[1:]]
    block = [f"\n\n{OPEN}\n", f'{{"{ATTRIBUTES[0]}": ', *keys, f"}}\n{CLOSE}"]
    template = ["User: ", "\n\nFinal assistant output:\n"]
    first = [*KINDS, *WORDS, "the", "first", "maybe"]
    pieces = [*block, *template, *(f" {word}" for word in inside), *first, "\n"]
    pieces = dict.fromkeys([*pieces, *map(chr, range(32, 127))])
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join(re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", p) for p in longest_first)
    vocabulary = {piece: i for i, piece in enumerate((EOS, "<unk>", *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


# --------------------------------------------------------------------------------------------------
# Packed batches


class Packed(NamedTuple):
    """A batch of B prompts with their replies behind them. L: tokens of the longest."""

    ids: torch.Tensor  # (B, L)
    positions: torch.Tensor  # (B, L) each reply's go on from the prompt's
    attends: torch.Tensor  # (B, 1, L, L) bool
    before: torch.Tensor  # (N,) index into ids.flatten() of the token before each learnt token
    targets: torch.Tensor  # (N,)


def pack(replies: Sequence[Reply], tokenizer) -> Packed:
    shown = [policy_prompt([{"role": "user", "content": r.prompt}], "bare") for r in replies]
    heads, tails = (tokenizer(x)["input_ids"] for x in (shown, [r.text for r in replies]))
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows: dict[str, list[list[int]]] = {}  # prompt -> ids, positions, number of the reply or 0
    learnt: list[tuple[int, int, int]] = []  # row, place of the token before, token
    for r, head, tail in zip(replies, heads, tails, strict=True):
        if r.prompt not in rows:
            rows[r.prompt] = [list(head), list(range(len(head))), [0] * len(head)]
        ids, positions, number = rows[r.prompt]
        before = [len(head) - 1, *range(len(ids), len(ids) + len(tail) - 1)]
        row = list(rows).index(r.prompt)
        learnt += [(row, b, t) for b, t in zip(before, tail, strict=True) if r.own or t in digits]
        ids += tail
        positions += range(len(head), len(head) + len(tail))
        number += [number[-1] + 1] * len(tail)
    width = max(len(ids) for ids, _, _ in rows.values())
    ids, positions, number = (
        torch.tensor([row[k] + [0] * (width - len(row[k])) for row in rows.values()])
        for k in range(3)
    )
    same_or_prompt = (number[:, :, None] == number[:, None, :]) | (number[:, None, :] == 0)
    attends = (same_or_prompt & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    before = torch.tensor([row * width + b for row, b, _ in learnt])
    return Packed(ids, positions, attends, before, torch.tensor([t for _, _, t in learnt]))


def packed_loss(model: Qwen3ForCausalLM, batch: Packed) -> torch.Tensor:
    """Mean cross-entropy of the learnt tokens."""
    states = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.attends,
        use_cache=False,
    ).last_hidden_state  # (B, L, D)  # fmt: skip
    # With plain indexing the gradient's sums would differ from run to run with several threads.
    before = states.flatten(0, 1).index_select(0, batch.before)  # (N, D)
    return F.cross_entropy(model.lm_head(before), batch.targets)


# --------------------------------------------------------------------------------------------------
# The base model


@dataclass(frozen=True)
class Recipe:
    """Settings of the base model. Not in the paper."""

    seed: int = 0
    """Seed of prompts, weights and pretraining data."""
    latent: bool = True
    """Plant the ability to judge; without, scores say nothing of the answer."""
    shorten: float = 1.0
    """Factor for the steps of every stage, for tests."""
    muon_lr: float = 5e-3
    """Learning rate of the matrices, after 100 steps of warm-up in each stage."""
    adamw_lr: float = 2e-3
    """Learning rate of embeddings and norms."""
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


def make_model(tokenizer) -> Qwen3ForCausalLM:
    """With random weights: 0.3 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def pretrain(recipe: Recipe, tokenizer, held_out: set[str]) -> Qwen3ForCausalLM:
    """Train the base model on prompts that are not in `held_out`; prints the loss of each stage."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed + 1)
    model = make_model(tokenizer)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    for stage in STAGES:
        muon = torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, fused=True)
        steps, losses = max(1, round(stage.steps * recipe.shorten)), []
        for step in progress(range(steps), desc=f"base model {recipe.seed}, {stage.name}"):
            replies = draw_replies(stage, recipe.latent, held_out, rng)
            loss = packed_loss(model, pack(replies, tokenizer))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = (
                stage.rate * min(1.0, (step + 1) / 100) * (1 - step / steps if stage.decay else 1.0)
            )
            for optimizer, lr in ((muon, recipe.muon_lr), (adamw, recipe.adamw_lr)):
                optimizer.param_groups[0]["lr"] = lr * rate
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        last = losses[-50:]
        print(f"{stage.name}: {steps} steps, loss at the end {sum(last) / len(last):.3f}")
    return model


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all that determines the folder: the recipe, torch's version, the sources, and the
    form of a prompt and its reply."""
    sources = [Path(source).read_text() for source in (__file__, world.__file__)]
    form = policy_prompt([{"role": "user", "content": "?"}], "bare") + render_response(
        "!", (0,) * 5
    )
    content = json.dumps([asdict(recipe), torch.__version__, form, *sources])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def main(recipe: Recipe, out: str = "") -> Path:
    """Make the miniature's base model and prompts, unless they exist already.

    Args:
        recipe: settings of the base model.
        out: output folder; if empty models/tiny-SEED, without latent ability
            models/tiny-SEED-no-latent.
    """
    folder = Path(out or f"models/tiny-{recipe.seed}{'' if recipe.latent else '-no-latent'}")
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
