"""The paper in miniature, offline, in minutes on two CPU cores (make demo).

    python -m miniature.demo --seed 0              one seed
    python -m miniature.demo --seed 0 --full       (make demo-full) with SEE from a base model whose
                                                   scores say nothing of the answer
    python -m miniature.demo --seeds 0 1 2 3 4 --full      a table over seeds

Runs the project's own commands, trainings two at a time: the base model (base_model.py); SEE, GRPO
alone with SEE's window, steps and batches, and Adapted RLCR, all at 2,400 sample-passes (cycle.py,
as in the paper's run); four answers of a number of checkpoints to each test prompt (evaluate.py);
tables and figures (report.py, kinds.py). Each command goes on where a killed one stopped; what is
finished is not done again, unless the recipe of the base model has changed. Everything lies in
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
from statistics import mean

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
# What the demo shows of the report: label -> table's file, column, and which of a model's rows if
# there are several.
MAIN = "tables-1-and-2-quality-and-calibration"
PREDICTORS = "calibration-beside-predictors-that-know-less"
WITHIN = "telling-answers-apart-by-quality"
USES = "uses"
SENSITIVITY = "does-the-score-depend-on-the-answer"
ERRORS = "where-the-error-comes-from-by-attribute"
SHOWN = {
    "well-formed": (MAIN, "well-formed"),
    "quality": (MAIN, "quality"),
    "calibration": (MAIN, "calibration"),
    "  of the best constant": (PREDICTORS, "test constant"),
    "  of the prompt's other answers": (PREDICTORS, "other samples"),
    "pairs within prompts": (WITHIN, "within: accuracy"),
    "best of 4 by its own scores": (USES, "by self-evaluation", ("use", "best of 4: quality")),
    "  at random": (USES, "random", ("use", "best of 4: quality")),
    "  by the judge": (USES, "oracle", ("use", "best of 4: quality")),
    "another prompt's answer": (SENSITIVITY, "another prompt's answer"),
    "half of the answer": (SENSITIVITY, "half of the answer"),
    "correlation, correctness": (ERRORS, "correlation", ("attribute", "correctness")),
}


def command(title: str, *words: object, name: str = "", log: object = None) -> None:
    """Run one of the project's commands and say how long it took; with `name` each line that it
    prints begins with that. SystemExit if it fails."""
    start = f"{name}: " if name else ""
    print(f"\n{start}== {title}", flush=True)
    started = time.perf_counter()
    script, *options = map(str, words)
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    pipes = {"stdout": log}
    if name:
        env.setdefault("OMP_NUM_THREADS", "1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *program, *options], env=env, **pipes) as process:
        for line in process.stdout or ():
            print(f"{start}{line}", end="", flush=True)
    if process.returncode:
        raise SystemExit(f"error: {script} ended with {process.returncode}; see its message above")
    print(f"{start}== {title}: {time.perf_counter() - started:.0f} s", flush=True)


def two_at_a_time(commands: Sequence[Sequence[object]]) -> None:
    """`commands`: name, title and words of each. A failure is raised when all have ended."""
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(command, title, *words, name=name) for name, title, *words in commands]
    for end in ends:
        end.result()


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
    two_at_a_time([
        (folder.name, "base model: pretraining on the miniature's world",
         "miniature.base_model", "--seed", seed, flag)
        for flag, folder in (("--latent", base_folder(seed)),
                             ("--no-latent", base_folder(seed, latent=False)))[: 1 + full]
    ])  # fmt: skip
    bases = {name: base_folder(seed, latent=name != "no-latent") for name in names}
    two_at_a_time([
        (name, RUNS[name][0], "cycle.py",
         "--name", run_folder(name, seed).path.relative_to("runs"), "--model", bases[name],
         "--data", bases[name] / "train.jsonl", "--seed", 42 + seed, *RUNS[name][1])
        for name in names
    ])  # fmt: skip
    runs = {name: run_folder(name, seed) for name in names}
    evaluate(base_folder(seed), runs, results_folder(seed))
    out = Path(f"report/demo-{seed}")
    report([results_folder(seed)], out, models(names), runs["see"])
    print(f"\nRollouts of SEE's last cycle\n\n{some_rollouts(runs['see'])}")
    show([seed], out, names)


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


def show(seeds: Sequence[int], out: Path, names: Sequence[str]) -> None:
    shown = models(names)
    by_kind = kinds.table([load_evaluation(results_folder(s)) for s in seeds], shown)
    on_window = ", ".join(
        f"{name} {window_quality(name, seeds):.3f}" for name in names if name != "rlcr"
    )
    print(
        f"\n512 test prompts x {SAMPLES} answers, temperature 0.8, after 2,400 sample-passes, "
        f"seed {', '.join(map(str, seeds))}\n\n{table(out, shown)}\n\n"
        f"quality on the window in the last cycle: {on_window}\n\n{by_kind}\n\n"
        f"Figure 2: {out}/figure2.png; all tables: {out}/report.html"
    )


def window_quality(run: str, seeds: Sequence[int]) -> float:
    """Mean quality of a run's judged rollouts in its last cycle, over seeds."""
    return mean(mean(r.quality for r in run_folder(run, seed).last_cycle()) for seed in seeds)


def table(out: Path, models: Sequence[str]) -> str:
    """The rows of SHOWN from the report's CSV files, a column for each model, with the ends of the
    95 % intervals."""
    lines = [f"{'':<32}" + "".join(f"{model:>24}" for model in models)]
    for label, (name, column, *rows) in SHOWN.items():
        frame = pandas.read_csv(out / "csv" / f"{name}.csv")
        for key, value in rows:
            frame = frame[frame[key] == value]
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
    """Each seed; then means and 95 % intervals over seeds (Student's t)."""
    for seed in seeds:
        one_seed(seed, full)
    out, names = Path("report/demo-seeds"), run_names(full)
    report([results_folder(seed) for seed in seeds], out, models(names))
    show(seeds, out, names)


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
