"""The ledger of judge requests: a JSONL file that all ranks share, with one line per attempt. It is
the cache of replies, the account of calls and cost, and the record of every judgement.

A line has the attempt's outcome, "ok" or the reason of the failure, with the raw reply, tokens,
cost and seconds. A successful attempt's line also has the full request, for the reader. Its key is
the hash of everything that affects the reply; a valid reply is never requested again. API keys are
never in the file. The attempt that settles that the judge refuses a text for good has the field
"refused" with the server's words, and the request too.

A line {"stop": reason, "start": N} tells the other ranks of launch N that one has given up. If a
kill cut the last line short, it is dropped with a warning (files.append_line); no other line is
ever dropped.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage.files import WriteError, append_line, read_lines

OK = "ok"


def cache_key(endpoint: str, request: dict, draw: int) -> str:
    """Cache key of a reply: hash of the endpoint's URL, the request, and the number of the draw
    among several independent replies to it."""
    content = json.dumps([endpoint, request, draw], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def question_key(messages: Sequence[dict]) -> str:
    """Key of a question, the same for every judge: hash of the messages."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def _as_now(row: dict) -> dict:
    """An attempt as it would be written now: older ledgers tell URL and URL/ apart."""
    if str(row.get("endpoint")).endswith("/"):
        row["endpoint"] = row["endpoint"].rstrip("/")
        if "request" in row:
            row["key"] = cache_key(row["endpoint"], row["request"], row.get("draw", 0))
    return row


def read_attempts(path: Path) -> Iterator[dict]:
    """The attempts in a ledger, or in a file that judgements.export wrote."""
    for _, _, row in read_lines(path, what="a judge record"):
        # Older exports have the kind "try".
        if row.get("kind", "attempt") in ("attempt", "try") and "stop" not in row:
            yield _as_now(row.get("content", row))


class Ledger:
    """One rank's view of the file; `refresh` reads the lines that any rank has added."""

    def __init__(self, path: Path, launch: int | None = None):
        """`launch`: a number that identifies this launch, the same on all its ranks; None for a
        single process."""
        self.path, self.launch = path, launch or random.SystemRandom().getrandbits(48)
        self.replies: dict[str, str] = {}  # cache key -> raw valid reply, the first if several
        # (model, endpoint) -> cache key of a question refused for good -> the judge's words; in the
        # order of the file, which is the same on all ranks
        self.refused: dict[tuple, dict[str, str]] = defaultdict(dict)
        self.calls = 0  # attempts of all ranks and all launches
        self.cost = 0.0  # in US dollars, of the attempts whose tokens were reported
        self._offset = self._number = 0  # bytes and lines read
        self._pending: list[dict] = []  # attempts that are not on file yet
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
            row = _as_now(row)
            refused = self.refused[row.get("model"), row.get("endpoint")]
            if row["outcome"] == OK:
                self.replies.setdefault(row["key"], row["reply"])
                refused.pop(row["key"], None)
            elif "refused" in row:
                refused.setdefault(row["key"], row["refused"])

    def give_up(self, reason: str) -> None:
        """Tell all ranks of this launch to stop."""
        append_line(self.path, {"stop": reason, "start": self.launch})
        self.refresh()

    def add(self, row: dict) -> None:
        """Append an attempt, with the time; it is on disk when this returns. Raises WriteError: the
        attempt, which is paid for, stays in memory for `write_pending`, and this rank asks no
        more."""
        self._pending.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **row})
        try:
            self.write_pending()
        except WriteError as error:
            self.stop = self.stop or str(error)
            raise
        self.refresh()

    def write_pending(self) -> None:
        """Write what an earlier call could not. Raises WriteError."""
        while self._pending:
            append_line(self.path, self._pending[0])
            self._pending.pop(0)


# --------------------------------------------------------------------------------------------------
# Totals


def totals(attempts: Sequence[dict]) -> dict[str, object]:
    """Counts, tokens and US dollars of all attempts, and the seconds of successful ones."""
    successful = [a for a in attempts if a["outcome"] == OK]
    failed = Counter(a["outcome"] for a in attempts if a["outcome"] != OK)
    judged = {a["key"] for a in successful}
    judgements = len(judged)
    seconds = sorted(a["seconds"] for a in successful)
    return {
        "calls": len(attempts),
        "judgements": judgements,
        "paid_twice": len(successful) - judgements,
        "refused": len({a["key"] for a in attempts if "refused" in a} - judged),
        "tokens_in": sum(a["tokens_in"] or 0 for a in attempts),
        "tokens_out": sum(a["tokens_out"] or 0 for a in attempts),
        "cost": sum(a["cost"] or 0.0 for a in attempts),
        "cost_unknown": sum(a["cost"] is None for a in attempts),
        "failed": dict(failed.most_common()),
        "most_attempts": max((a["attempt"] for a in attempts), default=0),
        "seconds": {p: seconds[round((len(seconds) - 1) * p / 100)] for p in (50, 90, 99, 100)}
        if seconds
        else {},
    }


def render_totals(attempts: Sequence[dict]) -> str:
    """A paragraph per judge as text."""
    paragraphs = []
    for model, endpoint in sorted({(a["model"], a["endpoint"]) for a in attempts}):
        judge_attempts = [a for a in attempts if (a["model"], a["endpoint"]) == (model, endpoint)]
        t = totals(judge_attempts)
        served = Counter(a["served_model"] for a in judge_attempts if a["outcome"] == OK)
        forms = Counter(a["form"] for a in judge_attempts if a["outcome"] == OK)
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
            percentiles = ", ".join(f"{p} %: {s:.2f}" for p, s in t["seconds"].items())
            lines.append(f"seconds      {percentiles} of the successful calls took at most this")
        if t["refused"]:
            lines.append(f"refused      {t['refused']:,} questions, their texts for good")
        lines += [f"failed       {n:6,}  {reason}" for reason, n in t["failed"].items()]
        paragraphs.append("\n  ".join(lines))
    return "\n\n".join(paragraphs) or "no judgement on file (offline judges are not recorded)"
