"""Judgements on file: .venv/bin/python -m pytest tests/test_ledger.py"""

import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from fake_judge import FAULTS

from judging import ledger
from judging.ledger import Ledger, cache_key, read_attempts, totals
from storage.files import append_line, read_lines
from storage.run_folder import Folder

TRY = {"key": "k1", "model": "m", "served_model": "m-1", "endpoint": "http://x/v1", "draw": 0,
       "form": "scores", "attempt": 1, "outcome": "ok", "reply": "{}", "tokens_in": 900,
       "tokens_out": 40, "cost": 0.5, "seconds": 2.0, "request": {"messages": []}}  # fmt: skip


def test_a_kill_at_any_byte_costs_the_line_it_hit_and_nothing_else(tmp_path):
    path = Folder(tmp_path).judge_cache
    append_line(path, TRY | {"reply": "{} é\ud800"})
    before = path.read_bytes()
    append_line(path, TRY | {"key": "k2"})
    line = path.read_bytes()[len(before) :]
    for cut in range(len(line)):
        path.write_bytes(before + line[:cut])
        seen = Ledger(path)
        assert list(seen.replies) == ["k1"] and seen.calls == 1
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            seen.add(TRY | {"key": "k3"})
        assert [("cut short" in str(w.message)) for w in said] == ([True] if cut else [])
        assert list(seen.replies) == ["k1", "k3"] == list(Ledger(path).replies)
        assert path.read_bytes().startswith(before)


def test_a_broken_line_elsewhere_is_an_error_with_its_place(tmp_path):
    path = Folder(tmp_path).judge_cache
    for row in (TRY, TRY | {"key": "k2"}):
        append_line(path, row)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:30] + b"\n" + second)
    with pytest.raises(ValueError, match=f"{path}:1: not a judge record"):
        Ledger(path)


def test_what_other_ranks_add_is_seen_and_the_first_of_two_replies_counts(tmp_path):
    path = Folder(tmp_path).judge_cache
    one, other = Ledger(path, launch=1), Ledger(path, launch=1)
    one.add(TRY | {"reply": "first"})
    one.add(TRY | {"key": "k2", "outcome": "HTTP 500", "reply": None, "cost": None})
    other.add(TRY | {"reply": "second"})
    one.refresh()
    assert one.replies == other.replies == {"k1": "first"}
    assert one.calls == other.calls == 3 and one.cost == other.cost == 1.0
    other.give_up("no money")
    one.refresh()
    assert one.stop == "no money" and Ledger(Folder(tmp_path).judge_cache, launch=2).stop is None


def test_the_key_can_be_computed_again_from_the_line(tmp_path):
    request = {"model": "m", "messages": [{"role": "user", "content": "Hé?"}], "temperature": 0.1}
    key = cache_key("http://x/v1", request, 0)
    again = json.loads(json.dumps(dict(reversed(request.items()))))
    assert cache_key("http://x/v1", again, 0) == key != cache_key("http://x/v1", request, 1)
    assert key != cache_key("http://y/v1", request, 0)


def test_totals_by_hand():
    tries = [TRY | {"key": str(k), "seconds": float(k)} for k in range(101)]
    tries += [TRY | {"key": "7"}, TRY | {"outcome": "HTTP 429", "attempt": 3, "cost": None,
              "tokens_in": None, "tokens_out": None}]  # fmt: skip
    t = totals(tries)
    assert (t["calls"], t["judgements"], t["paid_twice"], t["most_attempts"]) == (103, 101, 1, 3)
    assert (t["tokens_in"], t["tokens_out"]) == (102 * 900, 102 * 40)
    assert (t["cost"], t["cost_unknown"], t["failed"]) == (51.0, 1, {"HTTP 429": 1})
    # 102 good ones: 0, 1, 2, 2, 3, ...: the median stands at place 50 or 51.
    assert t["seconds"][50] in (49.0, 50.0) and t["seconds"][100] == 100.0
    assert "103, 1 of them failed" in ledger.render_totals(tries)
    assert "no judgement" in ledger.render_totals([])


def start(folder: Path, url: str, answers: int, concurrency: int) -> list[subprocess.Popen]:
    env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-secret-for-tests",
           "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "judge_worker.py"), str(folder)]
    return [
        subprocess.Popen([*command, str(rank), "2", str(answers), str(concurrency), "0.5"], env=env,
                         stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]  # fmt: skip


def test_two_processes_killed_and_started_again_lose_double_and_invent_nothing(
    fake_judge, tmp_path
):
    """A fifth of the requests fails, in every way; kill -9 halfway; the same command again."""
    answers, concurrency = 200, 8
    seed = random.SystemRandom().randrange(10**6)
    rng, faults = random.Random(seed), [reply for _, reply in FAULTS]
    fake_judge.fault = lambda: rng.choice(faults) if rng.random() < 0.2 else None
    fake_judge.delay = 0.02
    processes = start(tmp_path, fake_judge.url, answers, concurrency)
    while len(fake_judge.answered) < answers / 2:
        time.sleep(0.01)
    for p in processes:
        p.kill()
        p.wait()
    assert [p.wait(120) for p in start(tmp_path, fake_judge.url, answers, concurrency)] == [0, 0]

    tries = list(read_attempts(Folder(tmp_path).judge_cache))
    good = [t for t in tries if t["outcome"] == "ok"]
    questions = [t["request"]["messages"][1]["content"] for t in good]
    assert len(good) == len(set(questions)) == answers, f"seed {seed}"  # none lost, none doubled
    for t, asked in zip(good, questions, strict=True):  # none invented
        assert t["reply"] == fake_judge.judge({"messages": [{"content": asked}]}), f"seed {seed}"
    scores = {}
    for rank in range(2):
        for _, _, row in read_lines(tmp_path / f"scores_{rank}.jsonl"):
            scores[row["answer"]] = row["scores"]
    by_answer = {q.partition("Answer ")[2].partition(".")[0]: t["reply"]
                 for q, t in zip(questions, good, strict=True)}  # fmt: skip
    assert {str(k): s for k, s in scores.items()} == {
        k: list(json.loads(reply).values()) for k, reply in by_answer.items()
    }, f"seed {seed}"
    twice = sum(n - 1 for n in Counter(fake_judge.answered).values())
    assert twice <= concurrency, f"seed {seed}: only what was in flight is paid again"
    assert {t["outcome"] for t in tries} <= {"ok"} | {reason for reason, _ in FAULTS}
