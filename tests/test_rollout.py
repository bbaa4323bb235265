"""Sample, judge, keep: .venv/bin/python -m pytest tests/test_rollout.py"""

import asyncio
import threading

import pytest
from conftest import make_rollout

import prompts
from backend.sampler import Sample, SamplingParams
from buffer import in_buffer
from judging.client import Background, JudgeError, Refused
from reward import RewardConfig
from rollout import Collector, rollout_means
from storage.data import Prompt
from storage.logbook import Clock
from storage.record import read_rollouts

PROMPTS = [Prompt(f"p{k}", ({"role": "user", "content": f"Question {k}?"},)) for k in range(2)]
GOOD = prompts.render_response("It is fine.", (8, 8, 8, 1, 1))
JUDGED = (6, 3, 9, 2, 4)


class FakeSampler:
    """Yields a given text per rollout; `before` is called with its number before each."""

    weight_version = "c1s0"

    def __init__(self, tokenizer, texts, seed_per_rollout=False, before=lambda k: None):
        self.tokenizer, self.texts, self.before = tokenizer, texts, before
        self.seed_per_rollout = seed_per_rollout
        self.asked = []

    def sample(self, requests, params):
        self.asked.append([(q.prompt_id, q.sample) for q in requests])
        for k, q in enumerate(requests):
            self.before(k)
            text = self.texts[(q.prompt_id, q.sample)]
            ids = tuple(self.tokenizer.encode(text))
            yield Sample(q, ids, text, "stop", (-1.0,) * len(ids), self.weight_version)


class FakeJudge:
    name = "fake"

    def __init__(self, scores=lambda answer: JUDGED):
        self.scores, self.seen, self.first = scores, [], threading.Event()

    async def score(self, conversation, answer, references=()):
        self.seen.append(answer)
        self.first.set()
        return self.scores(answer)


def make(tokenizer, sampler, judge):
    return Collector(
        sampler=sampler, judge=judge, tokenizer=tokenizer, prompts={p.id: p for p in PROMPTS},
        prompt_ids={p.id: (5, 6, 7) for p in PROMPTS}, rollouts=2, seed=1,
        params=SamplingParams(), reward=RewardConfig(), use_references=True,
        background=Background(), clock=Clock(),
    )  # fmt: skip


def collect(collector, *step) -> list:
    """Sample a step and wait for the judge."""
    return collector.wait_for_judge(collector.sample(*step))


KEYS = [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]


def test_well_formed_rollouts_are_judged_and_malformed_ones_are_not(tokenizer, tmp_path):
    texts = dict.fromkeys(KEYS, GOOD) | {("p0", 1): "It is fine."}
    sampler, judge = FakeSampler(tokenizer, texts), FakeJudge()
    path = tmp_path / "r.jsonl"
    got = collect(make(tokenizer, sampler, judge), 1, 1, PROMPTS, {}, path, "c1s0")
    assert [(r.prompt_id, r.sample) for r in got] == KEYS  # groups contiguous
    assert judge.seen == ["It is fine."] * 3  # the answer without its block
    assert got[1].reward == -1 and got[1].judge_scores is None and got[1].quality is None
    # Errors 2, 5, 1, 1, 3: MAE 12/5.
    calibration = (1 - 12 / 45) ** 2
    assert got[0].calibration == pytest.approx(calibration)
    assert got[0].reward == pytest.approx(0.7 * 18 / 27 + 0.3 * calibration)
    assert [in_buffer(r) for r in got] == [True, False, True, True]
    assert sorted(read_rollouts(path), key=lambda r: (r.prompt_id, r.sample)) == got

    means = rollout_means(got, group_size=2)
    assert means["well_formed"] == 0.75 and means["quality"] == pytest.approx(2 / 3)
    assert means["reward"] == pytest.approx((3 * got[0].reward - 1) / 4)
    assert means["mae"] == pytest.approx(2.4) and means["truncated"] == 0
    nothing = rollout_means([got[1]], group_size=2)
    assert nothing["well_formed"] == 0 and nothing["quality"] is None is nothing["calibration"]


def test_judging_overlaps_sampling(tokenizer, tmp_path):
    judge = FakeJudge()

    def wait_for_the_judge(k):
        # The second rollout is sampled only once the first is with the judge.
        assert k == 0 or judge.first.wait(10)

    sampler = FakeSampler(tokenizer, dict.fromkeys(KEYS, GOOD), before=wait_for_the_judge)
    assert (
        len(collect(make(tokenizer, sampler, judge), 1, 1, PROMPTS, {}, tmp_path / "r", "c1s0"))
        == 4
    )


def test_the_responses_are_there_while_the_judge_is_still_at_work(tokenizer, tmp_path):
    """So that the reference pass, which needs no score, can fill the wait."""

    class SlowJudge(FakeJudge):
        async def score(self, conversation, answer, references=()):
            await asyncio.to_thread(self.first.wait, 10)
            return JUDGED

    judge = SlowJudge()
    collector = make(tokenizer, FakeSampler(tokenizer, dict.fromkeys(KEYS, GOOD)), judge)
    sampled = collector.sample(1, 1, PROMPTS, {}, tmp_path / "r", "c1s0")
    assert sampled.responses == [((5, 6, 7), tuple(tokenizer.encode(GOOD)))] * 4
    assert not any(f.done() for f in sampled.pending) and sampled.keys[1] == (1, "p0", 1)
    judge.first.set()
    assert [r.key for r in collector.wait_for_judge(sampled)] == sampled.keys


@pytest.mark.parametrize("seed_per_rollout", [False, True])
def test_what_is_on_file_is_not_sampled_again(tokenizer, tmp_path, seed_per_rollout):
    texts = dict.fromkeys(KEYS, GOOD)
    path = tmp_path / "r.jsonl"
    first = make(tokenizer, FakeSampler(tokenizer, texts), FakeJudge())
    got = collect(first, 1, 1, PROMPTS, {}, path, "c1s0")
    on_file = {r.key: r for r in got}

    sampler, judge = FakeSampler(tokenizer, texts, seed_per_rollout), FakeJudge()
    collector = make(tokenizer, sampler, judge)
    assert collect(collector, 1, 1, PROMPTS, on_file, path, "c1s0") == got
    assert sampler.asked == [[]] and judge.seen == []

    # An incomplete step: one seed for all samples all anew, a seed each only what is missing.
    del on_file[1, "p1", 0]
    collect(collector, 1, 1, PROMPTS, on_file, path, "c1s0")
    assert sampler.asked[-1] == ([("p1", 0)] if seed_per_rollout else KEYS)
    # Rollouts of other weights do not count.
    sampler.weight_version = "c1s1"
    collect(collector, 1, 1, PROMPTS, {r.key: r for r in got}, path, "c1s1")
    assert sampler.asked[-1] == KEYS


def test_a_sampler_with_older_weights_is_an_error(tokenizer, tmp_path):
    sampler = FakeSampler(tokenizer, dict.fromkeys(KEYS, GOOD))
    with pytest.raises(RuntimeError, match="weights 'c1s0', not 'c1s1'"):
        collect(make(tokenizer, sampler, FakeJudge()), 1, 2, PROMPTS, {}, tmp_path / "r", "c1s1")


def test_seeds_are_one_per_call_or_one_per_rollout(tokenizer):
    one = make(tokenizer, FakeSampler(tokenizer, {}), None)
    each = make(tokenizer, FakeSampler(tokenizer, {}, seed_per_rollout=True), None)
    assert len({q.seed for q in one.requests(1, 1, PROMPTS)}) == 1
    assert len({q.seed for q in each.requests(1, 1, PROMPTS)}) == 4
    assert one.requests(1, 1, PROMPTS) != one.requests(1, 2, PROMPTS)


def test_a_judge_that_fails_for_good_stops_the_step_and_keeps_the_rest(tokenizer, tmp_path):
    def scores(answer):
        if answer == "Bad.":
            raise JudgeError("judge x: out of money")
        return JUDGED

    texts = dict.fromkeys(KEYS, GOOD) | {("p1", 1): prompts.render_response("Bad.", (1,) * 5)}
    path = tmp_path / "r.jsonl"
    with pytest.raises(JudgeError, match="out of money"):
        collect(
            make(tokenizer, FakeSampler(tokenizer, texts), FakeJudge(scores)),
            1,
            1,
            PROMPTS,
            {},
            path,
            "c1s0",
        )
    kept = read_rollouts(path)
    assert len(kept) == 3 and all(r.judge_scores == JUDGED for r in kept)


def test_an_answer_that_the_judge_refuses_has_no_reward_and_is_in_no_mean(tokenizer, tmp_path):
    def scores(answer):
        if answer == "Bad.":
            raise Refused("content filter")
        return JUDGED

    texts = dict.fromkeys(KEYS, GOOD) | {("p1", 1): prompts.render_response("Bad.", (1,) * 5)}
    path = tmp_path / "r.jsonl"
    collector = make(tokenizer, FakeSampler(tokenizer, texts), FakeJudge(scores))
    got = collect(collector, 1, 1, PROMPTS, {}, path, "c1s0")
    refused = got[3]
    assert refused.refused == "content filter" and refused.self_scores == (1,) * 5
    assert refused.reward is refused.quality is refused.calibration is refused.judge_scores is None
    assert not in_buffer(refused) and refused in read_rollouts(path)
    means, others = rollout_means(got, group_size=2), rollout_means(got[:3], group_size=2)
    assert means["not_judged"] == 1 and others["not_judged"] == 0
    assert means["well_formed"] == 1 and means["zero_variance_groups"] == 2
    for name in ("reward", "quality", "calibration", "mae"):
        assert means[name] == others[name] is not None
    assert rollout_means([refused], group_size=2)["reward"] is None


def test_an_error_about_an_answer_names_it(tokenizer, tmp_path):
    def stops_at_bad(about_text):
        def scores(answer):
            if answer == "Bad.":
                raise JudgeError("refused for good", about_text)
            return JUDGED

        return FakeJudge(scores)

    texts = dict.fromkeys(KEYS, GOOD) | {("p1", 1): prompts.render_response("Bad.", (1,) * 5)}
    for about_text, says in (
        (True, "^prompt p1, sample 1: refused"),
        (False, "^refused for good$"),
    ):
        collector = make(tokenizer, FakeSampler(tokenizer, texts), stops_at_bad(about_text))
        with pytest.raises(JudgeError, match=says):
            collect(collector, 1, 1, PROMPTS, {}, tmp_path / f"{about_text}.jsonl", "c1s0")


def test_shared_digits_are_rewarded_and_kept_out_of_the_buffer(tokenizer):
    rollout = make_rollout(tokenizer, score_positions=None)
    assert not in_buffer(rollout) and rollout_means([rollout], group_size=2)["shared_digits"] == 1
