"""One gradient, however it is split: .venv/bin/python -m pytest tests/test_ranks.py"""

import pytest
import torch
from conftest import ROOT, finish, start_ranks


def gradients(folder, tmp_path, ranks):
    out = tmp_path / f"{ranks}.pt"
    script = [str(ROOT / "tests" / "rank_gradients.py"), str(folder), str(out)]
    finish(start_ranks(ranks, script, ROOT, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"))
    return torch.load(out)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen3", False)])
def test_ranks_and_micro_batches_do_not_change_the_gradient(random_folder, tmp_path, kind, tied):
    folder = random_folder(kind, tied)
    one, two = (gradients(folder, tmp_path, ranks) for ranks in (1, 2))
    for figures in (one.pop("figures"), two.pop("figures")):
        for case, found in figures.items():
            assert found["score_entropy"] > 0.1 and found["logprob_gap"] > 0.1
            whole = figures[f"{case.split()[0]} 10000 False"]
            assert found == pytest.approx(whole, rel=1e-4, abs=1e-6), case
    assert one.keys() == two.keys() and len(one) == 18
    for case in one:
        # One rank, as few micro-batches as can be, padded rows.
        whole = one[f"{case.split()[0]} 10000 False"]
        for got in (one[case], two[case]):
            for name, want in whole.items():
                assert want.norm() > 0, (case, name)
                assert (got[name] - want).norm() / want.norm() < 1e-5, (case, name)
    # The two means are different objectives, and the test would see it.
    a, b = one["response 10000 False"], one["token 10000 False"]
    assert any((a[name] - b[name]).norm() / a[name].norm() > 1e-2 for name in a)
