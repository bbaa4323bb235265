"""What an exported model says about itself, in two files beside its weights.

self_eval.json    for programs: the prompt that the model was trained with, sampling, judge, window,
                  best constant, held-out figures, commit. evaluate.py and predict.py read it.
README.md         for readers: a model card in the hub's form, with the licence of the base model

The folder may be published, so neither file holds a path of this machine, the judge's URL or a
prompt; prompts of the window are named by their ids.

Not in the paper: how unlike the window a prompt is, told by the model itself. `surprisal` has, for
at most 200 prompts of the window, minus the mean log-probability of the conversation's tokens given
the template before them, in nats a token: the logarithm of the perplexity. A new prompt's figure is
compared with these (`unlike`). It finds text that is strange to the model. It does not find a
familiar text about something that the window does not have.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from prompts import ATTRIBUTES, FEW_SHOT, TEMPLATES, Scores, policy_prompt, valid_scores
from storage.files import FileError, read_json, write_text
from storage.hub import card_header, is_id, licence
from storage.program import commit

FILE, README = "self_eval.json", "README.md"
WINDOW_PROMPTS = 200  # of the window, whose surprisal is kept
UNLIKE = 1.0  # ModelCard.unlike of a prompt more surprising than all of these
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
    surprisal: list[float]  # see above; ascending
    best_constant: Scores | None  # for the judgements of the run's first cycle; None without any
    commit: str | None
    attributes: list[str] = field(default_factory=lambda: list(ATTRIBUTES))
    scale: tuple[int, int] = (0, 9)
    held_out: dict[str, dict] = field(default_factory=dict)  # by benchmark; see add_held_out

    def unlike(self, surprisal: float) -> float | None:
        """Share of the window's prompts that surprise the model less than this one. None without
        figures of the window."""
        known = self.surprisal
        return bisect_left(known, surprisal) / len(known) if known else None


def of_run(
    config,
    model: Path,
    place: tuple[int, int | None],
    judge,
    window: Sequence[str],
    surprisal: Sequence[float],
    constant: Scores | None,
) -> ModelCard:
    """The card of a run's checkpoint. `config`: the run's; `model`: its base model's folder;
    `place`: cycle and RL step; `judge`: as judge.make_judge makes it; `surprisal`: in any order."""
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
        window=list(window),
        surprisal=sorted(round(nats, 4) for nats in surprisal),
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
    surprisal = card.surprisal if isinstance(card.surprisal, list) else [None]
    numbers = all(type(x) in (int, float) for x in surprisal)
    valid = {
        "template": card.template in TEMPLATES,
        "few_shot": card.few_shot in FEW_SHOT,
        "prompt_tokens": type(card.prompt_tokens) is int,
        "sampling": isinstance(card.sampling, dict),
        "judge": isinstance(card.judge, dict) and isinstance(card.judge.get("name"), str),
        "window": isinstance(card.window, list) and all(isinstance(x, str) for x in card.window),
        "surprisal": numbers and surprisal == sorted(surprisal),
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
    return {FILE: json.dumps(asdict(card), indent=1, ensure_ascii=False), README: _readme(card)}


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
