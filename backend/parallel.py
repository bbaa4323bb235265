"""Process groups, collectives, sharding and sharded state: one process per rank, started by
torchrun, or a single process without it.

The only file that imports torch.distributed. NCCL on GPUs, gloo on CPU. A single process is a
process group of size one, so that the rest of the code needs no special case. Parameters are
sharded by FSDP2 (`fully_shard`): fp32 shards, compute in `dtype`, gradients reduced in fp32."""

import ctypes
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from storage.files import FileError, WriteError, publish, write_text, writing
from storage.lock import locked

# Longer than rank 0 may ask judges in an evaluation while the others wait. A rank that ends is
# noticed at once: torchrun ends the others.
TIMEOUT = timedelta(days=7)
STATES_KEPT = 2
Group = dist.ProcessGroup


@contextmanager
def process_group():
    """The process group for a `with` block: torchrun's ranks, or this single process. Within
    another such block it is that one's."""
    if dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        # Micro-batches differ in size, which fragments segments of a fixed size.
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # It plans anew for each length of a row. vLLM switches it off too, where it is imported.
        torch.backends.cuda.enable_cudnn_sdp(False)
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
            # All ranks exit together. In rare cases one aborted at interpreter shutdown ("terminate
            # called without an active exception"), probably because a gloo thread still held a
            # tensor: the pause gives the thread time to release it.
            barrier()
            time.sleep(0.1)
    finally:
        if dist.is_initialized():  # a vLLM engine destroys the group when it shuts down
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks. By default it returns them to the operating system,
    and the page faults of the next step take a fifth of its time on CPU (docs/performance.md)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def rank() -> int:
    """This process's rank, from 0. It is torchrun's environment variable, so it is known before the
    process group exists."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def launch_id() -> int:
    """A random number that identifies this launch, the same on all its ranks. Collective."""
    drawn = random.SystemRandom().getrandbits(48) if rank() == 0 else 0
    return int(all_sum({"launch": float(drawn)})["launch"])


def print0(*args) -> None:
    if rank() == 0:
        print(*args, flush=True)


def barrier() -> None:
    all_sum({"arrived": 1.0})


def _reduce(values: Mapping[str, float], op, group: Group | None = None) -> dict[str, float]:
    """By gloo, on a GPU machine too: a rank that waits for another's judge keeps no GPU busy."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(tensor, op, group)
    return dict(zip(values, tensor.tolist(), strict=True))


def all_sum(values: Mapping[str, float], group: Group | None = None) -> dict[str, float]:
    """Sum of each value over ranks. Every rank must call it with the same keys in the same
    order."""
    return _reduce(values, dist.ReduceOp.SUM, group)


def all_max(value: float) -> float:
    return _reduce({"value": value}, dist.ReduceOp.MAX)["value"]


def gather(items: Sequence) -> list:
    """The items of all ranks in rank order, the same list on every rank. Collective."""
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a finite number. The weights were not changed."""


def check_finite(loss: float, grad_norm: float, rows: Callable[[], Sequence[str]]) -> None:
    """Raise NonFiniteError on all ranks alike, before the optimiser steps, unless a step's loss and
    gradient norm, both over all ranks, are finite. `rows` names this rank's rows
    whose log-probabilities are not; it is called in that case, which is collective."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    bad = gather(rows())
    where = ", ".join(bad[:5]) or "none: all log-probabilities are finite, their gradients are not"
    raise NonFiniteError(
        f"loss {loss:g} and gradient norm {grad_norm:g} must be finite; the optimiser did not step "
        f"and the state on file is as it was. Rows that are not finite: {where}. Lower the "
        "learning rate, look at these rows, or go on from an earlier state"
    )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other launch works in this folder during the `with` block. Collective. SystemExit on all
    ranks if one does; rank 0 says which."""
    with ExitStack() as stack:
        error = None
        if rank() == 0:
            try:
                stack.enter_context(locked(folder))
            except (ValueError, OSError) as failure:
                error = SystemExit(f"error: {failure}")
        raise_together(error)
        yield


def raise_together(error: BaseException | None, group: Group | None = None) -> None:
    """Stop all ranks if any has an error, so that none waits for a rank that has stopped: a rank
    with an error raises it, the others raise SystemExit with one line. Collective."""
    failed = all_sum({"failed": float(error is not None)}, group)["failed"]
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
    """Shard each block as one FSDP group, and all other parameters (embedding, norm, and the head,
    tied or not) as the root's group. The root's parameters stay gathered between forward and
    backward. A model that is not `trainable` has no backward, so its root reshards after forward:
    otherwise its parameters would stay gathered for good."""
    mesh = init_device_mesh(device().type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(root, mesh=mesh, mp_policy=precision, reshard_after_forward=not trainable)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed over ranks, not averaged: each loss has a global denominator.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def own_rows(sharded: DTensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a sharded tensor, perhaps none, and the number of the first. FSDP2 cuts
    the first dimension as torch.chunk does."""
    local, rows = sharded.to_local(), sharded.shape[0]
    return local, min(rows, rank() * -(-rows // world_size()))


def full_tensor(sharded: DTensor) -> torch.Tensor:
    """Gather a sharded tensor. Collective: every rank must call it, in the same order."""
    return sharded.full_tensor()


@torch.no_grad()
def copy_shards(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Overwrite target's parameters with source's, shard by shard (same architecture, any dtype),
    without communication."""
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        q.to_local().copy_(p.to_local())


def clip_grad_norm(module: torch.nn.Module, max_norm: float) -> float:
    """Clip by the global norm; returns the norm before clipping."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    before = norm.item()
    if before > max_norm:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return before


# --------------------------------------------------------------------------------------------------
# Files of all ranks, written at once or by a thread


class Saver:
    """Runs what writes files in a thread, one job after the other, while the run goes on. All ranks
    give it the same jobs in the same order. A job that fails fails on all ranks, and those after it
    are not run: no state appears without the checkpoint before it."""

    def __init__(self):
        # A thread begins on the first GPU, whichever is its process's.
        on_gpu = (torch.cuda.set_device, (device(),)) if torch.cuda.is_available() else ()
        self._thread = ThreadPoolExecutor(1, "saver", *on_gpu)
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # for the jobs' collectives
        self._jobs: list[Future] = []
        self._failed = False  # in the end the same on all ranks

    def start(self, job: Callable[[Group], None]) -> None:
        """`job` gets a process group of its own, and nothing that it uses may change any more."""
        self._jobs.append(self._thread.submit(self._run, job))

    def _run(self, job: Callable[[Group], None]) -> None:
        try:
            if not self._failed:
                job(self._group)
        except BaseException:
            self._failed = True
            raise

    def join(self) -> None:
        """Wait until all is on file. Raises a failed job's error: WriteError on the rank that could
        not write, SystemExit on the others."""
        while self._jobs:
            self._jobs.pop(0).result()

    def join_failed(self) -> None:
        """The same if a job has failed, so that a run does not go on for long. Collective."""
        if all_max(float(self._failed)):
            self.join()

    def wait(self, seconds: float | None = None) -> None:
        """Before this process ends for another reason."""
        wait(self._jobs, seconds)


def save_state(
    folder: Path, tensors: dict[str, torch.Tensor], where: dict, saver: Saver | None = None
) -> None:
    """Write `tensors` (each rank its shards) and `where`, the position in the run, to `folder`,
    which appears complete or not at all. Delete all but the newest STATES_KEPT states beside it.
    Collective. Raises WriteError. With a saver its thread writes a copy in host memory."""
    if saver is None:
        return _write_state(folder, tensors, where, None)
    in_host_memory = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False,
        use_non_blocking_copy=False,
    )  # fmt: skip
    copy = DefaultStager(in_host_memory).stage(tensors)
    saver.start(partial(_write_state, folder, copy, where))


def _write_state(
    folder: Path, tensors: dict[str, torch.Tensor], where: dict, group: Group | None
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")

    def start() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        write_text(temporary / "where.json", json.dumps(where))
        shutil.rmtree(folder, ignore_errors=True)
        publish(temporary, folder)
        for old in states(folder.parent)[:-STATES_KEPT]:
            shutil.rmtree(old)

    write_on_rank_0(folder, start, group)
    try:
        dcp.save(tensors, checkpoint_id=temporary, process_group=group)
        failure = None
    except CheckpointException as error:  # on all ranks, whichever failed
        failure = OSError(_causes(error))
    write_on_rank_0(folder, finish, group, failure)


def write_on_rank_0(
    folder: Path,
    work: Callable[[], None],
    group: Group | None = None,
    failure: OSError | None = None,
) -> None:
    """Run `work`, which writes to `folder`, on rank 0, unless there is a `failure` already. A
    failed write stops all ranks. Collective. Raises WriteError."""
    error = None
    if rank() == 0:
        try:
            with writing(folder):
                if failure is not None:
                    raise failure
                work()
        except WriteError as problem:
            error = problem
    raise_together(error, group)


def _causes(error: CheckpointException) -> str:
    causes = "; ".join(f"{failure}" for failure, _ in error.failures.values())
    return " ".join(causes.split())[:200]


def states(root: Path) -> list[Path]:
    """Folders of complete states, oldest first (their names sort by age)."""
    return sorted(
        path.parent for path in root.glob("*/where.json") if not path.parent.name.endswith(".tmp")
    )


def load_state(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Load `tensors` in place from a folder that save_state wrote. Collective. Raises FileError."""
    try:
        with torch.no_grad():
            dcp.load(tensors, checkpoint_id=folder)
    except (CheckpointException, OSError) as error:
        cause = _causes(error) if isinstance(error, CheckpointException) else str(error)
        raise FileError(
            f"{folder}: this state cannot be read ({cause}); delete the folder to go on from the "
            "state before it"
        ) from None


def optimizer_tensors(
    optimizer: torch.optim.AdamW, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name; zeros are created for a parameter that has had no step."""
    tensors = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)  # fused AdamW needs it there
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            tensors |= {f"{names[p]}.{key}": value for key, value in state.items()}
    return tensors
