"""--policy.compile: .venv/bin/python -m pytest tests/test_compile.py"""

import pytest
import torch
from test_packing import responses
from torch._dynamo.utils import counters

from backend import parallel
from backend.packing import share_out
from backend.policy import PolicyConfig, check_compiler, load_policy


def test_compiled_layers_give_what_the_others_give(random_folder):
    """Log-probabilities, entropies and gradients, under FSDP and recomputation; packs of another
    length, with another number of rows, compile nothing again."""
    try:
        check_compiler(PolicyConfig(compile=True))
    except ValueError as error:
        pytest.skip(str(error))
    packs = [responses(9, (4, 9, 1)), responses(5, (6, 2, 3, 8)), responses(30, (6, 20))]
    found, graphs = {}, []
    for compiled in (False, True):
        config = PolicyConfig("float32", head_tokens=3, compile=compiled)
        policy = load_policy(random_folder("qwen3"), config)
        for k, rows in enumerate(packs):
            [batch] = share_out(rows, [0] * len(rows), 1000).batches
            got = policy(batch, 0.8)
            # Different weights at each place, of both signs, so that a mix-up would show.
            weight = torch.arange(got.logp.numel()).view_as(got.logp) - 8.5
            (weight * got.logp + (weight - 0.3) * got.entropy).sum().backward()
            gradients = [parallel.full_tensor(p.grad).clone() for p in policy.parameters()]
            found[compiled, k] = [got.logp.detach(), got.entropy.detach(), *gradients]
            policy.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] < graphs[3] == graphs[5]
    for k in range(len(packs)):
        for a, b in zip(found[True, k], found[False, k], strict=True):
            assert b.norm() > 0 and (a - b).norm() / b.norm() < 1e-5


def test_where_nothing_compiles_the_option_is_refused_in_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("\nno C++ compiler\nand a page of text")

    monkeypatch.setattr(torch, "compile", fail)
    check_compiler(PolicyConfig())
    with pytest.raises(ValueError, match=r"--policy.compile: .* \(no C\+\+ compiler\); install"):
        check_compiler(PolicyConfig(compile=True))
