"""What runs and evaluations leave on file, read again: answers and judgements of several models.

A source is a run's folder runs/NAME, an evaluation's results/NAME (a source for each cell
BENCHMARK/MODEL) or one of its cells, or a file that `export` wrote: one file from which every
figure can be computed again, and which `--judge replay:FILE` reads."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import buffer
import metrics
from buffer import Rollout
from files import write_text
from ledger import LEDGER, read_lines, read_tries


@dataclass
class Source:
    """Answers and judgements of one model on one prompt file."""

    name: str
    config: dict
    rollouts: list[Rollout]
    tries: list[dict]  # lines of the ledger

    def table(self) -> dict[str, metrics.Estimate]:
        rows = [(r.prompt_id, r.self_scores, r.judge_scores) for r in self.rollouts]
        return metrics.summarise(rows, self.config["reward"]["gamma"])


def load(path: Path) -> list[Source]:
    """Raises ValueError for what is neither a run, a result nor an export."""
    if path.is_file():
        found: dict[str, Source] = {}
        for number, _, row in read_lines(path):
            try:
                kind, content = row["kind"], row["content"]
                source = found.setdefault(row["source"], Source(row["source"], {}, [], []))
                if kind == "config":
                    source.config = content
                elif kind == "rollout":
                    source.rollouts.append(buffer.from_row(content))
                else:
                    source.tries.append(content)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a line of an export ({error}); give a run's folder, or "
                    "a file made by judge.py --export"
                ) from None
        return list(found.values())
    if cells := sorted(path.glob("*/*/config.json")):
        return [source for cell in cells for source in load(cell.parent)]
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: neither a file nor a folder with a config.json; give runs/NAME, "
            "results/NAME, one of its BENCHMARK/MODEL, or a file made by --export"
        )
    ledger = path / LEDGER
    return [
        Source(
            str(path),
            json.loads((path / "config.json").read_text()),
            rollouts_of(path),
            list(read_tries(ledger)) if ledger.exists() else [],
        )
    ]


MODELS = "models.json"  # in results/NAME: an evaluation's models, the base first
WINDOW = "window.jsonl"  # in results/NAME: the base's scores for the window's answers
STRONGER = "stronger.jsonl"  # in results/NAME/BENCHMARK: judgements of a stronger model's answers


def scores_file(judge: str) -> str:
    """Where evaluate.py keeps a judge's further scores."""
    return f"scores_{re.sub(r'[^A-Za-z0-9.+-]', '_', judge)}.jsonl"


def rollouts_of(folder: Path) -> list[Rollout]:
    """All of a run's; of an evaluation's those of its newest weights, one for each sample, in an
    order that does not depend on which was finished first."""
    of_cycles = sorted((folder / "rollouts").glob("cycle_*.jsonl"))
    if of_cycles:
        return [r for path in of_cycles for r in buffer.read(path)]
    rows = buffer.read(folder / "rollouts.jsonl")
    newest = [r for r in rows if r.weight_version == rows[-1].weight_version]
    one_each = {(r.prompt_id, r.sample): r for r in newest}
    return sorted(one_each.values(), key=lambda r: r.key)


def first_cycle(run: Path) -> list[Rollout]:
    """The judged rollouts of a run's first cycle."""
    rollouts = buffer.read(run / "rollouts" / "cycle_01.jsonl")
    return [r for r in rollouts if r.judge_scores is not None]


def answer_id(r: Rollout) -> str:
    """Tells whether a line about an answer is about this very one."""
    return hashlib.blake2b(repr(r.response_ids).encode(), digest_size=6).hexdigest()


def export(sources: Sequence[Source], path: Path) -> None:
    """One file from which every figure can be computed again, and which replay:FILE reads."""
    lines = []
    for source in sources:
        rows = [("config", source.config)]
        rows += [("rollout", asdict(r)) for r in source.rollouts]
        rows += [("try", t) for t in source.tries]
        lines += [{"source": source.name, "kind": kind, "content": row} for kind, row in rows]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def metrics_until(checkpoint: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl up to one of its checkpoints."""
    _, cycle, *rest = checkpoint.name.split("_")  # cycle_NN, or cycle_NN_step_NNNNN in phase 1

    def before(m: dict) -> bool:
        if m["cycle"] != int(cycle) or not rest:
            return m["cycle"] <= int(cycle)
        return m["phase"] in ("rl", "setup") and m["step"] <= int(rest[1])

    lines = checkpoint.parent.parent / "metrics.jsonl"
    return [m for _, _, m in read_lines(lines) if before(m)] if lines.exists() else []
