"""This machine's GPU with the counters of fake_gpu.py, so that what that one promises can be held
against it.

    with real_gpu.on() as gpu:                  # one rank, GPU 0
        with parallel.process_group():
            ...
    gpu.peak, gpu.waits, gpu.seconds

Bytes are PyTorch's allocator's. Waits are its warnings of synchronising calls, by the function of
the project that was running; by its own word it does not notice all of them. FLOPs, kernels and
traffic are not counted: 0.
"""

import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


class Gpu:
    """now, peak: bytes. waits: {"file.py function": times}. seconds: of the stage."""

    flops = moved = kernels = 0

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.waits: Counter = Counter()
        self.counting = False

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.waits = Counter()
        self.counting, self._began = True, time.perf_counter()

    def stop(self) -> None:
        self.counting = False
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        self.now, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()

    def fill(self, name: str, rows: torch.Tensor) -> None:
        """A weight drawn as at a model's start, in place of one from a file."""
        rows.fill_(1.0) if "norm" in name else rows.normal_(0, 0.02)

    def _warned(self, message, *_) -> None:
        if self.counting and "synchroniz" in str(message):
            self.waits[caller(sys._getframe(1))] += 1


def caller(frame) -> str:
    """ "file.py function" of the project that has led to this frame, without bench/."""
    skipped = (str(ROOT / "bench"), str(ROOT / ".venv"))
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and not file.startswith(skipped):
            return f"{Path(file).name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def on():
    """Counting for a `with` block."""
    gpu = Gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = gpu._warned
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield gpu
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
