"""Lines 7-16 of Algorithm 1: sample responses, judge the well-formed ones, reward all, keep every
one on file.

A response is judged as soon as it is sampled, while others are still being sampled. A malformed
response gets the penalty and is never sent to the judge. A judge that fails after its last attempt
stops the run on all ranks; no score is made up. A response that the judge refuses, where
--client.skip_refused allows it, has neither scores nor a reward and is left out of every mean.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import reward
from backend import parallel
from backend.sampler import Request, Sample, SamplingParams, seed_of
from judging.client import Background, JudgeError, Refused
from prompts import parse_self_eval, score_positions, stray
from reward import RewardConfig
from storage.data import Prompt
from storage.files import WriteError
from storage.logbook import Clock
from storage.progress import progress
from storage.record import Rollout, append_rollout


class Sampled(NamedTuple):
    """This rank's share of a step: sampled, and perhaps not yet judged."""

    keys: list[tuple]  # of the rollouts, groups contiguous
    responses: list[tuple[Sequence[int], Sequence[int]]]  # prompt ids and response ids, as keys
    on_file: dict[tuple, Rollout]
    pending: list[Future]  # the others, on their way to the judge


@dataclass
class Collector:
    """Samples, judges and keeps; holds what stays the same over the steps of a run."""

    sampler: object  # see backend/sampler.py for the interface
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
    pending: list[Future] = field(default_factory=list)  # of the step in progress, at the judge

    def requests(self, cycle: int, step: int, batch: Sequence[Prompt]) -> list[Request]:
        """This rank's share of a step: whole groups, contiguous."""
        rank, ranks = parallel.rank(), parallel.world_size()
        mine = batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]
        one_seed = seed_of(self.seed, cycle, step, rank)

        def seed(prompt_id: str, k: int) -> int:
            if self.sampler.seed_per_rollout:
                return seed_of(self.seed, cycle, step, prompt_id, k)
            return one_seed

        return [
            Request(p.id, k, self.prompt_ids[p.id], seed(p.id, k))
            for p in mine
            for k in range(self.rollouts)
        ]

    def sample(
        self,
        cycle: int,
        step: int,
        batch: Sequence[Prompt],
        on_file: Mapping[tuple, Rollout],
        path: Path,
        weight_version: str,
    ) -> Sampled:
        """Sample this rank's share of a step, each response on its way to the judge as soon as it
        is finished (line 7). Rollouts of `weight_version` in `on_file` are taken from there, new
        ones are appended to `path`.

        A sampler with one seed per call samples an incomplete step anew: with as many ranks, the
        same weights give the same responses, and the judge's cache the same scores. One with a seed
        per rollout samples what is missing. Collective at its end, where all ranks stop if the
        judge of one has failed.
        """
        requests = self.requests(cycle, step, batch)
        finished = {key: r for key, r in on_file.items() if r.weight_version == weight_version}
        keys = [(step, q.prompt_id, q.sample) for q in requests]
        missing = [q for q, key in zip(requests, keys, strict=True) if key not in finished]
        if missing and not self.sampler.seed_per_rollout:
            missing = requests

        response_ids = {key: r.response_ids for key, r in finished.items()}
        self.pending = pending = []
        failed, began = False, time.monotonic()
        bar = progress(total=len(missing), desc="rollouts", leave=False, rank=parallel.rank())
        with self.clock("sampling"), bar:
            for sample in self.sampler.sample(missing, self.params):
                if sample.weight_version != weight_version:
                    raise RuntimeError(
                        f"the sampler has weights {sample.weight_version!r}, not {weight_version!r}"
                    )
                request = sample.request
                response_ids[step, request.prompt_id, request.sample] = sample.response_ids
                seconds = round(time.monotonic() - began, 3)
                work = self._judge_and_reward(sample, seconds, cycle, step, path)
                pending.append(self.background.submit(work))
                bar.update()
                if failed := any(f.done() and f.exception() for f in pending):
                    break
        sampled = Sampled(keys, [], finished, pending)
        with self.clock("waiting"):
            failed = parallel.all_max(float(failed))
        if failed:
            self.wait_for_judge(sampled)  # raises
        pairs = zip(requests, keys, strict=True)
        return sampled._replace(responses=[(q.prompt_ids, response_ids[key]) for q, key in pairs])

    def wait_for_judge(self, sampled: Sampled) -> list[Rollout]:
        """The step's rollouts once all are judged and rewarded, as `sampled.keys`. Collective at
        its end. Raises JudgeError or WriteError."""
        rollouts, error = dict(sampled.on_file), None
        try:
            with self.clock("judge_tail"):
                # After a failure too: requests in flight are paid for, and kept.
                wait(sampled.pending)
                for future in sampled.pending:
                    rollout = future.result()
                    rollouts[rollout.key] = rollout
        except (JudgeError, WriteError) as failure:
            error = failure
        with self.clock("waiting"):
            parallel.raise_together(error)
        return [rollouts[key] for key in sampled.keys]

    def stop(self, seconds: float = 15.0) -> None:
        """Before this process ends: ask the judge no more, and wait for requests in flight, which
        are paid for, until they are on file."""
        if self.judge.client is not None:
            self.judge.client.stop("the launch was ended from outside")
            wait(self.pending, timeout=seconds)

    def judge_costs(self) -> dict[str, dict[str, float]]:
        """{"judge": calls, failed attempts among them and US dollars of all ranks since the last
        time}; {} for an offline judge. Collective."""
        if self.judge.client is None:
            return {}
        return {"judge": parallel.all_sum(self.judge.client.take_counts())}

    async def _judge_and_reward(
        self, sample: Sample, seconds: float, cycle: int, step: int, path: Path
    ) -> Rollout:
        """Lines 8-16 for one response; the rollout is on file when this returns."""
        request, c = sample.request, self.reward
        block = parse_self_eval(sample.text)  # line 8
        answer = self_scores = positions = scores = None
        quality = calibration = total = refused = None
        if block is not None:  # line 9
            answer, self_scores = block
            positions = score_positions(sample.response_ids, self.tokenizer)
            prompt = self.prompts[request.prompt_id]
            references = prompt.references if self.use_references else ()
            try:
                scores = await self.judge.score(prompt.conversation, answer, references)  # line 12
            except Refused as error:
                refused = str(error)
            except JudgeError as error:
                raise error.named(f"prompt {prompt.id}, sample {request.sample}") from None
            else:
                quality = reward.quality(scores)  # line 13
                calibration = reward.calibration(self_scores, scores)  # lines 14-15
        if refused is None:
            total = reward.reward(  # lines 10 and 16, Eq. 1
                self_scores,
                scores,
                w_quality=c.w_quality,
                w_calibration=c.w_calibration,
                gamma=c.gamma,
                penalty=c.penalty,
            )
        rollout = Rollout(
            cycle=cycle,
            step=step,
            prompt_id=request.prompt_id,
            sample=request.sample,
            seed=request.seed,
            prompt_ids=tuple(request.prompt_ids),
            response_ids=sample.response_ids,
            text=sample.text,
            finish_reason=sample.finish_reason,
            answer=answer,
            self_scores=self_scores,
            score_positions=positions,
            judge_scores=scores,
            judge_model=self.judge.name if block else None,
            reward=total,
            quality=quality,
            calibration=calibration,
            weight_version=sample.weight_version,
            sampled_logp=sample.logp,
            sampled_after=seconds,
            refused=refused,
        )
        append_rollout(path, rollout)
        return rollout


def rollout_means(rollouts: Sequence[Rollout], group_size: int) -> dict[str, float | None]:
    """Means over all ranks' rollouts of a step (this rank's are whole groups, contiguous): that of
    the reward over those that have one, those of scores over the judged ones, and `not_judged`, the
    number that the judge refused. Collective.

    A mean over no rollout is None.
    """
    valid = [r for r in rollouts if r.self_scores is not None]
    judged = [r for r in valid if r.judge_scores is not None]
    rewards = [
        [r.reward for r in rollouts[i : i + group_size] if r.reward is not None]
        for i in range(0, len(rollouts), group_size)
    ]
    flaws = [stray(r.answer) for r in valid]
    total = parallel.all_sum(
        {
            "rollouts": len(rollouts),
            "valid": len(valid),
            "judged": len(judged),
            "rewarded": sum(map(len, rewards)),
            "reward": sum(map(sum, rewards)),
            "truncated": sum(r.finish_reason == "length" for r in rollouts),
            "response_tokens": sum(len(r.response_ids) for r in rollouts),
            "quality": sum(r.quality for r in judged),
            "calibration": sum(r.calibration for r in judged),
            "mae": sum(reward.mean_absolute_error(r.self_scores, r.judge_scores) for r in judged),
            "shared_digits": sum(r.score_positions is None for r in valid),
            "open_fence": sum(f["open_fence"] for f in flaws),
            "stray_label": sum(f["stray_label"] for f in flaws),
            "zero_variance_groups": sum(len(set(group)) <= 1 for group in rewards),
        }
    )

    def mean(name: str, among: str) -> float | None:
        return total[name] / total[among] if total[among] else None

    means = {name: mean(name, "rollouts") for name in ("truncated", "response_tokens")}
    means |= {name: mean(name, "judged") for name in ("quality", "calibration", "mae")}
    flaw_names = ("shared_digits", "open_fence", "stray_label")
    means |= {name: mean(name, "valid") for name in flaw_names}
    return means | {
        "reward": mean("reward", "rewarded"),
        "well_formed": mean("valid", "rollouts"),
        "not_judged": int(total["valid"] - total["judged"]),
        "zero_variance_groups": int(total["zero_variance_groups"]),
    }
