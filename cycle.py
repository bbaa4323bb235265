"""The SEE cycle (Algorithm 1, Sec. 3.3): Calibration-Coupled RL, then Masked Judge Distillation.

The paper's run (needs CUDA), a small run on CPU, and every option with its place in the paper:

    torchrun --nproc_per_node 4 cycle.py --cycles 15
    torchrun --nproc_per_node 2 cycle.py --preset small --model DIR --data FILE
    python cycle.py --help

The same command run again goes on where a killed run stopped. Weights come from `state/` (fp32
shards); steps since then whose rollouts are on file are trained again without sampling or judging.

Where the paper leaves a choice:
1. The window of prompts is `sorted(random.Random(seed).sample(range(n), size))` over the prompts
   that fit the prompt limit; its order in cycle c is a permutation by seed + c.
2. The KL reference is the policy at the start of the cycle, as in the authors' scripts, which start
   each phase afresh from the last checkpoint. `--reference base` keeps the base model instead.
3. Each phase starts with a fresh optimiser, as in the authors' scripts.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import buffer
import parallel
from client import Background, ChatClient, ClientConfig, JudgeError, check_environment
from data import Prompt
from files import append_line, write_text
from grpo import GRPOConfig, make_optimizer, rl_step
from judge import HeuristicJudge, LLMJudge
from logbook import Clock, check_same_config, open_folder, read_metrics, trim_metrics
from policy import PolicyConfig, export, load_policy
from reward import RewardConfig
from rollout import Collector, Inputs, figures, in_buffer, read_inputs
from sampler import EngineConfig, SamplingParams, choose, make_sampler
from sft_masked import SFTConfig, distil


@dataclass(frozen=True)
class Config:
    """Self-Evaluation Elicitation. Defaults are the paper's (Table 5)."""

    preset: Literal["paper", "small"] = "paper"
    """paper: the paper's run. small: a 135M model on CPU with the offline heuristic judge."""
    name: str = "see"
    """The run's folder is runs/NAME."""
    model: str = "Qwen/Qwen3-4B-Base"
    """Base model: a local Hugging Face folder with safetensors (App. E)."""
    data: str = "nvidia/HelpSteer2"
    """Training prompts: a local file, see data.py for its kinds (App. E: HelpSteer2 train)."""
    judge: str = "gpt-5.4"
    """Model name at an OpenAI-compatible endpoint (Sec. 4.1), or "heuristic", an offline
    stand-in."""
    use_references: bool = True
    """Show the judge reference responses with human labels where the data has them (App. B.3)."""
    cycles: int = 15
    """C, cycles of both phases (Sec. 4.1)."""
    window: int = 160
    """Unique prompts, drawn once by seed and reused in every cycle (App. E)."""
    batch: int = 16
    """B_RL, prompts per RL step over all ranks (Table 5)."""
    epochs: int = 1
    """Passes over the window per cycle."""
    rl_steps: int = 10
    """K, RL steps per cycle (Table 5); must be epochs x floor(window / batch)."""
    rollouts: int = 8
    """Rollouts per prompt, the GRPO group (Table 5)."""
    prompt_tokens: int = 4096
    """Longest prompt, template included, in tokens (Table 5); longer ones are dropped before the
    draw."""
    template: Literal["paper", "short"] = "paper"
    """Generation template: the paper's (App. B.1), or a short one for small models and contexts."""
    few_shot: Literal["paper-like", "varied"] = "paper-like"
    """Few-shot examples: scored like the authors', or with scores spread over the range (a control
    for priming)."""
    reference: Literal["cycle", "base"] = "cycle"
    """KL reference: the policy at the start of the cycle, or the base model."""
    distil: bool = True
    """Phase 2 after each phase 1; without it the run is GRPO alone, as Adapted RLCR (Sec. 4.1,
    Baseline)."""
    seed: int = 42
    """Seed of window, orders, sampling and selection."""
    save_every: int = 0
    """RL steps between states within a phase, with optimiser; 0: at phase ends only."""
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples: vllm where it is installed (auto), or the plain loop."""
    sample_rows: int = 64
    """Rollouts that are sampled at once per rank."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


# Not in the paper: sizes and learning rates for SmolLM2-135M on two CPU cores. The paper's rates
# (1e-6, 2e-6) move a model of this size by next to nothing in 15 steps.
SMALL = Config(
    preset="small",
    model="models/smollm2-135m",
    data="prompts.jsonl",
    judge="heuristic",
    cycles=3,
    window=40,
    batch=8,
    rl_steps=5,
    rollouts=4,
    prompt_tokens=600,
    template="short",
    sampling=SamplingParams(max_tokens=160),
    grpo=GRPOConfig(lr=5e-5),
    sft=SFTConfig(lr=1e-4),
    policy=PolicyConfig(micro_batch_tokens=2048, gradient_checkpointing=False),
)
PRESETS = {"paper": Config(), "small": SMALL}
# Not in the paper: nats per token; two bf16 forwards of the same weights differ by about 0.02.
GAP_ALARM = 0.1
MAY_CHANGE = {"cycles", "save_every", "client"}  # between a run and its continuation


def parse(args: list[str]) -> Config:
    """Command line -> Config; `--preset` decides the defaults of the rest."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="paper")
    default = PRESETS[first.parse_known_args(args)[0].preset]
    return tyro.cli(Config, default=default, args=args, description=__doc__)


# --------------------------------------------------------------------------------------------------
# Everything that can be wrong is found before a model is loaded


@dataclass(frozen=True)
class Setup:
    """What is known before the model is loaded."""

    folder: Path
    window: list[Prompt]
    inputs: Inputs


def prepare(config: Config) -> Setup:
    """Check configuration, machine, model folder, data and run folder. Raises ValueError or
    JudgeError."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("cycles", "window", "batch", "epochs", "rl_steps", "sample_rows"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.rollouts < 2:
        raise ValueError("rollouts must be at least 2: an advantage compares a prompt's rollouts")
    if config.preset == "paper" and not torch.cuda.is_available():
        raise ValueError(
            "preset paper trains a 4B model with 12,288-token rows and needs CUDA GPUs (the "
            "paper: 4 x 96 GB); this machine has none. What runs here: --preset small --model "
            "DIR --data FILE"
        )
    if config.rl_steps != config.epochs * (config.window // config.batch):
        raise ValueError(
            f"rl_steps {config.rl_steps} does not fit: {config.epochs} epoch(s) of a window of "
            f"{config.window} in batches of {config.batch} are "
            f"{config.epochs * (config.window // config.batch)} steps"
        )
    if config.batch % ranks:
        raise ValueError(
            f"batch {config.batch} cannot be shared evenly by {ranks} ranks; choose a multiple "
            f"of {ranks}"
        )
    if config.sampling.temperature <= 0:
        raise ValueError(
            "sampling.temperature must be above 0 in training: the loss divides logits by it"
        )
    if config.judge != "heuristic":
        check_environment()

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
    return Setup(folder, window, inputs)


def step_batches(config: Config, window: list[Prompt], cycle: int) -> list[list[Prompt]]:
    """The prompts of each RL step of a cycle (choice 1); an incomplete last batch
    is dropped."""
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
# The cycle


def main(config: Config | None = None) -> None:
    """Run SEE. `config` None: from the command line."""
    config = config or parse(sys.argv[1:])
    try:
        config = dataclasses.replace(config, sampler=choose(config.sampler))
        setup = prepare(config)
    except (ValueError, JudgeError) as error:
        raise SystemExit(
            f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1
        ) from None
    with parallel.process_group(), closing(Run(config, setup)) as run:
        try:
            run.train()
        except JudgeError as error:
            raise SystemExit(f"error: {error}") from None


class Run:
    """A run in progress: models, sampler, judge, files."""

    def __init__(self, config: Config, setup: Setup):
        self.config, self.setup, self.folder = config, setup, setup.folder
        self.clock = Clock()
        self._open_folder()
        with self.clock("loading"):
            self.sampler = make_sampler(  # first: vLLM measures free memory
                config.sampler,
                Path(config.model),
                setup.inputs.tokenizer,
                dtype=config.policy.dtype,
                longest=config.prompt_tokens + config.sampling.max_tokens,
                rows=config.sample_rows,
                seed=config.seed,
                engine=config.engine,
            )
            self.policy = load_policy(config.model, config.policy)
            self.reference = load_policy(config.model, config.policy, trainable=False)
        self.names = {p: name for name, p in self.policy.named_parameters()}
        self.collector = Collector(
            sampler=self.sampler,
            judge=self._make_judge(),
            tokenizer=setup.inputs.tokenizer,
            prompts={p.id: p for p in setup.window},
            prompt_ids=setup.inputs.prompt_ids,
            rollouts=config.rollouts,
            seed=config.seed,
            params=config.sampling,
            reward=config.reward,
            use_references=config.use_references,
            background=Background(),
            clock=self.clock,
        )

    def close(self) -> None:
        self.sampler.close()

    def train(self) -> None:
        """Algorithm 1. Lines 7-18 are in rollout.py, line 16 (Eq. 1) in reward.py."""
        first, done, optimizer = self._resume()
        for cycle in range(first, self.config.cycles + 1):  # line 4
            # Lines 5-19. Phase 1: Calibration-Coupled RL
            if done == 0:
                optimizer = self._begin_phase_1()
            on_file = {r.key: r for r in buffer.read(self._rollout_file(cycle))}
            batches = step_batches(self.config, self.setup.window, cycle)
            steps = range(done + 1, self.config.rl_steps + 1)
            for step in self._progress(steps, f"cycle {cycle}, RL"):
                version = self._hand_over(cycle, step)
                rollouts = self.collector.collect(  # lines 7-18
                    cycle, step, batches[step - 1], on_file, self._rollout_file(cycle), version
                )
                self.sampler.rest()
                update = self._rl_step(optimizer, rollouts)  # lines 6, 19
                self._log(cycle, "rl", step, figures(rollouts) | update)
                self._save_in_phase_1(cycle, step, optimizer)

            # Line 20: the buffer, the same on every rank
            on_file = sorted(buffer.read(self._rollout_file(cycle)), key=lambda r: r.key)
            buffered = [r for r in on_file if in_buffer(r)]

            # Lines 21-25. Phase 2: Masked Judge Distillation
            selected = self._select(buffered, cycle) if self.config.distil else []  # line 23
            updates = self._distil(selected, cycle)  # lines 22, 24
            for number, update in enumerate(self._progress(updates, f"cycle {cycle}, SFT"), 1):
                self._log(cycle, "sft", number, update)
            self._end_cycle(cycle, len(buffered), len(selected))
            done = 0
        self._log(self.config.cycles, "end", 0, {})

    # Phase 1

    def _begin_phase_1(self) -> torch.optim.AdamW:
        """A fresh optimiser; the KL reference becomes the policy as it is now (choice 2)."""
        if self.config.reference == "cycle":
            parallel.copy_shards(self.policy, self.reference)
        return make_optimizer(self.policy, self.config.grpo)

    def _hand_over(self, cycle: int, step: int) -> str:
        """The policy's weights to the sampler; their version is "c2s7" in cycle 2 after 7 RL
        steps."""
        version = f"c{cycle}s{step - 1}"
        with self.clock("hand_over"):
            self.sampler.load_weights(self.policy, version)
        return version

    def _rl_step(self, optimizer: torch.optim.AdamW, rollouts: list[buffer.Rollout]) -> dict:
        with self.clock("training"):
            update = rl_step(
                self.policy,
                self.reference,
                optimizer,
                rollouts,
                group_size=self.config.rollouts,
                temperature=self.config.sampling.temperature,
                config=self.config.grpo,
                micro_batch_tokens=self.config.policy.micro_batch_tokens,
            )
        if (update["logprob_gap"] or 0) > GAP_ALARM:
            parallel.print0(
                f"alarm: sampler and trainer differ by {update['logprob_gap']:.3f} nats a token; "
                "the sampler may have other weights than the policy"
            )
        return update

    def _save_in_phase_1(self, cycle: int, step: int, optimizer: torch.optim.AdamW) -> None:
        """At the phase's end without optimiser, because phase 2 starts with a fresh one."""
        every = self.config.save_every
        if step == self.config.rl_steps:
            self._save(cycle, step, None)
        elif every and step % every == 0:
            self._save(cycle, step, optimizer)

    # Phase 2

    def _select(self, buffered: list[buffer.Rollout], cycle: int) -> list[buffer.Rollout]:
        chosen = buffer.select_stratified(
            [r.judge_scores for r in buffered],
            [r.prompt_id for r in buffered],
            self.config.sft.max_samples,
            self.config.sft.per_prompt_limit,
            seed=self.config.seed + cycle,
        )
        return [buffered[i] for i in chosen]

    def _distil(self, selected: list[buffer.Rollout], cycle: int) -> Iterator[dict]:
        updates = distil(
            self.policy,
            self.setup.inputs.tokenizer,
            selected,
            self.config.sft,
            self.config.policy.micro_batch_tokens,
            seed=self.config.seed + cycle,
        )
        while True:
            with self.clock("training"):
                update = next(updates, None)
            if update is None:
                return
            yield update

    def _end_cycle(self, cycle: int, buffered: int, selected: int) -> None:
        """Export, one line of means over the window, and the state that the next cycle needs."""
        with self.clock("saving"):
            checkpoint = self.folder / "checkpoints" / f"cycle_{cycle:02d}"
            export(self.policy, self.setup.inputs.tokenizer, checkpoint)
        lines = [m for m in read_metrics(self.folder) if (m["cycle"], m["phase"]) == (cycle, "rl")]
        means = {}
        for name in ("reward", "well_formed", "quality", "calibration", "mae"):
            known = [m[name] for m in lines if m[name] is not None]
            means[name] = sum(known) / len(known) if known else None
        shown = ", ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in means.items())
        parallel.print0(f"cycle {cycle}: {shown}; {selected} of {buffered} rollouts distilled")
        self._log(cycle, "cycle", 0, means | {"buffered": buffered, "selected": selected})
        self._save(cycle + 1, 0, None)

    # Judge, progress, log

    def _make_judge(self) -> HeuristicJudge | LLMJudge:
        if self.config.judge == "heuristic":
            return HeuristicJudge()
        share = max(1, self.config.client.concurrency // parallel.world_size())
        cache = self.folder / "judge_cache.jsonl"
        return LLMJudge(ChatClient(self.config.judge, self.config.client, share, cache))

    def _progress(self, items, label: str):
        return tqdm(items, desc=f"{label} ({self.config.name})", disable=parallel.rank() != 0)

    def _log(self, cycle: int, phase: str, step: int, values: dict) -> None:
        steps = step if phase in ("rl", "setup") else self.config.rl_steps
        passes = ((cycle - 1) * self.config.rl_steps + steps) * self.config.batch
        line = {"cycle": cycle, "phase": phase, "step": step, "sample_passes": passes}
        line |= values | {"seconds": self.clock.lap()}
        if parallel.rank() == 0:
            append_line(self.folder / "metrics.jsonl", line)

    # Files: the run's folder, state, resume

    def _rollout_file(self, cycle: int) -> Path:
        return self.folder / "rollouts" / f"cycle_{cycle:02d}.jsonl"

    def _open_folder(self) -> None:
        if parallel.rank() == 0:
            open_folder(self.folder, self.config)
            (self.folder / "rollouts").mkdir(exist_ok=True)
            write_text(self.folder / "window.json", json.dumps([p.id for p in self.setup.window]))
            if self.setup.inputs.too_long:
                limit = self.config.prompt_tokens
                print(
                    f"{self.setup.inputs.too_long} prompts are over {limit} tokens and are left out"
                )
        parallel.barrier()

    def _save(self, cycle: int, step: int, optimizer: torch.optim.AdamW | None) -> None:
        """State after `step` RL steps of `cycle`, with optimiser and KL reference in mid-phase."""
        folder = self.folder / "state" / f"cycle_{cycle:03d}_step_{step:05d}"
        where = {"cycle": cycle, "step": step, "mid_phase": optimizer is not None}
        with self.clock("saving"):
            parallel.save_state(folder, self._tensors(optimizer), where)

    def _tensors(self, optimizer: torch.optim.AdamW | None) -> dict[str, torch.Tensor]:
        tensors = {name: p.detach() for p, name in self.names.items()}
        if optimizer is not None:
            reference = self.reference.named_parameters()
            tensors |= parallel.optimizer_tensors(optimizer, self.names)
            tensors |= {f"reference.{name}": p.detach() for name, p in reference}
        return tensors

    def _resume(self) -> tuple[int, int, torch.optim.AdamW | None]:
        """(cycle, its RL steps that are done, optimiser if in mid-phase) of the newest state."""
        states = parallel.states(self.folder / "state")
        cycle, step, optimizer = 1, 0, None
        if states:
            where = json.loads((states[-1] / "where.json").read_text())
            cycle, step = where["cycle"], where["step"]
            with self.clock("loading"):
                if where["mid_phase"]:
                    optimizer = make_optimizer(self.policy, self.config.grpo)
                parallel.load_state(states[-1], self._tensors(optimizer))
            parallel.print0(f"going on from {states[-1]}")
        if parallel.rank() == 0:
            trim_metrics(self.folder, cycle, step)
        self._log(cycle, "setup", step, {})
        return cycle, step, optimizer


if __name__ == "__main__":
    warnings.filterwarnings("once")
    main()
