"""Two ways to do the same work, each in a process of its own, asked in turn.

A side is a class with `step() -> {part: seconds}` and `gradients() -> {name: tensor}`. It is made
in a fresh process with a fixed number of threads, so that neither side's memory or threads disturb
the other's; while one works the other waits for its turn.
"""

import multiprocessing
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend import parallel  # noqa: E402


class Side:
    """A running side, seen from the parent."""

    def __init__(self, make, threads: int, *args):
        self.name = make.__name__
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads, args))
        self.process.start()

    def ask(self, what: str):
        self.pipe.send(what)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.send("end")
        self.process.join()


def _serve(pipe, make, threads: int, args) -> None:
    torch.set_num_threads(threads)
    parallel.keep_freed_memory()  # both sides: ours does it by itself
    os.environ["TQDM_DISABLE"] = "1"
    try:
        side = make(*args)
        while (what := pipe.recv()) != "end":
            own = {"peak": _peak, "forget_peak": _forget_peak}.get(what)
            pipe.send(own() if own else getattr(side, what)())
    except Exception as error:
        pipe.send(RuntimeError(f"{make.__name__}: {error!r}"))
        raise


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """The process's largest resident memory since it was forgotten, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


class Stopwatch(dict):
    """`with watch("part"):` adds to a part's seconds."""

    @contextmanager
    def __call__(self, part: str):
        started = time.perf_counter()
        yield
        self[part] = self.get(part, 0.0) + time.perf_counter() - started


def compare(sides: list[Side], repeats: int) -> list[dict]:
    """`repeats` steps of each in turn, after one whose gradients were taken: medians by part and in
    all, the range of the whole, the peak."""
    found: list[list[dict]] = [[] for _ in sides]
    for side in sides:  # copies of gradients were not part of a step
        side.ask("forget_peak")
    for _ in range(repeats):
        for side, steps in zip(sides, found, strict=True):
            steps.append(side.ask("step"))
    rows = []
    for side, steps in zip(sides, found, strict=True):
        whole = sorted(sum(step.values()) for step in steps)
        rows.append(
            {part: statistics.median(step[part] for step in steps) for part in steps[0]}
            | {"all": statistics.median(whole), "low": whole[0], "high": whole[-1]}
            | {"peak": side.ask("peak"), "name": side.name}
        )
    return rows


def agreement(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all parameters together, Euclidean norms."""
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return (difference / sum(b[k].double().square().sum() for k in b)).sqrt().item()


def print_table(rows: list[dict]) -> None:
    parts = [k for k in rows[0] if k not in ("name", "low", "high")]
    print(
        f"{'':12}" + "".join(f"{'peak GB' if p == 'peak' else p:>12}" for p in parts) + "   range"
    )
    for row in rows:
        values = "".join(f"{row[p]:12.2f}" for p in parts)
        print(f"{row['name']:12}{values}   {row['low']:.2f} to {row['high']:.2f}")
    ours, theirs = rows
    print(f"{'ratio':12}" + "".join(f"{theirs[p] / ours[p]:11.1f}x" for p in parts), flush=True)
