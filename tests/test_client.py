"""The way to the judge, against a server that misbehaves: .venv/bin/python -m pytest
tests/test_client.py"""

import asyncio
import json
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from asking import FAST, LOOP, TURNS, make, score
from fake_judge import FAULTS, GOOD, Reply

import cycle
import evaluate
from config import EVALUATION_MAY_CHANGE, CellConfig, Config
from judge import make_judge, with_judge_url
from judging.client import JudgeError
from judging.endpoint import ClientConfig, Endpoint, Service, prices
from judging.errors import retry_after
from judging.ledger import cache_key, read_attempts, render_totals, totals
from judging.replay import Replay
from storage.logbook import check_same_config


def lines(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- requests


def test_the_authors_settings_and_a_schema_are_sent(fake_judge, tmp_path):
    score(make(tmp_path), "Scattering.")
    [body] = fake_judge.bodies
    messages, form = body.pop("messages"), body.pop("response_format")
    assert [m["role"] for m in messages] == ["system", "user"]
    assert body == {"model": "some-judge", "temperature": 0.1, "max_completion_tokens": 128}
    schema = form["json_schema"]["schema"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert schema["required"] == ["helpfulness", "correctness", "coherence", "complexity",
                                  "verbosity"]  # fmt: skip
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    assert schema["properties"] == dict.fromkeys(schema["required"], digit)
    assert schema["additionalProperties"] is False


def test_request_parameters_are_configuration(fake_judge, tmp_path):
    more = '{"reasoning_effort": "low", "top_p": 1, "seed": null}'
    endpoint = Endpoint("", None, 300, "max_tokens", "json", more)
    score(make(tmp_path, endpoint=endpoint), "Scattering.")
    body = fake_judge.bodies[0]
    del body["messages"]
    assert body == {"model": "some-judge", "max_tokens": 300, "reasoning_effort": "low",
                    "top_p": 1, "response_format": {"type": "json_object"}}  # fmt: skip


def test_the_table_knows_the_papers_judges(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, f"key of {name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    gpt, claude, gemini = (
        Service(name, Endpoint(), ClientConfig())
        for name in ("gpt-5.4-2026-03-05", "claude-sonnet-4-6", "gemini-3.1-flash-lite")
    )
    assert gpt.base_url == "http://localhost:1/v1" and gpt.key == "key of OPENAI_API_KEY"
    assert "anthropic.com" in claude.base_url and claude.key == "key of ANTHROPIC_API_KEY"
    assert (gpt.output, claude.output, gemini.output) == ("schema", "text", "schema")
    assert "googleapis.com" in gemini.base_url and gemini.key == "key of GEMINI_API_KEY"
    # 1,000 tokens in at 2.5 a million and 100 out at 15.
    assert gpt.cost(1000, 100) == pytest.approx(0.0025 + 0.0015)
    assert prices("gpt-5.4-mini", ClientConfig()) == (None, None)
    assert prices("gpt-5.4", ClientConfig(price_in=1.0)) == (1.0, 15.0)
    # The options win over the table; null takes a parameter of the table out.
    own = Endpoint(base_url="https://example.org/v1", output="text",
                   request='{"reasoning_effort": null}')  # fmt: skip
    moved = Service("gemini-3.1-flash-lite", own, ClientConfig(key_variable="OPENAI_API_KEY"))
    assert moved.base_url == "https://example.org/v1" and moved.key == "key of OPENAI_API_KEY"
    assert moved.request_parameters == {"reasoning_effort": None}
    assert gemini.request_parameters["reasoning_effort"] == "minimal"


BAD = {
    "no key": (Endpoint(), ClientConfig(key_variable="NOT_SET"), "set NOT_SET"),
    "the key itself": (Endpoint(), ClientConfig(key_variable="sk-secret-1"), "not the key itself"),
    "password": (Endpoint(base_url="https://u:sk-secret-1@x.org/v1"), FAST, "without user"),
    "query": (Endpoint(base_url="https://x.org/v1?key=sk-secret-1"), FAST, "without user"),
    "no url": (Endpoint(base_url="x.org/v1"), FAST, "http"),
    "no port": (Endpoint(base_url="http://x.org:http/v1"), FAST, "http"),
    "not JSON": (Endpoint(request="temperature=1"), FAST, "--endpoint.request takes a JSON object"),
    "not ours": (Endpoint(request='{"stream": true}'), FAST, "without model"),
    "no price": (Endpoint(), replace(FAST, max_cost=5.0), "--client.price_in"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_anything_is_asked(fake_judge, case):
    endpoint, config, said = BAD[case]
    with pytest.raises(ValueError, match=said) as caught:
        Service("some-judge", endpoint, config)
    assert "sk-secret" not in str(caught.value) and not fake_judge.bodies


def test_concurrency_is_shared_over_the_ranks(fake_judge, tmp_path):
    class Config:
        judge, endpoint, client = "some-judge", Endpoint(), replace(FAST, concurrency=7)

    path = tmp_path / "ledger.jsonl"
    shares = [make_judge(Config, path, 3, rank).client._slots._value for rank in range(3)]
    assert shares == [3, 2, 2]
    with pytest.raises(ValueError, match="at least one"):
        make_judge(Config, path, 8, 0)


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("outcome, reply", FAULTS)
def test_every_fault_is_a_failed_try_under_its_own_reason(fake_judge, tmp_path, outcome, reply):
    fake_judge.replies = [reply]
    [got] = score(make(tmp_path, replace(FAST, timeout=0.4)), "Scattering.")
    assert got == tuple(json.loads(fake_judge.judge(fake_judge.bodies[1])).values())
    failed, counted = lines(tmp_path)
    assert (failed["outcome"], counted["outcome"]) == (outcome, "ok")
    assert (failed["attempt"], counted["attempt"]) == (1, 2)
    assert failed["key"] == counted["key"] and counted["served_model"] == "served-2026"
    if reply.content and reply.finish == "stop" and not reply.trickle:
        assert failed["reply"] == reply.content and failed["tokens_in"] == 900


def test_after_the_last_try_there_is_an_error_and_no_score(fake_judge, tmp_path):
    fake_judge.replies = [Reply("")] * 9
    [error] = score(make(tmp_path), "Scattering.")
    assert isinstance(error, JudgeError) and "no usable reply in 4 attempts" in str(error)
    assert "empty reply" in str(error) and len(fake_judge.bodies) == 4
    assert [row.get("outcome") for row in lines(tmp_path)] == ["empty reply"] * 4 + [None]
    fake_judge.replies = []
    assert isinstance(score(make(tmp_path), "Scattering.")[0], tuple)  # a later start goes on


def test_a_key_that_is_a_word_is_taken_out_as_a_word(fake_judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "no")
    service = Service("some-judge", Endpoint(), FAST)
    assert service.without_key("no, not now: 'no'") == "[key], not now: '[key]'"


def test_retry_after_is_honoured_as_number_as_date_and_in_milliseconds(fake_judge, tmp_path):
    for headers in ({"retry-after": "0.5"}, {"retry-after-ms": "500", "retry-after": "3000"}):
        fake_judge.replies = [Reply(status=429, headers=headers)]
        began = time.monotonic()
        score(make(tmp_path), f"Scattering, {len(headers)}.")
        assert time.monotonic() - began >= 0.5  # the back-off alone is at most 0.01 s
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40))
    assert 35 < retry_after({"retry-after": date}) <= 40
    assert retry_after({"retry-after-ms": "soon", "retry-after": "7"}) == 7
    assert retry_after({"retry-after": "soon"}) == retry_after({}) == 0


def test_the_back_off_doubles_and_is_jittered(fake_judge, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "judging.client.random.uniform", lambda low, high: asked.append((low, high)) or 0
    )
    fake_judge.replies = [Reply(status=500)] * 7
    score(make(tmp_path, ClientConfig(backoff=2.0, backoff_max=20.0)), "Scattering.")
    assert asked == [(0, 2), (0, 4), (0, 8), (0, 16), (0, 20), (0, 20), (0, 20)]


def test_an_answer_has_a_deadline(fake_judge, tmp_path):
    fake_judge.replies = [Reply(status=503, headers={"retry-after": "3000"})]
    began = time.monotonic()
    [error] = score(make(tmp_path), "Scattering.")
    assert time.monotonic() - began < 60 and "1200 s (--client.deadline)" in str(error)
    assert len(fake_judge.bodies) == 1


# ---------------------------------------------------------------------------- limits, stops, money


def test_requests_in_flight_are_bounded(fake_judge, tmp_path):
    fake_judge.delay = 0.03
    score(make(tmp_path, concurrency=3), *(f"Answer {k}." for k in range(12)))
    assert len(fake_judge.bodies) == 12 and fake_judge.most_in_flight == 3


def test_the_first_final_failure_stops_the_rest_and_keeps_what_was_paid(fake_judge, tmp_path):
    """Of two ranks: one is refused; the other waits between tries, and has one request in flight,
    which is still waited for and kept."""
    patient = ClientConfig(backoff=600.0, backoff_max=600.0)
    fake_judge.replies = [
        Reply(status=500),  # other rank: now it pauses for up to ten minutes
        Reply(delay=1.0),  # other rank: in flight while the first one fails
        Reply(status=400, delay=0.5),
    ]
    one, other = (make(tmp_path, c, start=7) for c in (FAST, patient))
    unrelated = make(tmp_path, start=8)

    async def ranks():
        waiting = asyncio.create_task(other.score(TURNS, "Waits."))
        await asyncio.sleep(0.1)
        in_flight = asyncio.create_task(other.score(TURNS, "In flight."))
        await asyncio.sleep(0.1)
        refused = asyncio.create_task(one.score(TURNS, "Refused."))
        tasks = (waiting, in_flight, refused)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    # A request with a delay is answered as FakeJudge does with an empty reply: a failed try.
    waiting, in_flight, refused = LOOP.submit(ranks()).result()
    assert all(isinstance(e, JudgeError) for e in (waiting, in_flight, refused))
    assert str(waiting) == str(refused) and "HTTP 400" in str(refused)
    assert len(fake_judge.bodies) == 3  # nobody asked again
    outcomes = [row["outcome"] for row in lines(tmp_path) if "stop" not in row]
    assert outcomes == ["HTTP 500", "HTTP 400", "empty reply"]
    # Another start is not concerned.
    assert isinstance(score(unrelated, "Other.")[0], tuple)


def test_a_budget_of_calls_stops_all_starts_together(fake_judge, tmp_path):
    config = replace(FAST, max_calls=5)
    got = score(make(tmp_path, config, start=1), *(f"Answer {k}." for k in range(8)))
    assert len(fake_judge.bodies) == 5 and sum(isinstance(g, tuple) for g in got) == 5
    assert "5 calls is used up (--client.max_calls)" in str(got[-1])
    # What is known is still answered; what is new is not, until the budget is raised.
    again = make(tmp_path, config, start=2)
    assert score(again, "Answer 0.") == [got[0]] and len(fake_judge.bodies) == 5
    assert isinstance(score(again, "Answer 7.")[0], JudgeError) and len(fake_judge.bodies) == 5
    more = make(tmp_path, replace(config, max_calls=6), start=3)
    assert isinstance(score(more, "Answer 7.")[0], tuple) and len(fake_judge.bodies) == 6


def test_a_budget_of_dollars(fake_judge, tmp_path):
    # 900 tokens in and 40 out at 1,000 and 2,500 dollars a million: one dollar a call.
    config = replace(FAST, max_cost=3.0, price_in=1000.0, price_out=2500.0)
    judge = make(tmp_path, config, concurrency=1)
    got = score(judge, *(f"Answer {k}." for k in range(6)))
    assert len(fake_judge.bodies) == 3 and "$3.00 is used up" in str(got[-1])
    assert judge.client.take_counts() == {"calls": 3.0, "failed": 0.0, "cost": pytest.approx(3.0)}
    tries = list(read_attempts(tmp_path / "ledger.jsonl"))
    assert len(tries) == 3 and totals(tries)["cost"] == pytest.approx(3.0)


def test_dollars_cannot_be_counted_without_tokens(fake_judge, tmp_path):
    config = replace(FAST, max_cost=3.0, price_in=1.0, price_out=1.0)
    fake_judge.replies = [Reply(GOOD, usage=False)]
    [error] = score(make(tmp_path, config), "Scattering.")
    assert "reports no tokens" in str(error)
    assert lines(tmp_path)[0]["outcome"] == "ok"  # paid for, so kept


# ---------------------------------------------------------------------------------------- endpoint


def test_a_run_keeps_its_endpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def config(url, given="", **changes):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        return with_judge_url(
            CellConfig(model="m", data="d", name="x", endpoint=Endpoint(given), **changes)
        )

    def go_on(c):
        check_same_config(c.folder, c, EVALUATION_MAY_CHANGE)

    first = config("http://a/v1/")
    assert first.endpoint.base_url == "http://a/v1"
    first.folder.path.mkdir(parents=True)
    for recorded in ("http://a/v1", "http://a/v1/"):  # the second as older runs did
        stored = asdict(first) | {"endpoint": asdict(Endpoint(recorded))}
        first.folder.config_file.write_text(json.dumps(stored))
        go_on(config("http://a/v1"))
        go_on(config("http://b/v1", given="http://a/v1/"))
        with pytest.raises(ValueError, match="whose judge is at http://a/v1, not at http://b/v1; "):
            go_on(config("http://b/v1"))
        with pytest.raises(ValueError, match="differs in endpoint.base_url, judge"):
            go_on(config("http://b/v1", judge="another"))
    # An older run with a URL from the environment, which it did not record; an offline judge.
    first.folder.config_file.write_text(
        json.dumps(asdict(first) | {"endpoint": asdict(Endpoint())})
    )
    go_on(config("http://b/v1"))
    assert config("http://b/v1", judge="heuristic").endpoint == Endpoint()
    assert config("http://b/v1", judge="replay:f@m").endpoint == Endpoint()
    with pytest.raises(ValueError, match="without user") as caught:
        config("http://user:sk-secret@a/v1")
    assert "sk-secret" not in str(caught.value)


def test_both_commands_keep_the_url_that_they_begin_with(monkeypatch):
    """Each is shown to fill it in before it looks at the folder."""

    def look(config, *_):
        raise ValueError(f"at {config.endpoint.base_url}")

    monkeypatch.setenv("OPENAI_BASE_URL", "http://b/v1/")
    monkeypatch.setattr(cycle, "prepare", look)
    monkeypatch.setattr(evaluate, "check_judges", look)
    with pytest.raises(SystemExit, match="error: at http://b/v1$"):
        cycle.main(Config(judge="another", sampler="transformers"))
    arguments = "evaluate --models m --benchmarks b --name x --judge another --sampler transformers"
    monkeypatch.setattr("sys.argv", arguments.split())
    with pytest.raises(SystemExit, match="error: at http://b/v1$"):
        evaluate.main()


# ------------------------------------------------------------------------------------------- cache


def test_nothing_is_asked_twice(fake_judge, tmp_path):
    first = score(make(tmp_path), *["Same."] * 5)
    assert len(set(first)) == 1 and len(fake_judge.bodies) == 1
    # A later start reads the file; what a kill left of a line costs its own reply only.
    with open(tmp_path / "ledger.jsonl", "ab") as f:
        f.write(b'{"key": "abc')
    assert score(make(tmp_path), "Same.")[0] == first[0] and len(fake_judge.bodies) == 1
    with pytest.warns(UserWarning, match="cut short"):
        score(make(tmp_path), "Other.")
    assert len(fake_judge.bodies) == 2 and len(lines(tmp_path)) == 2
    kept = (tmp_path / "ledger.jsonl").read_text()
    assert "sk-secret" not in kept and "Why is the sky blue?" in kept


def test_the_key_is_everything_that_decides_the_reply(fake_judge, tmp_path):
    base = make(tmp_path)
    others = [
        make(tmp_path, model="another"),
        make(tmp_path, endpoint=Endpoint(temperature=0.2)),
        make(tmp_path, endpoint=Endpoint(max_tokens=99)),
        make(tmp_path, endpoint=Endpoint(output="json")),
        make(
            tmp_path, endpoint=Endpoint(base_url=fake_judge.url.replace("127.0.0.1", "localhost"))
        ),
    ]
    for judge in [base, *others]:
        score(judge, "Same.")
    LOOP.submit(base.score(TURNS, "Same.", draw=1)).result()
    LOOP.submit(base.score(TURNS, "Same.", references=[("Ref.", (1, 2, 3, 4, 5))])).result()
    assert len(fake_judge.bodies) == 8
    assert len({row["key"] for row in lines(tmp_path)}) == 8
    # What does not decide it: patience, concurrency, a slash at the URL's end.
    score(make(tmp_path, replace(FAST, attempts=9, timeout=5.0), concurrency=1), "Same.")
    score(make(tmp_path, endpoint=Endpoint(base_url=fake_judge.url + "/")), "Same.")
    assert len(fake_judge.bodies) == 8


def test_an_older_ledger_whose_url_ends_in_a_slash_is_still_paid_for(fake_judge, tmp_path):
    first = score(make(tmp_path), "Same.")
    [row] = lines(tmp_path)
    assert row["key"] == cache_key(fake_judge.url, row["request"], 0)
    older = fake_judge.url + "/"
    row |= {"endpoint": older, "key": cache_key(older, row["request"], 0)}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row) + "\n")
    assert score(make(tmp_path), "Same.") == first and len(fake_judge.bodies) == 1
    score(make(tmp_path), "Other.")
    tries = list(read_attempts(tmp_path / "ledger.jsonl"))
    assert render_totals(tries).count(" at http") == 1 and totals(tries)["judgements"] == 2
    assert Replay(tmp_path / "ledger.jsonl").endpoint == fake_judge.url
