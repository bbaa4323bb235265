"""How long tables, figures and the page take from stored results of 805 prompts x 3 models x 4
benchmarks x 3 judges, and each table's share.

    python bench/report_time.py
    python bench/report_time.py --also ../see-before     # another checkout, on the same results

The results are made up at random: they say nothing but how much there is to compute. Seconds are of
processor time (one thread); each checkout runs in a process of its own, in turn, three times, and
the fastest counts.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent.parent
PROMPTS, MODELS = 805, ("base", "rlcr", "see")
BENCHMARKS = ("helpsteer2", "alpaca_eval", "arena_hard", "wildbench")
REPEATED = 100  # answers of a cell that are judged five times
TIMES = 3


@dataclass(frozen=True)
class Command:
    """Time of the report, table by table."""

    also: tuple[Path, ...] = ()
    """Other checkouts of this project, such as one before a change."""
    inside: Path | None = None
    """Used by this program itself: time the checkout on the results in the working directory."""


# --------------------------------------------------------------------------------------------------
# One report


def inside(checkout: Path) -> None:
    """Print {"table": seconds, ..., "all": seconds} of one report."""
    sys.path.insert(0, str(checkout))
    import report

    seconds: dict[str, float] = {}

    def timed(make):
        def made(results):
            began = time.process_time()
            table = make(results)
            seconds[table.title] = time.process_time() - began
            return table

        return made

    for module in list(vars(report).values()):
        if hasattr(module, "TABLES"):
            module.TABLES = tuple(map(timed, module.TABLES))
    began = time.process_time()
    report.run(report.Command((Path("results"),), out=Path("report")))
    whole = time.process_time() - began
    seconds["reading, figures and page"] = whole - sum(seconds.values())
    print(json.dumps(seconds | {"all": whole}))


# --------------------------------------------------------------------------------------------------
# Made-up results


def scores(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(10) for _ in range(5))


def digits(rng: random.Random) -> list[list[float]]:
    return [[rng.uniform(-5, 0) for _ in range(10)] for _ in range(5)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_results(root: Path) -> None:
    sys.path.insert(0, str(HERE))
    import numpy as np

    from config import CellConfig
    from evaluation.prompt_states import write_states
    from prompts import render_response
    from storage.record import Rollout, answer_id

    rng = random.Random(0)

    def answer(prompt: int) -> Rollout:
        own, judge = scores(rng), scores(rng)
        text = "word " * rng.randrange(20, 300)
        return Rollout(
            cycle=0, step=1, prompt_id=str(prompt), sample=0, seed=0, prompt_ids=(1,),
            response_ids=tuple(rng.randrange(999) for _ in range(5)),
            text=render_response(text, own), finish_reason="stop",
            answer=text, self_scores=own, score_positions=(0, 1, 2, 3, 4), judge_scores=judge,
            judge_model="made up", reward=0.0, quality=0.0, calibration=0.0, weight_version="v",
        )  # fmt: skip

    def line(r: Rollout, **values: object) -> dict:
        return {"prompt_id": r.prompt_id, "sample": r.sample, "version": "v",
                "answer_id": answer_id(r), **values}  # fmt: skip

    def states(prompts: range) -> dict:
        return {str(k): np.array([rng.random() for _ in range(64)]) for k in prompts}

    window = root / "window" / "rollouts"
    window.mkdir(parents=True)
    trained = [answer(k) for k in range(160) for _ in range(8)]
    for cycle in ("01", "15"):
        write(window / f"cycle_{cycle}.jsonl", [dataclasses.asdict(r) for r in trained])
    results = root / "results"
    for benchmark in BENCHMARKS:
        data = root / f"{benchmark}.jsonl"
        write(data, [{"prompt": f"Question {k}?", "id": str(k)} for k in range(PROMPTS)])
        for model in MODELS:
            path = results / benchmark / model
            path.mkdir(parents=True)
            cell = CellConfig(model="m", data=str(data), name="x", training_run=str(window.parent))
            (path / "config.json").write_text(json.dumps(dataclasses.asdict(cell)))
            rollouts = [answer(k) for k in range(PROMPTS)]
            write(path / "rollouts.jsonl", [dataclasses.asdict(r) for r in rollouts])
            for scorer in MODELS:
                write(path / f"digits_{scorer}.jsonl",
                      [line(r, scores=scores(rng), free=digits(rng), judge=digits(rng),
                            own=digits(rng) if scorer == model else None)
                       for r in rollouts])  # fmt: skip
            write(path / "sensitivity.jsonl", [
                line(r, as_it_is=scores(rng), another=scores(rng), cut=scores(rng))
                for r in rollouts
            ])  # fmt: skip
            for judge in ("second", "third"):
                write(path / f"scores_{judge}.jsonl",
                      [line(r, draw=0, scores=scores(rng)) for r in rollouts])  # fmt: skip
            write(path / f"scores_{cell.judge}.jsonl",
                  [line(r, draw=d, scores=scores(rng)) for r in rollouts[:REPEATED]
                   for d in range(5)])  # fmt: skip
            write(path / "preferences.jsonl", [
                line(r, result=rng.choice((-1, 0, 1)), shown_first=1, shown_second=1,
                     longer_by=rng.randrange(-900, 900)) for r in rollouts
            ])  # fmt: skip
        write_states(results / benchmark / "prompt_states.npz", "v", states(range(PROMPTS)))
    (results / "models.json").write_text(json.dumps(MODELS))
    write(results / "window.jsonl", [line(r, scores=r.self_scores) for r in trained])
    write_states(results / "window_states.npz", "v", states(range(160)))


# --------------------------------------------------------------------------------------------------
# The comparison


def main(command: Command) -> None:
    if command.inside:
        return inside(command.inside)
    checkouts = [HERE, *(path.resolve() for path in command.also)]
    fastest: dict[Path, dict[str, float]] = {}
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    with tempfile.TemporaryDirectory() as folder:
        make_results(Path(folder))
        for _ in range(TIMES):
            for checkout in checkouts:
                done = subprocess.run(
                    [sys.executable, __file__, "--inside", str(checkout)], cwd=folder, check=True,
                    stdout=subprocess.PIPE, text=True, env=os.environ | threads,
                )  # fmt: skip
                found = json.loads(done.stdout.splitlines()[-1])
                before = fastest.get(checkout)
                if not before or found["all"] < before["all"]:
                    fastest[checkout] = found
    for checkout, seconds in fastest.items():
        print(f"\n{checkout}: {seconds['all']:.1f} s of processor time")
        for name, value in sorted(seconds.items(), key=lambda x: -x[1]):
            if name != "all":
                print(f"  {value:6.2f} s  {value / seconds['all']:4.0%}  {name}")
    ours = fastest[HERE]["all"]
    for other in checkouts[1:]:
        print(f"\nthis checkout takes {ours / fastest[other]['all']:.2f} of {other}'s time")


if __name__ == "__main__":
    main(tyro.cli(Command, description=__doc__))
