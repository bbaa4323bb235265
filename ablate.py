"""Variants of the method beside the method: train, evaluate, one table and one forest plot.

    python ablate.py --list
    python ablate.py --variants no_mask random_selection --seeds 0 1 2 3 4
    python ablate.py --variants no_mask --preset small --test FILE --options="--rl_steps 4"

A variant is a file of ablations/; "see" is the method itself, which is always trained as the
reference, unless --against names a variant. For each seed all models answer the same test prompts.
Each run is a process of its own with one thread, --jobs of them at a time. Runs go to
runs/ablate-NAME/, answers to results/ablate-NAME/, the tables, the plot and each process's output
to report/ablate-NAME/.

The same command goes on where a killed one stopped, and so does one with more variants or seeds.
What is finished is not done again, also when sources have changed since: the tables then say which.
A variant that fails is named at the end, and the others go on.
"""

import ast
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from evaluation import variants
from evaluation.results import load_evaluation
from evaluation.table import Results
from storage.data import load_prompts
from storage.files import read_json, write_text
from storage.hub import data_file
from storage.lock import locked
from storage.options import Count, Options
from storage.progress import progress
from storage.record import read_rollouts
from storage.run_folder import EvaluationFolder, RunFolder

ROOT = Path(__file__).parent
METHOD, BASE, BENCHMARK = "see", "base", "test"
SAMPLES = 4  # answers to each test prompt
# What the models that are compared must have been trained with alike, because evaluate.py asks all
# of them in one way; the prompts too.
ALIKE = ("judge", "prompt_tokens", "sampling", "use_references")


@dataclass(frozen=True)
class Command(Options):
    """Train variants of the method, evaluate them, and compare them with the method."""

    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the variants, what each tests, and where it was run, and stop."""
    variants: tuple[str, ...] = ()
    """Which variants, by the names that --list prints."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the runs; with a tiny preset of the miniature's base model too."""
    against: str = METHOD
    """The model that the others are compared with."""
    preset: str = "tiny"
    """cycle.py's preset; a tiny one trains the base model models/tiny-SEED, made where missing."""
    options: str = ""
    """Further options of every cycle.py, written --options="--model DIR --cycles 5"; {seed} in it
    becomes the seed. A variant's own options come after them."""
    test: str = ""
    """Prompt file for the evaluation, {seed} as above, that shares no prompt with the training
    data; empty: with a tiny preset models/tiny-SEED/test.jsonl."""
    evaluation: str = ""
    """Further options of every evaluate.py, such as --evaluation="--limit 200"."""
    name: str = ""
    """Name of this comparison's folders; empty: the preset's. Other options, another name."""
    jobs: Count = 2
    """Processes at a time."""

    @property
    def out(self) -> Path:
        return Path("report") / self.title

    @property
    def title(self) -> str:
        return f"ablate-{self.name or self.preset}"

    @property
    def models(self) -> list[str]:
        """Of all runs, the reference first."""
        return list(dict.fromkeys([self.against, *self.variants]))

    @property
    def miniature(self) -> bool:
        return self.preset.startswith("tiny") and "--model" not in shlex.split(self.options)

    def base(self, seed: int) -> Path:
        """Of the miniature."""
        return Path(f"models/tiny-{seed}")

    def tag(self, seed: int) -> str:
        """The seed in the names of folders, with the recipe of the miniature's base model, of which
        another one makes another run."""
        recipe = self.base(seed) / "recipe.json"
        known = self.miniature and recipe.is_file()
        return f"{seed}-{read_json(recipe)['hash'][:6]}" if known else str(seed)

    def run(self, variant: str, seed: int) -> RunFolder:
        return RunFolder(Path("runs") / self.title / f"{variant}-{self.tag(seed)}")

    def results(self, seed: int) -> EvaluationFolder:
        return EvaluationFolder(Path("results") / self.title / self.tag(seed))

    def words(self, variant: str, seed: int) -> list[str]:
        """Options of cycle.py or a variant of it."""
        name = self.run(variant, seed).path.relative_to("runs")
        words = ["--preset", self.preset, "--name", str(name), "--seed", str(42 + seed)]
        words += ["--keep_checkpoints", "1"]
        if self.miniature:
            words += ["--model", str(self.base(seed))]
            words += ["--data", str(self.base(seed) / "train.jsonl")]
        return words + shlex.split(self.options.replace("{seed}", str(seed)))

    def test_file(self, seed: int) -> str:
        if self.test:
            return self.test.replace("{seed}", str(seed))
        return str(self.base(seed) / "test.jsonl")


def known() -> dict[str, Path]:
    """The method's and the variants' files by name."""
    files = sorted((ROOT / "ablations").glob("*.py"))
    return {METHOD: ROOT / "cycle.py"} | {p.stem: p for p in files if p.stem != "__init__"}


def check(command: Command) -> None:
    """Raises ValueError."""
    if not command.variants:
        raise ValueError("no variant is given; --variants NAME, of those that --list prints")
    if unknown := [v for v in command.models if v not in known()]:
        raise ValueError(f"there is no variant {unknown[0]}; --list prints those that there are")
    if not (command.test or command.miniature):
        raise ValueError("give a prompt file to --test; only the miniature has one of its own")
    if sorted({*command.seeds}) != sorted(command.seeds) or min(command.seeds, default=-1) < 0:
        raise ValueError("--seeds needs one seed at least, each once and not below 0")


# --------------------------------------------------------------------------------------------------
# The runs


class FailedError(Exception):
    """A process that ended badly; the message names its log."""


def start(program: Sequence[str], words: Sequence[str], log: Path) -> None:
    """Run one of the project's programs with one thread. Raises FailedError."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        done = subprocess.run([sys.executable, *program, *words], stdout=f, stderr=f,
                              env={**os.environ, **one})  # fmt: skip
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["(no output)"])[-1]
        raise FailedError(f"ended with {done.returncode}: {last} ({log})")


def make_base(command: Command, seed: int) -> None:
    log = command.out / "logs" / f"base-{seed}.txt"
    module, words = ["-m", "miniature.base_model"], ["--seed", str(seed)]
    start(module, words, log)
    if "no_latent" in command.models:
        start(module, [*words, "--no-latent"], log)


def finished(command: Command, variant: str, seed: int) -> bool:
    """Whether a run has its last checkpoint, and was made with these options."""
    run = command.run(variant, seed)
    if not (run.config_file.is_file() and run.env_file.is_file()):
        return False
    last = run.checkpoint(run.config()["cycles"])
    same = read_json(run.env_file, list)[-1]["command"][1:] == command.words(variant, seed)
    return same and last.is_dir()


def train(command: Command, variant: str, seed: int) -> None:
    path = known()[variant]
    program = [str(path)] if variant == METHOD else ["-m", f"ablations.{path.stem}"]
    log = command.out / "logs" / f"{variant}-{seed}.txt"
    start(program, command.words(variant, seed), log)


def evaluate(command: Command, seed: int) -> list[str]:
    """All of a seed's models that are trained, in one evaluate.py, so that all answer the same
    prompts, written as the reference's were. Returns the models that had to be left out, in words.
    Raises FailedError or ValueError."""
    trained = [v for v in command.models if finished(command, v, seed)]
    if command.against not in trained:
        raise FailedError(f"there is no {command.against} to compare with")
    config = command.run(command.against, seed).config()
    test, data = command.test_file(seed), config["data"]
    both = {p.id for p in load_prompts(data_file(test))} & {
        p.id for p in load_prompts(data_file(data))
    }
    if both:
        raise FailedError(f"{test} and {data} share {len(both)} prompts; take them out of the test")
    models, other = [f"{BASE}={config['model']}"], []
    for variant in trained:
        run = command.run(variant, seed)
        if differ := unlike(run, command.run(command.against, seed)):
            other.append(f"{variant} was trained with another {differ}; evaluate it by hand")
        else:
            models.append(f"{variant}={run.checkpoints()[-1]}")
    words = [
        "--models", *models, "--benchmarks", f"{BENCHMARK}={test}", "--stages", "answers",
        "sensitivity", "--name", str(command.results(seed).path.relative_to("results")),
        "--samples", SAMPLES, "--seed", 42 + seed, "--dtype", config["policy"]["dtype"],
    ]  # fmt: skip
    for name in ("judge", "template", "few_shot", "prompt_tokens", "sampler", "sample_rows"):
        words += [f"--{name}", config[name]]
    for name, value in config["sampling"].items():
        words += [f"--sampling.{name}", value]
    words += [] if config["use_references"] else ["--no-use-references"]
    words += shlex.split(command.evaluation)
    log = command.out / "logs" / f"evaluation-{seed}.txt"
    start([str(ROOT / "evaluate.py")], list(map(str, words)), log)
    return other


def unlike(run: RunFolder, reference: RunFolder) -> str | None:
    """What forbids to evaluate two runs in one way."""
    for name in ALIKE:
        if run.config()[name] != reference.config()[name]:
            return name
    theirs, ours = (
        {r.prompt_id: r.prompt_ids for r in read_rollouts(x.rollouts(1))} for x in (reference, run)
    )
    both = theirs.keys() & ours.keys()
    return "prompt template" if any(theirs[p] != ours[p] for p in both) else None


def run(command: Command) -> tuple[list[int], list[str]]:
    """(seeds that are evaluated, what failed, in words). Seed by seed, --jobs at a time."""
    seeds, failed = list(command.seeds), []
    pool = ThreadPoolExecutor(command.jobs)

    def attempt(title: str, bar, job: Callable, *words: object) -> bool:
        started, done = time.perf_counter(), True
        try:
            failed.extend(f"{title}: {problem}" for problem in job(command, *words) or ())
        except (FailedError, ValueError, OSError) as error:
            failed.append(f"{title}: {error}")
            done = False
        seconds = f"{time.perf_counter() - started:.0f} s"
        bar.write(f"{title}: {seconds}{'' if done else ', failed'}")
        bar.update()
        return done

    def of_seed(title: str, bar, seed: int, trainings: list[Future]) -> bool:
        for training in trainings:  # which have all been started before
            training.result()
        return attempt(title, bar, evaluate, seed)

    try:
        if command.miniature:
            with progress(total=len(seeds), desc="base models") as bar:
                made = [pool.submit(attempt, f"base model {s}", bar, make_base, s) for s in seeds]
                seeds = [s for s, job in zip(seeds, made, strict=True) if job.result()]
        todo = {s: [v for v in command.models if not finished(command, v, s)] for s in seeds}
        count = sum(map(len, todo.values())) + len(seeds)
        with progress(total=count, desc="runs and evaluations") as bar:
            jobs = {}
            for s in seeds:
                trainings = [pool.submit(attempt, f"{v}, seed {s}", bar, train, v, s)
                             for v in todo[s]]  # fmt: skip
                jobs[s] = pool.submit(of_seed, f"evaluation, seed {s}", bar, s, trainings)
            return [s for s, job in jobs.items() if job.result()], failed
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# What is printed


def compare(command: Command, seeds: Sequence[int]) -> str:
    """Tables and plot of these seeds, as text. Raises ValueError."""
    evaluations = [load_evaluation(command.results(s).path) for s in seeds]
    there = {model for e in evaluations for _, model in e.cells}
    trained = {m: [command.run(m, s) for s in seeds if finished(command, m, s)]
               for m in command.models if m in there}  # fmt: skip
    models = [m for m, folders in trained.items() if folders]
    results = Results(evaluations, (BASE, *models), command.against)
    rows = variants.differences(results, models[1:])
    lines = {m: None if m == METHOD else code_lines(known()[m]) for m in models}
    tables = [variants.table(results, rows), variants.levels(results)]
    tables.append(variants.runs({m: trained[m] for m in models}, lines))
    variants.draw(results, rows, command.out / "forest")
    for table in tables:
        write_text(command.out / f"{table.file_name}.csv", table.csv())
    text = "\n\n\n".join(table.text() for table in tables) + "\n"
    write_text(command.out / "tables.txt", text)
    return text


def code_lines(path: Path) -> int:
    """Without docstring and empty lines."""
    return sum(bool(x.strip()) for x in path.read_text().partition('"""\n\n')[2].splitlines())


def listing() -> str:
    """What each variant tests, and the evaluations that it is in."""
    there: dict[str, dict[str, int]] = {}
    for path in sorted(Path("results").glob("ablate-*/*")):
        for (_, model), cell in EvaluationFolder(path).cells().items():
            if "prompts" in cell.summary():  # all answers are on file
                counts = there.setdefault(model, {})
                counts[path.parent.name] = counts.get(path.parent.name, 0) + 1
    lines = []
    for name, path in known().items():
        said = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
        said = "The method itself (Algorithm 1)." if name == METHOD else said
        where = [f"{n} seed(s) in {title}" for title, n in there.get(name, {}).items()]
        text = f"{said} [{'run: ' + ', '.join(where) if where else 'not run'}]"
        lines.append(textwrap.fill(text, 100, initial_indent=f"{name:<24}",
                                   subsequent_indent=" " * 24))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        if command.show:
            return print(listing())
        check(command)
        with locked(command.out):
            seeds, failed = run(command)
            if seeds:
                print(compare(command, seeds))
                print(f"written to {command.out}/")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    if failed:
        raise SystemExit("failed:\n" + "\n".join(f"  {line}" for line in failed))


if __name__ == "__main__":
    main()
