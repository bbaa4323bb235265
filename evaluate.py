"""Answers, judgements and figures of one checkpoint on one prompt file (Sec. 4.1, first form).

    python evaluate.py --model runs/see/checkpoints/cycle_03 --data FILE --name see-c3 --samples 8

`results/NAME/` holds the configuration, every rollout with its judgement, and `summary.json`: the
well-formed rate, quality, calibration and mean absolute errors, each with its standard error over
prompts. The same command run again goes on where it stopped. Under torchrun the prompts are shared
by the ranks.
"""

import dataclasses
import hashlib
import json
import os
import random
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

import buffer
import parallel
from client import Background, JudgeError
from data import Prompt
from endpoint import ClientConfig, Endpoint
from files import write_text
from hub import fetch_weights
from judge import make_judge
from ledger import LEDGER
from logbook import Clock, check_same_config, open_folder
from metrics import Estimate, render, summarise
from reward import RewardConfig
from rollout import Collector, Inputs, read_inputs
from sampler import EngineConfig, SamplingParams, choose, make_sampler


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a checkpoint: n samples per prompt, judged, with standard errors."""

    model: str
    """Hugging Face folder: a run's checkpoint, or the base model; or a hub id."""
    data: str
    """Prompt file, see data.py for its kinds; or a hub id, see hub.py."""
    name: str
    """Results go to results/NAME."""
    judge: str = "gpt-5.4"
    """Model name at an OpenAI-compatible endpoint (Sec. 4.1, see endpoint.py); or replay:FILE, the
    judgements of an earlier run; or "heuristic", an offline stand-in that says nothing about real
    judging; or "rubric", the miniature's."""
    samples: int = 1
    """Samples per prompt."""
    limit: int = 0
    """Prompts, drawn by seed; 0: all of the file."""
    exclude_window: str = ""
    """Folder of a run whose training prompts are left out, such as runs/see."""
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


def prepare(config: EvalConfig) -> tuple[list[Prompt], Inputs]:
    """The prompts to answer, and all that was read. Raises ValueError."""
    make_judge(config, Path("results") / config.name / LEDGER, parallel.ranks())
    inputs = read_inputs(config)
    prompts = inputs.prompts
    if config.exclude_window:
        known = Path(config.exclude_window) / "window.json"
        if not known.is_file():
            raise ValueError(f"{known}: no such file; give a run's folder to --exclude_window")
        window = set(json.loads(known.read_text()))
        prompts = [p for p in prompts if p.id not in window]
    if config.limit > len(prompts) or not prompts:
        raise ValueError(
            f"{config.data}: {config.limit or 'some'} prompts are asked for, but {len(prompts)} "
            f"are left within {config.prompt_tokens} tokens; lower --limit or give more data"
        )
    if config.limit:
        chosen = random.Random(config.seed).sample(range(len(prompts)), config.limit)
        prompts = [prompts[i] for i in sorted(chosen)]
    check_same_config(Path("results") / config.name, config, {"sample_rows", "engine", "client"})
    fetch_weights(config.model)
    return prompts, inputs


def weights_id(folder: Path) -> str:
    """Changes when the weight files change, so that answers of other weights are not taken over."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")]
    return hashlib.blake2b(repr(sorted(stats)).encode(), digest_size=8).hexdigest()


def load_sampler(config: EvalConfig, inputs: Inputs):
    """The sampler with the checkpoint's weights, labelled by what tells their files apart."""
    version = weights_id(inputs.model)
    return make_sampler(config, inputs.model, inputs.tokenizer, config.dtype, version)


def run(config: EvalConfig, prompts: list[Prompt], inputs: Inputs, sampler) -> dict[str, Estimate]:
    """Sample, judge and summarise; rank 0 writes summary.json and returns the figures like all."""
    folder = Path("results") / config.name
    if parallel.rank() == 0:
        open_folder(folder, config, inputs.model)
    parallel.barrier()
    judge = make_judge(config, folder / LEDGER, *parallel.place())
    collector = Collector(
        sampler=sampler,
        judge=judge,
        tokenizer=inputs.tokenizer,
        prompts={p.id: p for p in prompts},
        prompt_ids=inputs.prompt_ids,
        rollouts=config.samples,
        seed=config.seed,
        params=config.sampling,
        reward=config.reward,
        use_references=config.use_references,
        background=Background(),
        clock=Clock(),
    )
    path = folder / "rollouts.jsonl"
    on_file = {r.key: r for r in buffer.read(path)}
    # A step is one sampler batch on every rank: what a kill can cost.
    size = max(1, config.sample_rows // config.samples) * parallel.world_size()
    steps = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    bar = tqdm(steps, desc=f"evaluating {config.name}", leave=False, disable=parallel.rank() != 0)
    for step, batch in enumerate(bar, 1):
        collector.collect(0, step, batch, on_file, path, sampler.weight_version)
    # Only what this call asked for: other numbers of ranks or rows make other steps.
    asked = {(step, p.id) for step, batch in enumerate(steps, 1) for p in batch}
    answered = sorted(buffer.read(path), key=lambda r: r.key)
    rows = [
        (r.prompt_id, r.self_scores, r.judge_scores)
        for r in answered
        if (r.step, r.prompt_id) in asked and r.weight_version == sampler.weight_version
    ]
    table = summarise(rows, config.reward.gamma)
    if parallel.rank() == 0:
        shown = sum(bool(p.references) for p in prompts) if config.use_references else 0
        summary = {"judge": judge.name, "prompts": len(prompts), "with_references": shown}
        summary["metrics"] = {name: estimate._asdict() for name, estimate in table.items()}
        write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return table


def main() -> None:
    config = tyro.cli(EvalConfig, description=__doc__)
    try:
        config = dataclasses.replace(config, sampler=choose(config.sampler))
        prepared = prepare(config)
    except ValueError as error:
        raise SystemExit(
            f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1
        ) from None
    with parallel.process_group(), closing(load_sampler(config, prepared[1])) as sampler:
        try:
            table = run(config, *prepared, sampler)
        except JudgeError as error:
            raise SystemExit(f"error: {error}") from None
        parallel.print0(f"\n{config.name}, judge {config.judge}\n{render(table)}")


if __name__ == "__main__":
    sys.exit(main())
