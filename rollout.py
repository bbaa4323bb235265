"""Lines 7-18 of Algorithm 1: sample responses, judge the well-formed ones, reward all, keep every
one on file.

A rollout is judged when it finishes, while others are still being sampled. A malformed response
gets the penalty and is never sent to the judge. A judge that fails for good stops the run on all
ranks; no score is made up."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import buffer
import parallel
import reward
from buffer import Rollout
from client import Background, JudgeError
from data import Prompt, load_prompts
from hub import data_file, model_folder
from logbook import Clock
from policy import check_model_folder, load_tokenizer
from prompts import check_tokenizer, parse_self_eval, prompt_ids, score_positions, stray
from reward import RewardConfig
from sampler import Request, Sample, SamplingParams, longest_row, seed_of


class Inputs(NamedTuple):
    """What a command is given, read and checked before weights are loaded."""

    model: Path  # the model's local folder
    tokenizer: object
    prompts: list[Prompt]  # those within the prompt limit, in file order
    prompt_ids: dict[str, tuple[int, ...]]  # prompt id -> token ids of the whole policy prompt
    too_long: int  # prompts over the limit
    near_duplicates: int = 0  # evaluation only: nearly a training prompt or a few-shot example


def read_inputs(config) -> Inputs:
    """Check the model folder and its tokenizer, read and tokenise the prompts (`config` is cycle's
    or evaluate's). A hub model's weights are not fetched yet. Raises ValueError."""
    model = model_folder(config.model)
    check_model_folder(model, longest_row(config))
    prompts = load_prompts(data_file(config.data))
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer)
    ids = {
        p.id: prompt_ids(tokenizer, p.conversation, config.template, config.few_shot)
        for p in prompts
    }
    fitting = [p for p in prompts if len(ids[p.id]) <= config.prompt_tokens]
    return Inputs(model, tokenizer, fitting, ids, len(prompts) - len(fitting))


class Sampled(NamedTuple):
    """A step that is sampled and perhaps not yet judged; this rank's share."""

    keys: list[tuple]  # of the rollouts, groups contiguous
    responses: list[tuple[Sequence[int], Sequence[int]]]  # prompt ids and response ids, as keys
    on_file: dict[tuple, Rollout]
    judged: list[Future]  # of the others


@dataclass
class Collector:
    """Samples, judges and keeps; what stays the same over the steps of a run."""

    sampler: object  # see sampler.py for the interface
    judge: object  # see judge.py for the interface
    tokenizer: object
    prompts: Mapping[str, Prompt]  # by id
    prompt_ids: Mapping[str, tuple[int, ...]]  # token ids of the whole policy prompt, by id
    rollouts: int  # per prompt
    seed: int
    params: SamplingParams
    reward: RewardConfig
    use_references: bool
    background: Background
    clock: Clock

    def requests(self, cycle: int, step: int, batch: Sequence[Prompt]) -> list[Request]:
        """This rank's share of a step: whole groups, contiguous."""
        rank, ranks = parallel.rank(), parallel.world_size()
        mine = batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]
        one_seed = seed_of(self.seed, cycle, step, rank)
        return [
            Request(
                p.id,
                k,
                self.prompt_ids[p.id],
                seed_of(self.seed, cycle, step, p.id, k)
                if self.sampler.seed_per_rollout
                else one_seed,
            )
            for p in mine
            for k in range(self.rollouts)
        ]

    def collect(
        self,
        cycle: int,
        step: int,
        batch: Sequence[Prompt],
        on_file: Mapping[tuple, Rollout],
        path: Path,
        version: str,
    ) -> list[Rollout]:
        """This rank's rollouts of one step, groups contiguous: `sample`, then `judged`."""
        return self.judged(self.sample(cycle, step, batch, on_file, path, version))

    def sample(
        self,
        cycle: int,
        step: int,
        batch: Sequence[Prompt],
        on_file: Mapping[tuple, Rollout],
        path: Path,
        version: str,
    ) -> Sampled:
        """Sample this rank's share of a step with the weights `version`, each response on its way
        to the judge as soon as it is there; those on file are taken from there.

        A sampler with one seed per call samples an incomplete step anew (the same weights give the
        same responses, and the judge's cache the same scores); one with a seed per rollout samples
        what is missing. Collective at its end, where all ranks stop if the judge of one has failed.
        """
        requests = self.requests(cycle, step, batch)
        done = {key: r for key, r in on_file.items() if r.weight_version == version}
        keys = [(step, q.prompt_id, q.sample) for q in requests]
        missing = [q for q, key in zip(requests, keys, strict=True) if key not in done]
        if missing and not self.sampler.seed_per_rollout:
            missing = requests

        tokens = {key: r.response_ids for key, r in done.items()}
        judged: list[Future] = []
        failed = False
        bar = tqdm(
            total=len(missing),
            desc="rollouts",
            leave=False,
            disable=parallel.rank() != 0 or not missing,
        )
        with self.clock("sampling"), bar:
            for sample in self.sampler.sample(missing, self.params):
                if sample.weight_version != version:
                    raise RuntimeError(
                        f"the sampler has weights {sample.weight_version!r}, not {version!r}"
                    )
                q = sample.request
                tokens[step, q.prompt_id, q.sample] = sample.response_ids
                judged.append(
                    self.background.submit(self._judge_and_keep(sample, path, cycle, step))
                )
                bar.update()
                if failed := any(f.done() and f.exception() for f in judged):
                    break
        sampled = Sampled(keys, [], done, judged)
        with self.clock("waiting"):
            failed = parallel.all_max(float(failed))
        if failed:
            self.judged(sampled)  # raises
        responses = [(q.prompt_ids, tokens[key]) for q, key in zip(requests, keys, strict=True)]
        return sampled._replace(responses=responses)

    def judged(self, sampled: Sampled) -> list[Rollout]:
        """The rollouts with their scores and rewards, when the judge has given the last.
        Collective at its end."""
        done, error = dict(sampled.on_file), None
        try:
            with self.clock("judge_tail"):
                wait(sampled.judged)  # after a failure too: what is in flight is paid for, and kept
                for future in sampled.judged:
                    rollout = future.result()
                    done[rollout.key] = rollout
        except JudgeError as failure:
            error = failure
        with self.clock("waiting"):
            parallel.raise_together(error)
        return [done[key] for key in sampled.keys]

    def spent(self) -> dict[str, dict[str, float]]:
        """{"judge": calls, failed tries among them and US dollars of all ranks since the last
        time}; {} for an offline judge. Collective."""
        return {"judge": parallel.all_sum(self.judge.lap())} if hasattr(self.judge, "lap") else {}

    async def _judge_and_keep(self, sample: Sample, path: Path, cycle: int, step: int) -> Rollout:
        q = sample.request
        block = parse_self_eval(sample.text)  # line 8
        scores = None
        if block:
            prompt = self.prompts[q.prompt_id]
            references = prompt.references if self.use_references else ()
            scores = await self.judge.score(
                prompt.conversation, block.answer, references
            )  # line 12
        c = self.reward
        rollout = Rollout(
            cycle=cycle,
            step=step,
            prompt_id=q.prompt_id,
            sample=q.sample,
            seed=q.seed,
            prompt_ids=tuple(q.prompt_ids),
            response_ids=sample.response_ids,
            text=sample.text,
            finish_reason=sample.finish_reason,
            answer=block and block.answer,
            self_scores=block and block.scores,
            score_positions=score_positions(sample.response_ids, self.tokenizer) if block else None,
            judge_scores=scores,
            judge_model=self.judge.name if block else None,
            reward=reward.reward(
                block and block.scores, scores, c.w_quality, c.w_calibration, c.gamma, c.penalty
            ),
            quality=reward.quality(scores) if block else None,  # line 13
            calibration=reward.calibration(block.scores, scores, c.gamma)
            if block
            else None,  # lines 14-15
            weight_version=sample.weight_version,
            sampled_logp=sample.logp,
        )
        buffer.append(path, rollout)
        return rollout


def in_buffer(rollout: Rollout) -> bool:
    """Line 20: well-formed, judged, and each score digit a token of its own."""
    return rollout.judge_scores is not None and rollout.score_positions is not None


def figures(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Means over all ranks' rollouts of a step; those of scores over the well-formed ones.
    Collective.

    quality, calibration and mae are None where no rollout was well-formed.
    """
    valid = [r for r in rollouts if r.self_scores is not None]
    flaws = [stray(r.answer) for r in valid]
    total = parallel.all_sum(
        {
            "rollouts": len(rollouts),
            "valid": len(valid),
            "reward": sum(r.reward for r in rollouts),
            "truncated": sum(r.finish_reason == "length" for r in rollouts),
            "response_tokens": sum(len(r.response_ids) for r in rollouts),
            "quality": sum(r.quality for r in valid),
            "calibration": sum(r.calibration for r in valid),
            "mae": sum(reward.mean_absolute_error(r.self_scores, r.judge_scores) for r in valid),
            "shared_digits": sum(r.score_positions is None for r in valid),
            "open_fence": sum(f["open_fence"] for f in flaws),
            "stray_label": sum(f["stray_label"] for f in flaws),
        }
    )
    over_all = ("reward", "truncated", "response_tokens")
    means = {name: total[name] / total["rollouts"] for name in over_all}
    means["well_formed"] = total["valid"] / total["rollouts"]
    for name in ("quality", "calibration", "mae", "shared_digits", "open_fence", "stray_label"):
        means[name] = total[name] / total["valid"] if total["valid"] else None
    return means
