"""The judge's way under load, measured against a server on loopback that misbehaves.

python bench/judging.py faults
    2,000 answers over two processes, 24 requests at once, a fifth of the requests failing in
    every way that tests/fake_judge.py knows; then the same again, killed halfway and restarted.
python bench/judging.py overlap --model DIR --data FILE
    One RL step's rollouts sampled alone, judged alone by a judge of 1 s latency, and both at
    once, which is what phase 1 does.
"""

import dataclasses
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_judge import FAULTS, FakeJudge  # noqa: E402

import rollout  # noqa: E402
from backend import parallel  # noqa: E402
from backend.sampler import choose_sampler, make_sampler  # noqa: E402
from config import SMALL  # noqa: E402
from judge import ask_all, make_judge  # noqa: E402
from judging.client import Background  # noqa: E402
from judging.endpoint import ClientConfig  # noqa: E402
from judging.heuristic import HeuristicJudge  # noqa: E402
from judging.ledger import read_attempts, render_totals  # noqa: E402
from plan import resolve, step_batches  # noqa: E402
from storage.logbook import Clock  # noqa: E402
from storage.run_folder import Folder  # noqa: E402


@dataclass(frozen=True)
class Faults:
    """A judge that fails, two processes, with and without a kill."""

    answers: int = 2000
    """Answers to judge, over both processes."""
    concurrency: int = 24
    """Requests at once, over both processes."""
    share: float = 0.2
    """Share of requests that fail."""
    latency: float = 0.1
    """Seconds that a judgement takes."""
    timeout: float = 2.0
    """Seconds after which a try is given up; the server's slowest faults take 3 and 20."""
    seed: int = 0
    """Seed of the faults."""

    def run(self) -> None:
        for kill in (False, True):
            print(f"\n{'killed halfway and started again' if kill else 'undisturbed'}")
            self._once(kill)

    def _once(self, kill: bool) -> None:
        server, rng = FakeJudge(), random.Random(self.seed)
        replies = [reply for _, reply in FAULTS]
        server.fault = lambda: rng.choice(replies) if rng.random() < self.share else None
        server.delay = self.latency
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            if kill:
                processes = self._start(folder, server.url)
                while len(server.answered) < self.answers / 2:
                    time.sleep(0.01)
                for p in processes:
                    p.kill()
                    p.wait()
            codes = [p.wait() for p in self._start(folder, server.url)]
            wall = time.monotonic() - began
            tries = list(read_attempts(Folder(Path(folder)).judge_cache))
            good = [t for t in tries if t["outcome"] == "ok"]
            asked = [t["request"]["messages"][1]["content"] for t in good]
            invented = sum(
                t["reply"] != server.judge({"messages": [{"content": question}]})
                for t, question in zip(good, asked, strict=True)
            )
            paid_twice = sum(n - 1 for n in Counter(server.answered).values())
            print(render_totals(tries))
            print(
                f"exit codes {codes}; {wall:.1f} s wall; requests at the server "
                f"{len(server.bodies):,}\n"
                f"of {self.answers:,} answers: lost {self.answers - len(set(asked))}, judged twice "
                f"on file {len(asked) - len(set(asked))}, invented {invented}, paid twice "
                f"{paid_twice}"
            )

    def _start(self, folder: str, url: str) -> list[subprocess.Popen]:
        env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
        options = [str(x) for x in (2, self.answers, self.concurrency, self.timeout)]
        script = [sys.executable, str(ROOT / "tests" / "judge_worker.py"), folder]
        env["PYTHONPATH"] = str(ROOT)
        return [
            subprocess.Popen([*script, str(rank), *options], env=env, stderr=subprocess.DEVNULL)
            for rank in range(2)
        ]


@dataclass(frozen=True)
class Overlap:
    """Sampling alone, judging alone, and both at once."""

    model: str
    """Hugging Face folder."""
    data: str
    """Prompt file."""
    batch: int = 16
    """Prompts of the step."""
    rollouts: int = 4
    """Rollouts per prompt."""
    sample_rows: int = 64
    """Rollouts sampled at once."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 24)
    """Judge requests at once; fewer make the judge slower."""
    latency: float = 1.0
    """Seconds that a judgement takes."""

    def run(self) -> None:
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(there, self.latency), daemon=True
        )
        server.start()
        os.environ |= {"OPENAI_BASE_URL": here.recv(), "OPENAI_API_KEY": "none"}
        config = dataclasses.replace(
            SMALL, model=self.model, data=self.data, window=self.batch, batch=self.batch,
            rl_steps=1, rollouts=self.rollouts, name="bench", sampler=choose_sampler("auto"),
            sample_rows=self.sample_rows,
        )  # fmt: skip
        setup = resolve(config)
        with parallel.process_group(), tempfile.TemporaryDirectory() as folder:
            sampler = make_sampler(
                config, setup.inputs.model, setup.inputs.tokenizer, "bfloat16", "base"
            )
            collect = Collect(config, setup, sampler, Path(folder))
            collect(HeuristicJudge())  # warm-up
            sampling, rollouts = collect(HeuristicJudge())
            answers = [r for r in rollouts if r.answer is not None]
            print(f"{len(rollouts)} rollouts, {len(answers)} of them well-formed; seconds")
            print(" at once  sampling   judging      both   / max   / sum")
            for k in self.concurrency:
                client = ClientConfig(concurrency=k)
                slow = dataclasses.replace(config, judge="slow", client=client)
                alone = make_judge(slow, Path(folder) / f"alone_{k}.jsonl")
                prompts = {p.id: p for p in setup.window}
                works = [alone.score(prompts[r.prompt_id].conversation, r.answer) for r in answers]
                began = time.perf_counter()
                names = [f"prompt {r.prompt_id}" for r in answers]
                Background().submit(ask_all(works, "judging alone", names)).result()
                judging = time.perf_counter() - began
                both, _ = collect(make_judge(slow, Path(folder) / f"both_{k}.jsonl"))
                print(
                    f"{k:8} {sampling:9.1f} {judging:9.1f} {both:9.1f} "
                    f"{both / max(sampling, judging):7.2f} {both / (sampling + judging):7.2f}"
                )
            sampler.close()


class Collect:
    """Lines 7-18 of Algorithm 1 for one step, timed."""

    def __init__(self, config, setup, sampler, folder: Path):
        self.config, self.setup, self.sampler, self.folder = config, setup, sampler, folder
        self.calls = 0

    def __call__(self, judge) -> tuple[float, list]:
        self.calls += 1
        c = self.config
        collector = rollout.Collector(
            sampler=self.sampler, judge=judge, tokenizer=self.setup.inputs.tokenizer,
            prompts={p.id: p for p in self.setup.window}, prompt_ids=self.setup.inputs.prompt_ids,
            rollouts=c.rollouts, seed=c.seed, params=c.sampling, reward=c.reward,
            use_references=False, background=Background(), clock=Clock(),
        )  # fmt: skip
        [batch] = step_batches(c, self.setup.window, 1)
        path = self.folder / f"rollouts_{self.calls}.jsonl"
        began = time.perf_counter()
        sampled = collector.sample(1, 1, batch, {}, path, self.sampler.weight_version)
        rollouts = collector.wait_for_judge(sampled)
        return time.perf_counter() - began, rollouts


def serve(pipe, latency: float) -> None:
    judge = FakeJudge()
    judge.delay = latency
    pipe.send(judge.url)
    time.sleep(10**6)


if __name__ == "__main__":
    tyro.cli(Faults | Overlap, description=__doc__).run()
