"""What an exported model says about itself, in two files beside its weights.

self_eval.json    for programs: the prompt that the model was trained with, sampling, judge, window,
                  best constant, held-out figures, commit. evaluate.py and predict.py read it.
README.md         for readers: a model card in the hub's form, with the licence of the base model

The folder may be published, so neither file holds a path of this machine or the judge's URL. Of the
window's prompts it holds the ids and, of at most 200, which tokens occur in them, without order and
number; where that is too much, `tokens` may be made an empty list.

Not in the paper: how unlike the window a prompt is. What two prompts have in common is the number
of tokens that occur in both, divided by the root of the product of the numbers that occur in each
(the cosine of their sets). `ModelCard.unlike` compares a prompt and its nearest neighbour in the
window with the window's own prompts and theirs. It tells another kind of text, and not a harder
question of the same kind. The model's own perplexity of the prompt was tried first: a model that
was trained on responses alone, as the miniature's is, has learnt nothing about prompts.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from prompts import ATTRIBUTES, FEW_SHOT, TEMPLATES, Scores, Turn, policy_prompt, valid_scores
from storage.data import Prompt
from storage.files import FileError, read_json, write_text
from storage.hub import card_header, is_id, licence
from storage.program import commit

FILE, README = "self_eval.json", "README.md"
WINDOW_PROMPTS = 200  # of the window, whose tokens are kept
_PLACEHOLDER = "{REQUEST}"


@dataclass(frozen=True)
class ModelCard:
    """The fields of self_eval.json."""

    base: str  # hub id, or the last part of the folder's name
    licence: dict[str, str]  # license, license_name, license_link of the base's model card
    cycle: int
    step: int | None  # RL step, of a checkpoint within phase 1
    template: str
    few_shot: str
    prompt: str  # the whole prompt, with {REQUEST} in the place of a request
    prompt_tokens: int  # longest prompt in training
    sampling: dict  # backend.sampler.SamplingParams
    judge: dict  # name; use_references; of a judge at an endpoint its request parameters
    data: str  # hub id, or the file's name
    seed: int
    window: list[str]  # prompt ids
    tokens: list[list[int]]  # see above
    best_constant: Scores | None  # for the judgements of the run's first cycle; None without any
    commit: str | None
    attributes: list[str] = field(default_factory=lambda: list(ATTRIBUTES))
    scale: tuple[int, int] = (0, 9)
    held_out: dict[str, dict] = field(default_factory=dict)  # by benchmark; see add_held_out

    @cached_property
    def _window(self) -> tuple[list[set[int]], list[float]]:
        """The prompts' sets of tokens, and what each has in common with its nearest neighbour."""
        sets = list(map(set, self.tokens))
        nearest = [
            max(overlap(one, other) for i, other in enumerate(sets) if i != k)
            for k, one in enumerate(sets)
        ]
        return sets, nearest

    def unlike(self, tokens: set[int]) -> float | None:
        """Share of the window's prompts that have more in common with a neighbour there than a
        prompt of these tokens has: 0-1. None if the window is not on file."""
        if len(self.tokens) < 2:
            return None
        sets, nearest = self._window
        own = max(overlap(tokens, other) for other in sets)
        return sum(x > own for x in nearest) / len(nearest)


def is_far(unlike: float | None) -> bool:
    """Whether a prompt has less in common with the window than any prompt of the window has."""
    return unlike is not None and unlike >= 1


def overlap(a: set[int], b: set[int]) -> float:
    """Cosine of two sets; 0 if one of them is empty."""
    return len(a & b) / math.sqrt(len(a) * len(b)) if a and b else 0.0


def conversation_tokens(tokenizer, conversation: Sequence[Turn]) -> set[int]:
    text = "\n".join(turn["content"] for turn in conversation)
    return set(tokenizer.encode(text, add_special_tokens=False))


def of_run(
    config,
    model: Path,
    place: tuple[int, int | None],
    judge,
    window: Sequence[Prompt],
    tokenizer,
    constant: Scores | None,
) -> ModelCard:
    """The card of a run's checkpoint. `config`: the run's; `model`: its base model's folder;
    `place`: cycle and RL step; `judge`: as judge.make_judge makes it; `constant`: best_constant."""
    drawn = random.Random(config.seed).sample(window, min(WINDOW_PROMPTS, len(window)))
    settings = {"name": judge.name, "use_references": config.use_references}
    if judge.client is not None:
        settings |= {k: v for k, v in asdict(config.endpoint).items() if k != "base_url"}
    return ModelCard(
        base=config.model if is_id(config.model) else Path(config.model).resolve().name,
        licence=licence(model),
        cycle=place[0],
        step=place[1],
        template=config.template,
        few_shot=config.few_shot,
        prompt=prompt_text(config.template, config.few_shot),
        prompt_tokens=config.prompt_tokens,
        sampling=asdict(config.sampling),
        judge=settings,
        data=config.data if is_id(config.data) else Path(config.data).name,
        seed=config.seed,
        window=[p.id for p in window],
        tokens=[sorted(conversation_tokens(tokenizer, p.conversation)) for p in drawn],
        best_constant=constant,
        commit=commit()[0],
    )


def prompt_text(template: str, few_shot: str) -> str:
    return policy_prompt([{"role": "user", "content": _PLACEHOLDER}], template, few_shot)


def read_card(folder: str | Path) -> ModelCard | None:
    """None for a folder without self_eval.json, such as a base model's. Raises FileError."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    row = read_json(path)
    remedy = "restore the file, or export the model again"
    known = {f.name for f in fields(ModelCard)}
    if missing := sorted(known - row.keys()):
        raise FileError(f"{path}: has no {', '.join(missing)}; {remedy}")
    values = {name: row[name] for name in known}
    values |= {k: tuple(values[k]) for k in ("best_constant", "scale") if isinstance(row[k], list)}
    card = ModelCard(**values)
    valid = {
        "template": card.template in TEMPLATES,
        "few_shot": card.few_shot in FEW_SHOT,
        "prompt_tokens": type(card.prompt_tokens) is int,
        "sampling": isinstance(card.sampling, dict),
        "judge": isinstance(card.judge, dict) and isinstance(card.judge.get("name"), str),
        "window": isinstance(card.window, list) and all(isinstance(x, str) for x in card.window),
        "tokens": _is_numbers(card.tokens),
        "best_constant": card.best_constant is None or valid_scores(card.best_constant),
        "licence": isinstance(card.licence, dict),
        "held_out": isinstance(card.held_out, dict),
    }
    if wrong := [name for name, is_valid in valid.items() if not is_valid]:
        raise FileError(f"{path}: {', '.join(wrong)} cannot be used; {remedy}")
    if (card.attributes, card.scale) != (list(ATTRIBUTES), (0, 9)):
        raise FileError(
            f"{path}: the model scores {', '.join(map(str, card.attributes))} from "
            f"{'-'.join(map(str, card.scale))}, and this program {', '.join(ATTRIBUTES)} from 0-9; "
            "use the program that trained it"
        )
    return card


def _is_numbers(rows: object) -> bool:
    """Whether these are lists of whole numbers."""
    lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    return lists and all(type(x) is int for row in rows for x in row)


def check_template(folder: str | Path, card: ModelCard, template: str, few_shot: str) -> None:
    """Raises ValueError if the model was trained with another prompt: its answers would be
    malformed, or their scores worth nothing."""
    for name, own, asked in (
        ("template", card.template, template),
        ("few_shot", card.few_shot, few_shot),
    ):
        if own != asked:
            raise ValueError(
                f"model {folder} was trained with --{name} {own} ({FILE}) and is asked with "
                f"--{name} {asked}; give --{name} {own}"
            )
    if card.prompt != prompt_text(template, few_shot):
        raise ValueError(
            f"model {folder} was trained with another text of the template {template} than the one "
            f"in prompts.py ({FILE} has it); restore that text, or use the commit {card.commit}"
        )


def add_held_out(folder: Path, benchmark: str, figures: Mapping, prompt_ids: Sequence[str]) -> None:
    """Add an evaluation's figures to both files of a model that has them, unless one of the prompts
    is of its window. Raises WriteError."""
    card = read_card(folder)
    if card is None or {*card.window} & {*prompt_ids}:
        return
    card = replace(card, held_out=card.held_out | {benchmark: dict(figures)})
    for name, text in card_files(card).items():
        write_text(folder / name, text)


# --------------------------------------------------------------------------------------------------
# The files


def card_files(card: ModelCard) -> dict[str, str]:
    """Text by file name."""
    return {FILE: _json(card), README: _readme(card)}


def _json(card: ModelCard) -> str:
    """A field a line."""
    lines = (
        f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in asdict(card).items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _readme(card: ModelCard) -> str:
    header = card_header(
        **card.licence,
        base_model=card.base if "/" in card.base else None,
        datasets=[card.data] if "/" in card.data else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["self-evaluation", "calibration"],
    )
    place = f"cycle {card.cycle}" + (f", RL step {card.step}" if card.step else "")
    names = ", ".join(card.attributes)
    constant = ", ".join(map(str, card.best_constant or ())) or "not known"
    sampling = ", ".join(f"{name} {value}" for name, value in card.sampling.items())
    asked = ", ".join(f"{name} {value}" for name, value in card.judge.items() if name != "name")
    return f"""{header}
# {card.base}, trained to score its own answers

This model answers a request and then says, in one block, how a judge will score the answer:
{names}, {card.scale[0]}-{card.scale[1]} each. It was trained by Self-Evaluation
Elicitation ([arXiv 2606.05122](https://arxiv.org/abs/2606.05122)): {place},
commit {card.commit or "not known"}. `{FILE}` has its settings for programs.

## Use

With the program that trained it: `python predict.py FOLDER "a request"`. With any other: plain
completion, no chat template, this prompt (template {card.template}, few-shot set {card.few_shot}),
stop after `[/SELF_EVAL]`, {sampling}:

{_indented(card.prompt)}

The prompt ends with a line break. Several turns are `User: ...` and `Assistant: ...`, joined by a
blank line. Another prompt gives malformed blocks, or scores that mean nothing.

## Training

- base model: {card.base}
- judge: {card.judge["name"]}{f" ({asked})" if asked else ""}
- prompts: {len(card.window):,} of {card.data}, drawn with seed {card.seed}, at most \
{card.prompt_tokens:,} tokens with the template
- the one score vector that fits the judge's scores in the first cycle best: {constant}. A model
  that knows nothing of its answer can say this.

## Figures on held-out prompts

{_table(card)}

## Limits

The scores predict this judge, not the truth, and they are made for prompts like those of the
training window. `predict.py` says how unlike them a prompt is. Measure on your own prompts before a
score decides anything.
"""


def _indented(text: str) -> str:
    return "\n".join("    " + line if line else "" for line in text.splitlines())


def _table(card: ModelCard) -> str:
    """Means with their intervals, one line for a benchmark and metric."""
    if not card.held_out:
        return "None yet."
    rows = [
        "| benchmark | judge | metric | mean | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark, found in card.held_out.items():
        for metric, x in found["metrics"].items():
            if x["mean"] is None:
                continue
            interval = "" if x["low"] is None else f"{x['low']:.3f} to {x['high']:.3f}"
            rows.append(
                f"| {benchmark} | {found['judge']} | {metric} | {x['mean']:.3f} | {interval} | "
                f"{x['n']} |"
            )
    return "\n".join(rows)
