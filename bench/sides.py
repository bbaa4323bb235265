"""Two ways to do the same work, each in a process of its own, asked in turn.

A side is a class with `step() -> {part: seconds}`, `gradients() -> {name: tensor}` of the first
step, and `tokens`, which pass the layers in a forward pass. It is made in a fresh process with a
fixed number of threads, so that neither side's memory or threads disturb the other's; while one
works the other waits for its turn.
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

from flops import Products, count_flops  # noqa: E402

from backend import parallel  # noqa: E402


class Side:
    """A running side, seen from the parent."""

    def __init__(self, name: str, make, threads: int, *args):
        self.name = name
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
            own = {
                "peak": _peak,
                "forget_peak": _forget_peak,
                "flops": lambda: count_flops(side.step).total(),
                "tokens": lambda: side.tokens,
            }.get(what)
            pipe.send(own() if own else getattr(side, what)())
    except Exception as error:
        pipe.send(RuntimeError(f"{make.__name__}: {error!r}"))
        raise


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Since it was forgotten, in GB: the process's largest resident memory, or on a GPU the largest
    memory of its tensors there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


class Stopwatch(dict):
    """`with watch("part"):` adds to a part's seconds."""

    @contextmanager
    def __call__(self, part: str):
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self[part] = self.get(part, 0.0) + time.perf_counter() - started


def compare(sides: list[Side], repeats: int) -> list[dict]:
    """`repeats` steps of each in turn, after one whose gradients were taken and one whose FLOPs
    were counted: medians by part and in all, the range of the whole, the peak, tokens and FLOPs."""
    found: list[list[dict]] = [[] for _ in sides]
    flops = [side.ask("flops") for side in sides]
    for side in sides:
        side.ask("step")  # counting ran nothing compiled
        side.ask("forget_peak")
    for _ in range(repeats):
        for side, steps in zip(sides, found, strict=True):
            steps.append(side.ask("step"))
    rows = []
    for side, steps, n in zip(sides, found, flops, strict=True):
        whole = sorted(sum(step.values()) for step in steps)
        rows.append(
            {part: statistics.median(step[part] for step in steps) for part in steps[0]}
            | {"all": statistics.median(whole), "low": whole[0], "high": whole[-1]}
            | {"peak": side.ask("peak"), "name": side.name}
            | {"flops": n, "tokens": side.ask("tokens")}
        )
    return rows


def alone(side: Side) -> dict[str, torch.Tensor]:
    """The gradients of a side that is not needed any more."""
    found = side.ask("gradients")
    side.close()
    return found


def agreement(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all parameters together, Euclidean norms."""
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return (difference / sum(b[k].double().square().sum() for k in b)).sqrt().item()


def compare_and_print(
    pair: list[Side], exact: list[dict], repeats: int, rate: float, dtype: str
) -> None:
    """Times and gradients of ours and theirs, which end with it. `exact`: each one's gradients in
    fp32; `rate` as in print_table."""
    ours, theirs = (side.ask("gradients") for side in pair)
    print_table(compare(pair, repeats), rate)
    print(
        f"gradients, |difference| / |gradient|: between the two in fp32 "
        f"{agreement(*exact):.1e}; of each in {dtype} from itself in fp32, ours "
        f"{agreement(ours, exact[0]):.1e}, theirs {agreement(theirs, exact[1]):.1e}"
    )
    for side in pair:
        side.close()


def print_table(rows: list[dict], rate: float) -> None:
    """`rows`: ours, theirs. `rate`: FLOP/s of the machine's products at the model's shapes."""
    parts = [k for k in rows[0] if k not in ("name", "low", "high", "flops", "tokens", "peak")]
    head = (*parts, "peak GB", "tokens", "ms/token", "GFLOP/s", "of rate")
    print(f"{'':14}" + "".join(f"{name:>10}" for name in head) + "   range")
    for row in rows:
        speed = row["flops"] / row["all"]
        values = "".join(f"{row[p]:10.2f}" for p in (*parts, "peak"))
        values += f"{row['tokens']:10,}{1000 * row['all'] / row['tokens']:10.2f}"
        values += f"{speed / 1e9:10.0f}{speed / rate:10.0%}"
        print(f"{row['name']:14}{values}   {row['low']:.2f} to {row['high']:.2f}")
    ours, theirs = (row | {"ms": row["all"] / row["tokens"]} for row in rows)
    ratios = [theirs[p] / ours[p] for p in (*parts, "peak", "tokens", "ms")]
    print(f"{'ratio':14}" + "".join(f"{ratio:9.1f}x" for ratio in ratios), flush=True)


def matrix_rate(model: str, tokens: int, dtype: str, threads: int) -> float:
    """FLOP/s at the shapes of the model's layers; printed beside that of large squares."""
    side = Side("products", Products, threads, model, tokens, dtype)
    rates = side.ask("rates")
    side.close()
    print(
        f"matrix products here, {dtype}: {rates['own'] / 1e9:,.0f} GFLOP/s at a layer's shapes "
        f"(forward and backward), {rates['squares'] / 1e9:,.0f} at squares of 4,096",
        flush=True,
    )
    return rates["own"]
