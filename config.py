"""All options of cycle.py and evaluate.py with their source in the paper, and the presets.

paper         the paper's run (Table 5)
official      the authors' scripts, as far as options allow: parameters in bf16. The other
              differences are not options (README, Departures)
rlcr          the baseline Adapted RLCR (Sec. 4.1, Table 6): phase 1 only, two epochs over 5,000
              prompts in batches of 48, the loss a mean over tokens, a checkpoint every 10 steps for
              Figure 2
rlcr-matched  the baseline with SEE's batch size of 16 and SEE's loss, a mean over responses. In
              Table 6 SEE and the baseline differ in distillation, batch size and this mean; here
              they differ in distillation alone
small         a 135M model on two CPU cores with the offline heuristic judge
tiny          the miniature: the paper's window, steps and batches, in minutes on CPU
tiny-rlcr, tiny-rlcr-matched    baselines of the miniature, both with the mean over responses
"""

import argparse
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import tyro

from backend.policy import PolicyConfig
from backend.sampler import EngineConfig, SamplingParams
from grpo import GRPOConfig
from judging.endpoint import ClientConfig, Endpoint
from reward import RewardConfig
from sft_masked import SFTConfig
from storage import hub
from storage.options import Count, CountOrZero, Options, in_range
from storage.run_folder import CellFolder, EvaluationFolder, RunFolder


@dataclass(frozen=True, kw_only=True)
class CommonConfig(Options):
    """Options that training and evaluation have in common."""

    judge: str = "gpt-5.4"
    """Model name at an OpenAI-compatible endpoint (Sec. 4.1, see judging/endpoint.py); or
    replay:FILE, the judgements of an earlier run; or "heuristic", an offline judge for trying out
    the code; or "rubric", the miniature's judge ("rubric:0.3": with probability 0.3 a score is one
    off, drawn anew at each call)."""
    use_references: bool = True
    """Show the judge reference responses with human labels if the data has them (App. B.3)."""
    template: Literal["paper", "short", "bare"] = "paper"
    """Generation template: the paper's (App. B.1), a short one for small models and contexts, or
    the conversation alone for the miniature. Evaluate with the template of training."""
    few_shot: Literal["paper-like", "varied"] = "paper-like"
    """Few-shot examples: with the scores of the authors', or with scores over the whole range (a
    control for priming). Evaluate with the examples of training."""
    prompt_tokens: Count = 4096
    """Maximum prompt length, template included, in tokens (Table 5); longer prompts are left out
    and counted."""
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    """Sampler: vLLM, or a decoding loop with transformers; auto: vLLM if it is installed."""
    sample_rows: Count = 64
    """Maximum number of rollouts that are sampled at once per rank."""
    seed: in_range(int, "[0, 4294967000]") = 42
    """Seed for the draw of prompts and for sampling; in training also for the order of prompts and
    the selection of rollouts to distil."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    endpoint: Endpoint = field(default_factory=Endpoint)
    client: ClientConfig = field(default_factory=ClientConfig)

    @property
    def longest_row(self) -> int:
        """Maximum length of prompt and response together, in tokens."""
        return self.prompt_tokens + self.sampling.max_tokens


# --------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Self-Evaluation Elicitation. Defaults are the paper's (Table 5)."""

    preset: Literal[
        "paper", "official", "rlcr", "rlcr-matched", "small", "tiny", "tiny-rlcr",
        "tiny-rlcr-matched",
    ] = "paper"  # fmt: skip
    """Sets the defaults of all other options; the presets are described in config.py."""
    name: str = "see"
    """The run's folder is runs/NAME."""
    model: str = "Qwen/Qwen3-4B-Base"
    """Base model: a Hugging Face folder with safetensors, or a hub id (App. E)."""
    data: str = "nvidia/HelpSteer2"
    """Training prompts: a file (for kinds see storage/data.py) or a hub id (see storage/hub.py).
    App. E: HelpSteer2 train."""
    cycles: Count = 15
    """C, number of cycles of both phases (Sec. 4.1)."""
    window: Count = 160
    """Unique prompts, drawn once by seed and reused in every cycle (App. E)."""
    batch: Count = 16
    """B_RL, prompts per RL step over all ranks (Table 5)."""
    epochs: Count = 1
    """Passes over the window per cycle, of which a cycle takes `rl_steps` batches."""
    rl_steps: Count = 10
    """K, RL steps per cycle (Table 5); at most epochs x floor(window / batch), which is the paper's
    number. With fewer, each cycle takes part of the window, drawn anew."""
    rollouts: in_range(int, "[2, inf)") = 8
    """Rollouts per prompt: the GRPO group size (Table 5)."""
    reference: Literal["cycle", "base"] = "cycle"
    """KL reference: the policy at the start of the cycle, or the base model."""
    distil: bool = True
    """Phase 2 after each phase 1; without it the run is GRPO only, as Adapted RLCR (Sec. 4.1,
    Baseline)."""
    save_every: CountOrZero = 0
    """RL steps between checkpoints, and between states with the optimiser, within phase 1; 0:
    states at phase ends and checkpoints at cycle ends only."""
    keep_checkpoints: CountOrZero = 0
    """Number of newest checkpoints to keep on disk; 0: all (2 bytes per parameter each)."""
    dry_run: bool = False
    """Print the plan of the run and stop before the model is loaded: window, batches, schedule,
    memory, judge calls and cost, files."""
    self_check: bool = False
    """Check this machine with a small random model, print one page and stop (self_check.py). Needs
    no model, data or judge."""
    show_batch: bool = False
    """Print the first row of each phase with its loss mask in colour. The output contains a prompt
    and an answer of the run."""
    wandb: bool = False
    """Log metrics to Weights & Biases (WANDB_MODE=offline works); prompts and answers are not
    uploaded."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path("runs") / self.name)


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
    grpo=GRPOConfig(loss_mean="token"),
    client=ClientConfig(concurrency=48),
)
RLCR_MATCHED = replace(
    RLCR,
    preset="rlcr-matched",
    name="rlcr-matched",
    batch=16,
    rl_steps=624,  # 2 x floor(5,000 / 16)
    grpo=PAPER.grpo,
)
# Not in the paper: sizes and learning rates for SmolLM2-135M on two CPU cores. The paper's learning
# rates (1e-6, 2e-6) hardly change a model of this size in 15 steps.
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
    sft=SFTConfig(lr=2e-4),
    # Sharing a prefix does not pay for prompts of about 20 tokens.
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
# Options that may change when a run is continued: its length, what is kept, micro-batches, client.
MAY_CHANGE = {
    "cycles", "save_every", "keep_checkpoints", "dry_run", "show_batch", "wandb", "engine",
    "client", "sample_rows", "policy.micro_batch_tokens", "policy.head_tokens",
    "policy.gradient_checkpointing", "policy.shared_prefix", "policy.attn", "policy.compile",
}  # fmt: skip


def parse(args: list[str], description: str = "") -> Config:
    """Command line -> Config; `--preset` sets the defaults of the other options."""
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", choices=PRESETS, default="paper")
    default = PRESETS[preset_parser.parse_known_args(args)[0].preset]
    return tyro.cli(Config, default=default, args=args, description=description)


# --------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(CommonConfig):
    """Options that all cells of an evaluation have in common."""

    samples: Count = 1
    """Samples per prompt."""
    limit: CountOrZero = 0
    """Number of prompts of each benchmark, drawn by seed; 0: all."""
    training_run: str = ""
    """Folder of a run, such as runs/see. Its training prompts are left out, and the trivial
    predictors are fitted on the judgements of its first cycle."""
    drop_duplicates: bool = False
    """Leave out near duplicates of training prompts of --training_run and of few-shot examples;
    without this option they are only counted."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the sampling model's weights."""


@dataclass(frozen=True, kw_only=True)
class CellConfig(EvaluationSettings):
    """One model on one benchmark."""

    model: str  # Hugging Face folder, or a hub id
    data: str  # prompt file, or a hub id
    name: str  # its folder under results/

    @property
    def folder(self) -> CellFolder:
        return CellFolder(Path("results") / self.name)


STAGES = ("answers", "digits", "sensitivity", "judges", "preferences")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EvaluationSettings):
    """Evaluate models on benchmarks (Sec. 4)."""

    models: tuple[str, ...]
    """NAME=FOLDER each, or FOLDER alone: Hugging Face folders or hub ids of one architecture; the
    first is the base. A run's folder, such as see=runs/see, is its newest checkpoint; its earlier
    ones are evaluated too, as see_cycle_NN and in the stage answers alone, for Figure 2."""
    benchmarks: tuple[str, ...]
    """NAME=FILE each, or FILE alone: prompt files (for kinds see storage/data.py) or hub ids (see
    storage/hub.py); nvidia/HelpSteer2 is its validation split here."""
    name: str
    """Results go to results/NAME/BENCHMARK/MODEL."""
    judges: tuple[str, ...] = ()
    """Held-out judges (Sec. 4.5, Table 3), by name. Their settings are from the table in
    judging/endpoint.py; --endpoint.*, key and prices apply to --judge only."""
    repeat: CountOrZero = 0
    """Judgements per answer by the judge, to estimate the ceiling, on --repeat_answers answers of
    each cell; 0 or 1: no repeats."""
    repeat_answers: Count = 100
    """Number of answers of each cell that are judged repeatedly, drawn by seed."""
    stronger: tuple[str, ...] = ()
    """BENCHMARK=FILE each: a stronger model's answers (see storage/answers.py), judged
    once; the report routes a share of the prompts to this model (Sec. 5)."""
    primary: tuple[str, ...] = ()
    """BENCHMARK MODEL of the primary endpoint: calibration against three predictors that know less;
    none: the first benchmark and the last model. What is declared first stands; another choice
    later is shown as a second look."""
    margin: in_range(float, "(0, 1)") = 0.02
    """Loss of quality against the reference that still counts as none (non-inferiority); what is
    declared first stands."""
    stages: tuple[Literal[STAGES], ...] = STAGES
    """Stages to run; their order is fixed."""
    dry_run: bool = False
    """Print the judges' calls, tokens and cost by stage, judge and cell, and stop before a model is
    loaded or a judge is asked."""

    @property
    def folder(self) -> EvaluationFolder:
        return EvaluationFolder(Path("results") / self.name)

    def main_models(self) -> dict[str, str]:
        """Folder by name; of a run its newest checkpoint. Raises ValueError for a name that is
        given twice or is not valid as a folder name, and for a run without a checkpoint."""
        return {m: str(checkpoints(folder)[-1]) for m, folder in self._models().items()}

    def earlier_checkpoints(self) -> dict[str, tuple[str, str]]:
        """(name of the run's newest checkpoint, folder) by name."""
        return {
            f"{m}_{checkpoint.name}": (m, str(checkpoint))
            for m, folder in self._models().items()
            for checkpoint in map(Path, checkpoints(folder)[:-1])
        }

    def _models(self) -> dict[str, str]:
        return _named("models", self.models)

    def named_benchmarks(self) -> list[str]:
        return list(_named("benchmarks", self.benchmarks))

    def primary_endpoint(self) -> tuple[str, str]:
        """(benchmark, model). Raises ValueError if one of them is not evaluated."""
        benchmarks, models = self.named_benchmarks(), list(self._models())
        chosen = self.primary or (benchmarks[0], models[-1])
        if len(chosen) != 2 or chosen[0] not in benchmarks or chosen[1] not in models:
            raise ValueError(
                f"--primary {' '.join(chosen)}: say one of the benchmarks {', '.join(benchmarks)} "
                f"and one of the models {', '.join(models)}"
            )
        return chosen[0], chosen[1]

    def cells(self) -> dict[tuple[str, str], CellConfig]:
        """Cells by (model, benchmark), the earlier checkpoints last. Raises ValueError as
        main_models does, and for two models of one name."""
        models, earlier = self.main_models(), self.earlier_checkpoints()
        if twice := models.keys() & earlier.keys():
            raise ValueError(f"--models: {min(twice)} is a checkpoint of a run too; rename one")
        models |= {name: folder for name, (_, folder) in earlier.items()}
        files = _named("benchmarks", self.benchmarks)
        benchmarks = {b: hub.benchmark(file) for b, file in files.items()}
        shared = {f.name: getattr(self, f.name) for f in fields(EvaluationSettings)}
        return {
            (m, b): CellConfig(**shared, model=folder, data=file, name=f"{self.name}/{b}/{m}")
            for m, folder in models.items()
            for b, file in benchmarks.items()
        }


def checkpoints(folder: str) -> list[str]:
    """A run's checkpoints, oldest first; the name itself if it is no run's folder. Raises
    ValueError."""
    run = RunFolder(Path(folder))
    if not run.window_file.is_file():
        return [folder]
    if not (checkpoints := run.checkpoints()):
        raise ValueError(f"the run {folder} has no checkpoint yet; let it end a cycle")
    return list(map(str, checkpoints))


def _named(option: str, specs: tuple[str, ...]) -> dict[str, str]:
    """Path by name, from specs NAME=PATH or PATH; the name of the latter is the path's last part
    without extension."""
    pairs = []
    for spec in specs:
        name, equals, path = spec.partition("=")
        pairs.append((name, path) if equals else (Path(spec).name.split(".")[0], spec))
    names = [name for name, _ in pairs]
    bad = [n for n in names if names.count(n) > 1 or not re.fullmatch(r"[\w.+-]+", n)]
    if bad or not names:
        raise ValueError(
            f"--{option}: {bad[0] if bad else 'nothing'} is not a unique, valid folder name; give "
            "NAME=FOLDER or NAME=FILE with another name"
        )
    return dict(pairs)


# Options that may change when an evaluation is continued.
EVALUATION_MAY_CHANGE = {"sample_rows", "engine", "client"}
# Former names of evaluation options, in older configurations on disk -> present names.
RENAMED = {"window": "training_run"}
