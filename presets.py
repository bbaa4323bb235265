"""Every option with its place in the paper, and the presets.

paper         the paper's run (Table 5)
official      as the authors' scripts run it, where an option can say so: parameters in bf16. The
              other differences are not options; README, Departures, lists them
rlcr          Adapted RLCR, the baseline (Sec. 4.1, Table 6): phase 1 alone, two epochs over 5,000
              prompts in batches of 48, a checkpoint every 10 steps for Figure 2
rlcr-matched  the same with SEE's batch of 16. Table 6: SEE and the baseline differ in
              distillation and in batch size; this control takes the second difference away
small         a 135M model on two CPU cores with the offline heuristic judge
tiny          the miniature of tiny.py: the paper's window, steps and batches, minutes on CPU
tiny-rlcr, tiny-rlcr-matched    its baselines
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Literal

import tyro

from endpoint import ClientConfig, Endpoint
from grpo import GRPOConfig
from policy import PolicyConfig
from reward import RewardConfig
from sampler import EngineConfig, SamplingParams
from sft_masked import SFTConfig


@dataclass(frozen=True)
class Config:
    """Self-Evaluation Elicitation. Defaults are the paper's (Table 5)."""

    preset: Literal[
        "paper", "official", "rlcr", "rlcr-matched", "small", "tiny", "tiny-rlcr",
        "tiny-rlcr-matched",
    ] = "paper"  # fmt: skip
    """Decides the defaults of all other options; what each preset is stands in presets.py."""
    name: str = "see"
    """The run's folder is runs/NAME."""
    model: str = "Qwen/Qwen3-4B-Base"
    """Base model: a Hugging Face folder with safetensors, or a hub id (App. E)."""
    data: str = "nvidia/HelpSteer2"
    """Training prompts: a file, see data.py for its kinds, or a hub id, see hub.py (App. E:
    HelpSteer2 train)."""
    judge: str = "gpt-5.4"
    """Model name at an OpenAI-compatible endpoint (Sec. 4.1, see endpoint.py); or replay:FILE, the
    judgements of an earlier run; or "heuristic", an offline stand-in; or "rubric", the miniature's
    ("rubric:0.3": with a probability of 0.3 a score is one off, drawn anew at each call)."""
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
    template: Literal["paper", "short", "bare"] = "paper"
    """Generation template: the paper's (App. B.1), a short one for small models and contexts, or
    the conversation alone for the miniature."""
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
    """RL steps between states within a phase, with optimiser, and between checkpoints; 0: states
    at phase ends, checkpoints at cycle ends."""
    keep_checkpoints: int = 0
    """Newest checkpoints that are kept on disk; 0: all (each 2 bytes a parameter)."""
    dry_run: bool = False
    """Resolve everything up to the first sample, print it and stop: window, batches, schedule,
    memory, judge calls and cost, files."""
    show_batch: bool = False
    """Print the first row of each phase with its loss mask in colour (prompt and answer are
    text of the run: mind where the output goes)."""
    wandb: bool = False
    """Log metrics to Weights & Biases (WANDB_MODE=offline works); prompts and answers stay here."""
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
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)


PAPER = Config()
OFFICIAL = replace(
    PAPER, preset="official", name="official", policy=PolicyConfig(parameters="bfloat16")
)
RLCR = replace(
    PAPER,
    preset="rlcr",
    name="rlcr",
    cycles=1,
    window=5000,
    batch=48,
    epochs=2,
    rl_steps=208,  # 2 x floor(5,000 / 48)
    distil=False,
    save_every=10,
    client=ClientConfig(concurrency=48),
)
RLCR_MATCHED = replace(
    RLCR,
    preset="rlcr-matched",
    name="rlcr-matched",
    batch=16,
    rl_steps=624,  # 2 x floor(5,000 / 16)
)
# Not in the paper: sizes and learning rates for SmolLM2-135M on two CPU cores. The paper's rates
# (1e-6, 2e-6) move a model of this size by next to nothing in 15 steps.
SMALL = Config(
    preset="small",
    name="small",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    data="tatsu-lab/alpaca_eval",
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
# Not in the paper: sizes and learning rates for the miniature, chosen on its development prompts.
_TINY = dict(
    model="models/tiny-0",
    data="models/tiny-0/train.jsonl",
    judge="rubric",
    template="bare",
    prompt_tokens=64,
    sampler="transformers",
    sample_rows=128,
    sampling=SamplingParams(max_tokens=64),
    grpo=GRPOConfig(lr=1e-4),
    sft=SFTConfig(lr=1e-4),
    # Prompts of some 20 tokens are not worth sharing.
    policy=PolicyConfig(
        "float32", shared_prefix=False, micro_batch_tokens=8192, gradient_checkpointing=False
    ),
)
TINY = replace(PAPER, preset="tiny", name="tiny", **_TINY)
TINY_RLCR = replace(RLCR, preset="tiny-rlcr", name="tiny-rlcr", **_TINY)
TINY_RLCR_MATCHED = replace(
    RLCR_MATCHED, preset="tiny-rlcr-matched", name="tiny-rlcr-matched", **_TINY
)
PRESETS = {
    c.preset: c
    for c in (PAPER, OFFICIAL, RLCR, RLCR_MATCHED, SMALL, TINY, TINY_RLCR, TINY_RLCR_MATCHED)
}
# What may differ between a run and its continuation: how long, what is kept, how much at once.
MAY_CHANGE = {
    "cycles", "save_every", "keep_checkpoints", "dry_run", "show_batch", "wandb", "engine",
    "client", "sample_rows", "policy.micro_batch_tokens", "policy.head_tokens",
    "policy.gradient_checkpointing", "policy.shared_prefix", "policy.attn",
}  # fmt: skip


def parse(args: list[str], description: str = "") -> Config:
    """Command line -> Config; `--preset` decides the defaults of the rest."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="paper")
    default = PRESETS[first.parse_known_args(args)[0].preset]
    return tyro.cli(Config, default=default, args=args, description=description)
