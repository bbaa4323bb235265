"""A process and what started it: an end within seconds when its launcher is gone or it gets
SIGTERM, torchrun's restarts, a GPU that cannot be used."""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from backend.parallel import rank


def refuse_restart() -> None:
    """Raise ValueError in a process that torchrun --max_restarts has started again: the ranks that
    were left alone may still wait for the old group, and PyTorch's own restart with gloo often
    fails. A new launch resumes from the state on file."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise ValueError(
            "torchrun has restarted this process (--max_restarts), which is not supported; run the "
            "same command again without it, in a loop if you like: it goes on where the run stopped"
        )


class Watcher:
    """Ends this process within seconds when its launcher is gone (kill -9 of torchrun leaves its
    workers alone) or when it gets SIGTERM (torchrun passes it on and kills after 30 s), also in the
    middle of a collective or of sampling. Made by the main thread, before anything that can wait.
    Everything on file is whole at any moment, so all there is to do is `before_exit`, which should
    take 20 s at most."""

    def __init__(self):
        self.before_exit: Callable[[], None] = lambda: None
        self._launcher = os.getppid()
        self._signals, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # Python's own; the next line is what acts
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not (reason := self._reason_to_end()):
            pass
        print(f"rank {rank()} ends: {reason}; the same command goes on from here", file=sys.stderr)
        try:
            self.before_exit()
        finally:
            os._exit(128 + signal.SIGTERM)

    def _reason_to_end(self) -> str:
        """ "" after a second in which there was none."""
        if os.getppid() != self._launcher or self._started_alone():
            return "its launcher is gone"
        ready, _, _ = select.select([self._signals], [], [], 1.0)
        terminated = ready and signal.SIGTERM in os.read(self._signals, 64)
        return "it got SIGTERM" if terminated else ""

    def _started_alone(self) -> bool:
        """Torchrun was killed before this process came so far: now init is its parent."""
        init = Path("/proc/1/cmdline")
        started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return (
            started_by_torchrun
            and self._launcher == 1
            and init.exists()
            and b"torch" not in init.read_bytes()
        )


def check_gpu() -> None:
    """Raise ValueError on a machine with a GPU that PyTorch cannot use, where all would run on CPU
    in silence."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden:
        return
    if listed := gpu_listed():
        built = torch.version.cuda
        remedy = (
            f"is built for CUDA {built}, for which the driver is probably too old; update it"
            if built
            else "is a CPU build; run make setup"
        )
        raise ValueError(
            f"{listed} cannot be used: PyTorch {torch.__version__} {remedy}. "
            "CUDA_VISIBLE_DEVICES=-1 before the command runs it on CPU"
        )


def gpu_listed() -> str:
    """The driver's first GPU, as "GPU 0: NVIDIA H200"; "" where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return listed.splitlines()[0].split(" (UUID")[0] if listed.startswith("GPU") else ""
