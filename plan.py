"""Planning a run before its model is loaded: checks, window, batches, and `--dry_run`.

    python cycle.py --preset paper --dry_run                                (one rank)
    torchrun --nproc_per_node 4 cycle.py --preset paper --dry_run           (four ranks)

All mistakes that can be found before anything expensive are reported here, in one sentence each.
Memory is by formula (backend/footprint.py), the judge's cost by judging/estimate.py.

Choices that the paper leaves open: the window of prompts is
`sorted(random.Random(seed).sample(range(n), size))` over the prompts within the prompt limit; its
order in cycle c is a permutation drawn with seed + c. Departure: the authors' scripts draw the
window before they drop over-long prompts, which can leave fewer than 160; ours always has 160.
"""

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backend import footprint
from backend.footprint import GB, this_machine
from backend.launch import check_gpu
from backend.model_folder import (
    Size,
    check_model_folder,
    check_weights,
    load_tokenizer,
    model_size,
)
from backend.parallel import world_size
from backend.policy import attention, check_compiler
from config import MAY_CHANGE, CommonConfig, Config
from judge import check_judge, judge_prices, offline_judge
from judging import estimate
from prompts import check_tokenizer, prompt_ids
from storage.data import Prompt, load_prompts
from storage.hub import data_file, fetch_weights, model_folder
from storage.logbook import check_same_config, wandb_ready
from storage.program import check_same_program
from storage.run_folder import RunFolder


class Inputs(NamedTuple):
    """A command's model folder, tokenizer and prompts, after all checks."""

    model: Path  # local folder
    size: Size  # of the model
    tokenizer: object
    prompts: list[Prompt]  # those within the prompt limit, in file order
    prompt_ids: dict[str, tuple[int, ...]]  # prompt id -> token ids of the full policy prompt
    too_long: int  # number of prompts over the limit
    # Evaluation only: number of near duplicates of training prompts or few-shot examples.
    near_duplicates: int = 0


def read_inputs(config: CommonConfig) -> Inputs:
    """Check the model folder and its tokenizer; read and tokenise the prompts. `config` is cycle's
    or an evaluation cell's. A hub model's weights are not fetched yet. Raises ValueError."""
    model = model_folder(config.model)
    check_model_folder(model, config.longest_row, config.sampler)
    prompts = load_prompts(data_file(config.data))
    tokenizer = load_tokenizer(model)
    size = model_size(model)
    check_tokenizer(tokenizer, config.template, config.few_shot, size.vocabulary)
    if config.sampling.top_k > size.vocabulary:
        raise ValueError(
            f"--sampling.top_k {config.sampling.top_k:,} is above the model's vocabulary of "
            f"{size.vocabulary:,}; 0 keeps all"
        )
    ids = {
        p.id: prompt_ids(tokenizer, p.conversation, config.template, config.few_shot)
        for p in prompts
    }
    fitting = [p for p in prompts if len(ids[p.id]) <= config.prompt_tokens]
    return Inputs(model, size, tokenizer, fitting, ids, len(prompts) - len(fitting))


@dataclass(frozen=True)
class Setup:
    """A checked run whose model is not loaded yet."""

    folder: RunFolder
    window: list[Prompt]
    inputs: Inputs

    @property
    def size(self) -> Size:
        return self.inputs.size


def prepare(config: Config) -> Setup:
    """Check options, model folder, data, run folder and machine; fetch a hub model's weights.
    Raises ValueError."""
    setup = resolve(config)
    if problems := obstacles(config, setup):
        raise ValueError(problems[0])
    fetch_weights(config.model)
    check_weights(setup.inputs.model)
    return setup


def resolve(config: Config) -> Setup:
    """All checks except those of the machine. Raises ValueError."""
    check_options(config)
    inputs = read_inputs(config)
    fitting = inputs.prompts
    if config.window > len(fitting):
        raise ValueError(
            f"{config.data}: cannot draw a window of {config.window} prompts: the file has "
            f"{len(fitting) + inputs.too_long} unique prompts, {len(fitting)} of them within "
            f"{config.prompt_tokens} tokens; lower --window or give more data"
        )
    chosen = sorted(random.Random(config.seed).sample(range(len(fitting)), config.window))
    window = [fitting[i] for i in chosen]
    folder = config.folder
    check_same_config(folder, config, MAY_CHANGE)
    check_same_program(folder)
    if folder.window_file.exists() and folder.window_ids() != [p.id for p in window]:
        raise ValueError(
            f"{folder.window_file} names other prompts than {config.data} gives now; restore the "
            "prompt file that the run began with, or choose another --name"
        )
    return Setup(folder, window, inputs)


def check_options(config: Config) -> None:
    """Raises ValueError for options that are inconsistent with each other or with the number of
    ranks."""
    steps = config.epochs * (config.window // config.batch)
    if config.rl_steps > steps:
        raise ValueError(
            f"rl_steps {config.rl_steps} does not fit: {config.epochs} epoch(s) of a window of "
            f"{config.window} in batches of {config.batch} are {steps} steps; give --rl_steps "
            f"{steps} or less, or more --epochs"
        )
    check_name(config.name)
    if config.batch % world_size():
        raise ValueError(
            f"batch {config.batch} cannot be shared evenly by {world_size()} ranks; choose a "
            f"multiple of {world_size()}"
        )
    if config.sampling.temperature <= 0:
        raise ValueError(
            "sampling.temperature must be above 0 in training: the loss divides logits by it"
        )
    attention(config.policy)
    check_compiler(config.policy)


def check_name(name: str) -> None:
    """Raises ValueError unless a name gives a folder below runs/ or results/."""
    if not re.fullmatch(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", name):
        raise ValueError(
            f"--name {name!r} must be letters, digits and . _ + -, with / between folders"
        )


def obstacles(config: Config, setup: Setup) -> list[str]:
    """Reasons why the run cannot be done on this machine in its present state; [] if none."""
    problems, machine = [], this_machine()
    for check in (check_gpu, lambda: check_judge(config, world_size())):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if config.wandb and not wandb_ready():
        problems.append("--wandb: no key is known: `wandb login` first, or WANDB_MODE=offline")
    parts = footprint.memory(config, setup.size, machine)
    if sum(parts.values()) > machine.memory:
        sizes = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
        problems.append(
            f"a rank needs about {sum(parts.values()) / GB:.1f} GB ({sizes}) and this machine has "
            f"{machine.memory / GB:.1f} GB a rank; use more GPUs, a smaller --model, or lower "
            "--policy.micro_batch_tokens, --sample_rows (transformers) or --engine.* (vLLM); "
            "--dry_run prints the whole plan, and --preset small is a run for two CPU cores"
        )
    longest, capacity = config.longest_row, footprint.kv_tokens(config, setup.size, machine)
    if config.sampler == "vllm" and longest > capacity:
        problems.append(
            f"vLLM's cache holds about {capacity:,} tokens and one rollout may take {longest:,}; "
            "raise --engine.gpu_memory (GPU) or --engine.kv_cache_gb (CPU), or lower "
            "--sampling.max_tokens"
        )
    needed = sum(footprint.disk(config, setup.size).values())
    free = footprint.disk_free(setup.folder.path)
    if needed > free:
        problems.append(
            f"{setup.folder} needs about {needed / GB:.1f} GB of disk and {free / GB:.1f} GB are "
            "free; --keep_checkpoints N keeps the newest N only"
        )
    return problems


def step_batches(config: Config, window: list[Prompt], cycle: int) -> list[list[Prompt]]:
    """The prompts of each RL step of a cycle: the first `rl_steps` batches of its epochs. In each
    epoch an incomplete last batch is dropped."""
    rng = random.Random(config.seed + cycle)
    batches = []
    for _ in range(config.epochs):
        order = rng.sample(window, len(window))
        batches += [
            order[i : i + config.batch]
            for i in range(0, len(order) - config.batch + 1, config.batch)
        ]
    return batches[: config.rl_steps]


# --------------------------------------------------------------------------------------------------
# The dry run


def describe(config: Config, setup: Setup) -> str:
    """The plan of a run as text."""
    machine = this_machine()
    sections = {
        "Inputs": _inputs(config, setup),
        "Schedule": _schedule(config, setup),
        "Judge": _judge(config, setup),
        f"Memory of each of {world_size()} rank(s), by formula": _sizes(
            footprint.memory(config, setup.size, machine)
        )
        + [f"{'this machine has':<34} {machine.memory / GB:8.1f} GB"],
        f"Disk, {setup.folder}/": _sizes(footprint.disk(config, setup.size))
        + [f"{'free':<34} {footprint.disk_free(setup.folder.path) / GB:8.1f} GB"]
        + _files(config),
        "Obstacles": obstacles(config, setup) or ["none found"],
    }
    text = f"Dry run of preset {config.preset}; nothing was loaded, sampled, judged or written."
    for title, lines in sections.items():
        text += f"\n\n{title}\n" + "\n".join(f"  {line}" for line in lines)
    return text


def _inputs(config: Config, setup: Setup) -> list[str]:
    inputs, m = setup.inputs, setup.size
    sampler = config.sampler
    if sampler == "vllm":
        sampler += f", KV cache for {footprint.kv_tokens(config, m, this_machine()):,} tokens"
    lengths = sorted(len(inputs.prompt_ids[p.id]) for p in setup.window)
    first = step_batches(config, setup.window, 1)[0]
    conversation = first[0].conversation[-1]["content"].strip().splitlines()[0]
    return [
        f"model       {config.model} at {inputs.model}",
        f"            {m.kind}, {m.parameters / 1e9:.3f} B parameters, {m.layers} layers, "
        f"vocabulary {m.vocabulary:,}, head {'tied' if m.tied else 'untied'}",
        f"data        {config.data}: {len(inputs.prompts) + inputs.too_long:,} unique prompts, "
        f"{inputs.too_long:,} over {config.prompt_tokens:,} tokens left out",
        f"window      {config.window:,} prompts, seed {config.seed}; tokens with the template: "
        f"{lengths[0]:,} to {lengths[-1]:,}, median {lengths[len(lengths) // 2]:,}",
        f"            {sum(bool(p.references) for p in setup.window):,} of them with reference "
        f"responses, {'shown' if config.use_references else 'not shown'} to the judge",
        f"first step  {len(first)} prompts, {sum(len(inputs.prompt_ids[p.id]) for p in first):,} "
        f"tokens; the first: {conversation[:60]!r}",
        f"sampler     {sampler}; attention in training {attention(config.policy)}",
    ]


def _schedule(config: Config, setup: Setup) -> list[str]:
    steps = config.cycles * config.rl_steps
    rollouts = steps * config.batch * config.rollouts
    prompt_tokens = sum(
        len(setup.inputs.prompt_ids[p.id])
        for cycle in range(1, config.cycles + 1)
        for batch in step_batches(config, setup.window, cycle)
        for p in batch
    )
    s, dropped = config.sampling, config.window % config.batch
    lines = [
        f"phase 1     {config.cycles} cycle(s) x {config.rl_steps} RL steps x {config.batch} "
        f"prompts x {config.rollouts} rollouts = {rollouts:,} rollouts, {steps * config.batch:,} "
        "sample-passes",
        f"            {dropped} prompt(s) of the window left over in each epoch; a cycle takes "
        f"{config.rl_steps} of its {config.epochs * (config.window // config.batch)} batches",
        f"            AdamW, learning rate {config.grpo.lr:g} constant, one step per batch",
        f"sampling    temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}, at most "
        f"{s.max_tokens:,} tokens",
        f"tokens      prompts {prompt_tokens:,} (each once for its {config.rollouts} rollouts), "
        f"responses at most {rollouts * s.max_tokens:,}",
    ]
    if not config.distil:
        return [*lines, "phase 2     none"]
    sft = config.sft
    rows = min(sft.max_samples, config.rl_steps * config.batch * config.rollouts)
    updates = math.ceil(rows / sft.batch)
    return [
        *lines,
        f"phase 2     {config.cycles} x at most {rows} rows in {updates} updates of {sft.batch}, "
        f"five tokens each; learning rate {sft.lr:g}, {math.floor(sft.warmup * updates)} updates "
        "of warm-up, cosine to 0",
    ]


def _judge(config: Config, setup: Setup) -> list[str]:
    calls = config.cycles * config.rl_steps * config.batch * config.rollouts
    if offline_judge(config.judge) or config.judge.startswith("replay:"):
        return [f"{config.judge}, {calls:,} judgements at most; offline and free"]
    tokenizer, client = setup.inputs.tokenizer, config.client
    price_in, price_out = judge_prices(config)
    asked = estimate.scoring(tokenizer, setup.window, config.use_references)
    asked = asked._replace(calls=calls, prices=(price_in, price_out))
    lines = [
        f"{config.judge}, at most {calls:,} answers, {client.concurrency} at once, at most "
        f"{client.attempts} attempts each",
        f"malformed and repeated answers are not sent; {asked.reply} tokens a reply",
        estimate.budget(client),
    ]
    if price_in is None or price_out is None:
        lines.append("price unknown; give --client.price_in and --client.price_out")
    else:
        lines.append(f"${price_in:g} and ${price_out:g} per million tokens in and out, list price")
    lengths = estimate.answer_lengths(tokenizer, setup.window, config.sampling.max_tokens)
    return lines + estimate.by_length([(asked, lengths)])


def _sizes(parts: dict[str, float]) -> list[str]:
    total = {**parts, "total": sum(parts.values())}
    return [f"{name:<34} {size / GB:8.1f} GB" for name, size in total.items()]


def _files(config: Config) -> list[str]:
    last = f"{config.cycles:02d}"
    records = "config.json, env.json, window.json, metrics.jsonl"
    if not offline_judge(config.judge):
        records += ", judge_cache.jsonl"
    checkpoints = f"checkpoints/cycle_01 to cycle_{last}"
    if config.save_every:
        checkpoints += f" and cycle_NN_step_NNNNN every {config.save_every} steps"
    return [
        records,
        f"rollouts/cycle_01.jsonl to cycle_{last}.jsonl: every response with its judgement",
        f"{checkpoints}: Hugging Face folders in bf16",
        "state/: fp32 shards, to continue a killed run",
    ]
