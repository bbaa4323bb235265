"""The paper in miniature, offline, in minutes on two CPU cores (make demo).

    python -m miniature.demo --seed 0              one seed: about seven minutes
    python -m miniature.demo --seed 0 --full       (make demo-full) with SEE from a base model whose
                                                   scores say nothing of the answer: ten minutes
    python -m miniature.demo --seeds 0 1 2 3 4 --full      a table over seeds, two at a time

Runs the project's own commands one after the other: the base model (base_model.py); SEE, GRPO alone
with SEE's window, steps and batches, and Adapted RLCR, all at 2,400 sample-passes (cycle.py, as in
the paper's run); four answers of a number of checkpoints to each test prompt (evaluate.py); tables
and figures (report.py, kinds.py). Each command goes on where a killed one stopped; what is finished
is not done again, unless the recipe of the base model has changed. Everything lies in
models/tiny-*, runs/demo/, results/demo/ and report/. What the miniature is, and what it is not:
world.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import tyro

from config import PRESETS
from evaluation.results import load_evaluation
from miniature import kinds
from miniature.base_model import Recipe, recipe_hash
from miniature.world import read_task
from storage.data import load_prompts
from storage.record import read_rollouts
from storage.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
# Name of a run -> its title, and cycle.py's options beside the data.
RUNS = {
    "see": ("SEE: 15 cycles of GRPO and distillation over 160 prompts", ("--preset", "tiny")),
    "rl": ("RL alone: the same without distillation", ("--preset", "tiny", "--no-distil")),
    # At SEE's 2,400 sample-passes: one epoch over 2,400 prompts in batches of 48.
    "rlcr": (
        "Adapted RLCR: GRPO alone over 2,400 prompts in larger batches",
        ("--preset", "tiny-rlcr", "--window", 2400, "--epochs", 1, "--rl_steps", 50),
    ),
    "no-latent": ("SEE from the base model without latent ability", ("--preset", "tiny")),
}
# The order of the tables; the report compares SEE, the last, with each of the others.
MODELS = ("base", "no-latent", "rlcr", "rl", "see")
CYCLES = (1, 2, 4, 8)  # and the last: SEE's checkpoints that are evaluated
SAMPLES = 4  # answers to each test prompt
# What the demo shows of the report: label -> table's file, column, attribute if there is one.
MAIN = "tables-1-and-2-quality-and-calibration"
PREDICTORS = "calibration-beside-predictors-that-know-less"
WITHIN = "telling-answers-apart-by-quality"
SENSITIVITY = "does-the-score-depend-on-the-answer"
ERRORS = "where-the-error-comes-from-by-attribute"
SHOWN = {
    "well-formed": (MAIN, "well-formed"),
    "quality": (MAIN, "quality"),
    "calibration": (MAIN, "calibration"),
    "  of the best constant": (PREDICTORS, "test constant"),
    "  of the prompt's other answers": (PREDICTORS, "other samples"),
    "pairs within prompts": (WITHIN, "within: accuracy"),
    "another prompt's answer": (SENSITIVITY, "another prompt's answer"),
    "half of the answer": (SENSITIVITY, "half of the answer"),
    "correlation, correctness": (ERRORS, "correlation", "correctness"),
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


def base_folder(seed: int, latent: bool = True) -> Path:
    return Path(f"models/tiny-{seed}{'' if latent else '-no-latent'}")


def run_folder(run: str, seed: int) -> RunFolder:
    """Another base model makes another run."""
    recipe = Recipe(seed, latent=run != "no-latent")
    return RunFolder(Path(f"runs/demo/{run}-{seed}-{recipe_hash(recipe)[:6]}"))


def results_folder(seed: int) -> Path:
    return Path(f"results/demo/{seed}-{recipe_hash(Recipe(seed))[:6]}")


def one_seed(seed: int, full: bool) -> None:
    names = run_names(full)
    for latent in (True, False)[: 1 + full]:
        command(
            "base model: pretraining on the miniature's world"
            + (", with scores that say nothing of the answer" if not latent else ""),
            "miniature.base_model", "--seed", seed, "--latent" if latent else "--no-latent",
        )  # fmt: skip
    for name in names:
        title, options = RUNS[name]
        base = base_folder(seed, latent=name != "no-latent")
        command(title, "cycle.py", "--name", run_folder(name, seed).path.relative_to("runs"),
                "--model", base, "--data", base / "train.jsonl", "--seed", 42 + seed,
                *options)  # fmt: skip
    runs = {name: run_folder(name, seed) for name in names}
    evaluate(base_folder(seed), runs, results_folder(seed))
    out = Path(f"report/demo-{seed}")
    report([results_folder(seed)], out, models(names), runs["see"])
    print(f"\nRollouts of SEE's last cycle\n\n{some_rollouts(runs['see'])}")
    show([seed], out, models(names))


def evaluate(base: Path, runs: dict[str, RunFolder], results: Path) -> None:
    """Answers of the checkpoints to the test prompts, sampled as in training; then what another
    answer does to the last ones' scores, and the base's digits."""
    p = PRESETS["tiny"]
    options = (
        "--benchmarks", f"test={base / 'test.jsonl'}", "--training_run", runs["see"],
        "--name", results.relative_to("results"), "--judge", p.judge, "--template", p.template,
        "--prompt_tokens", p.prompt_tokens, "--sampling.max_tokens", p.sampling.max_tokens,
        "--dtype", p.policy.dtype, "--sampler", p.sampler, "--sample_rows", 512,
        "--samples", SAMPLES,
    )  # fmt: skip
    last = [f"base={base}", *(f"{name}={run.checkpoints()[-1]}" for name, run in runs.items())]
    earlier = [
        f"{name}_{checkpoint.name}={checkpoint}"
        for name, run in runs.items()
        for k, checkpoint in enumerate(run.checkpoints()[:-1], 1)
        if name == "rlcr" or k in CYCLES
    ]
    stages = {
        "answers of the checkpoints to the test prompts": ("answers", [*last, *earlier]),
        "their scores for another prompt's answer, and for half of it": ("sensitivity", last),
        "the base model's digits": ("digits", last[:1]),
    }
    for title, (stage, models) in stages.items():
        primary = ("--primary", "test", "see") if len(models) > 1 else ()
        command(f"evaluation: {title}", "evaluate.py", "--models", *models, *options, *primary,
                "--stages", stage, log=subprocess.DEVNULL)  # fmt: skip


def run_names(full: bool) -> list[str]:
    return [name for name in RUNS if full or name != "no-latent"]


def models(runs: Collection[str]) -> list[str]:
    """The base and the runs of these names, in the order of the tables."""
    return [m for m in MODELS if m == "base" or m in runs]


def report(results: Sequence[Path], out: Path, models: Sequence[str], *runs: RunFolder) -> None:
    """Tables of the base and the last checkpoints; Figure 2 over all checkpoints on file."""
    training = ("--runs", *runs) if runs else ()
    command("tables and figures", "report.py", *results, "--models", *models, *training,
            "--out", out, log=subprocess.DEVNULL)  # fmt: skip


def show(seeds: Sequence[int], out: Path, models: Sequence[str]) -> None:
    by_kind = kinds.table([load_evaluation(results_folder(s)) for s in seeds], models)
    print(
        f"\n512 test prompts x {SAMPLES} answers, temperature 0.8, after 2,400 sample-passes, "
        f"seed {', '.join(map(str, seeds))}\n\n{table(out, models)}\n\n{by_kind}\n\n"
        f"Figure 2: {out}/figure2.png; all tables: {out}/report.html"
    )


def table(out: Path, models: Sequence[str]) -> str:
    """The rows of SHOWN from the report's CSV files, a column for each model, with the ends of the
    95 % intervals."""
    lines = [f"{'':<32}" + "".join(f"{model:>24}" for model in models)]
    for label, (name, column, *attribute) in SHOWN.items():
        frame = pandas.read_csv(out / "csv" / f"{name}.csv")
        if attribute:
            frame = frame[frame["attribute"] == attribute[0]]
        frame = frame.set_index("model")
        cells = (
            f"{frame[column][m]:.3f} [{frame[column + ' low'][m]:.3f}, "
            f"{frame[column + ' high'][m]:.3f}]"
            for m in models
        )
        lines.append(f"{label:<32}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def some_rollouts(run: RunFolder, count: int = 3) -> str:
    """A few of a run's last cycle: prompt, right answer, text, scores."""
    questions = {p.id: p.conversation[-1]["content"] for p in load_prompts(run.config()["data"])}
    rollouts = read_rollouts(run.rollouts(run.config()["cycles"]))
    lines = []
    for r in rollouts[:: max(1, len(rollouts) // count)][:count]:
        task = read_task(questions[r.prompt_id])
        lines.append(f"{questions[r.prompt_id]}   right: {' '.join(task.ways[task.right])}")
        lines.append(f"    {r.text!r}")
        lines.append(f"    self {r.self_scores}  judge {r.judge_scores}  reward {r.reward:.3f}")
    return "\n".join(lines)


def many_seeds(seeds: Sequence[int], full: bool) -> None:
    """Two at a time; then mean and 95 % interval over seeds (Student's t)."""

    def run(seed: int) -> None:
        log_file = Path(f"runs/demo/log-{seed}.txt")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "a") as log:
            line = [sys.executable, "-m", "miniature.demo", "--seed", str(seed)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*line, *["--full"][:full]], stdout=log, stderr=log,
                                  env=one_thread)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"error: seed {seed} failed; {log_file} says why")
        print(f"seed {seed} is done ({log_file})", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, seeds))
    out = Path("report/demo-seeds")
    shown = models(run_names(full))
    report([results_folder(seed) for seed in seeds], out, shown)
    show(seeds, out, shown)


def main(seed: int = 0, seeds: tuple[int, ...] = (), full: bool = False) -> None:
    """Run the demo.

    Args:
        seed: of the world's prompts, the base model and the runs.
        seeds: several, for a table with intervals over them (2 at least).
        full: with SEE from the base model without latent ability.
    """
    if len(seeds) == 1:
        raise SystemExit("error: --seeds takes two seeds at least; for one, --seed")
    many_seeds(seeds, full) if seeds else one_seed(seed, full)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
