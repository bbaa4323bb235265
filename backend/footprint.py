"""Memory of one rank and disk of one run by formula, from a model's config.json alone.

The estimate is on the low side: it leaves out the overhead of allocators and libraries, for which
MARGIN is kept free. tests/test_footprint.py compares the sum and its parts with measured steps on
CPU; bench/memory.py prints the estimate for any machine. All figures are bytes unless named
otherwise.
"""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from backend.model_folder import Size
from backend.parallel import world_size
from backend.policy import HeadLogProbs, PolicyConfig

GB = 1e9
# A measured step on CPU takes 1.05 to 1.2 times the sum of the parts.
MARGIN = 1.2


def training(config, m: Size, ranks: int) -> dict[str, float]:
    """Peak of a rank in a training step, by part, without the sampler (`config` is cycle's)."""
    p: PolicyConfig = config.policy
    compute, stored = itemsize(p.dtype), itemsize(p.parameters)
    root = m.parameters - m.layers * m.per_layer  # embedding, norm and head
    tokens = max(p.micro_batch_tokens, config.longest_row)
    return {
        "parameters": stored * m.parameters / ranks,
        "gradients": stored * m.parameters / ranks,
        "AdamW": 2 * stored * m.parameters / ranks,
        "KL reference": compute * m.parameters / ranks,
        # The root's are whole from forward to backward; of the layers, two are whole at a time.
        "gathered weights and gradients": (2 * compute + 4) * (root + 2 * m.per_layer),
        "activations": activations_per_token(p, m) * tokens,
        "attention masks": masks_per_token(config, m) * tokens,
        # Never at once: first the head, then the backward pass layer by layer.
        "head or layer at work": max(head(p, m, tokens), backward_per_token(p, m) * tokens),
    }


def activations_per_token(p: PolicyConfig, m: Size) -> float:
    """Saved for backward: the input of each layer, and with gradient checkpointing nothing else,
    without it all activations of each layer."""
    inner = 0 if p.gradient_checkpointing else m.layers * m.activations
    return itemsize(p.dtype) * (m.layers * m.hidden + inner)


def backward_per_token(p: PolicyConfig, m: Size) -> float:
    """One layer's backward pass: about twice the layer's activations, for their gradients and for
    temporaries of its norms and activation function; with gradient checkpointing also the
    recomputed activations themselves."""
    return itemsize(p.dtype) * (3 if p.gradient_checkpointing else 2) * m.activations


def masks_per_token(config, m: Size) -> float:
    """Attention masks of a pack (packing.attention_calls), at most: each token may attend to a
    whole row."""
    p: PolicyConfig = config.policy
    return p.shared_prefix * itemsize(p.dtype) * m.heads_per_key * config.longest_row


def head(p: PolicyConfig, m: Size, tokens: int) -> float:
    """Logits of a chunk, fp32 temporaries of a block, and, with several chunks, the fp32 sum of the
    head's gradient."""
    chunk = min(p.head_tokens, tokens)
    gradient_sum = 4 * m.vocabulary * m.hidden if tokens > p.head_tokens else 0
    return m.vocabulary * (itemsize(p.dtype) * chunk + 3 * 4 * HeadLogProbs.BLOCK) + gradient_sum


def tokens_that_fit(config, m: Size, ranks: int, free: float) -> int:
    """The largest micro-batch, in tokens, if training may take `free` bytes, MARGIN included."""
    p, per_token = config.policy, ("activations", "attention masks", "head or layer at work")
    fixed = sum(size for part, size in training(config, m, ranks).items() if part not in per_token)
    remaining = free / MARGIN - fixed
    saved = activations_per_token(p, m) + masks_per_token(config, m)
    # The peak is either at the head or in a layer's backward pass: both must fit.
    fit_at_head = (remaining - head(p, m, p.head_tokens + 1)) / saved
    fit_in_layer = remaining / (saved + backward_per_token(p, m))
    return max(0, math.floor(min(fit_at_head, fit_in_layer)))


class Machine(NamedTuple):
    memory: float  # for one rank: its GPU's, or an equal share of the computer's
    cuda: bool


def this_machine() -> Machine:
    if torch.cuda.is_available():
        return Machine(torch.cuda.get_device_properties(0).total_memory, True)
    total = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_limit())
    return Machine(total / int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), False)


def container_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this process's control group may use; inf without a limit."""
    limits = [math.inf]
    own = Path("/proc/self/cgroup").read_text() if Path("/proc/self/cgroup").exists() else ""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        name = "memory.limit_in_bytes" if "memory" in controllers.split(",") else "memory.max"
        root = cgroup / "memory" if name != "memory.max" else cgroup
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):  # a limit above it counts too
            with suppress(OSError, ValueError):
                limits.append(float((folder / name).read_text()))  # "max": ValueError
            if folder == root:
                break
    return min(limits)


def engine(config, m: Size, machine: Machine) -> float:
    """Memory that the sampler holds while the policy trains."""
    weights, e = itemsize(config.policy.dtype) * m.parameters, config.engine
    if config.sampler != "vllm":
        return weights
    if not machine.cuda:
        return weights + e.kv_cache_gb * 2**30
    return 0.0 if e.sleep else e.gpu_memory * machine.memory


def kv_tokens(config, m: Size, machine: Machine) -> int:
    """Capacity of vLLM's KV cache on one rank, in tokens."""
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
    """Size of the run's folder at the end of the run, without responses and judgements (a few GB at
    most)."""
    per_cycle = config.rl_steps // config.save_every if config.save_every else 1
    checkpoints = config.cycles * per_cycle
    parameters = itemsize(config.policy.parameters)  # bytes of one
    optimizer_and_reference = 2 * parameters + itemsize(config.policy.dtype)
    state = parameters + (optimizer_and_reference if config.save_every else 0)
    return {
        "checkpoints": 2 * m.parameters * min(checkpoints, config.keep_checkpoints or checkpoints),
        "state": 3 * state * m.parameters,  # the newest two and the one being written
    }


def disk_free(folder: Path) -> float:
    """Bytes that the folder may grow to: its present size and the free space on its disk."""
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free + present


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
