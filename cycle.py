"""The SEE cycle (Algorithm 1, Sec. 3.3): Calibration-Coupled RL, then Masked Judge Distillation.

The paper's run (needs CUDA), what it would do, its baseline, and a small run on CPU:

    torchrun --nproc_per_node 4 cycle.py --cycles 15
    torchrun --nproc_per_node 4 cycle.py --cycles 15 --dry_run
    torchrun --nproc_per_node 4 cycle.py --preset rlcr
    torchrun --nproc_per_node 2 cycle.py --preset small --model DIR --data FILE

The options are in config.py, the checks before a run in plan.py. The same command run again goes on
where a killed run stopped: weights come from `state/` (fp32 shards), and steps since then whose
rollouts are on file are trained again without sampling or judging.

Where the paper leaves a choice:
1. The KL reference is the policy at the start of the cycle, as in the authors' scripts, which start
   each phase afresh from the last checkpoint. `--reference base` keeps the base model instead.
2. Each phase starts with a fresh optimiser, as in the authors' scripts.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import torch

import grpo
import self_check
import sft_masked
from backend import footprint, parallel
from backend.launch import Watcher, refuse_restart
from backend.packing import Row, Work, share_out
from backend.policy import export, load_policy
from backend.sampler import choose_sampler, make_sampler
from buffer import in_buffer, select_stratified
from config import Config, parse
from evaluation.predictors import best_constant
from grpo import group_advantages, reference_logps, response_row, rewards_of, rl_step
from judge import make_judge, with_judge_url
from judging.client import Background, JudgeError
from plan import Setup, describe, prepare, resolve, step_batches
from prompts import Scores
from rollout import Collector, Sampled, rollout_means
from sft_masked import distillation_row, sft_step
from storage import model_card
from storage.data import Prompt
from storage.files import FileError, WriteError, append_line, read_json, write_text
from storage.logbook import Clock, coloured, open_folder, open_wandb
from storage.model_card import ModelCard
from storage.progress import progress
from storage.record import Rollout, read_rollouts


def main(config: Config | None = None, options: Sequence[str] = ()) -> None:
    """Run SEE. `config` None: from the command line, with a variant's `options` after it."""
    config = config or parse([*sys.argv[1:], *options], __doc__)
    first = parallel.rank() == 0
    try:
        refuse_restart()
        if config.self_check:
            return self_check.main(config)
        config = with_judge_url(dataclasses.replace(config, sampler=choose_sampler(config.sampler)))
        if config.dry_run:
            plan = describe(config, resolve(config))
            return print(plan) if first else None
        setup = prepare(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}" if first else 1) from None
    watcher = Watcher()
    with parallel.process_group(), parallel.alone_in(setup.folder.path):
        try:
            with closing(Run(config, setup)) as run:
                watcher.before_exit = run.stop
                run.train()
        except parallel.NonFiniteError as error:  # the same on all ranks
            raise SystemExit(f"error: {run.where}: {error}" if first else 1) from None
        except (JudgeError, WriteError, FileError) as error:
            raise SystemExit(f"error: {error}") from None


class Run:
    """A run in progress: models, sampler, judge, files."""

    def __init__(self, config: Config, setup: Setup):
        self.config, self.setup, self.folder = config, setup, setup.folder
        self.tokenizer = setup.inputs.tokenizer
        self.clock = Clock()
        self._open_folder()
        with self.clock("loading"):
            model = setup.inputs.model
            # The sampler first: vLLM measures free memory.
            self.sampler = make_sampler(config, model, self.tokenizer, config.policy.dtype)
            self.policy = load_policy(model, config.policy)
            self.reference = load_policy(model, config.policy, trainable=False)
        self.saver = parallel.Saver()
        self.names = {p: name for name, p in self.policy.named_parameters()}
        self.optimizer: torch.optim.AdamW | None = None  # of the phase in progress
        self.best_constant: Scores | None = None  # of the first cycle's judgements
        self.steps_done = 0  # RL steps of the cycle in progress that its state already holds
        self.on_file: dict[tuple, Rollout] = {}  # the cycle's rollouts of an earlier launch
        self.figures: dict[str, float | None] = {}  # of the step in progress, for metrics.jsonl
        self.to_show = False  # whether --show_batch has yet to print a row of this phase
        self.policy_is_reference = False  # in the step in progress
        self.logged = 0  # lines of metrics.jsonl
        self.where = "before the first step"  # the step in progress, for error messages
        ranks, rank, launch = parallel.world_size(), parallel.rank(), parallel.launch_id()
        self.collector = Collector(
            sampler=self.sampler,
            judge=make_judge(config, self.folder.judge_cache, ranks, rank, launch),
            tokenizer=self.tokenizer,
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

    def train(self) -> None:
        """Algorithm 1 (App. D). Lines 8-16 are rollout.Collector's, Eq. 1 is reward.reward."""
        for cycle in self.cycles():  # line 4
            # Lines 5-19. Phase 1: Calibration-Coupled RL
            for step, prompts in self.rl_steps(cycle):  # line 6
                sampled = self.sample(cycle, step, prompts)  # line 7
                work, ref_logps = self.reference_pass(sampled)  # for the KL, while the judge works
                rollouts = self.judged(sampled)  # lines 8-16: parsed, judged, rewarded
                advantages = group_advantages(rewards_of(rollouts), self.config.rollouts)  # (N,)
                self.rl_step(work, rollouts, advantages, ref_logps)  # line 19

            # Line 20. The buffer: the well-formed rollouts of this phase
            buffer = [r for r in self.rollouts_of(cycle) if in_buffer(r)]

            # Lines 21-25. Phase 2: Masked Judge Distillation (not with --no-distil)
            selected = self.select(buffer, cycle)  # line 23
            targets = [distillation_row(r, self.tokenizer) for r in selected]  # line 22
            for update in self.sft_updates(cycle, targets):  # line 24
                self.sft_step(update)
            self.end_cycle(cycle, buffered=len(buffer), selected=len(selected))

    # ----------------------------------------------------------------------------------------------
    # The steps of Algorithm 1 on this run's models and files, timed

    def sample(self, cycle: int, step: int, prompts: Sequence[Prompt]) -> Sampled:
        """This rank's rollouts by the policy as it is now; they are judged as they finish."""
        version = f"c{cycle}s{step - 1}"  # "c2s7" is cycle 2 after 7 RL steps
        with self.clock("hand_over"):
            self.sampler.load_weights(self.policy, version)
        path = self.folder.rollouts(cycle)
        sampled = self.collector.sample(cycle, step, prompts, self.on_file, path, version)
        self.sampler.sleep()
        return sampled

    def reference_pass(self, sampled: Sampled) -> tuple[Work, list[torch.Tensor]]:
        """This rank's micro-batches of the step, and the KL reference's log-probabilities in them.
        Needs no reward, so it runs while the judge's last scores are awaited."""
        with self.clock("waiting"):
            rows = [response_row(*pair) for pair in parallel.gather(sampled.responses)]
        self._show_first(rows)
        c = self.config
        with self.clock("reference"):
            groups = [i // c.rollouts for i in range(len(rows))]
            work = share_out(rows, groups, c.policy.micro_batch_tokens, c.policy.shared_prefix)
            return work, reference_logps(self.reference, work.batches, c.sampling.temperature)

    def judged(self, sampled: Sampled) -> list[Rollout]:
        """The rollouts of all ranks once they are judged and rewarded, groups contiguous."""
        mine = self.collector.wait_for_judge(sampled)
        self.figures |= rollout_means(mine, self.config.rollouts)
        with self.clock("waiting"):
            return parallel.gather(mine)

    def rl_step(
        self,
        work: Work,
        rollouts: Sequence[Rollout],
        advantages: torch.Tensor,
        ref_logps: Sequence[torch.Tensor],
    ) -> None:
        with self.clock("training"):
            self.figures |= rl_step(
                policy=self.policy,
                optimizer=self.optimizer,
                work=work,
                rollouts=rollouts,
                advantages=advantages,
                ref_logps=ref_logps,
                temperature=self.config.sampling.temperature,
                config=self.config.grpo,
            )
        self._alarms()

    def _alarms(self) -> None:
        """What a step's figures must be, whatever is learnt. A NaN is an alarm too."""
        gap, kl = self.figures["logprob_gap"], self.figures["kl"]
        if gap is not None and not gap <= grpo.GAP_ALARM:
            parallel.print0(
                f"alarm: sampler and trainer differ by {gap:.3f} nats a token; the sampler may "
                "have other weights than the policy"
            )
        limit = grpo.KL_ALARM[self.config.policy.dtype]
        if self.policy_is_reference and kl is not None and not kl <= limit:
            parallel.print0(
                f"alarm: the KL to the reference is {kl:.2g} nats a token, although policy and "
                f"reference have the same weights in this step (rounding makes {limit:g} at most); "
                "something random is active in training, or the two were loaded differently"
            )

    def rollouts_of(self, cycle: int) -> list[Rollout]:
        """All ranks' rollouts of a cycle, in the same order on every rank."""
        return sorted(read_rollouts(self.folder.rollouts(cycle)), key=lambda r: r.key)

    def select(self, buffer: Sequence[Rollout], cycle: int) -> list[Rollout]:
        if not self.config.distil:
            return []
        chosen = select_stratified(
            judge_scores=[r.judge_scores for r in buffer],
            prompt_ids=[r.prompt_id for r in buffer],
            max_samples=self.config.sft.max_samples,
            per_prompt_limit=self.config.sft.per_prompt_limit,
            seed=self.config.seed + cycle,
        )
        return [buffer[i] for i in chosen]

    def sft_step(self, update: sft_masked.Update) -> None:
        with self.clock("training"):
            self.figures |= sft_step(
                policy=self.policy,
                optimizer=self.optimizer,
                update=update,
                config=self.config.sft,
                batching=self.config.policy,
            )

    # ----------------------------------------------------------------------------------------------
    # The loops, from where a killed run stopped; after each turn its metrics and its state

    def cycles(self) -> Iterator[int]:
        first, self.steps_done, self.optimizer = self._resume()
        for cycle in range(first, self.config.cycles + 1):
            yield cycle
            self.steps_done = 0
        self._finish_saving()
        self._log(self.config.cycles, "end", 0, {})

    def rl_steps(self, cycle: int) -> Iterator[tuple[int, list[Prompt]]]:
        """(step, its prompts), from 1."""
        if self.steps_done == 0:
            if self.config.reference == "cycle":  # choice 1
                parallel.copy_shards(self.policy, self.reference)
            self.optimizer = grpo.make_optimizer(self.policy, self.config.grpo)  # choice 2
        self.on_file = {r.key: r for r in read_rollouts(self.folder.rollouts(cycle))}
        self.to_show = self.config.show_batch
        batches = step_batches(self.config, self.setup.window, cycle)
        steps = range(self.steps_done + 1, self.config.rl_steps + 1)
        for step in self._progress(steps, f"cycle {cycle}, RL"):
            self.figures, self.where = {}, f"cycle {cycle}, RL step {step}"
            first_of_all = cycle == 1 and step == 1
            self.policy_is_reference = (
                step == 1 if self.config.reference == "cycle" else first_of_all
            )
            yield step, batches[step - 1]
            own = self.collector.judge_costs() | self._hand_over_speed()
            self._log(cycle, "rl", step, self.figures | own)
            self.saver.join_failed()
            self._save_in_phase_1(cycle, step)

    def sft_updates(self, cycle: int, targets: Sequence[Row]) -> Iterator[sft_masked.Update]:
        self.to_show = self.config.show_batch
        self._show_first(targets)
        updates = sft_masked.updates(targets, self.config.sft, seed=self.config.seed + cycle)
        self.optimizer = sft_masked.make_optimizer(self.policy, self.config.sft)
        for number, update in enumerate(self._progress(updates, f"cycle {cycle}, SFT"), 1):
            self.figures = {"updates": len(updates)}
            self.where = f"cycle {cycle}, SFT update {number}"
            yield update
            self._log(cycle, "sft", number, self.figures)

    def end_cycle(self, cycle: int, buffered: int, selected: int) -> None:
        """Export, one line of means over the window, and the state that the next cycle needs."""
        self._finish_saving()
        self._export(cycle)
        lines = [m for m in self.folder.metrics() if (m["cycle"], m["phase"]) == (cycle, "rl")]
        means = {}
        for name in ("reward", "well_formed", "quality", "calibration", "mae"):
            values = [m[name] for m in lines if m[name] is not None]
            means[name] = sum(values) / len(values) if values else None
        shown = ", ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in means.items())
        if self.config.distil:
            shown += f"; {selected} of {buffered} rollouts distilled"
        parallel.print0(f"cycle {cycle}: {shown}")
        self._log(cycle, "cycle", 0, means | {"buffered": buffered, "selected": selected})
        self._save(cycle + 1, 0)

    def stop(self) -> None:
        """Before this process is ended from outside, which takes 20 s at most."""
        self.collector.stop(15.0)
        self.saver.wait(4.0)

    def close(self) -> None:
        self.saver.wait()
        self.sampler.close()
        if self.wandb:
            self.wandb.finish()
        if self.collector.judge.client is not None:
            self.collector.judge.client.close()

    # ----------------------------------------------------------------------------------------------
    # Progress, metrics

    def _progress(self, items: Sequence, label: str):
        return progress(items, desc=f"{label} ({self.config.name})", rank=parallel.rank())

    def _show_first(self, rows: Sequence[Row]) -> None:
        """--show_batch: the first row of a phase with its loss mask in colour."""
        if self.to_show and rows:
            parallel.print0(coloured(rows[0].ids, rows[0].mask, self.tokenizer))
            self.to_show = False

    def _hand_over_speed(self) -> dict[str, float]:
        gigabytes = footprint.itemsize(self.config.policy.dtype) * self.setup.size.parameters / 1e9
        return {"hand_over_s_per_gb": self.clock.spent["hand_over"] / gigabytes}

    def _log(self, cycle: int, phase: str, step: int, values: dict) -> None:
        steps = step if phase in ("rl", "setup") else self.config.rl_steps
        passes = ((cycle - 1) * self.config.rl_steps + steps) * self.config.batch
        line = {"cycle": cycle, "phase": phase, "step": step, "sample_passes": passes}
        line |= values | {"seconds": self.clock.lap()}
        if parallel.rank() == 0:
            append_line(self.folder.metrics_file, line)
        if self.wandb:
            # A step that is replayed after a kill has wandb's step already: it appears once.
            self.wandb.log(line, step=self.logged)
        self.logged += 1

    # ----------------------------------------------------------------------------------------------
    # Files: the run's folder, checkpoints, state, resume

    def _open_folder(self) -> None:
        self.wandb = None
        if parallel.rank() == 0:
            ranks = parallel.world_size()
            open_folder(self.folder, self.config, self.setup.inputs.model, ranks)
            if self.config.wandb:
                self.wandb = open_wandb(self.folder, self.config, ranks)
            self.folder.rollouts(1).parent.mkdir(exist_ok=True)
            write_text(self.folder.window_file, json.dumps([p.id for p in self.setup.window]))
            if too_long := self.setup.inputs.too_long:
                limit = self.config.prompt_tokens
                print(f"{too_long} prompts are over {limit} tokens and are left out")
        parallel.barrier()

    def _card(self, cycle: int, step: int | None) -> ModelCard:
        """What a checkpoint says about itself; the same on all ranks."""
        if cycle == 1 or self.best_constant is None:  # after it the first cycle stays as it is
            judged = [r.judge_scores for r in self.folder.first_cycle()]
            self.best_constant = best_constant(judged) if judged else None
        model, judge = self.setup.inputs.model, self.collector.judge
        place, window = (cycle, step), self.setup.window
        return model_card.of_run(
            self.config, model, place, judge, window, self.tokenizer, self.best_constant
        )

    def _save_in_phase_1(self, cycle: int, step: int) -> None:
        """At the phase's end without optimiser, because phase 2 starts with a fresh one."""
        every, last = self.config.save_every, step == self.config.rl_steps
        if last or (every and step % every == 0):
            self._finish_saving()
            if not last:
                self._export(cycle, step)
            self._save(cycle, step, None if last else self.optimizer)

    def _finish_saving(self) -> None:
        """Before the saver gets more, all that it has must be on file."""
        with self.clock("saving"):
            self.saver.join()

    def _export(self, cycle: int, step: int | None = None) -> None:
        """A checkpoint for use; the oldest beyond `keep_checkpoints` are deleted."""
        folder = self.folder.checkpoint(cycle, step)
        with self.clock("saving"):
            card = model_card.card_files(self._card(cycle, step))
            export(self.policy, self.setup.inputs.model, folder, card, self.saver)
        if keep := self.config.keep_checkpoints:
            delete = partial(self.folder.delete_checkpoints, keep)
            self.saver.start(partial(parallel.write_on_rank_0, folder.parent, delete))

    def _save(self, cycle: int, step: int, optimizer: torch.optim.AdamW | None = None) -> None:
        """State after `step` RL steps of `cycle`, with optimiser and KL reference in mid-phase."""
        folder = self.folder.state(cycle, step)
        where = {"cycle": cycle, "step": step, "mid_phase": optimizer is not None}
        with self.clock("saving"):
            parallel.save_state(folder, self._tensors(optimizer), where, self.saver)

    def _tensors(self, optimizer: torch.optim.AdamW | None) -> dict[str, torch.Tensor]:
        tensors = {name: p.detach() for p, name in self.names.items()}
        if optimizer is not None:
            reference = self.reference.named_parameters()
            tensors |= parallel.optimizer_tensors(optimizer, self.names)
            tensors |= {f"reference.{name}": p.detach() for name, p in reference}
        return tensors

    def _resume(self) -> tuple[int, int, torch.optim.AdamW | None]:
        """(cycle, its RL steps that are done, optimiser if in mid-phase) of the newest state."""
        states = parallel.states(self.folder.states)
        cycle, step, optimizer = 1, 0, None
        if states:
            where = read_json(states[-1] / "where.json")
            cycle, step = where["cycle"], where["step"]
            with self.clock("loading"):
                if where["mid_phase"]:
                    optimizer = grpo.make_optimizer(self.policy, self.config.grpo)
                parallel.load_state(states[-1], self._tensors(optimizer))
            parallel.print0(f"going on from {states[-1]}")
        if parallel.rank() == 0:
            self.folder.keep_metrics_until(cycle, step)
            self.logged = len(self.folder.metrics())
        self._log(cycle, "setup", step, {})
        return cycle, step, optimizer


if __name__ == "__main__":
    warnings.filterwarnings("once")
    main()
