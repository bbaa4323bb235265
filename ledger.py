"""Every try at asking a judge, one line of JSON each, in a file that all ranks share: the cache,
the account and the evidence in one.

A line says what became of the try: "ok", or the reason why it does not count, with the raw reply,
tokens, cost and seconds. The line of a try that counts holds the whole request too, so that a
person can read what was asked; its key is the hash of everything that decides the reply. A reply
that counts is never asked for again. No key of the user's is ever in the file.

A line {"stop": reason, "start": N} tells the other ranks of the same start that one has given up.
A last line that a kill cut short is dropped with a warning (files.append_line), and nothing else
ever is.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from files import append_line

LEDGER = "judge_cache.jsonl"  # its name in a folder
OK = "ok"


def key_of(endpoint: str, request: dict, draw: int) -> str:
    """The name of a reply: hash of the endpoint's URL, the whole request, and which of several
    draws of the same request it is."""
    decides = json.dumps([endpoint, request, draw], sort_keys=True)
    return hashlib.sha256(decides.encode()).hexdigest()


def question_of(messages: Sequence[dict]) -> str:
    """The name of a question, whoever is asked: hash of the messages."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def read_lines(path: Path, offset: int = 0, number: int = 0) -> Iterator[tuple[int, int, dict]]:
    """(line number, offset behind it, row) of each whole line from a byte offset on.

    Raises ValueError with file and line for one that is not a JSON object.
    """
    with open(path, "rb") as f:
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                return  # being written, or cut short by a kill
            number, offset = number + 1, offset + len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: not a judge record ({error}); restore the file, or delete "
                    "this line: its answer is then asked again"
                ) from None
            yield number, offset, row


def read_tries(path: Path) -> Iterator[dict]:
    """The tries in a ledger, or in a file that sources.export wrote."""
    for _, _, row in read_lines(path):
        if row.get("kind", "try") == "try" and "stop" not in row:
            yield row.get("content", row)


class Ledger:
    """The file as one rank sees it: `refresh` takes in what this rank and the others have added."""

    def __init__(self, path: Path, start: int | None = None):
        """`start`: a number that the ranks of one start share, and no other process has; None for
        a process alone."""
        self.path, self.start = path, start or random.SystemRandom().getrandbits(48)
        self.replies: dict[str, str] = {}  # key -> raw reply that counts; of two the first
        self.calls = 0  # tries of all ranks and all starts
        self.cost = 0.0  # US dollars of those whose tokens were reported
        self._offset = self._number = 0
        self.stop: str | None = None  # why a rank of this start gave up
        self.refresh()

    def refresh(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == self._offset:
            return
        for number, offset, row in read_lines(self.path, self._offset, self._number):
            self._number, self._offset = number, offset
            if "stop" in row:
                if row["start"] == self.start:
                    self.stop = self.stop or row["stop"]
                continue
            self.calls += 1
            self.cost += row["cost"] or 0.0
            if row["outcome"] == OK:
                self.replies.setdefault(row["key"], row["reply"])

    def give_up(self, reason: str) -> None:
        """Tell all ranks of this start."""
        append_line(self.path, {"stop": reason, "start": self.start})
        self.refresh()

    def add(self, row: dict) -> None:
        """On disk when this returns."""
        append_line(self.path, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **row})
        self.refresh()


# --------------------------------------------------------------------------------------------------
# Totals


def totals(tries: Sequence[dict]) -> dict[str, object]:
    """What a list of tries came to: counts, tokens, US dollars, seconds of the tries that count."""
    good = [t for t in tries if t["outcome"] == OK]
    seconds = sorted(t["seconds"] for t in good)
    return {
        "calls": len(tries),
        "judgements": len({t["key"] for t in good}),
        "paid_twice": len(good) - len({t["key"] for t in good}),
        "tokens_in": sum(t["tokens_in"] or 0 for t in tries),
        "tokens_out": sum(t["tokens_out"] or 0 for t in tries),
        "cost": sum(t["cost"] or 0.0 for t in tries),
        "cost_unknown": sum(t["cost"] is None for t in tries),
        "failed": dict(Counter(t["outcome"] for t in tries if t["outcome"] != OK).most_common()),
        "most_tries": max((t["attempt"] for t in tries), default=0),
        "seconds": {p: seconds[round((len(seconds) - 1) * p / 100)] for p in (50, 90, 99, 100)}
        if seconds
        else {},
    }


def render_totals(tries: Sequence[dict]) -> str:
    """A paragraph per judge as text."""
    paragraphs = []
    for model, endpoint in sorted({(t["model"], t["endpoint"]) for t in tries}):
        mine = [t for t in tries if (t["model"], t["endpoint"]) == (model, endpoint)]
        t = totals(mine)
        served = Counter(x["served_model"] for x in mine if x["outcome"] == OK)
        forms = Counter(x["form"] for x in mine if x["outcome"] == OK)
        failed = sum(t["failed"].values())
        lines = [
            f"{model} at {endpoint}",
            f"served as    {', '.join(f'{name} ({n:,})' for name, n in served.most_common())}",
            f"judgements   {t['judgements']:,} ("
            + ", ".join(f"{n:,} {form}" for form, n in forms.items())
            + f"), {t['paid_twice']:,} of them paid twice",
            f"calls        {t['calls']:,}, {failed:,} of them failed; at most {t['most_tries']} "
            "tries for an answer",
            f"tokens       {t['tokens_in']:,} in, {t['tokens_out']:,} out",
            f"cost         ${t['cost']:,.4f} by list price; {t['cost_unknown']:,} calls of unknown "
            "cost (no price, or no token count: errors, time-outs)",
        ]
        if t["seconds"]:
            shown = ", ".join(f"{p} %: {s:.2f}" for p, s in t["seconds"].items())
            lines.append(f"seconds      {shown} of the calls that count took at most this")
        lines += [f"failed       {n:6,}  {reason}" for reason, n in t["failed"].items()]
        paragraphs.append("\n  ".join(lines))
    return "\n\n".join(paragraphs) or "no judgement on file (offline judges are not recorded)"
