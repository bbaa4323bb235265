"""What can be known of a run before its model is loaded: checks, window, batches, and `--dry_run`.

    python cycle.py --preset paper --dry_run                                (as one rank)
    torchrun --nproc_per_node 4 cycle.py --preset paper --dry_run           (as four)

Everything that can be wrong is found here, in one sentence each, before anything expensive. Memory
is by formula (footprint.py). Judge tokens are counted with the policy's tokenizer; the judge's own
counts otherwise.

Where the paper leaves a choice: the window of prompts is
`sorted(random.Random(seed).sample(range(n), size))` over the prompts that fit the prompt limit; its
order in cycle c is a permutation by seed + c.
"""

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import footprint
from data import Prompt
from endpoint import prices
from footprint import MARGIN, itemsize, per_rank
from hub import fetch_weights
from judge import make_judge, offline_judge
from ledger import LEDGER
from logbook import check_same_config, wandb_ready
from parallel import ranks
from policy import Size, attention, model_size
from presets import MAY_CHANGE, Config
from prompts import ATTRIBUTES, JUDGE_SYSTEM, judge_user
from rollout import Inputs, read_inputs
from sampler import longest_row

GB = 1e9


@dataclass(frozen=True)
class Setup:
    """What is known before the model is loaded."""

    folder: Path
    window: list[Prompt]
    inputs: Inputs
    size: Size  # of the model


def prepare(config: Config) -> Setup:
    """Check options, model folder, data, run folder and machine; fetch what the hub has to give.
    Raises ValueError."""
    setup = look(config)
    if problems := obstacles(config, setup):
        raise ValueError(problems[0])
    fetch_weights(config.model)
    return setup


def look(config: Config) -> Setup:
    """All but the machine. Raises ValueError."""
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
    folder = Path("runs") / config.name
    check_same_config(folder, config, MAY_CHANGE)
    known = folder / "window.json"
    if known.exists() and json.loads(known.read_text()) != [p.id for p in window]:
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
    if config.batch % ranks():
        raise ValueError(
            f"batch {config.batch} cannot be shared evenly by {ranks()} ranks; choose a multiple "
            f"of {ranks()}"
        )
    if config.sampling.temperature <= 0:
        raise ValueError(
            "sampling.temperature must be above 0 in training: the loss divides logits by it"
        )
    attention(config.policy)


def obstacles(config: Config, setup: Setup) -> list[str]:
    """Why this machine, as it is now, could not do the run."""
    found = []
    try:
        make_judge(config, setup.folder / LEDGER, ranks())
    except ValueError as error:
        found.append(str(error))
    if config.wandb and not wandb_ready():
        found.append(
            "--wandb is asked for, but no key is known: `wandb login` first, or WANDB_MODE=offline"
        )
    parts, there = memory(config, setup), per_rank()
    if sum(parts.values()) > there:
        shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
        found.append(
            f"a rank needs about {sum(parts.values()) / GB:.1f} GB ({shown}) and this machine has "
            f"{there / GB:.1f} GB a rank; more GPUs, a smaller --model, or lower "
            "--policy.micro_batch_tokens or --engine.* (--dry_run shows the whole plan; --preset "
            "small is a run for two CPU cores)"
        )
    longest, seats = longest_row(config), kv_tokens(config, setup)
    if config.sampler == "vllm" and longest > seats:
        found.append(
            f"vLLM's cache holds about {seats:,} tokens and one rollout may take {longest:,}; "
            "raise --engine.gpu_memory (GPU) or --engine.kv_cache_gb (CPU), or lower "
            "--sampling.max_tokens"
        )
    needed, free = sum(disk(config, setup).values()), disk_free(setup.folder)
    if needed > free:
        found.append(
            f"{setup.folder} needs about {needed / GB:.1f} GB of disk and {free / GB:.1f} GB are "
            "free; --keep_checkpoints N keeps the newest N only"
        )
    return found


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
# Memory and disk, in bytes


def memory(config: Config, setup: Setup) -> dict[str, float]:
    """Peak of one rank of this start on this machine."""
    sampler = footprint.engine(config, setup.size, per_rank(), torch.cuda.is_available())
    parts = footprint.training(config, setup.size, ranks())
    return {**parts, "margin": (MARGIN - 1) * sum(parts.values()), "sampler": sampler}


def kv_tokens(config: Config, setup: Setup) -> int:
    """Tokens that vLLM's KV cache holds on one rank."""
    return footprint.kv_tokens(config, setup.size, per_rank(), torch.cuda.is_available())


def disk(config: Config, setup: Setup) -> dict[str, float]:
    """What the run's folder grows to, the responses and judgements (a few GB at most) left out."""
    m = setup.size
    checkpoints = config.cycles * (config.rl_steps // config.save_every if config.save_every else 1)
    kept = itemsize(config.policy.parameters)
    optimizer_and_reference = 2 * kept + itemsize(config.policy.dtype)
    state = kept + (optimizer_and_reference if config.save_every else 0)
    return {
        "checkpoints": 2 * m.parameters * min(checkpoints, config.keep_checkpoints or checkpoints),
        "state": 3 * state * m.parameters,  # the newest two and the one being written
    }


def disk_free(folder: Path) -> float:
    """Free bytes where the folder is or will be, and what it holds already."""
    held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free + held


# --------------------------------------------------------------------------------------------------
# The dry run


def describe(config: Config, setup: Setup) -> str:
    """The plan of a run as text."""
    sections = {
        "Inputs": _inputs(config, setup),
        "Schedule": _schedule(config, setup),
        "Judge": _judge(config, setup),
        f"Memory of each of {ranks()} rank(s), by formula": _sizes(memory(config, setup))
        + [f"{'this machine has':<34} {per_rank() / GB:8.1f} GB"],
        f"Disk, {setup.folder}/": _sizes(disk(config, setup))
        + [f"{'free there':<34} {disk_free(setup.folder) / GB:8.1f} GB"]
        + _files(config),
        "In the way of the run": obstacles(config, setup) or ["nothing that is known now"],
    }
    text = f"Dry run of preset {config.preset}; nothing was loaded, sampled, judged or written."
    for title, lines in sections.items():
        text += f"\n\n{title}\n" + "\n".join(f"  {line}" for line in lines)
    return text


def _inputs(config: Config, setup: Setup) -> list[str]:
    inputs, m = setup.inputs, setup.size
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
        f"sampler     {config.sampler}"
        + (f", KV cache for {kv_tokens(config, setup):,} tokens" * (config.sampler == "vllm"))
        + f"; attention in training {attention(config.policy)}",
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
        f"{config.judge}, at most {calls:,} answers, {c.concurrency} at once, {c.tries} tries each",
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
