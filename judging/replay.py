"""Replay: answers from judgements on file instead of a judge."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from judging.client import JudgeError, Refused
from judging.endpoint import Form
from judging.ledger import OK, question_key, read_attempts
from judging.replies import unfenced


class Replay:
    """Answers questions from judgements on file; a question that is not on file is an error."""

    def __init__(self, path: Path, model: str = "", url: str = "", skip_refused: int = 0):
        """`path`: a run's judge_cache.jsonl, or a file made by evaluation.judgements --export.
        `model`, and its `url`, are needed if the file has judgements of several. Raises
        ValueError."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --judge replay:FILE takes judgements on file")
        self.path, self.skip_refused = path, skip_refused
        replies: dict[tuple, dict[tuple, str]] = defaultdict(dict)  # judge -> question -> reply
        refused: dict[tuple, dict[tuple, str]] = defaultdict(dict)  # the same -> judge's words
        for row in read_attempts(path):
            if row["outcome"] == OK or "refused" in row:
                judge = (row["model"], row["endpoint"])
                question = (question_key(row["request"]["messages"]), row["form"], row["draw"])
                if row["outcome"] == OK:
                    replies[judge].setdefault(question, row["reply"])
                else:
                    refused[judge].setdefault(question, row["refused"])
        judges = sorted(replies.keys() | refused.keys())
        fitting = [j for j in judges if model in ("", j[0]) and url.rstrip("/") in ("", j[1])]
        if len(fitting) != 1:
            names = [name for name, _ in judges]
            ways = [n if names.count(n) == 1 else f"{n}@{at}" for n, at in judges]
            raise ValueError(
                f"{path}: judgements of one judge are needed, and "
                + (f"{len(fitting)} judges fit" if fitting else "no judge fits")
                + "; give one of: "
                + (", ".join(f"--judge replay:{path}@{way}" for way in ways) or "another file")
            )
        [(self.model, self.endpoint)] = fitting
        self._replies = replies[fitting[0]]
        self._refused = {q: w for q, w in refused[fitting[0]].items() if q not in self._replies}

    async def ask(self, messages: Sequence[dict], form: Form, draw: int = 0) -> object:
        """As ChatClient.ask."""
        question = (question_key(messages), form.name, draw)
        if question in self._replies:
            return form.parse(unfenced(self._replies[question]))
        if question in self._refused:
            text = (
                f"{self.path}: {self.model} refused this text for good: {self._refused[question]}"
            )
            if [*self._refused].index(question) < self.skip_refused:
                raise Refused(text)
            raise JudgeError(f"{text}. Give --client.skip_refused as when it was judged", True)
        raise JudgeError(
            f"{self.path} has no {form.name} of {self.model} (draw {draw}) for the question "
            f"that ends in {messages[-1]['content'][-80:]!r}; replay has only the judgements "
            "on file, so use the same references and template as when they were made",
            about_text=True,
        )

    def stop(self, reason: str) -> None:
        """As ChatClient.stop; no request is ever sent."""

    def close(self) -> None:
        """As ChatClient.close; there is nothing to write."""

    def take_counts(self) -> dict[str, float]:
        """As ChatClient.take_counts; no request is ever sent."""
        return {"calls": 0.0, "failed": 0.0, "cost": 0.0}
