"""A GPU that is not there: the project's own code runs on it, and nothing is computed.

    with fake_gpu.on(ranks=4) as gpu:           # rank 0 of 4, each with a GPU
        with parallel.process_group():
            ...
    gpu.peak, gpu.flops, gpu.waits

PyTorch can make a device in Python (`torch.utils.backend_registration`, experimental); its tensors
are fake: they have shape, type and device, and no memory. An operator that meets tensors of two
devices raises, as on a GPU. Counted are the bytes of all storages, FLOPs of matrix products and
attention, kernels, bytes read and written, and where the host waits for the GPU.

It cannot show: numbers, NCCL, streams, drivers, the memory of a CUDA context or of a fragmented
allocator. A tensor without dimensions on the CPU passes unnoticed, as PyTorch lets operators take
it as a number. Only bench/ and tests/ import this module. The device stays registered, so a process
that has imported it should do nothing else.
"""

import os
import sys
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401, collectives of fake tensors
import torch.nn.functional as F
from real_gpu import caller
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from backend import packing, parallel

NAME = "gpu"
BLOCK = 512  # bytes: CUDA's caching allocator gives multiples of it
aten = torch.ops.aten
_VARLEN_BACKWARD = torch.ops.torch_attn._varlen_attn_backward.default


_tolist = FakeTensor.tolist


class _Stream:
    """Stream and event at once; there is one, and it is never behind."""

    def __init__(self, *_, **__): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def wait_stream(self, _): ...
    def wait_event(self, _): ...
    def wait(self, _=None): ...
    def record(self, _=None): ...
    def record_event(self, _=None):
        return self

    def synchronize(self): ...


class _Backend(backend_registration._DummyBackendModule):
    """What torch.cuda is for "cuda"."""

    Stream = Event = _Stream

    def current_stream(self, _=None):
        return _Stream()

    def stream(self, _):
        return _Stream()

    def set_device(self, _): ...
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
dist.Backend.register_backend("fake_gpu", _create_fake_pg, extended_api=True, devices=["cpu", NAME])
DEVICE = torch.device(NAME, 0)
# One kernel on CUDA; on a device without its own PyTorch would take it apart.
_own_kernels = torch.library.Library("aten", "IMPL")
_own_kernels.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")


class Gpu(TorchDispatchMode):
    """The counters. now, peak: bytes. waits: {"file.py function": times} where the host waits."""

    def __init__(self):
        super().__init__()
        # Query-key pairs of a pack by its Ends.queries, whose numbers a fake tensor does not hold.
        self.pairs: dict[int, int] = {}
        self.now = self.uncounted = 0
        self.sizes: dict[int, int] = {}  # of the storages there are
        self.device, self.seconds = DEVICE, None  # there is no time here
        self.reset()

    def reset(self) -> None:
        self.peak, self.flops, self.kernels, self.moved = self.now, 0, 0, 0
        self.waits: Counter = Counter()

    def stop(self) -> None: ...
    def fill(self, name: str, rows: torch.Tensor) -> None:
        """A copy from the host, in place of reading a weight."""
        rows.copy_(torch.empty_like(rows, device="cpu"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come by themselves
        if func.namespace == "aten" and torch.is_inference_mode_enabled():
            with self:  # composed operators come whole there
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func in (aten.index.Tensor, aten.masked_select.default, aten.nonzero.default):
            if (most := self._all_chosen(func, args)) is not None:
                return most
        if func is aten.masked_scatter_backward.default and _here(args[0]):
            self._wait()  # chosen by a mask within the operator
        self._look_for_copies(func, args, kwargs)
        out = func(*args, **kwargs)
        if not self.uncounted:
            self._count(func, args, kwargs, out)
        return out

    # ----------------------------------------------------------------------------------------------
    # Where the host waits

    def _wait(self) -> None:
        self.waits[caller(sys._getframe(1))] += 1

    def _number(self, tensor):
        """Some value of the type, which the host has waited for."""
        if _here(tensor):
            self._wait()
        elif tensor.constant is not None:
            with _disable_current_modes():
                return tensor.constant.item()
        return tensor.dtype is torch.bool or (1.0 if tensor.is_floating_point() else 1)

    def listed(self, tensor):
        """FakeTensor.tolist as one wait instead of one an element."""
        if not _here(tensor):
            return _tolist(tensor)
        value = self._number(tensor)
        for n in reversed(tensor.shape):
            value = [value] * n
        return value

    def _all_chosen(self, func, args):
        """Operators whose result has as many rows as are chosen: the most that there could be."""
        x = args[0]
        if func is aten.index.Tensor:
            [mask] = [i for i in args[1] if i is not None][:1]
            if mask.dtype is not torch.bool:
                return None
            shape = (mask.numel(), *x.shape[mask.dim() :])
        else:
            shape = (x.numel(),) if func is aten.masked_select.default else (x.numel(), x.dim())
        if _here(x):
            self._wait()
        dtype = torch.long if func is aten.nonzero.default else x.dtype
        return x.new_empty(shape, dtype=dtype)

    def _look_for_copies(self, func, args, kwargs) -> None:
        """From memory that is not pinned, and to the host, a copy waits for all work before it."""
        if func in (aten._to_copy.default, aten.to.device):
            target = kwargs.get("device")
            crosses = target is not None and torch.device(target).type != args[0].device.type
            real = args[0].device.type != "meta"
        elif func is aten.copy_.default:
            crosses, real = args[0].device.type != args[1].device.type, True
        elif func in (aten.index.Tensor, aten.index_put_.default):
            # An index on the CPU, such as a list, is copied.
            crosses = any(i is not None and not _here(i) for i in args[1])
            real = _here(args[0])
        else:
            return
        if (
            crosses
            and real
            and any(_here(t) for t in tree_leaves(args))
            | (torch.device(kwargs.get("device") or "cpu").type == NAME)
        ):
            self._wait()

    # ----------------------------------------------------------------------------------------------
    # Memory, FLOPs, kernels

    def _count(self, func, args, kwargs, out) -> None:
        made = [t for t in tree_leaves(out) if _here(t)]
        for t in made:
            self.keep(t.untyped_storage())
        if not made or func.is_view or "empty" in func.name() or "prim" in func.name():
            return
        self.kernels += 1
        for t in {id(t): t for t in [*tree_leaves((args, kwargs)), *made] if _here(t)}.values():
            self.moved += min(t.numel() * t.itemsize, t.untyped_storage().nbytes())
        if func in (torch.ops.torch_attn._varlen_attn.default, _VARLEN_BACKWARD):
            backward = func is _VARLEN_BACKWARD
            q, k, v, ends = args[1:4] + args[6:7] if backward else args[:4]
            # Two products a pair forward and five backward.
            pairs = self.pairs[ends.untyped_storage()._cdata]
            self.flops += (10 if backward else 4) * pairs * q.shape[1] * q.shape[2]
            if backward:
                self._flash_backward(q, k, len(ends) - 1)
        elif func._overloadpacket in flop_registry:
            causal = any(x is True for x in args)  # half of the square
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.flops += flops // 2 if causal and "flash" in func.name() else flops
            if func is aten._scaled_dot_product_flash_attention_backward.default:
                self._flash_backward(args[1].transpose(1, 2), args[2].transpose(1, 2), len(args[1]))

    def _flash_backward(self, q, k, sequences: int) -> None:
        """Workspace of flash attention 2's backward pass: fp32 sums of the queries' gradient, of
        128 tokens more a sequence, and the keys' and values' gradients for every query head."""
        heads, d = q.shape[-2:]
        tokens_q, tokens_k = q.numel() // (heads * d), k.numel() // (k.shape[-2] * d)
        work = 4 * (tokens_q + 128 * sequences) * heads * d
        if heads != k.shape[-2]:
            work += 2 * k.itemsize * tokens_k * heads * d
        self.peak = max(self.peak, self.now + work)

    def keep(self, storage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.sizes:
            weakref.finalize(storage, self._drop, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _here(x) -> bool:
    return isinstance(x, FakeTensor) and x.device.type == NAME


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What PyTorch takes on an H100 without cuDNN: flash where there is no mask, otherwise the
    memory-efficient kernel, for which a mask is copied if its rows do not begin at multiples of
    8."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    width = attn_mask.shape[-1]
    mask = F.pad(attn_mask, (0, -width % 8))[..., :width] if width % 8 else attn_mask
    mask = mask.expand(*q.shape[:2], *mask.shape[-2:])
    grad = torch.is_grad_enabled() and q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, grad, scale=scale)[0]


def _moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Module.to, which would swap the contents of tensors; fake ones refuse."""
    moved: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight moves once
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, x in kept.items():
                if x is None:
                    continue
                if x not in moved:
                    there = x.detach().to(device)
                    if isinstance(x, torch.nn.Parameter):
                        there = torch.nn.Parameter(there, x.requires_grad)
                    moved[x] = there
                kept[name] = moved[x]
    return module


@contextmanager
def on(ranks: int = 4, rank: int = 0):
    """The device is `parallel.device()` and this process one of `ranks` for a `with` block."""
    gpu, mode = Gpu(), FakeTensorMode()
    init, mesh = dist.init_process_group, parallel.init_device_mesh
    resize = torch.UntypedStorage.resize_
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached
    attend, make_generator = packing.attend_without_mask, torch.Generator

    def init_fake(*_, **__):
        init("fake_gpu", store=FakeStore(), rank=rank, world_size=ranks)

    def real_mesh(*args, **kwargs):  # a mesh holds the numbers of its ranks
        with _disable_current_modes():
            return mesh(*args, **kwargs)

    def counted_resize(storage, size):  # so FSDP frees gathered weights
        resize(storage, size)
        if storage._cdata in gpu.sizes:
            gpu.keep(storage)

    def generator(device):
        assert torch.device(device).type == NAME, f"a generator on {device}"
        return make_generator()

    def known_pairs(query, key, value, scaling, prefix, lengths, ends):
        own = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in lengths)
        gpu.pairs[ends.queries.untyped_storage()._cdata] = own
        return attend(query, key, value, scaling, prefix, lengths, ends)

    def uncounted(*args, **kwargs):  # DTensor runs an operator on whole tensors for its shape only
        gpu.uncounted += 1
        try:
            return propagate(*args, **kwargs)
        finally:
            gpu.uncounted -= 1

    with ExitStack() as stack:
        for owner, name, value in (
            (parallel, "device", lambda: DEVICE),
            (parallel, "init_device_mesh", real_mesh),
            (dist, "init_process_group", init_fake),
            (torch.UntypedStorage, "resize_", counted_resize),
            (torch.nn.Module, "to", _moved),
            (torch, "Generator", generator),
            (FakeTensor, "tolist", lambda tensor: gpu.listed(tensor)),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", uncounted),
            (F, "scaled_dot_product_attention", _sdpa),
            (packing, "attend_without_mask", known_pairs),
            # Transformers looks into masks and positions, but not into those of fake tensors.
            (masking_utils, "is_tracing", lambda *_: False),
            (FakeTensorMode, "avoid_device_init", True),  # for torch.tensor(list, device=...)
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(
            mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(ranks)})
        )
        stack.enter_context(mode)
        stack.enter_context(gpu)
        yield gpu
