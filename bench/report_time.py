"""How long tables, figures and the page take from stored results of 805 prompts x 2 models.

    python bench/report_time.py

The results are made up at random: they say nothing but how much there is to compute.
"""

import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from config import CellConfig  # noqa: E402
from prompts import render_response  # noqa: E402
from storage.record import Rollout, answer_id  # noqa: E402

PROMPTS, MODELS = 805, ("base", "see")


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"Question {k}?", "id": str(k)}) + "\n"
                                for k in range(PROMPTS)))  # fmt: skip
        window = root / "window" / "rollouts"
        window.mkdir(parents=True)
        write(window / "cycle_01.jsonl", [dataclasses.asdict(answer(rng, k)) for k in range(160)])
        for model in MODELS:
            path = root / "results" / "alpaca_eval" / model
            path.mkdir(parents=True)
            cell = CellConfig(model="m", data=str(data), name="x", training_run=str(window.parent))
            (path / "config.json").write_text(json.dumps(dataclasses.asdict(cell)))
            rollouts = [answer(rng, k) for k in range(PROMPTS)]
            write(path / "rollouts.jsonl", [dataclasses.asdict(r) for r in rollouts])
            for scorer in MODELS:
                write(path / f"digits_{scorer}.jsonl",
                      [line(r, scores=r.self_scores, free=digits(rng), judge=digits(rng),
                            own=digits(rng)) for r in rollouts])  # fmt: skip
            write(path / "sensitivity.jsonl", [
                line(r, as_it_is=scores(rng), another=scores(rng), cut=scores(rng))
                for r in rollouts
            ])  # fmt: skip
            write(path / "scores_other.jsonl", [line(r, draw=0, scores=scores(rng))
                                                for r in rollouts])  # fmt: skip
            write(path / "preferences.jsonl", [
                line(r, result=rng.choice((-1, 0, 1)), shown_first=1, shown_second=1,
                     longer_by=rng.randrange(-900, 900)) for r in rollouts
            ])  # fmt: skip
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "report.py", root / "results", "--out",
                            root / "report"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
            print(f"{time.perf_counter() - began:.1f} s, imports and page included")


def scores(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(10) for _ in range(5))


def digits(rng: random.Random) -> list[list[float]]:
    return [[rng.uniform(-5, 0) for _ in range(10)] for _ in range(5)]


def answer(rng: random.Random, prompt: int) -> Rollout:
    own, judge = scores(rng), scores(rng)
    text = "word " * rng.randrange(20, 300)
    return Rollout(
        cycle=0, step=1, prompt_id=str(prompt), sample=0, seed=0, prompt_ids=(1,),
        response_ids=(1, 2, 3, 4, 5), text=render_response(text, own), finish_reason="stop",
        answer=text, self_scores=own, score_positions=(0, 1, 2, 3, 4), judge_scores=judge,
        judge_model="made up", reward=0.0, quality=0.0, calibration=0.0, weight_version="v",
    )  # fmt: skip


def line(r: Rollout, **values: object) -> dict:
    return {"prompt_id": r.prompt_id, "sample": r.sample, "version": "v",
            "answer_id": answer_id(r), **values}  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
