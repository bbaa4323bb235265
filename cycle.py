"""The SEE cycle (Algorithm 1, Sec. 3.3): Calibration-Coupled RL, then Masked Judge Distillation.

The paper's run (needs CUDA), what it would do, its baseline, and a small run on CPU:

    torchrun --nproc_per_node 4 cycle.py --cycles 15
    torchrun --nproc_per_node 4 cycle.py --cycles 15 --dry_run
    torchrun --nproc_per_node 4 cycle.py --preset rlcr
    torchrun --nproc_per_node 2 cycle.py --preset small --model DIR --data FILE

The options stand in presets.py, the checks before a run in plan.py. The same command run again goes
on where a killed run stopped. Weights come from `state/` (fp32 shards); steps since then whose
rollouts are on file are trained again without sampling or judging.

Where the paper leaves a choice:
1. The KL reference is the policy at the start of the cycle, as in the authors' scripts, which start
   each phase afresh from the last checkpoint. `--reference base` keeps the base model instead.
2. Each phase starts with a fresh optimiser, as in the authors' scripts.
"""

import dataclasses
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

import buffer
import footprint
import parallel
from buffer import Rollout
from client import Background, JudgeError
from files import append_line, write_text
from grpo import make_optimizer, micro_batches, reference_logps, response_row, rl_step
from judge import make_judge
from ledger import LEDGER
from logbook import (
    Clock,
    checkpoints,
    coloured,
    open_folder,
    open_wandb,
    read_metrics,
    trim_metrics,
)
from packing import Row, Work
from plan import Setup, describe, look, prepare, step_batches
from policy import export, load_policy
from presets import Config, parse
from rollout import Collector, figures, in_buffer
from sampler import choose, make_sampler
from sft_masked import distil, distillation_row

# Not in the paper: nats per token; two bf16 forwards of the same weights differ by about 0.02.
GAP_ALARM = 0.1


def main(config: Config | None = None) -> None:
    """Run SEE. `config` None: from the command line."""
    config = config or parse(sys.argv[1:], __doc__)
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = dataclasses.replace(config, sampler=choose(config.sampler))
        if config.dry_run:
            plan = describe(config, look(config))
            return print(plan) if first else None
        setup = prepare(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}" if first else 1) from None
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
                config, setup.inputs.model, setup.inputs.tokenizer, config.policy.dtype
            )
            self.policy = load_policy(setup.inputs.model, config.policy)
            self.reference = load_policy(setup.inputs.model, config.policy, trainable=False)
        self.names = {p: name for name, p in self.policy.named_parameters()}
        self.collector = Collector(
            sampler=self.sampler,
            judge=make_judge(config, self.folder / LEDGER, *parallel.place()),
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
        if self.wandb:
            self.wandb.finish()

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
                sampled = self.collector.sample(  # lines 7-11
                    cycle, step, batches[step - 1], on_file, self._rollout_file(cycle), version
                )
                self.sampler.rest()
                work, ref_logps = self._reference_pass(sampled.responses, step == done + 1)
                rollouts = self.collector.judged(sampled)  # lines 12-18
                update = self._rl_step(optimizer, work, ref_logps, rollouts)  # lines 6, 19
                line = figures(rollouts) | update | self.collector.spent() | self._hand_over_speed()
                self._log(cycle, "rl", step, line)
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
        """A fresh optimiser; the KL reference becomes the policy as it is now (choice 1)."""
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

    def _hand_over_speed(self) -> dict[str, float]:
        gigabytes = footprint.itemsize(self.config.policy.dtype) * self.setup.size.parameters / 1e9
        return {"hand_over_s_per_gb": self.clock.spent["hand_over"] / gigabytes}

    def _reference_pass(self, responses: list[tuple], first: bool) -> tuple[Work, list]:
        """This rank's micro-batches of the step, and the KL reference's log-probabilities in them:
        needs no reward, so it runs while the judge's last scores are awaited."""
        with self.clock("waiting"):
            rows = [response_row(*pair) for pair in parallel.gather(responses)]
        if self.config.show_batch and first:
            self._show(rows[0])
        with self.clock("reference"):
            work = micro_batches(rows, self.config.rollouts, self.config.policy)
            temperature = self.config.sampling.temperature
            return work, reference_logps(self.reference, work.batches, temperature)

    def _rl_step(
        self, optimizer: torch.optim.AdamW, work: Work, ref_logps: list, rollouts: list[Rollout]
    ) -> dict:
        """`rollouts` are this rank's samples; what it trains on is shared out anew, by tokens."""
        with self.clock("waiting"):
            rollouts = parallel.gather(rollouts)
        with self.clock("training"):
            update = rl_step(
                self.policy,
                optimizer,
                work,
                ref_logps,
                rollouts,
                group_size=self.config.rollouts,
                temperature=self.config.sampling.temperature,
                config=self.config.grpo,
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
            self._export(f"cycle_{cycle:02d}_step_{step:05d}")
            self._save(cycle, step, optimizer)

    # Phase 2

    def _select(self, buffered: list[Rollout], cycle: int) -> list[Rollout]:
        chosen = buffer.select_stratified(
            [r.judge_scores for r in buffered],
            [r.prompt_id for r in buffered],
            self.config.sft.max_samples,
            self.config.sft.per_prompt_limit,
            seed=self.config.seed + cycle,
        )
        return [buffered[i] for i in chosen]

    def _distil(self, selected: list[Rollout], cycle: int) -> Iterator[dict]:
        tokenizer = self.setup.inputs.tokenizer
        if self.config.show_batch and selected:
            self._show(distillation_row(selected[0], tokenizer))
        updates = distil(
            self.policy,
            tokenizer,
            selected,
            self.config.sft,
            self.config.policy,
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
        self._export(f"cycle_{cycle:02d}")
        lines = [m for m in read_metrics(self.folder) if (m["cycle"], m["phase"]) == (cycle, "rl")]
        means = {}
        for name in ("reward", "well_formed", "quality", "calibration", "mae"):
            known = [m[name] for m in lines if m[name] is not None]
            means[name] = sum(known) / len(known) if known else None
        shown = ", ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in means.items())
        shown += f"; {selected} of {buffered} rollouts distilled" * self.config.distil
        parallel.print0(f"cycle {cycle}: {shown}")
        self._log(cycle, "cycle", 0, means | {"buffered": buffered, "selected": selected})
        self._save(cycle + 1, 0, None)

    def _export(self, name: str) -> None:
        """A checkpoint for use; the oldest beyond `keep_checkpoints` are deleted."""
        with self.clock("saving"):
            export(self.policy, self.setup.inputs.tokenizer, self.folder / "checkpoints" / name)
        if self.config.keep_checkpoints and parallel.rank() == 0:
            for old in checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)

    # Progress, log

    def _progress(self, items, label: str):
        return tqdm(items, desc=f"{label} ({self.config.name})", disable=parallel.rank() != 0)

    def _show(self, row: Row) -> None:
        """What the loss sees of a row."""
        parallel.print0(coloured(row.ids, row.mask, self.setup.inputs.tokenizer))

    def _log(self, cycle: int, phase: str, step: int, values: dict) -> None:
        steps = step if phase in ("rl", "setup") else self.config.rl_steps
        passes = ((cycle - 1) * self.config.rl_steps + steps) * self.config.batch
        line = {"cycle": cycle, "phase": phase, "step": step, "sample_passes": passes}
        line |= values | {"seconds": self.clock.lap()}
        if parallel.rank() == 0:
            append_line(self.folder / "metrics.jsonl", line)
        if self.wandb:
            self.wandb.log(line)

    # Files: the run's folder, state, resume

    def _rollout_file(self, cycle: int) -> Path:
        return self.folder / "rollouts" / f"cycle_{cycle:02d}.jsonl"

    def _open_folder(self) -> None:
        self.wandb = None
        if parallel.rank() == 0:
            open_folder(self.folder, self.config, self.setup.inputs.model)
            if self.config.wandb:
                self.wandb = open_wandb(self.folder, self.config)
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
