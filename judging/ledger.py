"""Every request to a judge, one line of JSON each, in a file that all ranks share: the cache, the
account and the evidence in one.

A line says how the attempt ended: "ok", or the reason why it does not count, with the raw reply,
tokens, cost and seconds. The line of an attempt that counts holds the whole request too, so that a
person can read what was asked; its key is the hash of everything that decides the reply. A reply
that counts is never asked for again. API keys are never in the file.

A line {"stop": reason, "start": N} tells the other ranks of launch N that one has given up. A last
line that a kill cut short is dropped with a warning (files.append_line), and nothing else ever is.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage.files import append_line, read_lines

OK = "ok"


def cache_key(endpoint: str, request: dict, draw: int) -> str:
    """Cache key of a reply: hash of the endpoint's URL, the whole request, and which of several
    draws of the same request it is."""
    content = json.dumps([endpoint, request, draw], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def question_key(messages: Sequence[dict]) -> str:
    """Key of a question, whichever judge is asked: hash of the messages."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def read_attempts(path: Path) -> Iterator[dict]:
    """The attempts in a ledger, or in a file that judgements.export wrote."""
    for _, _, row in read_lines(path, what="a judge record"):
        if row.get("kind", "attempt") in ("attempt", "try") and "stop" not in row:  # "try": older
            yield row.get("content", row)


class Ledger:
    """The file as one rank sees it: `refresh` reads what this rank and the others have added."""

    def __init__(self, path: Path, launch: int | None = None):
        """`launch`: a number that the ranks of one launch share, and no other process has; None for
        a process alone."""
        self.path, self.launch = path, launch or random.SystemRandom().getrandbits(48)
        self.replies: dict[str, str] = {}  # key -> raw reply that counts; of two the first
        self.calls = 0  # attempts of all ranks and all launches
        self.cost = 0.0  # US dollars of those whose tokens were reported
        self._offset = self._number = 0
        self.stop: str | None = None  # why a rank of this launch gave up
        self.refresh()

    def refresh(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == self._offset:
            return
        for number, offset, row in read_lines(
            self.path, self._offset, self._number, what="a judge record"
        ):
            self._number, self._offset = number, offset
            if "stop" in row:
                if row["start"] == self.launch:
                    self.stop = self.stop or row["stop"]
                continue
            self.calls += 1
            self.cost += row["cost"] or 0.0
            if row["outcome"] == OK:
                self.replies.setdefault(row["key"], row["reply"])

    def give_up(self, reason: str) -> None:
        """Tell all ranks of this launch."""
        append_line(self.path, {"stop": reason, "start": self.launch})
        self.refresh()

    def add(self, row: dict) -> None:
        """Append an attempt; it is on disk when this returns."""
        append_line(self.path, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **row})
        self.refresh()


# --------------------------------------------------------------------------------------------------
# Totals


def totals(attempts: Sequence[dict]) -> dict[str, object]:
    """Counts, tokens, US dollars, and seconds of the attempts that count."""
    good = [t for t in attempts if t["outcome"] == OK]
    seconds = sorted(t["seconds"] for t in good)
    return {
        "calls": len(attempts),
        "judgements": len({t["key"] for t in good}),
        "paid_twice": len(good) - len({t["key"] for t in good}),
        "tokens_in": sum(t["tokens_in"] or 0 for t in attempts),
        "tokens_out": sum(t["tokens_out"] or 0 for t in attempts),
        "cost": sum(t["cost"] or 0.0 for t in attempts),
        "cost_unknown": sum(t["cost"] is None for t in attempts),
        "failed": dict(Counter(t["outcome"] for t in attempts if t["outcome"] != OK).most_common()),
        "most_attempts": max((t["attempt"] for t in attempts), default=0),
        "seconds": {p: seconds[round((len(seconds) - 1) * p / 100)] for p in (50, 90, 99, 100)}
        if seconds
        else {},
    }


def render_totals(attempts: Sequence[dict]) -> str:
    """A paragraph per judge as text."""
    paragraphs = []
    for model, endpoint in sorted({(t["model"], t["endpoint"]) for t in attempts}):
        mine = [t for t in attempts if (t["model"], t["endpoint"]) == (model, endpoint)]
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
            f"calls        {t['calls']:,}, {failed:,} of them failed; at most {t['most_attempts']} "
            "attempts for an answer",
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
