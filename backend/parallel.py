"""Process groups, collectives, sharding and sharded state: one process per rank, started by
torchrun, or one process alone.

The only file that imports torch.distributed. NCCL where there are GPUs, gloo on CPU; a single
process is a group of one, so that the rest of the code has one path. Parameters are sharded by
FSDP2 (`fully_shard`): fp32 shards, compute in `dtype`, gradients reduced in fp32."""

import ctypes
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from storage.files import publish, write_text

# Well above the judge's slowest answer, for which the other ranks wait in their next collective.
TIMEOUT = timedelta(hours=4)
STATES_KEPT = 2


@contextmanager
def process_group():
    """The process group for a `with` block: torchrun's ranks, or this process alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(
            backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1
        )
    try:
        yield
        if dist.is_initialized():
            # Ranks leave together. In rare cases one aborted while Python was closing ("terminate
            # called without an active exception"), probably by a gloo thread that still held a
            # tensor: the pause lets it drop it.
            barrier()
            time.sleep(0.1)
    finally:
        if dist.is_initialized():  # a vLLM engine ends the group with itself
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks. By default it returns them to the system, and the next
    step gets them back page by page: a fifth of its time on CPU (docs/performance.md)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # names of options in malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def rank() -> int:
    """This process's number, from 0. Torchrun's, so it is known before the group is made."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def launch_id() -> int:
    """A random number that the ranks of this launch share, and no other launch has. Collective."""
    mine = random.SystemRandom().getrandbits(48) if rank() == 0 else 0
    return int(all_sum({"launch": float(mine)})["launch"])


def print0(*args) -> None:
    if rank() == 0:
        print(*args, flush=True)


def barrier() -> None:
    all_sum({"here": 1.0})


def _reduce(values: Mapping[str, float], op) -> dict[str, float]:
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op)
    return dict(zip(values, tensor.tolist(), strict=True))


def all_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sum of each value over ranks. Every rank must call it with the same keys in the same
    order."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(value: float) -> float:
    return _reduce({"value": value}, dist.ReduceOp.MAX)["value"]


def gather(items: Sequence) -> list:
    """The items of all ranks in the order of ranks, the same list everywhere. Collective."""
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def raise_together(error: Exception | None) -> None:
    """Every rank calls it; if any has an error all stop: it with its error, the others with one
    line. None waits for a rank that is gone."""
    failed = all_sum({"failed": float(error is not None)})["failed"]
    if error is not None:
        raise error
    if failed:
        raise SystemExit(f"rank {rank()} stops because {failed:.0f} other rank(s) did")


# --------------------------------------------------------------------------------------------------
# FSDP2


def shard(
    root: torch.nn.Module,
    blocks: Iterable[torch.nn.Module],
    dtype: torch.dtype,
    trainable: bool,
) -> None:
    """Shard each block as one group, and the rest (embedding, norm, head: tied or not) with the
    root. The root stays whole between a forward and its backward, so one that has no backward must
    be told: its parameters would never be shards again."""
    mesh = init_device_mesh(device().type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(root, mesh=mesh, mp_policy=precision, reshard_after_forward=not trainable)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Gradients are added over ranks, not averaged: each loss has a global denominator.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def full_tensor(sharded: DTensor) -> torch.Tensor:
    """The whole of a sharded tensor. Collective: every rank must call it, in the same order."""
    return sharded.full_tensor()


@torch.no_grad()
def copy_shards(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Overwrite target's parameters with source's, shard by shard (same architecture, any dtype);
    no traffic."""
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        q.to_local().copy_(p.to_local())


def clip_grad_norm(module: torch.nn.Module, max_norm: float) -> float:
    """Clip by the global norm; returns the norm before clipping."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)).item()


# --------------------------------------------------------------------------------------------------
# Sharded state: a folder appears whole or not at all


def save_state(folder: Path, tensors: dict[str, torch.Tensor], where: dict) -> None:
    """Write `tensors` (each rank its shards) and the JSON `where` to `folder`; keep the newest two
    of its siblings."""
    aside = folder.with_name(folder.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    dcp.save(tensors, checkpoint_id=aside)
    if rank() == 0:
        write_text(aside / "where.json", json.dumps(where))
        shutil.rmtree(folder, ignore_errors=True)
        publish(aside, folder)
        for old in states(folder.parent)[:-STATES_KEPT]:
            shutil.rmtree(old)
    barrier()


def states(root: Path) -> list[Path]:
    """Whole states, oldest first (their names sort by age)."""
    return sorted(
        path.parent for path in root.glob("*/where.json") if not path.parent.name.endswith(".tmp")
    )


def load_state(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place from a folder that save_state wrote."""
    with torch.no_grad():
        dcp.load(tensors, checkpoint_id=folder)


def optimizer_tensors(
    optimizer: torch.optim.AdamW, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, made (as zeros) where no step has been taken yet."""
    tensors = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)  # where the fused form wants it
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            tensors |= {f"{names[p]}.{key}": value for key, value in state.items()}
    return tensors
