"""Models, benchmarks and judges -> result files (Sec. 4); report.py makes tables of them.

    python evaluate.py --models base=DIR rlcr=runs/rlcr see=runs/see \\
        --benchmarks helpsteer2=validation.jsonl alpaca_eval=alpaca_eval.jsonl \\
        --judges claude-sonnet-4-6 --training_run runs/see --name paper

The first model is the base. A run's folder is its newest checkpoint; its earlier checkpoints get
the stage `answers` alone, for Figure 2. --dry_run says what the judges will be asked and what that
costs. Stages, each of which goes on where it was stopped, on all ranks unless said otherwise:

    answers      each model's answers to each benchmark, judged
    digits       what each model would write at the score positions of each model's answers: top-5,
                 the answer x scorer swap, the forced block; no judge call
    sensitivity  the same with another prompt's answer, and with the second half cut off
    judges       malformed answers, repeats, a stronger model's answers from a file, and held-out
                 judges (rank 0)
    preferences  the pairwise referee against the base (Sec. 4.1; rank 0)

Results go to results/NAME/ (storage/run_folder.py lists the files). A cell, one model on one
benchmark, is done once: other models or benchmarks under the same name add cells.
"""

import dataclasses
import json
import random
import sys
import warnings
from pathlib import Path

import tyro

from backend import parallel
from backend.launch import Watcher, check_gpu, refuse_restart
from backend.model_folder import check_model_folder, check_weights, weights_id
from backend.policy import PolicyConfig, load_policy
from backend.sampler import choose_sampler, make_sampler
from config import EVALUATION_MAY_CHANGE, RENAMED, CellConfig, EvaluationConfig
from evaluation import dry_run, stages
from evaluation.digits import Reader
from evaluation.intervals import Interval
from evaluation.metrics import render, summarise
from judge import check_judge, make_judge, with_judge_url
from judging.client import Background, JudgeError
from plan import Inputs, check_name, read_inputs
from prompts import EXAMPLES, FEW_SHOT, special_tokens
from rollout import Collector
from storage.answers import Answers, load_answers
from storage.data import Prompt, load_prompts, near_duplicates
from storage.files import FileError, WriteError, read_json, write_text
from storage.hub import data_file, fetch_weights
from storage.logbook import Clock, check_same_config, open_folder
from storage.model_card import add_held_out, check_template, read_card
from storage.progress import progress
from storage.record import answer_text, read_rollouts
from storage.run_folder import RunFolder

Key = tuple[str, str]  # (model, benchmark)


# --------------------------------------------------------------------------------------------------
# Before weights are loaded


def prepare(cell: CellConfig) -> Inputs:
    """Read a cell's model folder and prompts; the returned prompts are those to answer. Raises
    ValueError."""
    inputs = read_inputs(cell)
    if card := read_card(inputs.model):
        check_template(inputs.model, card, cell.template, cell.few_shot)
    run = RunFolder(Path(cell.training_run))
    trained = training_prompts(run) if cell.training_run else {}
    prompts = [p for p in inputs.prompts if p.id not in trained]
    duplicate = near_duplicates(prompts, [*trained.values(), *few_shot_prompts(cell)])
    if cell.drop_duplicates:
        prompts = [p for p, d in zip(prompts, duplicate, strict=True) if not d]
    if cell.limit > len(prompts) or not prompts:
        raise ValueError(
            f"{cell.data}: {cell.limit or 'some'} prompts are asked for, but {len(prompts)} are "
            f"left within {cell.prompt_tokens} tokens; lower --limit or give more data"
        )
    if cell.limit:
        chosen = random.Random(cell.seed).sample(range(len(prompts)), cell.limit)
        prompts = [prompts[i] for i in sorted(chosen)]
    check_same_config(cell.folder, cell, EVALUATION_MAY_CHANGE, RENAMED)
    return inputs._replace(prompts=prompts, near_duplicates=sum(duplicate))


def prepare_earlier(cell: CellConfig, newest: Inputs) -> Inputs:
    """An earlier checkpoint of a run has the prompts and the tokenizer of the newest one. Raises
    ValueError."""
    check_model_folder(Path(cell.model), cell.longest_row, cell.sampler)
    check_same_config(cell.folder, cell, EVALUATION_MAY_CHANGE, RENAMED)
    return newest._replace(model=Path(cell.model))


def prepare_all(config: EvaluationConfig, cells: dict[Key, CellConfig]) -> dict[Key, Inputs]:
    """Raises ValueError."""
    earlier, inputs = config.earlier_checkpoints(), {}
    for (model, benchmark), cell in cells.items():
        if model in earlier:
            newest, _ = earlier[model]
            inputs[model, benchmark] = prepare_earlier(cell, inputs[newest, benchmark])
        else:
            inputs[model, benchmark] = prepare(cell)
    return inputs


def check_judges(config: EvaluationConfig, cell: CellConfig) -> None:
    """Raises ValueError for a judge that cannot be asked, or is not that of the training run."""
    judge = check_judge(cell, parallel.world_size())
    for name in config.judges:
        check_judge(stages.held_out(cell, name))
    if not cell.training_run:
        return
    run = RunFolder(Path(cell.training_run))
    judges = {r.judge_model for r in run.first_cycle()}
    if judges and judges != {judge}:
        raise ValueError(
            f"--training_run {run} was judged by {', '.join(sorted(judges))} and not by "
            f"{judge}: predictors fitted on it would predict another judge; give the run's "
            "judge, or another run"
        )


def tell_special_prompts(config: EvaluationConfig, inputs: dict[Key, Inputs]) -> None:
    """A line for each benchmark with prompts that are too long, or near duplicates."""
    done = "left out" if config.drop_duplicates else "kept (--drop_duplicates)"
    for benchmark, found in {benchmark: found for (_, benchmark), found in inputs.items()}.items():
        if found.too_long and parallel.rank() == 0:
            limit = config.prompt_tokens
            print(f"{benchmark}: {found.too_long} prompts are over {limit:,} tokens and left out")
        if found.near_duplicates and parallel.rank() == 0:
            print(
                f"{benchmark}: {found.near_duplicates} prompts are nearly a training prompt or an "
                f"example; {done}"
            )


def training_prompts(run: RunFolder) -> dict[str, Prompt]:
    """A run's training prompts by id. Raises ValueError."""
    if not run.window_file.is_file():
        raise ValueError(f"{run.window_file}: no such file; give a run's folder to --training_run")
    ids = set(run.window_ids())
    prompts = load_prompts(data_file(run.config()["data"]))
    return {p.id: p for p in prompts if p.id in ids}


def few_shot_prompts(cell: CellConfig) -> list[Prompt]:
    """The template's few-shot examples as prompts."""
    shown = FEW_SHOT[cell.few_shot][: EXAMPLES[cell.template]]
    return [
        Prompt(f"example {k}", ({"role": "user", "content": example.request},))
        for k, example in enumerate(shown)
    ]


def stronger_answers(
    config: EvaluationConfig, cells: dict[Key, CellConfig], inputs: dict[Key, Inputs]
) -> dict[str, Answers]:
    """--stronger's answers by benchmark. Raises ValueError."""
    base = next(iter(cells))[0]
    answers = {}
    for spec in config.stronger:
        benchmark, equals, path = spec.partition("=")
        if not equals or (base, benchmark) not in cells:
            raise ValueError(
                f"--stronger {spec}: say BENCHMARK=FILE with one of the benchmarks "
                f"{', '.join(b for m, b in cells if m == base)}"
            )
        answers[benchmark] = found = load_answers(path, inputs[base, benchmark].prompts)
        if parallel.rank() == 0:
            print(f"{benchmark}: {path} has {found}")
    return answers


def obstacles(config: EvaluationConfig, cell: CellConfig) -> list[str]:
    """Reasons why the judges cannot be asked; [] if none."""
    try:
        check_judges(config, cell)
    except ValueError as error:
        return [str(error)]
    return []


# --------------------------------------------------------------------------------------------------
# Answers


def hand_over(sampler, cell: CellConfig, inputs: Inputs) -> None:
    """Load the cell's checkpoint into the sampler, if it has another's weights. Collective."""
    version = weights_id(inputs.model)
    if sampler.weight_version != version:
        policy = load_policy(inputs.model, PolicyConfig(dtype=cell.dtype), trainable=False)
        sampler.load_weights(policy, version)


def answer_prompts(
    cell: CellConfig, inputs: Inputs, sampler, watcher: Watcher | None = None
) -> dict[str, Interval]:
    """Sample, judge and summarise; every rank returns the figures, rank 0 writes summary.json.
    Raises JudgeError."""
    folder, prompts = cell.folder, inputs.prompts
    ranks, rank = parallel.world_size(), parallel.rank()
    if rank == 0:
        open_folder(folder, cell, inputs.model, ranks)
    parallel.barrier()
    judge = make_judge(cell, folder.judge_cache, ranks, rank, parallel.launch_id())
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
    if watcher:
        watcher.before_exit = collector.stop
    # A step is one sampler batch on every rank: what a kill can cost.
    size = max(1, cell.sample_rows // cell.samples) * ranks
    steps = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    step_of = {p.id: step for step, batch in enumerate(steps, 1) for p in batch}

    def answers() -> list:
        """On file: the prompts' answers by these weights."""
        return [
            r
            for r in read_rollouts(folder.rollouts_file)
            if r.prompt_id in step_of and r.weight_version == sampler.weight_version
        ]

    # Answers on file count whatever the step in which other ranks or rows had them sampled.
    on_file = {(step_of[r.prompt_id], r.prompt_id, r.sample): r for r in answers()}
    parallel.barrier()  # every rank has read the file before one writes
    bar = progress(steps, desc=f"evaluating {cell.name}", leave=False, rank=rank)
    for step, batch in enumerate(bar, 1):
        sampled = collector.sample(
            0, step, batch, on_file, folder.rollouts_file, sampler.weight_version
        )
        collector.wait_for_judge(sampled)
    by_sample = {(r.prompt_id, r.sample): r for r in answers()}
    rows = [(r.prompt_id, r.self_scores, r.judge_scores) for _, r in sorted(by_sample.items())]
    table = summarise(rows)
    if rank == 0:
        shown = sum(bool(p.references) for p in prompts) if cell.use_references else 0
        summary = {"judge": judge.name, "prompts": len(prompts), "with_references": shown}
        # Before --limit:
        summary |= {"too_long": inputs.too_long, "near_duplicates": inputs.near_duplicates}
        special = special_tokens(inputs.tokenizer)
        summary["with_text"] = sum(bool(answer_text(r, special)) for r in by_sample.values())
        summary["not_judged"] = sum(r.refused is not None for r in by_sample.values())
        summary["metrics"] = {name: interval._asdict() for name, interval in table.items()}
        folder.add_to_summary(summary)
        if Path(cell.model).is_dir():  # not one in the hub's cache
            shown = {name: summary[name] for name in ("judge", "prompts", "metrics")}
            ids = [p.id for p in prompts]
            try:
                add_held_out(inputs.model, folder.path.parent.name, shown, ids)
            except WriteError as error:
                warnings.warn(f"the model card stays without these figures: {error}", stacklevel=2)
    return table


# --------------------------------------------------------------------------------------------------
# All stages


def run(
    config: EvaluationConfig,
    cells: dict[Key, CellConfig],
    inputs: dict[Key, Inputs],
    stronger: dict[str, Answers],
    watcher: Watcher,
) -> None:
    """Raises JudgeError."""
    models = list(config.main_models())
    if parallel.rank() == 0:
        keep_model_order(config.folder.models_file, models)
        declare(config)
    sampler = None
    try:
        if "answers" in config.stages:
            for key, cell in cells.items():
                sampler = sampler or make_sampler(
                    cell, inputs[key].model, inputs[key].tokenizer, cell.dtype,
                    weights_id(inputs[key].model),
                )  # fmt: skip
                hand_over(sampler, cell, inputs[key])
                table = answer_prompts(cell, inputs[key], sampler, watcher)
                parallel.print0(f"\n{cell.name}, judge {cell.judge}\n{render(table)}")
            sampler.sleep()
        cells = {key: cell for key, cell in cells.items() if key[0] in models}
        if {"digits", "sensitivity"} & set(config.stages):
            for model in models:
                read_scores(config, model, cells, inputs)
        error = None
        if parallel.rank() == 0:
            try:
                ask_judges(config, cells, inputs, stronger)
            except (JudgeError, WriteError) as failure:
                error = failure
        parallel.raise_together(error)
    finally:
        if sampler:
            sampler.close()  # last: vLLM ends the process group with itself


def keep_model_order(path: Path, models: list[str]) -> None:
    """Record the models in the order in which they were first asked for, the base first."""
    before = read_json(path, list) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*before, *(m for m in models if m not in before)]))


def declare(config: EvaluationConfig) -> None:
    """Record, before there is an answer, what must not be chosen by results: the benchmarks in
    their order, the primary endpoint and the margin of quality. The first declaration stands; a
    primary endpoint that is asked for later is recorded as later. The base alone declares none."""
    first = config.folder.declared()
    known, benchmarks = first.get("benchmarks", []), config.named_benchmarks()
    primary = list(config.primary_endpoint()) if config.primary or len(config.models) > 1 else None
    declared = {
        "benchmarks": [*known, *(b for b in benchmarks if b not in known)],
        "primary": first.get("primary") or primary,
        "margin": first.get("margin") or (config.margin if primary else None),
        "later": first.get("later", []),
    }
    if config.primary and primary not in [declared["primary"], *declared["later"]]:
        declared["later"].append(primary)
    config.folder.path.mkdir(parents=True, exist_ok=True)
    write_text(config.folder.declared_file, json.dumps(declared, indent=2))


def read_scores(
    config: EvaluationConfig,
    model: str,
    cells: dict[Key, CellConfig],
    inputs: dict[Key, Inputs],
) -> None:
    """Stages digits and sensitivity of one model as the scorer."""
    own = {key: cell for key, cell in cells.items() if key[0] == model}
    folder = inputs[next(iter(own))].model
    reader, version = Reader(folder, config.dtype), weights_id(folder)
    if "digits" in config.stages:
        for cell in cells.values():
            stages.read_digits(cell.folder, model, reader, version)
        base = next(iter(cells))[0]
        if config.training_run and model == base:
            run = RunFolder(Path(config.training_run))
            stages.read_training_window(config.folder.window_scores_file, run, reader, version)
            prompts = {config.folder.window_states_file: run.last_cycle()}
            for cell in own.values():
                benchmark = cell.folder.path.parent.name
                prompts[config.folder.states_file(benchmark)] = cell.folder.answers()
            for path, rollouts in prompts.items():
                stages.read_prompt_states(path, rollouts, reader, version)
    if "sensitivity" in config.stages:
        for cell in own.values():
            stages.read_sensitivity(cell.folder, reader, version)


def ask_judges(
    config: EvaluationConfig,
    cells: dict[Key, CellConfig],
    inputs: dict[Key, Inputs],
    stronger: dict[str, Answers],
) -> None:
    """Stages judges and preferences. Raises JudgeError."""
    base = next(iter(cells))[0]
    for (model, benchmark), cell in cells.items():
        prompts = {p.id: p for p in inputs[model, benchmark].prompts}
        if "judges" in config.stages:
            special = special_tokens(inputs[model, benchmark].tokenizer)
            stages.judge_more(config, cell, prompts, special)
            if model == base and benchmark in stronger:
                path = config.folder.stronger_file(benchmark)
                stages.judge_stronger(path, cell, prompts, stronger[benchmark])
        if "preferences" in config.stages and model != base:
            stages.compare_with_base(cells[base, benchmark], cell, prompts)


def main() -> None:
    config = tyro.cli(EvaluationConfig, description=__doc__)
    try:
        refuse_restart()
        if not config.dry_run:
            check_gpu()
        # On a GPU the reader of digits takes the engine's place.
        engine = dataclasses.replace(config.engine, sleep=True)
        sampler = choose_sampler(config.sampler)
        config = with_judge_url(dataclasses.replace(config, sampler=sampler, engine=engine))
        check_name(config.name)
        cells = config.cells()
        config.primary_endpoint()
        first = next(iter(cells.values()))
        if config.judge in config.judges:
            raise ValueError(f"--judges: {config.judge} is the judge already; name others")
        if not config.dry_run:
            check_judges(config, first)
        inputs = prepare_all(config, cells)
        tell_special_prompts(config, inputs)
        stronger = stronger_answers(config, cells, inputs)
        if config.dry_run:
            if parallel.rank() == 0:
                print(dry_run.describe(config, cells, inputs, stronger, obstacles(config, first)))
            return
        for key, cell in cells.items():
            fetch_weights(cell.model)
            check_weights(inputs[key].model)
    except ValueError as error:
        raise SystemExit(f"error: {error}" if parallel.rank() == 0 else 1) from None
    watcher = Watcher()
    with parallel.process_group(), parallel.alone_in(config.folder.path):
        try:
            run(config, cells, inputs, stronger, watcher)
        except (JudgeError, WriteError, FileError) as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
