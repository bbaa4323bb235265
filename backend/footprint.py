"""Memory of one rank and disk of one run by formula, from a model's config.json alone.

tests/test_footprint.py holds the formula against what the project's own step takes on a GPU that
is not there (bench/fake_gpu.py), and against measured steps on CPU; bench/memory.py prints formula
and trace for any machine. For what neither sees MARGIN, and on a GPU CONTEXT, are kept free. All
figures are bytes unless named otherwise.
"""

import math
import os
import shutil
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from backend.model_folder import Size
from backend.parallel import world_size
from backend.policy import HeadLogProbs, PolicyConfig

GB = 1e9
# Not in the formula: fragmentation of the allocator, temporaries of libraries. A measured step on
# CPU takes up to 1.3 times the formula. On an H200 tensors take the formula's and the allocator
# holds 1.06 times as much (docs/gpu.md); several GPUs have not been measured.
MARGIN = 1.3
# On CPU the work in a layer takes so many times what it takes on a GPU: copies that its attention
# makes, and holes in the C library's heap. Measured (tests/test_footprint.py).
CPU_WORK = 2.5
# Not in the formula: a CUDA context with its loaded kernels, NCCL's buffers, cuBLAS's workspace.
CONTEXT = 2e9


def training(config, m: Size, ranks: int, gpu: bool, tokens: int | None = None) -> dict[str, float]:
    """Peak of a rank in a training step of several micro-batches, by part, without the sampler
    (`config` is cycle's). tokens: of a micro-batch; None: as configured."""
    p: PolicyConfig = config.policy
    stored = itemsize(p.parameters) * m.parameters / ranks
    tokens = tokens or max(p.micro_batch_tokens, config.longest_row)
    parts = {
        "parameters": stored,
        "gradients": stored,
        "AdamW": 2 * stored,
        "KL reference": itemsize(p.dtype) * m.parameters / ranks,
    }
    moments = [
        at_head(p, m, tokens, gpu), in_layer(config, m, ranks, tokens, gpu), at_end(p, m, ranks)
    ]  # fmt: skip
    if not gpu and p.shared_prefix:
        # Each token may attend to a whole row (packing.attention_calls).
        masks = itemsize(p.dtype) * m.heads_per_key * config.longest_row * tokens
        for moment in moments[:2]:
            moment["attention masks"] = masks
    return parts | max(moments, key=lambda moment: sum(moment.values()))


def root_parameters(m: Size) -> int:
    """Embedding, last norm and head, which FSDP gathers as one."""
    return m.parameters - m.layers * m.per_layer


def activations(p: PolicyConfig, m: Size) -> float:
    """Saved from forward to backward, for a token and layer: input and attention's output, without
    gradient checkpointing all that the layer saves."""
    size = itemsize(p.dtype)
    return size * m.hidden + (size * m.queries if p.gradient_checkpointing else m.saved[p.dtype])


def at_head(p: PolicyConfig, m: Size, tokens: int, gpu: bool) -> dict[str, float]:
    """Backward of HeadLogProbs, if all tokens are scored."""
    size, weight = itemsize(p.dtype), m.vocabulary * m.hidden
    blocks = 2 * 4 * HeadLogProbs.block("cuda" if gpu else "cpu") * m.vocabulary
    logits = size * m.vocabulary * min(p.head_tokens, tokens)
    gradient_sum = 4 * weight if tokens > p.head_tokens else 0
    return {
        "gathered weights": size * (root_parameters(m) + m.per_layer),
        "activations": m.layers * activations(p, m) * tokens,
        "head": logits + gradient_sum + max(blocks, size * weight) + 2 * size * m.hidden * tokens,
    }


def in_layer(config, m: Size, ranks: int, tokens: int, gpu: bool) -> dict[str, float]:
    """Backward of a layer: of its MLP, or of its attention."""
    p: PolicyConfig = config.policy
    size, keys = itemsize(p.dtype), m.kv_per_token / 2 / m.layers
    # Each row behind a prefix has the prefix's keys and values again (packing.attend).
    again = config.rollouts * config.prompt_tokens / tokens if p.shared_prefix else 0
    recomputed, before = 2 * size * keys * again, m.layers
    if p.gradient_checkpointing:
        # Of the last layer but one: by then the gradients of the last are on their way.
        recomputed, before = recomputed + m.saved[p.dtype] - size * m.queries, m.layers - 1
    mlp = 2 * size * (m.feed_forward + m.hidden)
    attention = size * (2 * m.queries + 2 * keys * (1 + again))
    if gpu:  # flash attention's workspace: an fp32 sum, and gradients of keys for each query head
        attention += 4 * m.queries + 2 * size * m.queries * (1 + again) * (m.heads_per_key > 1)
    attention -= 4 * size * (m.feed_forward + m.hidden)  # what the MLP has given back
    work = (recomputed + max(mlp, attention)) * tokens
    return {
        # The root's weights and the head's gradient; two layers, and the fp32 gradients of one, on
        # their way to the other ranks and come back.
        "gathered weights and gradients": size * (root_parameters(m) + m.vocabulary * m.hidden)
        + (2 * size + 4 + 4 / ranks) * m.per_layer,
        "activations": before * activations(p, m) * tokens,
        "layer": work if gpu else CPU_WORK * work,
    }


def at_end(p: PolicyConfig, m: Size, ranks: int) -> dict[str, float]:
    """The root's gradients in fp32, on their way to the other ranks and come back."""
    size, root = itemsize(p.dtype), root_parameters(m)
    both = size * m.vocabulary * m.hidden * m.tied  # of the embedding and of the head
    return {
        "gathered weights and gradients": (2 * size + 4 + 4 / ranks) * root + both + 4 * m.per_layer
    }


def tokens_that_fit(config, m: Size, machine: "Machine", ranks: int, free: float) -> int:
    """The largest micro-batch, in tokens, if training may take `free` bytes, margin and context
    included."""

    def taken(tokens: int) -> float:
        return sum(training(config, m, ranks, machine.cuda, tokens).values())

    budget = (free - CONTEXT * machine.cuda) / MARGIN
    return bisect_right(range(1, 10**7), budget, key=taken)


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
    if config.sampler != "vllm":  # its keys and values: see memory
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
    parts = training(config, m, world_size(), machine.cuda)
    if config.sampler != "vllm":
        # While rollouts are sampled their keys and values stand where a step's temporaries will.
        held = sum(parts[name] for name in ("parameters", "gradients", "AdamW", "KL reference"))
        rows = itemsize(config.policy.dtype) * m.kv_per_token * config.longest_row
        beyond = config.sample_rows * rows - (sum(parts.values()) - held)
        parts["keys and values of rollouts"] = max(0.0, beyond)
    parts["margin"] = (MARGIN - 1) * sum(parts.values())
    if machine.cuda:
        parts["CUDA context, NCCL"] = CONTEXT
    else:  # with GPUs they lie in the host's memory, which is not planned
        state = per_state(config) * m.parameters / world_size()
        parts["copies being saved"] = state + 2 * m.parameters  # and rank 0's checkpoint
    return parts | {"sampler": engine(config, m, machine)}


def disk(config, m: Size) -> dict[str, float]:
    """Size of the run's folder at the end of the run, without responses and judgements (a few GB at
    most)."""
    per_cycle = config.rl_steps // config.save_every if config.save_every else 1
    checkpoints = config.cycles * per_cycle
    return {
        "checkpoints": 2 * m.parameters * min(checkpoints, config.keep_checkpoints or checkpoints),
        # The newest two and the one being written.
        "state": 3 * per_state(config) * m.parameters,
    }


def per_state(config) -> int:
    """Bytes of the largest state, for a parameter."""
    parameters = itemsize(config.policy.parameters)
    optimizer_and_reference = 2 * parameters + itemsize(config.policy.dtype)
    return parameters + (optimizer_and_reference if config.save_every else 0)


def disk_free(folder: Path) -> float:
    """Bytes that the folder may grow to: its present size and the free space on its disk."""
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free + present


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
