"""What can be known of a run before its model is loaded: checks, window, batches, and `--dry_run`.

    python cycle.py --preset paper --dry_run                                (as one rank)
    torchrun --nproc_per_node 4 cycle.py --preset paper --dry_run           (as four)

Every mistake that can be found here is found here, in one sentence each, before anything expensive.
Memory is by formula (backend/footprint.py). Judge tokens are counted with the policy's tokenizer;
the judge's own counts differ.

Where the paper leaves a choice: the window of prompts is
`sorted(random.Random(seed).sample(range(n), size))` over the prompts that fit the prompt limit; its
order in cycle c is a permutation by seed + c.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backend import footprint
from backend.footprint import GB, this_machine
from backend.model_folder import Size, check_model_folder, load_tokenizer, model_size
from backend.parallel import world_size
from backend.policy import attention
from config import MAY_CHANGE, CommonConfig, Config
from judge import check_judge, offline_judge
from judging.endpoint import prices
from prompts import ATTRIBUTES, JUDGE_SYSTEM, check_tokenizer, judge_user, prompt_ids
from storage.data import Prompt, load_prompts
from storage.hub import data_file, fetch_weights, model_folder
from storage.logbook import check_same_config, wandb_ready
from storage.run_folder import RunFolder


class Inputs(NamedTuple):
    """Model folder, tokenizer and prompts of a command, checked."""

    model: Path  # the model's local folder
    tokenizer: object
    prompts: list[Prompt]  # those within the prompt limit, in file order
    prompt_ids: dict[str, tuple[int, ...]]  # prompt id -> token ids of the whole policy prompt
    too_long: int  # prompts over the limit
    near_duplicates: int = 0  # evaluation only: nearly a training prompt or a few-shot example


def read_inputs(config: CommonConfig) -> Inputs:
    """Check the model folder and its tokenizer, read and tokenise the prompts (`config` is cycle's
    or an evaluation cell's). A hub model's weights are not fetched yet. Raises ValueError."""
    model = model_folder(config.model)
    check_model_folder(model, config.longest_row)
    prompts = load_prompts(data_file(config.data))
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer)
    ids = {
        p.id: prompt_ids(tokenizer, p.conversation, config.template, config.few_shot)
        for p in prompts
    }
    fitting = [p for p in prompts if len(ids[p.id]) <= config.prompt_tokens]
    return Inputs(model, tokenizer, fitting, ids, len(prompts) - len(fitting))


@dataclass(frozen=True)
class Setup:
    """What is known before the model is loaded."""

    folder: RunFolder
    window: list[Prompt]
    inputs: Inputs
    size: Size  # of the model


def prepare(config: Config) -> Setup:
    """Check options, model folder, data, run folder and machine; fetch the weights from the hub if
    need be. Raises ValueError."""
    setup = resolve(config)
    if problems := obstacles(config, setup):
        raise ValueError(problems[0])
    fetch_weights(config.model)
    return setup


def resolve(config: Config) -> Setup:
    """All checks but those of the machine. Raises ValueError."""
    check_options(config)
    inputs = read_inputs(config)
    fitting = inputs.prompts
    if config.window > len(fitting):
        raise ValueError(
            f"{config.data}: a window of {config.window} prompts is asked for, but the file has "
            f"{len(fitting) + inputs.too_long} unique prompts, {len(fitting)} of them within "
            f"{config.prompt_tokens} tokens; lower --window or give more data"
        )
    chosen = sorted(random.Random(config.seed).sample(range(len(fitting)), config.window))
    window = [fitting[i] for i in chosen]
    folder = config.folder
    check_same_config(folder, config, MAY_CHANGE)
    if folder.window_file.exists() and folder.window_ids() != [p.id for p in window]:
        raise ValueError(
            f"{folder} holds a run on other prompts: {config.data} has changed; choose another "
            "--name"
        )
    return Setup(folder, window, inputs, model_size(inputs.model))


def check_options(config: Config) -> None:
    """Options that do not fit each other or the number of ranks. Raises ValueError."""
    for name in ("cycles", "window", "batch", "epochs", "rl_steps", "sample_rows"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.rollouts < 2:
        raise ValueError("rollouts must be at least 2: an advantage compares a prompt's rollouts")
    if config.rl_steps != config.epochs * (config.window // config.batch):
        raise ValueError(
            f"rl_steps {config.rl_steps} does not fit: {config.epochs} epoch(s) of a window of "
            f"{config.window} in batches of {config.batch} are "
            f"{config.epochs * (config.window // config.batch)} steps"
        )
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


def obstacles(config: Config, setup: Setup) -> list[str]:
    """Why this machine, as it is now, could not do the run; [] if no reason is found."""
    problems, machine = [], this_machine()
    try:
        check_judge(config, world_size())
    except ValueError as error:
        problems.append(str(error))
    if config.wandb and not wandb_ready():
        problems.append(
            "--wandb is asked for, but no key is known: `wandb login` first, or WANDB_MODE=offline"
        )
    parts = footprint.memory(config, setup.size, machine)
    if sum(parts.values()) > machine.memory:
        shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
        problems.append(
            f"a rank needs about {sum(parts.values()) / GB:.1f} GB ({shown}) and this machine has "
            f"{machine.memory / GB:.1f} GB a rank; more GPUs, a smaller --model, or lower "
            "--policy.micro_batch_tokens or --engine.* (--dry_run shows the whole plan; --preset "
            "small is a run for two CPU cores)"
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
    """The prompts of each RL step of a cycle; an incomplete last batch is dropped."""
    rng = random.Random(config.seed + cycle)
    batches = []
    for _ in range(config.epochs):
        order = rng.sample(window, len(window))
        batches += [
            order[i : i + config.batch]
            for i in range(0, len(order) - config.batch + 1, config.batch)
        ]
    return batches


# --------------------------------------------------------------------------------------------------
# The dry run


def describe(config: Config, setup: Setup) -> str:
    """The plan of a run as text."""
    sections = {
        "Inputs": _inputs(config, setup),
        "Schedule": _schedule(config, setup),
        "Judge": _judge(config, setup),
        f"Memory of each of {world_size()} rank(s), by formula": _sizes(
            footprint.memory(config, setup.size, this_machine())
        )
        + [f"{'this machine has':<34} {this_machine().memory / GB:8.1f} GB"],
        f"Disk, {setup.folder}/": _sizes(footprint.disk(config, setup.size))
        + [f"{'free there':<34} {footprint.disk_free(setup.folder.path) / GB:8.1f} GB"]
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
    read = sum(
        len(setup.inputs.prompt_ids[p.id])
        for cycle in range(1, config.cycles + 1)
        for batch in step_batches(config, setup.window, cycle)
        for p in batch
    )
    s, dropped = config.sampling, config.window - config.window // config.batch * config.batch
    lines = [
        f"phase 1     {config.cycles} cycle(s) x {config.rl_steps} RL steps x {config.batch} "
        f"prompts x {config.rollouts} rollouts = {rollouts:,} rollouts, {steps * config.batch:,} "
        "sample-passes",
        f"            {dropped} prompt(s) of the window left over in each epoch",
        f"            AdamW, learning rate {config.grpo.lr:g} constant, one step per batch",
        f"sampling    temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}, at most "
        f"{s.max_tokens:,} tokens",
        f"tokens      prompts {read:,} (each read once for its {config.rollouts} rollouts), "
        f"responses at most {rollouts * s.max_tokens:,}",
    ]
    if not config.distil:
        return [*lines, "phase 2     none"]
    c = config.sft
    rows = min(c.max_samples, config.rl_steps * config.batch * config.rollouts)
    updates = math.ceil(rows / c.batch)
    return [
        *lines,
        f"phase 2     {config.cycles} x at most {rows} rows in {updates} updates of {c.batch}, "
        f"five tokens each; learning rate {c.lr:g}, {math.floor(c.warmup * updates)} updates of "
        "warm-up, cosine to 0",
    ]


def _judge(config: Config, setup: Setup) -> list[str]:
    """Calls and cost. An answer's length is not known before it is sampled, so there are three."""
    calls = config.cycles * config.rl_steps * config.batch * config.rollouts
    if offline_judge(config.judge) or config.judge.startswith("replay:"):
        return [f"{config.judge}, {calls:,} judgements at most; offline and free"]

    def tokens(text: str) -> int:
        return len(setup.inputs.tokenizer.encode(text, add_special_tokens=False))

    shown = [(p.conversation, p.references if config.use_references else ()) for p in setup.window]
    asked = [tokens(JUDGE_SYSTEM + judge_user(c, "", references)) for c, references in shown]
    without = sum(asked) / len(asked)
    lengths = [tokens(r.response) for p in setup.window for r in p.references]
    if lengths:
        usual, why = sum(lengths) / len(lengths), "as long as the reference responses"
    else:
        usual = min(300, config.sampling.max_tokens)
        why = f"of {usual} tokens, a guess: this data has no reference responses"
    reply = tokens(json.dumps(dict.fromkeys(ATTRIBUTES, 8)))
    c, (price_in, price_out) = config.client, prices(config.judge, config.client)
    lines = [
        f"{config.judge}, at most {calls:,} answers, {c.concurrency} at once, at most "
        f"{c.attempts} attempts each",
        f"malformed answers and answers seen before are not asked; {reply} tokens a reply",
        f"budget: {'none' if c.max_cost is None else f'${c.max_cost:,.2f}'} (--client.max_cost), "
        f"{'none' if c.max_calls is None else f'{c.max_calls:,} calls'} (--client.max_calls)",
    ]
    if price_in is None or price_out is None:
        lines.append("price not known; give --client.price_in and --client.price_out")
    else:
        lines.append(f"${price_in:g} and ${price_out:g} per million tokens in and out, list price")
    for answer, name in (
        (0, "empty answers"), (usual, f"answers {why}"), (config.sampling.max_tokens, "the longest")
    ):  # fmt: skip
        each = without + answer
        cost = "cost not known"
        if price_in is not None and price_out is not None:
            cost = f"${calls * (each * price_in + reply * price_out) / 1e6:9,.2f}"
        lines.append(f"{calls * each / 1e6:9,.1f} M tokens in, {cost}   {name}")
    return lines


def _sizes(parts: dict[str, float]) -> list[str]:
    total = {**parts, "together": sum(parts.values())}
    return [f"{name:<34} {size / GB:8.1f} GB" for name, size in total.items()]


def _files(config: Config) -> list[str]:
    last = f"{config.cycles:02d}"
    steps = f" and cycle_NN_step_NNNNN every {config.save_every} steps" if config.save_every else ""
    cache = "" if offline_judge(config.judge) else ", judge_cache.jsonl"
    return [
        f"config.json, env.json, window.json, metrics.jsonl{cache}",
        f"rollouts/cycle_01.jsonl to cycle_{last}.jsonl: every response with its judgement",
        f"checkpoints/cycle_01 to cycle_{last}{steps}: Hugging Face folders in bf16",
        "state/: what resume needs",
    ]
