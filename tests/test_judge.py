"""What is asked, what counts, and the way there: .venv/bin/python -m pytest tests/test_judge.py"""

import asyncio
import json

import pytest

import prompts
from client import ChatClient, ClientConfig, JudgeError, check_environment
from judge import HeuristicJudge, LLMJudge, parse_scores

TURNS = [{"role": "user", "content": "Why is the sky blue?"}]
GOOD = json.dumps(dict(zip(prompts.ATTRIBUTES, (8, 7, 6, 1, 0), strict=True)))
FAST = ClientConfig(backoff=0.01, backoff_max=0.02, tries=4)


def make(cache=None, config=FAST, concurrency=4):
    return LLMJudge(ChatClient("some-judge", config, concurrency, cache))


def score(judge, answer="Rayleigh scattering.", references=()):
    return asyncio.run(judge.score(TURNS, answer, references))


def test_only_five_integers_count():
    assert parse_scores(GOOD) == (8, 7, 6, 1, 0)
    assert parse_scores(json.dumps(dict(reversed(json.loads(GOOD).items())))) == (8, 7, 6, 1, 0)
    row = json.loads(GOOD)
    bad = [{**row, "helpfulness": x} for x in (10, -1, 8.0, "8", True, None)]
    bad += [{**row, "style": 3}, {k: row[k] for k in list(row)[:4]}, list(row.values())]
    for reply in [json.dumps(b) for b in bad] + [f"Here: {GOOD}", f"{GOOD}{GOOD}", "", "8 7 6 1 0"]:
        with pytest.raises(ValueError):
            parse_scores(reply)


def test_the_papers_prompts_are_asked_with_the_authors_settings(fake_judge):
    fake_judge.replies = [(200, {}, GOOD)]
    assert score(make(), references=[("It is.", (2, 0, 8, 0, 0))]) == (8, 7, 6, 1, 0)
    [body] = fake_judge.bodies
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == prompts.JUDGE_SYSTEM
    asked = body["messages"][1]["content"]
    assert "Rayleigh scattering." in asked and "It is." in asked and "SELF_EVAL" not in asked
    assert (body["model"], body["temperature"]) == ("some-judge", 0.1)
    assert body["max_completion_tokens"] == 128


def test_failed_tries_are_tried_again(fake_judge):
    fake_judge.replies = [(500, {}, {}), (429, {"retry-after": "0"}, {}), (200, {}, "I think 8."),
                          (200, {"finish": "length"}, GOOD[:20])]  # fmt: skip
    assert score(make(config=ClientConfig(backoff=0.01, tries=5))) == json_scores(fake_judge)
    assert len(fake_judge.bodies) == 5


def json_scores(fake):
    return tuple(json.loads(fake.score(fake.bodies[-1])).values())


def test_after_the_last_try_there_is_an_error_and_no_score(fake_judge):
    fake_judge.replies = [(200, {}, "")] * 9
    with pytest.raises(JudgeError, match="no usable reply in 4 tries"):
        score(make())
    assert len(fake_judge.bodies) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_no_retry_can_mend_is_asked_once_and_shows_no_key(fake_judge, status):
    said = {"error": {"message": "Incorrect API key provided: sk-secret-for-tests"}}
    fake_judge.replies = [(status, {}, said if status in (401, 403) else {"error": {}})]
    with pytest.raises(JudgeError, match=f"HTTP {status}") as caught:
        score(make())
    assert len(fake_judge.bodies) == 1 and "sk-secret" not in str(caught.value)


def test_nothing_is_asked_twice(fake_judge, tmp_path):
    cache = tmp_path / "judge_cache.jsonl"
    judge = make(cache)

    async def together():
        return await asyncio.gather(*(judge.score(TURNS, "Same.") for _ in range(5)))

    first = asyncio.run(together())
    assert len(set(first)) == 1 and len(fake_judge.bodies) == 1
    # A later process reads the cache; a torn last line costs its own reply only.
    with open(cache, "ab") as f:
        f.write(b'{"key": "abc')
    assert score(make(cache), "Same.") == first[0] and len(fake_judge.bodies) == 1
    score(make(cache), "Other.")
    assert len(fake_judge.bodies) == 2
    kept = cache.read_text()
    assert "sk-secret" not in kept and '"served_model": "served"' in kept


def test_requests_in_flight_are_bounded(fake_judge):
    fake_judge.delay = 0.03
    judge = make(concurrency=3)

    async def many():
        await asyncio.gather(*(judge.score(TURNS, f"Answer {k}.") for k in range(12)))

    asyncio.run(many())
    assert len(fake_judge.bodies) == 12 and fake_judge.most_in_flight == 3


def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        check_environment()


def heuristic(request, answer):
    turns = [{"role": "user", "content": request}]
    return asyncio.run(HeuristicJudge().score(turns, answer))


def test_the_heuristic_judge_reads_text_statistics():
    request = "Name three rivers in France and say where each of them ends."
    good = (
        "Three rivers in France: the Seine ends in the Channel, the Loire in the Atlantic, and "
        "the Rhone ends in the Mediterranean, after crossing much of the country."
    )
    plain = heuristic(request, good)
    assert heuristic(request, good) == plain and all(0 <= s <= 9 for s in plain)
    off_topic = heuristic(request, "Bread is made of flour, water, salt and yeast, then baked hot.")
    assert off_topic[0] < plain[0] and off_topic[1] < plain[1]
    stutter = heuristic(request, "the rivers in France " * 40)
    assert stutter[2] < plain[2]
    cut = heuristic(request, good[:-20])
    assert cut[2] < plain[2]
    assert heuristic(request, good * 8)[4] > plain[4] > heuristic(request, "The Seine.")[4]
    hard = heuristic(
        request, "Hydrographical considerations notwithstanding, Mediterranean basins."
    )
    assert hard[3] > plain[3]
