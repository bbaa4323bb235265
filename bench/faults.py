"""Faults at large: kills, full disks, broken files, a secret, a clock that jumps. By hand, minutes.

    python bench/faults.py kills            # 30 kills of a run of two ranks, a judge that fails
    python bench/faults.py disks            # a disk that fills at a random byte (Linux, as root)
    python bench/faults.py fuzz             # ten minutes of broken files and options
    python bench/faults.py secret           # a key is in no file and in no message
    python bench/faults.py clock            # a wall clock that jumps by hours

Each runs a tiny model that it makes on the spot against a judge on loopback, prints what it saw and
ends with 1 if a promise was broken.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import REQUESTS, free_port, make_parrot, make_tokenizer, small_args  # noqa: E402
from fake_judge import FAULTS, FakeJudge  # noqa: E402

import report  # noqa: E402
from backend.model_folder import check_weights  # noqa: E402
from config import Config, parse  # noqa: E402
from evaluation import judgements  # noqa: E402
from judging.ledger import read_attempts  # noqa: E402
from plan import prepare  # noqa: E402
from storage.data import load_prompts  # noqa: E402
from storage.run_folder import RunFolder  # noqa: E402


class Stage:
    """A folder with a model, prompts and a judge; runs of cycle.py in it."""

    def __init__(self, folder: Path, fail_share: float = 0.0, delay: float = 0.0, **options):
        self.folder, self.judge = folder, FakeJudge()
        make_parrot(folder / "model", make_tokenizer())
        data = folder / "prompts.jsonl"
        prompts = [f"{request} {k}" for request in REQUESTS for k in range(5)]
        data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        rng = random.Random(0)
        faults = [reply for _, reply in FAULTS if reply.delay < 1 and not reply.trickle]
        self.judge.fault = lambda: rng.choice(faults) if rng.random() < fail_share else None
        self.judge.delay = delay
        values = {"judge": "fake", "client.concurrency": 4, "client.backoff": 0.05,
                  "client.backoff_max": 0.2, "client.attempts": 12}  # fmt: skip
        self.args = small_args(folder / "model", data, **(values | options))

    def environment(self, **more: str) -> dict[str, str]:
        judge = {"OPENAI_BASE_URL": self.judge.url, "OPENAI_API_KEY": "none"}
        return {**os.environ, "OMP_NUM_THREADS": "1", **judge, **more}

    def launch(self, cwd: Path, ranks: int = 2, **more: str) -> subprocess.Popen:
        """torchrun in a session of its own; its output goes to cwd/launch.txt."""
        cwd.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                   "--master_port", free_port(), *self.args]  # fmt: skip
        with open(cwd / "launch.txt", "w") as log:
            return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT,
                                    env=self.environment(**more),
                                    start_new_session=True)  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def last_weights(run: RunFolder) -> str:
    return digest(run.checkpoints()[-1] / "model.safetensors")


def workers_of(launcher: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def finish(promises: dict[str, bool]) -> None:
    for promise, kept in promises.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    if not all(promises.values()):
        raise SystemExit(1)


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kills:
    """Kill a run of two ranks at random moments, in three ways, and start it again each time."""

    kills: int = 30
    """Kills before the run may finish."""
    share: float = 0.2
    """Share of the judge's requests that fail."""
    seed: int = 0
    """Seed of the moments and of the ways."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), self.share, 0.3, cycles=12, window=48, batch=12, rl_steps=4,
                          save_every=1)  # fmt: skip
            whole, killed = Path(folder) / "whole", Path(folder) / "killed"
            began = time.monotonic()
            assert stage.launch(whole).wait() == 0, (whole / "launch.txt").read_text()
            print(f"undisturbed: {time.monotonic() - began:.0f} s, "
                  f"{len(stage.judge.answered):,} judgements", flush=True)  # fmt: skip
            questions = set(stage.judge.answered)
            stage.judge.answered.clear()
            phases, slowest, at_risk = Counter(), 0.0, 0
            rng = random.Random(self.seed)
            for n in range(self.kills):
                way = ("all", "launcher", "SIGTERM")[n % 3]
                launcher = stage.launch(killed)
                time.sleep(rng.uniform(4, 14))
                if launcher.poll() is not None:
                    print(f"the run ended before kill {n + 1}; give it more cycles")
                    break
                workers = workers_of(launcher.pid)
                at_risk += stage.judge.in_flight if way != "SIGTERM" else 0
                phases[way, self.phase(RunFolder(killed / "runs" / "tiny"))] += 1
                began = time.monotonic()
                if way == "all":
                    os.killpg(launcher.pid, signal.SIGKILL)
                    for pid in workers:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                else:
                    launcher.send_signal(signal.SIGKILL if way == "launcher" else signal.SIGTERM)
                launcher.wait()
                while any(map(running, workers)):
                    time.sleep(0.05)
                slowest = max(slowest, time.monotonic() - began)
                print(
                    f"kill {n + 1}: {way}, gone after {time.monotonic() - began:.1f} s", flush=True
                )
            assert stage.launch(killed).wait() == 0, (killed / "launch.txt").read_text()[-3000:]
            for (way, phase), count in sorted(phases.items()):
                print(f"  {count:3} x {way:<9} in {phase}")
            runs = [RunFolder(f / "runs" / "tiny") for f in (whole, killed)]
            again = Counter(stage.judge.answered)
            twice = sum(count - 1 for count in again.values())
            kept = [Counter((r.cycle, *r.key) for r in run.all_rollouts()) for run in runs]
            print(f"judged twice {twice}; in flight when killed {at_risk}; slowest {slowest:.1f} s")
            same = last_weights(runs[0]) == last_weights(runs[1])
            finish({
                "weights are those of the undisturbed run": same,
                "no rollout lost, none twice": kept[0] == kept[1] and max(kept[1].values()) == 1,
                "the judge was asked the same questions": set(again) == questions,
                "paid twice at most what was in flight": twice <= at_risk,
                "every process gone within 20 s": slowest < 20,
                "metrics of every step once": self.steps(runs[0]) == self.steps(runs[1]),
            })  # fmt: skip

    @staticmethod
    def phase(run: RunFolder) -> str:
        lines = run.metrics() if run.metrics_file.exists() else []
        return f"{lines[-1]['phase']} (last line)" if lines else "set-up"

    @staticmethod
    def steps(run: RunFolder) -> list[tuple]:
        return [(m["cycle"], m["phase"], m["step"]) for m in run.metrics()
                if m["phase"] in ("rl", "sft", "cycle")]  # fmt: skip


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disks:
    """Fill the disk (a tmpfs) at a random moment of a run, leaving it a few bytes; then give it
    room again. The same with a disk that is read-only from the start."""

    trials: int = 6
    """Disks."""
    seed: int = 0
    """Seed of moments and bytes."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), cycles=4, save_every=1)
            whole = Path(folder) / "whole"
            assert stage.launch(whole, 1).wait() == 0, (whole / "launch.txt").read_text()
            expected = last_weights(RunFolder(whole / "runs" / "tiny"))
            promises, rng = {}, random.Random(self.seed)
            for n in range(self.trials + 1):
                mount = Path(folder) / f"disk_{n}"
                (mount / "runs").mkdir(parents=True)
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs",
                                mount / "runs"], check=True)  # fmt: skip
                try:
                    what = f"disk {n}" if n < self.trials else "read-only disk"
                    code, said = self.spoilt_run(stage, mount, n == self.trials, rng)
                    errors = re.findall(r"^error: .*$", said, re.MULTILINE)
                    print(f"{what}: {errors or 'the run was quicker'}", flush=True)
                    told = len(errors) == 1 and "Traceback" not in before_torchrun(said)
                    promises[f"{what}: one sentence"] = told if code else not errors
                    self.remount(mount, "rw")
                    (mount / "runs" / "filler").unlink(missing_ok=True)
                    code = stage.launch(mount, 1).wait()
                    same = code == 0 and last_weights(RunFolder(mount / "runs/tiny")) == expected
                    promises[f"{what}: with room it ends as the undisturbed run"] = same
                    if not same:
                        print((mount / "launch.txt").read_text()[-2000:])
                finally:
                    subprocess.run(["umount", "-l", mount / "runs"], check=True)
            finish(promises)

    def spoilt_run(
        self, stage: Stage, mount: Path, read_only: bool, rng: random.Random
    ) -> tuple[int, str]:
        """Exit code and output of a launch whose disk is read-only, or fills up."""
        if read_only:
            self.remount(mount, "ro")
        launch = stage.launch(mount, 1)
        if not read_only:
            while not RunFolder(mount / "runs" / "tiny").metrics_file.exists():
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 3))
            free = shutil.disk_usage(mount / "runs").free - rng.randrange(60_000)
            with contextlib.suppress(OSError):  # the run was quicker, and the disk is full
                (mount / "runs" / "filler").write_bytes(bytes(max(0, free)))
        return launch.wait(), (mount / "launch.txt").read_text()

    @staticmethod
    def remount(mount: Path, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", mount / "runs"], check=True)


def before_torchrun(said: str) -> str:
    """Output without torchrun's own report of a failed worker."""
    return said.partition("E1")[0].partition("torch.distributed.elastic")[0]


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fuzz:
    """Break files and options at random: a ValueError of one sentence that names the file, or
    success; nothing on file changes."""

    seconds: float = 600.0
    """How long."""
    seed: int = 0
    """Seed of the mutations."""

    def run(self) -> None:
        os.environ |= {"OPENAI_API_KEY": "none"}
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), cycles=1)
            assert stage.launch(Path(folder), 1).wait() == 0
            os.chdir(folder)
            os.environ["OPENAI_BASE_URL"] = stage.judge.url
            targets = self.targets(Path(folder), stage)
            counts, broken = Counter(), []
            rng, end = random.Random(self.seed), time.monotonic() + self.seconds
            while time.monotonic() < end:
                name, file, work = rng.choice(targets)
                original = file.read_bytes() if file else b""
                if file:
                    file.write_bytes(mutated(original, rng))
                spoilt = file.read_bytes() if file else b""
                state = {p: digest(p) for p in Path("runs").rglob("*") if p.is_file()}
                outcome, text = self.outcome(work, rng)
                changed = [str(p) for p, d in state.items() if not p.exists() or digest(p) != d]
                named = not file or file.name in text or str(file.parent) in text
                if outcome == "error" and not named:
                    outcome = "file not named"
                if changed:
                    outcome, text = "overwritten", ", ".join(changed)
                counts[name, outcome] += 1
                if outcome not in ("error", "fine"):
                    broken.append((name, outcome, text, spoilt[:200]))
                if file:
                    file.write_bytes(original)
            for (name, outcome), count in sorted(counts.items()):
                print(f"{count:6} {name:<28} {outcome}")
            shown = {(name, outcome): example for name, outcome, *example in broken}  # one of each
            for key, example in shown.items():
                print(*key, *example, sep="\n    ")
            finish({f"{sum(counts.values()):,} cases: one sentence or success": not broken})

    @staticmethod
    def outcome(work: Callable, rng: random.Random) -> tuple[str, str]:
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                work(rng)
        except ValueError as error:
            text = str(error)
            return ("error" if text and "\n" not in text.strip() else "not a sentence"), text
        except SystemExit as stop:  # tyro's own refusal of an option
            return ("error" if stop.code else "fine"), "--"
        except BaseException:
            return "traceback", traceback.format_exc()[-1500:]
        return "fine", ""

    @staticmethod
    def targets(folder: Path, stage: Stage) -> list[tuple[str, Path | None, Callable]]:
        """(name, the file that is broken, what reads it)."""
        config = parse([str(x) for x in stage.args[1:]])
        run = RunFolder(Path("runs/tiny"))
        model, data = folder / "model", folder / "prompts.jsonl"

        def options(rng: random.Random) -> None:
            values = ("0", "-1", "nan", "inf", "1e400", "x", "", "None", "999999999999", "0.5")
            names = {f.name for f in dataclasses.fields(Config)} - {"name", "preset"}
            nested = """grpo.lr sft.batch sampling.top_k sampling.top_p client.deadline sft.warmup
                policy.head_tokens reward.gamma engine.kv_cache_gb endpoint.request
                endpoint.base_url""".split()
            spoilt = [
                f"--{rng.choice(sorted(names) + nested)}",
                rng.choice(values),
                "--name",
                "other",
            ]
            prepare(parse([*[str(x) for x in stage.args[1:]], *spoilt]))

        def judged(rng: random.Random) -> None:
            judgements.run(judgements.Command((run.path,)))

        def reported(rng: random.Random) -> None:
            report.run(report.Command(runs=(run.path,), out=folder / "out"))

        return [
            ("prompts", data, lambda rng: load_prompts(data)),
            ("config.json", model / "config.json", lambda rng: prepare(config)),
            ("tokenizer.json", model / "tokenizer.json", lambda rng: prepare(config)),
            ("tokenizer_config.json", model / "tokenizer_config.json", lambda rng: prepare(config)),
            ("weights", model / "model.safetensors", lambda rng: check_weights(model)),
            ("options", None, options),
            ("run's config.json", run.config_file, lambda rng: prepare(config)),
            ("run's window.json", run.window_file, lambda rng: prepare(config)),
            (
                "run's judge cache",
                run.judge_cache,
                lambda rng: list(read_attempts(run.judge_cache)),
            ),
            ("run's rollouts, judgements", run.rollouts(1), judged),
            ("run's rollouts, report", run.rollouts(1), reported),
            ("run's metrics", run.metrics_file, reported),
        ]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled, emptied, or with another value somewhere."""
    data = bytearray(content)
    place = rng.randrange(len(data))
    way = rng.randrange(7)
    if way == 0:
        return bytes(data[:place])
    if way == 1:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if way == 2:
        return b""
    if way == 3:
        return bytes(data[:place] + data[: rng.randrange(200)] + data[place:])
    if way == 4:
        return rng.randbytes(rng.randrange(300))
    if way == 5:
        return bytes(data[:place] + data[place + rng.randint(1, 40) :])
    values = (b"null", b"-1", b'"x"', b"[]", b"{}", b"true", b"1e999")
    numbers = list(re.finditer(rb'(?<=: )(-?\d+(?:\.\d+)?|true|false|null|"[^"]*")', content))
    if not numbers:
        return bytes(data)
    at = rng.choice(numbers)
    return content[: at.start()] + rng.choice(values) + content[at.end() :]


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """Run with a key in the environment, wandb offline and a judge that quotes the key in its
    errors; then look for it everywhere."""

    def run(self) -> None:
        key = "sk-canary-" + os.urandom(12).hex()
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), cycles=1)
            more = {"OPENAI_API_KEY": key, "WANDB_MODE": "offline", "WANDB_API_KEY": key}
            stage.args += ["--wandb"]
            ended = {"run": stage.launch(Path(folder), 1, **more).wait() == 0}
            quoting = json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}})
            for status in (400, 401, 404, 500):
                reply = dataclasses.replace(FAULTS[0][1], status=status, body=quoting)
                stage.judge.replies = [reply] * 1000
                stage.args[stage.args.index("--name") + 1] = f"refused_{status}"
                ended[f"HTTP {status}"] = (
                    stage.launch(Path(folder) / str(status), 1, **more).wait() != 0
                )
            files = [p for p in Path(folder).rglob("*") if p.is_file()]
            holding = [p for p in files if key.encode() in p.read_bytes()]
            print(
                f"looked into {len(files):,} files, {sum(p.stat().st_size for p in files):,} bytes"
            )
            print(*holding, sep="\n")
            finish({
                "the run ended well, and refusals ended theirs": all(ended.values()),
                "the key is in no file, log or message": not holding,
            })  # fmt: skip


JUMP = """
import random, time
real, offset, rng = time.time, 0.0, random.Random(0)
def jumping():
    global offset
    if rng.random() < 0.05:
        offset = rng.uniform(-86400, 86400)
    return real() + offset
time.time = jumping
"""


@dataclass(frozen=True)
class Clock:
    """Run under a wall clock that jumps by up to a day, forth and back, within one process."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), 0.2, cycles=1)
            (Path(folder) / "jump").mkdir()
            (Path(folder) / "jump" / "sitecustomize.py").write_text(JUMP)
            calm, jumping = Path(folder) / "calm", Path(folder) / "jumping"
            codes = [stage.launch(calm, 1).wait(),
                     stage.launch(jumping, 1, PYTHONPATH=f"{folder}/jump").wait()]  # fmt: skip
            runs = [RunFolder(f / "runs" / "tiny") for f in (calm, jumping)]
            spent = [m["seconds"]["wall"] for m in runs[1].metrics()]
            finish({
                "both runs end well": codes == [0, 0],
                "the same weights": last_weights(runs[0]) == last_weights(runs[1]),
                "no step took a negative time, or a day": all(0 <= s < 3600 for s in spent),
            })  # fmt: skip


if __name__ == "__main__":
    shutil.which("pgrep") or sys.exit("error: this needs pgrep (procps)")
    tyro.cli(Kills | Disks | Fuzz | Secret | Clock, description=__doc__).run()
