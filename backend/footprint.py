"""Memory of one rank and disk of one run by formula, from a model's config.json alone.

An estimate on the low side: it leaves out what allocators and libraries take for themselves, for
which MARGIN is kept free. tests/test_footprint.py holds sum and parts against measured steps on
CPU; bench/memory.py prints it for a machine that need not be there. All figures are bytes unless
named otherwise.
"""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from backend.parallel import world_size
from backend.policy import HeadLogProbs, PolicyConfig, Size

GB = 1e9
# A measured step on CPU takes 1.05 to 1.2 times the sum of the parts.
MARGIN = 1.2


def training(config, m: Size, ranks: int) -> dict[str, float]:
    """Peak of a rank in a training step, sampler aside (`config` is cycle's)."""
    p: PolicyConfig = config.policy
    compute, kept = itemsize(p.dtype), itemsize(p.parameters)
    root = m.parameters - m.layers * m.per_layer  # embedding, norm and head
    tokens = max(p.micro_batch_tokens, config.longest_row)
    return {
        "parameters": kept * m.parameters / ranks,
        "gradients": kept * m.parameters / ranks,
        "AdamW": 2 * kept * m.parameters / ranks,
        "KL reference": compute * m.parameters / ranks,
        # The root's stay whole from forward to backward; of the layers two at a time.
        "gathered weights and gradients": (2 * compute + 4) * (root + 2 * m.per_layer),
        "activations": kept_per_token(p, m) * tokens,
        "attention masks": masks_per_token(config, m) * tokens,
        # One after the other: the head, then backward layer by layer.
        "head or layer at work": max(head(p, m, tokens), work_per_token(p, m) * tokens),
    }


def kept_per_token(p: PolicyConfig, m: Size) -> float:
    """For backward: every layer's activations, or the input of each where they are recomputed."""
    kept = 0 if p.gradient_checkpointing else m.layers * m.activations
    return itemsize(p.dtype) * (m.layers * m.hidden + kept)


def work_per_token(p: PolicyConfig, m: Size) -> float:
    """One layer in backward: about two layers' worth, the gradients of one and what its norms and
    activation compute, and its own where they are recomputed."""
    return itemsize(p.dtype) * (3 if p.gradient_checkpointing else 2) * m.activations


def masks_per_token(config, m: Size) -> float:
    """Of a pack (packing.attention_calls), at most: each token may see a whole row."""
    p: PolicyConfig = config.policy
    return p.shared_prefix * itemsize(p.dtype) * m.heads_per_key * config.longest_row


def head(p: PolicyConfig, m: Size, tokens: int) -> float:
    """Logits of a chunk, fp32 work on a block of it, and the head's gradient in fp32 where it is
    added up over chunks."""
    chunk = min(p.head_tokens, tokens)
    summed = 4 * m.vocabulary * m.hidden if tokens > p.head_tokens else 0
    return m.vocabulary * (itemsize(p.dtype) * chunk + 3 * 4 * HeadLogProbs.BLOCK) + summed


def tokens_that_fit(config, m: Size, ranks: int, free: float) -> int:
    """The largest micro-batch, in tokens, where `free` bytes are left for training, the margin
    among them."""
    p, by_tokens = config.policy, ("activations", "attention masks", "head or layer at work")
    fixed = sum(v for k, v in training(config, m, ranks).items() if k not in by_tokens)
    left = free / MARGIN - fixed
    kept = kept_per_token(p, m) + masks_per_token(config, m)
    at_head = (left - head(p, m, p.head_tokens + 1)) / kept  # whichever of the two is larger
    return max(0, math.floor(min(at_head, left / (kept + work_per_token(p, m)))))


class Machine(NamedTuple):
    memory: float  # of one rank: its GPU's, or its share of the computer's
    cuda: bool


def this_machine() -> Machine:
    if torch.cuda.is_available():
        return Machine(torch.cuda.get_device_properties(0).total_memory, True)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(total / int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), False)


def engine(config, m: Size, machine: Machine) -> float:
    """The sampler's part while the policy trains."""
    weights, e = itemsize(config.policy.dtype) * m.parameters, config.engine
    if config.sampler != "vllm":
        return weights
    if not machine.cuda:
        return weights + e.kv_cache_gb * 2**30
    return 0.0 if e.sleep else e.gpu_memory * machine.memory


def kv_tokens(config, m: Size, machine: Machine) -> int:
    """Tokens that vLLM's KV cache holds on one rank."""
    size, e = itemsize(config.policy.dtype), config.engine
    if machine.cuda:
        cache = e.gpu_memory * machine.memory - size * m.parameters
    else:
        cache = e.kv_cache_gb * 2**30
    return max(0, int(cache / (size * m.kv_per_token)))


def memory(config, m: Size, machine: Machine) -> dict[str, float]:
    """Peak of one rank of this launch, by part."""
    parts, sampler = training(config, m, world_size()), engine(config, m, machine)
    return {**parts, "margin": (MARGIN - 1) * sum(parts.values()), "sampler": sampler}


def disk(config, m: Size) -> dict[str, float]:
    """Size of the run's folder at its end, without responses and judgements (a few GB at most)."""
    checkpoints = config.cycles * (config.rl_steps // config.save_every if config.save_every else 1)
    trained = itemsize(config.policy.parameters)
    optimizer_and_reference = 2 * trained + itemsize(config.policy.dtype)
    state = trained + (optimizer_and_reference if config.save_every else 0)
    return {
        "checkpoints": 2 * m.parameters * min(checkpoints, config.keep_checkpoints or checkpoints),
        "state": 3 * state * m.parameters,  # the newest two and the one being written
    }


def disk_free(folder: Path) -> float:
    """Bytes that the folder may grow to: what is free on its disk, and what it holds already."""
    held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free + held


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
