"""Models, benchmarks and judges -> result files (Sec. 4); report.py makes tables of them.

    python evaluate.py --models base=DIR see=runs/see/checkpoints/cycle_15 \\
        --benchmarks helpsteer2=validation.jsonl alpaca_eval=alpaca_eval.jsonl \\
        --judges claude-sonnet-4-6 --window runs/see --name paper

The first model is the base. Stages, each of which goes on where it was stopped, on all ranks unless
said otherwise:

    answers      each model's answers to each benchmark, judged
    digits       what each model would write at the score positions of each model's answers: top-5,
                 the answer x scorer swap, the forced block; no judge call
    sensitivity  the same with another prompt's answer, and with the second half cut off; likewise
    judges       malformed answers, repeats, a stronger model's answers from a file, and held-out
                 judges (rank 0)
    preferences  the pairwise referee against the base (Sec. 4.1; rank 0)

`results/NAME/BENCHMARK/MODEL/` holds each cell's configuration, rollouts with their judgements,
`digits_SCORER.jsonl`, `sensitivity.jsonl`, `scores_JUDGE.jsonl` and `preferences.jsonl`;
`results/NAME/BENCHMARK/stronger.jsonl` the judgements of a stronger model's answers;
`results/NAME/models.json` the models in the order in which they were first asked for. A cell is
done once: another choice of models or benchmarks under the same name adds cells.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

import buffer
import parallel
from buffer import Rollout
from client import Background, JudgeError
from data import Prompt, load_answers, load_prompts, near_duplicates
from digits import Question, Reader, Reading
from endpoint import ClientConfig, Endpoint
from files import append_line, write_text
from hub import data_file, fetch_weights
from judge import Answer, ask_all, judge_again, make_judge, prefer
from ledger import LEDGER, read_lines
from logbook import Clock, check_same_config, open_folder
from metrics import Estimate, render, summarise
from policy import PolicyConfig, load_policy
from prompts import EXAMPLES, FEW_SHOT, OPEN
from reward import RewardConfig
from rollout import Collector, Inputs, read_inputs
from sampler import EngineConfig, SamplingParams, choose, make_sampler
from sources import (
    MODELS,
    STRONGER,
    WINDOW,
    answer_id,
    first_cycle,
    rollouts_of,
    scores_file,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cells of an evaluation share."""

    judge: str = "gpt-5.4"
    """Model name at an OpenAI-compatible endpoint (Sec. 4.1, see endpoint.py); or replay:FILE, the
    judgements of an earlier run; or "heuristic", an offline stand-in that says nothing about real
    judging; or "rubric", the miniature's."""
    samples: int = 1
    """Samples per prompt."""
    limit: int = 0
    """Prompts of each benchmark, drawn by seed; 0: all."""
    window: str = ""
    """Folder of a run, such as runs/see, whose training prompts are left out, and whose first
    cycle's judgements the trivial predictors are fitted on."""
    drop_duplicates: bool = False
    """Leave out prompts that are nearly one of the window's or of the few-shot examples; they are
    counted in any case."""
    use_references: bool = True
    """Show the judge reference responses with human labels where the data has them (App. B.3)."""
    template: Literal["paper", "short", "bare"] = "paper"
    """Generation template, as in training."""
    few_shot: Literal["paper-like", "varied"] = "paper-like"
    """Few-shot examples, as in training."""
    prompt_tokens: int = 4096
    """Longest prompt, template included, in tokens; longer ones are left out and counted."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the sampling model's weights."""
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples: vllm where it is installed (auto), or the plain loop."""
    sample_rows: int = 64
    """Rollouts that are sampled at once per rank."""
    seed: int = 42
    """Seed of the draw of prompts and of sampling."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)


@dataclass(frozen=True, kw_only=True)
class Cell(Settings):
    """One checkpoint on one prompt file."""

    model: str  # Hugging Face folder, or a hub id
    data: str  # prompt file, or a hub id
    name: str  # its folder under results/

    @property
    def folder(self) -> Path:
        return Path("results") / self.name


STAGES = ("answers", "digits", "sensitivity", "judges", "preferences")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """Evaluate models on benchmarks (Sec. 4)."""

    models: tuple[str, ...]
    """NAME=FOLDER each, or FOLDER alone: Hugging Face folders or hub ids of one architecture; the
    first is the base."""
    benchmarks: tuple[str, ...]
    """NAME=FILE each, or FILE alone: prompt files (see data.py for their kinds) or hub ids (see
    hub.py)."""
    name: str
    """Results go to results/NAME/BENCHMARK/MODEL."""
    judges: tuple[str, ...] = ()
    """Held-out judges (Sec. 4.5, Table 3), by name; their settings are the table's in endpoint.py,
    whatever --endpoint and --client.key_variable say of the judge."""
    repeat: int = 0
    """Judgements of an answer by the judge, for the ceiling: on the first --repeat_answers answers
    of each cell; 0 or 1: none."""
    repeat_answers: int = 100
    """Answers of each cell that are judged repeatedly."""
    stronger: tuple[str, ...] = ()
    """BENCHMARK=FILE each: a stronger model's answers (see data.load_answers), judged once; the
    report sends a share of the prompts to it (Sec. 5)."""
    stages: tuple[Literal[STAGES], ...] = STAGES
    """What is done, in this order."""


def named(spec: str) -> tuple[str, str]:
    """ "see=runs/see/..." -> ("see", "runs/see/..."); without a name the path's last part."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals else (Path(spec).name.split(".")[0], spec)


def cells(config: EvalConfig) -> dict[tuple[str, str], Cell]:
    """By (model, benchmark). Raises ValueError for a name given twice or unfit for a folder."""
    models, benchmarks = ([named(s) for s in specs] for specs in (config.models, config.benchmarks))
    for kind, specs in (("models", models), ("benchmarks", benchmarks)):
        names = [name for name, _ in specs]
        bad = [n for n in names if names.count(n) > 1 or not re.fullmatch(r"[\w.+-]+", n)]
        if bad or not names:
            raise ValueError(
                f"--{kind}: {bad[0] if bad else 'nothing'} is no name of its own for a folder; say "
                "NAME=FOLDER or NAME=FILE with other names"
            )
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings)}
    return {
        (m, b): Cell(**shared, model=folder, data=file, name=f"{config.name}/{b}/{m}")
        for m, folder in models
        for b, file in benchmarks
    }


def stronger_answers(
    config: EvalConfig, table: dict[tuple[str, str], Cell], read: dict[tuple[str, str], Inputs]
) -> dict[str, dict[str, str]]:
    """--stronger's answers by benchmark and prompt id. Raises ValueError."""
    found, base = {}, next(iter(table))[0]
    for spec in config.stronger:
        benchmark, equals, path = spec.partition("=")
        if not equals or (base, benchmark) not in table:
            raise ValueError(
                f"--stronger {spec}: say BENCHMARK=FILE with one of the benchmarks "
                f"{', '.join(b for m, b in table if m == base)}"
            )
        found[benchmark] = load_answers(path, read[base, benchmark].prompts)
    return found


MAY_CHANGE = {"sample_rows", "engine", "client"}


def prepare(cell: Cell) -> Inputs:
    """What is read and checked of a cell before weights are loaded; its prompts are those to
    answer. Raises ValueError."""
    judge = make_judge(cell, cell.folder / LEDGER, parallel.ranks())
    inputs = read_inputs(cell)
    if cell.window and (judges := {r.judge_model for r in first_cycle(Path(cell.window))}):
        if judges != {judge.name}:
            raise ValueError(
                f"--window {cell.window} was judged by {', '.join(sorted(judges))} and not by "
                f"{judge.name}: predictors fitted on it would foretell another judge; give the "
                "run's judge, or another run"
            )
    trained = window_prompts(Path(cell.window)) if cell.window else {}
    prompts = [p for p in inputs.prompts if p.id not in trained]
    double = near_duplicates(prompts, [*trained.values(), *examples(cell)])
    if any(double) and os.environ.get("RANK", "0") == "0":
        done = "left out" if cell.drop_duplicates else "kept (--drop_duplicates)"
        print(
            f"{cell.data}: {sum(double)} of {len(prompts)} prompts are nearly a training prompt or "
            f"a few-shot example; {done}"
        )
    if cell.drop_duplicates:
        prompts = [p for p, d in zip(prompts, double, strict=True) if not d]
    if cell.limit > len(prompts) or not prompts:
        raise ValueError(
            f"{cell.data}: {cell.limit or 'some'} prompts are asked for, but {len(prompts)} are "
            f"left within {cell.prompt_tokens} tokens; lower --limit or give more data"
        )
    if cell.limit:
        chosen = random.Random(cell.seed).sample(range(len(prompts)), cell.limit)
        prompts = [prompts[i] for i in sorted(chosen)]
    check_same_config(cell.folder, cell, MAY_CHANGE)
    fetch_weights(cell.model)
    return inputs._replace(prompts=prompts, near_duplicates=sum(double))


def window_prompts(run: Path) -> dict[str, Prompt]:
    """A run's training prompts by id. Raises ValueError."""
    known = run / "window.json"
    if not known.is_file():
        raise ValueError(f"{known}: no such file; give a run's folder to --window")
    ids = set(json.loads(known.read_text()))
    data = json.loads((run / "config.json").read_text())["data"]
    return {p.id: p for p in load_prompts(data_file(data)) if p.id in ids}


def examples(cell: Cell) -> list[Prompt]:
    """The template's few-shot examples as prompts."""
    shown = FEW_SHOT[cell.few_shot][: EXAMPLES[cell.template]]
    return [Prompt(f"example {k}", ({"role": "user", "content": e.request},))
            for k, e in enumerate(shown)]  # fmt: skip


def weights_id(folder: Path) -> str:
    """Changes when the weight files change, so that answers of other weights are not taken over."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")]
    return hashlib.blake2b(repr(sorted(stats)).encode(), digest_size=8).hexdigest()


def load_sampler(cell: Cell, inputs: Inputs):
    """The sampler with the checkpoint's weights, labelled by what tells their files apart."""
    return make_sampler(cell, inputs.model, inputs.tokenizer, cell.dtype, weights_id(inputs.model))


def hand_over(sampler, cell: Cell, inputs: Inputs) -> None:
    """Another checkpoint's weights for the same sampler. Collective."""
    if sampler.weight_version != weights_id(inputs.model):
        config = PolicyConfig(dtype=cell.dtype)
        policy = load_policy(inputs.model, config, trainable=False)
        sampler.load_weights(policy, weights_id(inputs.model))


# --------------------------------------------------------------------------------------------------
# Stages


def answer(cell: Cell, inputs: Inputs, sampler) -> dict[str, Estimate]:
    """Sample, judge and summarise; rank 0 writes summary.json and returns the figures like all."""
    folder, prompts = cell.folder, inputs.prompts
    if parallel.rank() == 0:
        open_folder(folder, cell, inputs.model)
    parallel.barrier()
    judge = make_judge(cell, folder / LEDGER, *parallel.place())
    collector = Collector(
        sampler=sampler,
        judge=judge,
        tokenizer=inputs.tokenizer,
        prompts={p.id: p for p in prompts},
        prompt_ids=inputs.prompt_ids,
        rollouts=cell.samples,
        seed=cell.seed,
        params=cell.sampling,
        reward=cell.reward,
        use_references=cell.use_references,
        background=Background(),
        clock=Clock(),
    )
    path = folder / "rollouts.jsonl"
    # A step is one sampler batch on every rank: what a kill can cost.
    size = max(1, cell.sample_rows // cell.samples) * parallel.world_size()
    steps = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    # Answers on file count whatever the step in which other ranks or rows had them sampled.
    step_of = {p.id: step for step, batch in enumerate(steps, 1) for p in batch}
    on_file = {
        (step_of[r.prompt_id], r.prompt_id, r.sample): r
        for r in buffer.read(path)
        if r.prompt_id in step_of and r.weight_version == sampler.weight_version
    }
    parallel.barrier()  # every rank has read the file before one writes
    bar = tqdm(steps, desc=f"evaluating {cell.name}", leave=False, disable=parallel.rank() != 0)
    for step, batch in enumerate(bar, 1):
        collector.collect(0, step, batch, on_file, path, sampler.weight_version)
    answered = {
        (r.prompt_id, r.sample): r
        for r in buffer.read(path)
        if r.prompt_id in step_of and r.weight_version == sampler.weight_version
    }
    rows = [(r.prompt_id, r.self_scores, r.judge_scores)
            for _, r in sorted(answered.items())]  # fmt: skip
    table = summarise(rows, cell.reward.gamma)
    if parallel.rank() == 0:
        shown = sum(bool(p.references) for p in prompts) if cell.use_references else 0
        summary = {"judge": judge.name, "prompts": len(prompts), "with_references": shown}
        summary["near_duplicates"] = inputs.near_duplicates  # before --limit
        summary["metrics"] = {name: estimate._asdict() for name, estimate in table.items()}
        write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return table


def spoken(r: Rollout) -> str:
    """The answer, also of a malformed response: what stands before its first tag."""
    return r.answer if r.answer is not None else r.text.partition(OPEN)[0].strip()


CHUNK = 64  # answers between two writes: what a kill can cost


def chunks(
    path: Path, version: str, rollouts: Sequence[Rollout], label: str
) -> Iterator[tuple[Sequence[Rollout], set[str]]]:
    """This rank's chunks of which the file lacks lines under this version, and the answers that
    lack one. A chunk is read whole, so that a figure does not depend on a kill or on the ranks."""
    lines = [row for _, _, row in read_lines(path)] if path.exists() else []
    there = {(x["prompt_id"], x["sample"], x["answer_id"]) for x in lines
             if x["version"] == version}  # fmt: skip
    rows = [r for r in rollouts if spoken(r)]
    parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    todo = []
    for part in parts[parallel.rank() :: parallel.world_size()]:
        lacking = {r.key for r in part if (r.prompt_id, r.sample, answer_id(r)) not in there}
        todo += [(part, lacking)] * bool(lacking)
    parallel.barrier()  # every rank has read the file before one writes
    yield from tqdm(todo, desc=label, leave=False, disable=parallel.rank() != 0 or not todo)
    parallel.barrier()


def line_of(r: Rollout, version: str, **values: object) -> dict:
    return {"prompt_id": r.prompt_id, "sample": r.sample, "version": version,
            "answer_id": answer_id(r), **values}  # fmt: skip


def read_digits(cell: Cell, scorer: str, reader: Reader, version: str) -> None:
    """What the scorer would write behind each of the cell's answers; own=... only behind its own
    blocks."""
    path = cell.folder / f"digits_{scorer}.jsonl"
    rollouts = rollouts_of(cell.folder)
    own_cell = cell.folder.name == scorer
    for rows, lacking in chunks(path, version, rollouts, f"{scorer} reads {cell.name}"):
        readings = reader.read([Question(r.prompt_ids, spoken(r), r.judge_scores) for r in rows])
        blocks = [r for r in rows if own_cell and r.score_positions is not None]
        own = dict(zip(map(id, blocks), reader.own(blocks), strict=True))
        for r, reading in zip(rows, readings, strict=True):
            values = reading._asdict() if reading else dict.fromkeys(Reading._fields)
            if r.key in lacking:
                append_line(path, line_of(r, version, **values, own=own.get(id(r))))


def read_window(config: EvalConfig, reader: Reader, version: str) -> None:
    """The base model's scores for the answers of the window's first cycle, on which it is
    recalibrated."""
    path = Path("results") / config.name / WINDOW
    rollouts = first_cycle(Path(config.window))
    for rows, lacking in chunks(path, version, rollouts, "the base reads the window"):
        found = reader.read([Question(r.prompt_ids, r.answer) for r in rows])
        for r, reading in zip(rows, found, strict=True):
            if r.key in lacking:
                append_line(path, line_of(r, version, scores=reading and reading.scores))


def read_sensitivity(cell: Cell, reader: Reader, version: str) -> None:
    """The model's scores for its answer as it is, for another prompt's answer in its place, and for
    its first half."""
    path = cell.folder / "sensitivity.jsonl"
    rollouts = [r for r in rollouts_of(cell.folder) if r.answer is not None]
    by_prompt = {r.prompt_id: r.answer for r in rollouts}
    ids = list(by_prompt)
    another = {p: by_prompt[q] for p, q in zip(ids, ids[1:] + ids[:1], strict=True)}
    for rows, lacking in chunks(path, version, rollouts, f"{cell.name}, exchanged and cut"):
        texts = {
            "as_it_is": [r.answer for r in rows],
            "another": [another[r.prompt_id] for r in rows],
            "cut": [r.answer[: (len(r.answer) + 1) // 2].strip() for r in rows],
        }
        scores = {
            kind: [x and x.scores for x in reader.read(
                [Question(r.prompt_ids, text) for r, text in zip(rows, found, strict=True)]
            )]
            for kind, found in texts.items()
        }  # fmt: skip
        for k, r in enumerate(rows):
            found = {kind: x[k] for kind, x in scores.items()}
            if len(ids) < 2:
                found["another"] = None  # there is no other prompt's answer
            if r.key in lacking:
                append_line(path, line_of(r, version, **found))


def write_lines(path: Path, lines: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def held_out(cell: Cell, judge: str) -> Cell:
    """The cell under another judge, whose settings are the table's in endpoint.py, not ours."""
    client = dataclasses.replace(cell.client, key_variable="", price_in=None, price_out=None)
    return dataclasses.replace(cell, judge=judge, endpoint=Endpoint(), client=client)


def judge_more(config: EvalConfig, cell: Cell, prompts: dict[str, Prompt]) -> None:
    """Malformed answers and repeats by the judge, all answers by the held-out judges. Raises
    JudgeError."""
    rollouts = rollouts_of(cell.folder)
    valid = [r for r in rollouts if r.judge_scores is not None]
    malformed = [r for r in rollouts if r.judge_scores is None and spoken(r)]
    drawn = random.Random(config.seed).sample(valid, min(config.repeat_answers, len(valid)))
    repeated = sorted(drawn, key=lambda r: r.key) if config.repeat > 1 else []
    work = [(cell, [(malformed, 1), (repeated, config.repeat)])]
    work += [(held_out(cell, name), [(valid, 1)]) for name in config.judges]
    for judged, parts in work:
        judge = make_judge(judged, cell.folder / LEDGER)
        lines = []
        for rows, repeat in parts:
            answers = [
                Answer.of(r, prompts[r.prompt_id], spoken(r), cell.use_references) for r in rows
            ]
            for r, draws in zip(rows, judge_again(judge, answers, repeat), strict=True):
                lines += [
                    line_of(r, r.weight_version, draw=d, scores=s) for d, s in enumerate(draws)
                ]
        path = cell.folder / scores_file(judged.judge)
        write_lines(path, [*kept(path, lines, rollouts), *lines])


def judge_stronger(base: Cell, prompts: dict[str, Prompt], answers: dict[str, str]) -> None:
    """A stronger model's answers by the judge, once each. Raises JudgeError."""
    judge = make_judge(base, base.folder / LEDGER)
    asked = [
        Answer(prompts[p], prompts[p].references if base.use_references else (), text, None, None)
        for p, text in answers.items()
    ]
    found = judge_again(judge, asked, 1)
    lines = [{"prompt_id": p, "version": "", "scores": scores}
             for p, [scores] in zip(answers, found, strict=True)]  # fmt: skip
    write_lines(base.folder.parent / STRONGER, lines)


def kept(path: Path, lines: Sequence[dict], rollouts: Sequence[Rollout]) -> list[dict]:
    """What an earlier call with other options has paid for: its lines about answers that are still
    the cell's and not among the new lines."""

    def key(x: dict) -> tuple:
        return x["prompt_id"], x["sample"], x["answer_id"], x["draw"]

    now = {(r.prompt_id, r.sample, answer_id(r)) for r in rollouts}
    new = {key(x) for x in lines}
    before = [row for _, _, row in read_lines(path)] if path.exists() else []
    return [x for x in before if key(x) not in new and key(x)[:3] in now]


def prefer_over(base: Cell, cell: Cell, prompts: dict[str, Prompt]) -> None:
    """The referee's choice between the base's answers and this model's. Raises JudgeError."""
    theirs = {(r.prompt_id, r.sample): r for r in rollouts_of(base.folder) if r.answer is not None}
    ours = [r for r in rollouts_of(cell.folder)
            if r.answer is not None and (r.prompt_id, r.sample) in theirs]  # fmt: skip
    judge = make_judge(cell, cell.folder / LEDGER)
    pairs = [(r, theirs[r.prompt_id, r.sample]) for r in ours]
    works = [prefer(judge, prompts[r.prompt_id].conversation, r.answer, o.answer) for r, o in pairs]
    found = Background().submit(ask_all(works, f"{cell.name} against the base")).result()
    lines = [
        line_of(r, r.weight_version, **p._asdict(), longer_by=len(r.answer) - len(o.answer))
        for (r, o), p in zip(pairs, found, strict=True)
    ]
    write_lines(cell.folder / "preferences.jsonl", lines)


def keep_order(path: Path, models: Sequence[str]) -> None:
    """The evaluation's models in the order in which they were first asked for, the base first."""
    known = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*known, *(m for m in models if m not in known)]))


def run(
    config: EvalConfig,
    table: dict[tuple[str, str], Cell],
    read: dict[tuple[str, str], Inputs],
    stronger: dict[str, dict[str, str]],
) -> None:
    """All stages. Raises JudgeError."""
    models = list(dict.fromkeys(m for m, _ in table))
    of = {m: {b: cell for (n, b), cell in table.items() if n == m} for m in models}
    if parallel.rank() == 0:
        keep_order(Path("results") / config.name / MODELS, models)
    sampler = None
    try:
        if "answers" in config.stages:
            for (model, benchmark), cell in table.items():
                inputs = read[model, benchmark]
                sampler = sampler or load_sampler(cell, inputs)
                hand_over(sampler, cell, inputs)
                figures = answer(cell, inputs, sampler)
                parallel.print0(f"\n{cell.name}, judge {cell.judge}\n{render(figures)}")
            sampler.rest()
        for scorer in models:
            if not {"digits", "sensitivity"} & set(config.stages):
                break
            folder = next(iter(read[scorer, b].model for b in of[scorer]))
            reader, version = Reader(folder, config.dtype), weights_id(folder)
            for cell in table.values() if "digits" in config.stages else ():
                read_digits(cell, scorer, reader, version)
            if config.window and scorer == models[0] and "digits" in config.stages:
                read_window(config, reader, version)
            for cell in of[scorer].values() if "sensitivity" in config.stages else ():
                read_sensitivity(cell, reader, version)
        error = None
        if parallel.rank() == 0:
            try:
                for (model, benchmark), cell in table.items():
                    prompts = {p.id: p for p in read[model, benchmark].prompts}
                    if "judges" in config.stages:
                        judge_more(config, cell, prompts)
                        if model == models[0] and benchmark in stronger:
                            judge_stronger(cell, prompts, stronger[benchmark])
                    if "preferences" in config.stages and model != models[0]:
                        prefer_over(table[models[0], benchmark], cell, prompts)
            except JudgeError as failure:
                error = failure
        parallel.raise_together(error)
    finally:
        if sampler:
            sampler.close()  # last: vLLM ends the process group with itself


def main() -> None:
    config = tyro.cli(EvalConfig, description=__doc__)
    try:
        config = dataclasses.replace(config, sampler=choose(config.sampler))
        table = cells(config)
        if config.judge in config.judges:
            raise ValueError(f"--judges: {config.judge} is the judge already; name others")
        read = {key: prepare(cell) for key, cell in table.items()}
        stronger = stronger_answers(config, table, read)
        for cell in table.values():
            for name in config.judges:
                make_judge(held_out(cell, name), cell.folder / LEDGER)
    except ValueError as error:
        raise SystemExit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1) from None
    with parallel.process_group():
        try:
            run(config, table, read, stronger)
        except JudgeError as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
