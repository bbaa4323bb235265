"""The paper in miniature, offline, in minutes on two CPU cores (make demo).

    python -m miniature.demo --seed 0              one seed: about six minutes
    python -m miniature.demo --seeds 0 1 2 3 4     a table over seeds, two at a time, a thread each

Runs the project's own commands one after the other: the base model (base_model.py), SEE and Adapted
RLCR at equal sample-passes (cycle.py, as in the paper's run), the answers of every checkpoint to
the test prompts (evaluate.py), tables and figures (report.py). Each command goes on where a killed
one stopped; what is finished is not done again, unless the recipe of the base model has changed.
Everything lies in models/tiny-SEED/, runs/demo/, results/demo/ and report/. What the miniature is,
and what it is not: world.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import tyro

from config import PRESETS
from miniature.base_model import Recipe, recipe_hash
from storage.data import load_prompts
from storage.record import read_rollouts
from storage.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
# Adapted RLCR at SEE's 2,400 sample-passes: one epoch over 2,400 prompts in batches of 48.
EQUAL_PASSES = ("--window", 2400, "--epochs", 1, "--rl_steps", 50)
MODELS = ("base", "rlcr", "see")
# What the demo shows of the report: label -> table's file, column, attribute if there is one.
MAIN = "tables-1-and-2-quality-and-calibration"
PREDICTORS = "calibration-beside-predictors-that-know-less"
ERRORS = "where-the-error-comes-from-by-attribute"
TOP_5 = "table-4-top-5-accuracy"
SHOWN = {
    "well-formed": (MAIN, "well-formed"),
    "quality": (MAIN, "quality"),
    "calibration": (MAIN, "calibration"),
    "  of its scores shuffled": (PREDICTORS, "shuffled"),
    "  of the best constant": (PREDICTORS, "test constant"),
    "correlation, correctness": (ERRORS, "correlation", "correctness"),
    "self - judge, helpfulness": (ERRORS, "self - judge", "helpfulness"),
    "self - judge, correctness": (ERRORS, "self - judge", "correctness"),
    "top-5": (TOP_5, "top-5"),
    "  of a constant ranking": (TOP_5, "test ranking"),
}


def command(title: str, *words: object, log: object = None) -> None:
    """Run one of the project's commands and say how long it took. SystemExit if it fails."""
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    script, *options = map(str, words)
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *program, *options], stdout=log,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: {script} ended with {done.returncode}; see its message above")
    print(f"== {title}: {time.perf_counter() - started:.0f} s", flush=True)


def one_seed(seed: int) -> None:
    base = Path(f"models/tiny-{seed}")
    see, rlcr = run_folder("see", seed), run_folder("rlcr", seed)
    data = ("--model", base, "--data", base / "train.jsonl", "--seed", 42 + seed)
    command(
        "1 of 4, base model: pretraining on the miniature world (about 3 minutes)",
        "miniature.base_model", "--seed", seed,
    )  # fmt: skip
    command(
        "2 of 4, SEE: 15 cycles of GRPO and distillation over 160 prompts (about 2 minutes)",
        "cycle.py", "--preset", "tiny", "--name", see.path.relative_to("runs"), *data,
    )  # fmt: skip
    command(
        "3 of 4, Adapted RLCR: GRPO alone, as many sample-passes (about a minute)",
        "cycle.py", "--preset", "tiny-rlcr", "--name", rlcr.path.relative_to("runs"), *data,
        *EQUAL_PASSES,
    )  # fmt: skip
    evaluate(base, see, rlcr, results_folder(seed))
    out = Path(f"report/demo-{seed}")
    report([results_folder(seed)], out, see)
    print(f"\nA few rollouts of SEE's last cycle\n\n{some_rollouts(see)}")
    print(f"\n512 test prompts, temperature 0.8, seed {seed}, after 2,400 sample-passes\n")
    print(f"{table(out)}\n\nFigure 2: {out}/figure2.png; all tables: {out}/report.html")


def run_folder(method: str, seed: int) -> RunFolder:
    """Another base model makes another run."""
    return RunFolder(Path(f"runs/demo/{method}-{seed}-{recipe_hash(Recipe(seed))[:6]}"))


def results_folder(seed: int) -> Path:
    return Path(f"results/demo/{seed}-{recipe_hash(Recipe(seed))[:6]}")


def evaluate(base: Path, see: RunFolder, rlcr: RunFolder, results: Path) -> None:
    """One answer of every checkpoint to each test prompt, as in training; the digits behind top-5
    of the last ones."""
    p = PRESETS["tiny"]
    options = (
        "--benchmarks", f"test={base / 'test.jsonl'}", "--primary", "test", "see",
        "--training_run", see,
        "--name", results.relative_to("results"), "--judge", p.judge, "--template", p.template,
        "--prompt_tokens", p.prompt_tokens, "--sampling.max_tokens", p.sampling.max_tokens,
        "--dtype", p.policy.dtype, "--sampler", p.sampler, "--sample_rows", 512,
    )  # fmt: skip
    command(
        "4 of 4, evaluation: every checkpoint on 512 test prompts (about a minute)",
        "evaluate.py", "--models", f"base={base}", f"rlcr={rlcr}", f"see={see}", *options,
        "--stages", "answers", "digits", log=subprocess.DEVNULL,
    )  # fmt: skip


def report(results: Sequence[Path], out: Path, *runs: RunFolder) -> None:
    """Tables of the base and the last checkpoints; Figure 2 over all checkpoints."""
    training = ("--runs", *runs) if runs else ()
    command("tables and figures", "report.py", *results, "--models", *MODELS, *training, "--out",
            out, log=subprocess.DEVNULL)  # fmt: skip


def table(out: Path) -> str:
    """The rows of SHOWN from the report's CSV files, a column for each model, with the ends of the
    95 % intervals."""
    lines = [f"{'':<28}" + "".join(f"{model:>24}" for model in MODELS)]
    for label, (name, column, *attribute) in SHOWN.items():
        frame = pandas.read_csv(out / "csv" / f"{name}.csv")
        if attribute:
            frame = frame[frame["attribute"] == attribute[0]]
        frame = frame.set_index("model")
        cells = (
            f"{frame[column][m]:.3f} [{frame[column + ' low'][m]:.3f}, "
            f"{frame[column + ' high'][m]:.3f}]"
            for m in MODELS
        )
        lines.append(f"{label:<28}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def some_rollouts(run: RunFolder, count: int = 6) -> str:
    """A few of a run's last cycle: prompt, text, scores, the judge's scores."""
    prompts = {p.id: p.conversation[-1]["content"] for p in load_prompts(run.config()["data"])}
    rollouts = read_rollouts(run.rollouts(run.config()["cycles"]))
    lines = []
    for r in rollouts[:: max(1, len(rollouts) // count)][:count]:
        lines.append(f"{prompts[r.prompt_id]!r} -> {r.text!r}")
        lines.append(f"    self {r.self_scores}  judge {r.judge_scores}  reward {r.reward:.3f}")
    return "\n".join(lines)


def many_seeds(seeds: Sequence[int]) -> None:
    """Two at a time; then mean and 95 % interval over seeds (Student's t)."""

    def run(seed: int) -> None:
        log_file = Path(f"runs/demo/log-{seed}.txt")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "a") as log:
            line = [sys.executable, "-m", "miniature.demo", "--seed", str(seed)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(line, stdout=log, stderr=log, env=one_thread)
        if done.returncode:
            raise SystemExit(f"error: seed {seed} failed; {log_file} says why")
        print(f"seed {seed} is done ({log_file})", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, seeds))
    out = Path("report/demo-seeds")
    report([results_folder(seed) for seed in seeds], out)
    print(
        f"\n512 test prompts, temperature 0.8, seeds {', '.join(map(str, seeds))}\n\n{table(out)}"
    )


def main(seed: int = 0, seeds: tuple[int, ...] = ()) -> None:
    """Run the demo.

    Args:
        seed: of the world's prompts, the base model and both runs.
        seeds: several, for a table with intervals over them (2 at least).
    """
    if len(seeds) == 1:
        raise SystemExit("error: --seeds takes two seeds at least; for one, --seed")
    many_seeds(seeds) if seeds else one_seed(seed)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
