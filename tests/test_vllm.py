"""The vLLM engine (make vllm-cpu): .venv/bin/python -m pytest tests/test_vllm.py"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib import metadata
from urllib.request import urlopen

import pytest
import torch
from conftest import ROOT, finish, free_port, make_model, small_args, start_ranks
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import prompts
from grpo import GAP_ALARM
from judge import LLMJudge
from judging.client import Background, ChatClient, JudgeError
from judging.endpoint import ClientConfig, Endpoint, Service
from judging.ledger import Ledger, read_attempts
from storage.record import read_rollouts
from storage.run_folder import RunFolder

pytestmark = pytest.mark.skipif(
    not list(metadata.distributions(name="vllm-cpu")),
    reason="vLLM's CPU build is not installed: make vllm-cpu",
)


@pytest.mark.parametrize(
    ("kind", "tied", "ranks"),
    [
        ("llama", True, 1),
        ("llama", False, 2),
        ("qwen3", True, 2),
        ("qwen3", False, 1),
        ("mistral", False, 1),
        ("phi3", False, 1),
    ],  # fmt: skip
)
def test_the_engine_samples_with_the_policys_weights(tmp_path, random_folder, kind, tied, ranks):
    script = [str(ROOT / "tests" / "engine_rank.py"), str(random_folder(kind, tied))]
    path = f"{ROOT}:{ROOT / 'tests'}"
    finish(start_ranks(ranks, [*script, str(tmp_path / "said")], tmp_path, PYTHONPATH=path))
    said = [json.loads((tmp_path / f"said.{rank}.json").read_text()) for rank in range(ranks)]
    one = said[0]

    # Mean |engine - trainer| in nats a token, over all ranks; before the hand-over it is far off.
    assert one["stale_gap"] > GAP_ALARM
    for name in ("gap", "gap_1", "gap_2", "gap_3", "gap_after_close", "gap_after_sleep"):
        assert one[name] < 0.05, name

    # Ranks have work of their own, and seeds of their own; a seed gives the same rollout again.
    assert [len(s["texts"]) for s in said] == [9, 3][:ranks]
    long = [tuple(ids) for s in said for ids in s["texts"] if len(ids) > 5]
    assert len(set(long)) == len(long) > 5
    for s in said:
        assert s["again"] == s["texts"]
        assert not set(map(tuple, s["other_seed"])) & set(long)
        assert set(s["versions"]) == {"c1s0"}
        assert len(set(map(tuple, s["greedy"][:3]))) == 1  # temperature 0: one answer a prompt
    assert len({s["first_random"] for s in said}) == 1  # our seed, not the engine's by rank

    # Draws follow temperature, then top-k, then top-p of what is left; nothing less fits them.
    drawn = torch.tensor(one["drawn"]).bincount(minlength=len(one["logp"])) / len(one["drawn"])

    def distance(temperature=0.8, top_k=25, top_p=0.9) -> float:
        """Total variation between the draws and what these parameters would give."""
        scores = TemperatureLogitsWarper(temperature)(None, torch.tensor([one["logp"]]))
        kept = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        return (drawn - kept.softmax(-1)[0]).abs().sum().item() / 2

    assert distance() < 0.06
    for wrong in ({"temperature": 0.5}, {"top_k": 100}, {"top_p": 0.99}, {"top_p": 0.7}):
        assert distance(**wrong) > distance() + 0.03, wrong

    # Old weights are never sampled from in silence.
    assert one["stale_version"] == "a rollout of weights 'c1s3' was sampled with {'c1s2'}"
    assert one["unfinished"] == 0
    assert "prefix cache" in one["mid_sampling"]
    if tied:
        assert one["no_head"] == "policy and engine have different weights: lm_head.weight"
        assert one["no_head_gap"] > GAP_ALARM


def test_a_run_with_vllm_killed_and_continued(tmp_path, parrot_folder, prompt_file, fake_judge):
    """Two ranks in bf16: the gap stays small at every step, a kill costs no judgement twice but
    those in flight, and vLLM loads the exported checkpoint as it is."""
    fake_judge.delay = 0.05
    args = small_args(
        parrot_folder, prompt_file, judge="fake", sampler="vllm", **{
            "policy.dtype": "bfloat16", "client.concurrency": 4, "engine.kv_cache_gb": 0.1,
            "grpo.lr": 1e-4, "sft.lr": 1e-4,  # at 1e-3 the model forgets its block
        },
    )  # fmt: skip
    run = tmp_path / "runs" / "tiny"
    ranks = start_ranks(2, args, tmp_path)
    wait = random.SystemRandom().uniform(0, 4)
    while not list(run.glob("rollouts/*.jsonl")) and any(p.poll() is None for p in ranks):
        time.sleep(0.01)
    time.sleep(wait)
    killed = any(p.poll() is None for p in ranks)
    for p in ranks:
        p.kill()
        p.communicate()
    finish(start_ranks(2, args, tmp_path))

    twice = sum(n - 1 for n in Counter(fake_judge.answered).values())
    assert twice <= 4 * killed, f"killed {wait:.2f} s after the first rollout"
    steps = [m for m in RunFolder(run).metrics() if m["phase"] == "rl"]
    assert [(m["cycle"], m["step"]) for m in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for m in steps:
        assert m["logprob_gap"] < 0.05 and m["clip_fraction"] == 0
        assert m["well_formed"] > 0.5
    for cycle in (1, 2):
        rollouts = read_rollouts(run / "rollouts" / f"cycle_{cycle:02d}.jsonl")
        assert len(rollouts) == 2 * 4 * 4
        assert {(r.step, r.weight_version) for r in rollouts} == {
            (1, f"c{cycle}s0"), (2, f"c{cycle}s1")
        }  # fmt: skip
        assert len({r.seed for r in rollouts}) == len(rollouts)

    options = {
        "models": f"after={run / 'checkpoints' / 'cycle_02'}", "benchmarks": f"own={prompt_file}",
        "name": "x",
        "judge": "heuristic", "sampler": "vllm", "samples": 2, "template": "short",
        "sampling.max_tokens": 120, "prompt_tokens": 700, "engine.kv_cache_gb": 0.1,
    }  # fmt: skip
    evaluate = [word for k, v in options.items() for word in (f"--{k}", str(v))]
    finish(start_ranks(2, [str(ROOT / "evaluate.py"), *evaluate], tmp_path))
    summary = json.loads(
        (tmp_path / "results" / "x" / "own" / "after" / "summary.json").read_text()
    )
    assert summary["metrics"]["well_formed"]["n"] == 12 * 2
    assert summary["metrics"]["well_formed"]["mean"] > 0.5


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture
def judge_server(tmp_path, tokenizer):
    """The URL of vLLM's own OpenAI-compatible server, with a random model that reads 4,096
    tokens."""
    folder = tmp_path / "judge"
    model = make_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat.jinja").write_text(CHAT)
    port = free_port()
    options = {
        "model": folder, "served-model-name": "local-judge", "chat-template": folder / "chat.jinja",
        "host": "127.0.0.1", "port": port, "dtype": "bfloat16", "max-model-len": 4096,
        "kv-cache-memory-bytes": 2**26, "max-num-seqs": 8, "generation-config": "vllm",
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }  # fmt: skip
    words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1"}
    log = open(tmp_path / "server.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *words],
        env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def test_a_local_vllm_server_as_judge(tmp_path, monkeypatch, judge_server):
    """A random model, held to the schema, gives five integers 0-9 and a preference; what the server
    refuses is said with the field to change."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    loop, turns = Background(), [{"role": "user", "content": "Why is the sky blue?"}]

    def judge(**options):
        service = Service(
            "local-judge", Endpoint(judge_server, **options), ClientConfig(attempts=2)
        )
        return LLMJudge(ChatClient(service, 4, Ledger(tmp_path / "ledger.jsonl")))

    async def ask(j):
        works = [j.score(turns, f"Answer {k}.", draw=k) for k in range(6)]
        works += [j.prefer(turns, "One.", "Two.")]
        return await asyncio.gather(*works)

    *scores, preference = loop.submit(ask(judge(temperature=1.0))).result()
    assert all(prompts.valid_scores(s) for s in scores) and len(set(scores)) > 1
    assert {*preference} <= {-1, 0, 1}
    tries = list(read_attempts(tmp_path / "ledger.jsonl"))
    assert {t["outcome"] for t in tries} == {"ok"} and len(tries) == 8
    assert all(t["served_model"] == "local-judge" and t["tokens_in"] > 100 for t in tries)

    for refused, said in {
        judge(max_tokens=10_000): "change --endpoint.token_limit or --endpoint.max_tokens",
        judge(request='{"top_p": 7}'): "refuses the parameter top_p .*change --endpoint.request",
    }.items():
        with pytest.raises(JudgeError, match=f"HTTP 400: .*{said}"):
            loop.submit(refused.score(turns, "Answer.")).result()
    with pytest.raises(JudgeError, match="cut at the token limit; raise --endpoint.max_tokens"):
        loop.submit(judge(max_tokens=5).score(turns, "Answer.")).result()
