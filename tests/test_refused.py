"""Texts that the judge refuses for good, and replay: .venv/bin/python -m pytest
tests/test_refused.py"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from asking import FAST, LOOP, TURNS, attempts, make, score, score_in_turn
from fake_judge import GOOD, Reply

from judge import LLMJudge, make_judge
from judging.client import JudgeError, Refused
from judging.endpoint import ClientConfig, Endpoint
from judging.ledger import totals
from judging.replay import Replay

WORDS = "The prompt triggers a content policy"
FILTERED = {"error": {"message": WORDS, "param": "prompt", "code": "content_filter"}}
FILTER = Reply(status=400, body=json.dumps(FILTERED))
DECLINE = Reply("", refusal="I cannot judge this.")


def skip(n: int) -> ClientConfig:
    return replace(FAST, skip_refused=n)


def test_refused_texts_are_passed_over_up_to_the_number_allowed(fake_judge, tmp_path):
    """Each once, over all launches; none is asked again while some are allowed."""
    fake_judge.replies = [FILTER, Reply(), FILTER]
    one, two, three, four = score_in_turn(make(tmp_path, skip(1), start=1), "1", "2", "3", "4")
    assert type(one) is Refused and isinstance(two, tuple) and WORDS in str(one)
    assert type(three) is JudgeError and three.about_text
    assert "it is 1, and this is number 2" in str(three)
    assert str(four) == str(three) and not four.about_text  # stopped by another question
    assert [len(fake_judge.bodies), totals(attempts(tmp_path))["refused"]] == [3, 2]
    # The same command again; then more are allowed; then none, so that all are asked again.
    one, two, three = score_in_turn(make(tmp_path, skip(1), start=2), "1", "2", "3")
    assert type(one) is Refused and isinstance(two, tuple) and type(three) is JudgeError
    one, three, four = score_in_turn(make(tmp_path, skip(2), start=3), "1", "3", "4")
    assert type(one) is type(three) is Refused and isinstance(four, tuple)
    assert len(fake_judge.bodies) == 4
    assert isinstance(score(make(tmp_path, start=4), "1")[0], tuple) and len(fake_judge.bodies) == 5
    # What has a judgement now is not counted any more.
    assert type(score(make(tmp_path, skip(1), start=5), "3")[0]) is Refused
    assert totals(attempts(tmp_path))["refused"] == 1


def test_refused_texts_are_counted_by_judge_and_over_the_ranks(fake_judge, tmp_path):
    fake_judge.replies = [FILTER, FILTER, FILTER, Reply()]
    first, second = (make(tmp_path, skip(1), start=1) for _ in range(2))
    other = make(tmp_path, skip(1), start=1, model="another")
    assert type(score(first, "1")[0]) is Refused and type(score(other, "1")[0]) is Refused
    assert type(score(second, "1")[0]) is Refused and len(fake_judge.bodies) == 2
    assert type(score(second, "2")[0]) is JudgeError
    assert str(score(first, "3")[0]) == str(score(other, "3")[0])  # both stop
    assert len(fake_judge.bodies) == 3


DECLINED = {
    "each time": ([DECLINE] * 4, Refused),
    "filtered": ([Reply(GOOD, finish="content_filter")] * 4, Refused),
    "with a busy server": ([DECLINE, Reply(status=429), DECLINE, DECLINE], Refused),
    "with a reply that does not count": ([DECLINE, Reply("Eight."), DECLINE, DECLINE], JudgeError),
    "not the last time": ([DECLINE, DECLINE, Reply("Eight."), Reply(status=503)], JudgeError),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_a_judge_that_declines_in_every_reply_refuses_the_text(fake_judge, tmp_path, case):
    fake_judge.replies, kind = [*DECLINED[case][0]], DECLINED[case][1]
    [got] = score(make(tmp_path, skip(1)), "Scattering.")
    assert type(got) is kind and len(fake_judge.bodies) == 4
    assert ["refused" in row for row in attempts(tmp_path)] == [False] * 3 + [kind is Refused]
    if case == "each time":
        assert "refuses this text for good: refusal: I cannot judge this" in str(got)


def test_of_a_pair_the_other_order_is_waited_for(fake_judge, tmp_path):
    fake_judge.replies = [FILTER, Reply('{"better": "A"}', delay=0.2)]
    with pytest.raises(Refused):
        LOOP.submit(make(tmp_path, skip(1)).prefer(TURNS, "One.", "Two.")).result()
    assert [row["outcome"] for row in attempts(tmp_path)] == ["HTTP 400, content filter", "ok"]


def test_replay_knows_what_was_refused(fake_judge, tmp_path):
    fake_judge.replies = [FILTER, FILTER]
    score_in_turn(make(tmp_path, skip(2)), "1", "2", "3")
    path = tmp_path / "ledger.jsonl"
    one, two, three = score_in_turn(LLMJudge(Replay(path, skip_refused=1)), "1", "2", "3")
    assert type(one) is Refused and isinstance(three, tuple)
    assert type(two) is JudgeError and "Give --client.skip_refused as when" in str(two)


# ------------------------------------------------------------------------------------------ replay


def test_replay_answers_from_a_file_or_not_at_all(fake_judge, tmp_path):
    first = score(make(tmp_path), "Same.", "Other.")
    asked = len(fake_judge.bodies)
    path = tmp_path / "ledger.jsonl"
    replayed = LLMJudge(Replay(path))
    assert score(replayed, "Same.", "Other.") == first and replayed.name == "some-judge"
    [error] = score(replayed, "New.")
    assert isinstance(error, JudgeError) and "has no scores of some-judge" in str(error)
    assert len(fake_judge.bodies) == asked
    with pytest.raises(ValueError, match="no such file"):
        Replay(tmp_path / "none.jsonl")


def test_replay_needs_one_judge_and_says_how_to_name_it(fake_judge, tmp_path):
    """A judge at two URLs, another at one; the URL's last slash does not matter."""
    path, local = tmp_path / "ledger.jsonl", fake_judge.url.replace("127.0.0.1", "localhost")
    first = score(make(tmp_path), "Same.")
    score(make(tmp_path, model="@cf/another"), "Same.")
    for url in (local, local + "/"):
        score(make(tmp_path, endpoint=Endpoint(base_url=url)), "Same.", "Other.")

    def judge(name):
        config = SimpleNamespace(judge=f"replay:{path}{name}", client=FAST)
        return make_judge(config, tmp_path / "none.jsonl")

    ways = (f"@@cf/another, --judge replay:{path}@some-judge@{fake_judge.url}, "
            f"--judge replay:{path}@some-judge@{local}")  # fmt: skip
    for ambiguous in ("", "@some-judge", "@third"):
        with pytest.raises(ValueError) as caught:
            judge(ambiguous)
        assert str(caught.value).endswith(f"give one of: --judge replay:{path}{ways}")
    for name in (f"@some-judge@{fake_judge.url}", f"@some-judge@{fake_judge.url}/"):
        assert score(judge(name), "Same.") == first
        assert isinstance(score(judge(name), "Other.")[0], JudgeError)  # asked at the other URL
    assert isinstance(score(judge(f"@some-judge@{local}"), "Other.")[0], tuple)
    assert judge("@@cf/another").name == "@cf/another"
