"""The risk that is wished for, and threshold.json: from which confidence on an answer is sent, and
what that promises. risk.py chooses it, predict.py decides by it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from storage.files import FileError, read_json, write_text
from storage.options import Options, in_range

Measure = Literal["quality", "bad"]
Kind = Literal["expected", "sampled"]


@dataclass(frozen=True)
class Wish(Options):
    """The risk that is wished for."""

    prefix: ClassVar[str] = "wish."

    target: in_range(float, "(0, 1)") = 0.1
    """The largest share of bad answers among those that are sent; with measure quality, the least
    mean judged quality of these (0-1)."""
    measure: Measure = "bad"
    """What the target is about: the share of bad answers, or the mean quality."""
    bad_below: in_range(float, "(0, 1]") = 0.5
    """Answers whose judged quality (0-1) is below this are bad."""
    delta: in_range(float, "(0, 1)") = 0.05
    """Probability, over the evaluation's prompts, that the target is missed."""
    seed: in_range(int, "[0, 4294967000]") = 42
    """Seed of the draws: one answer of each prompt, and the prompts on which the order of the tests
    is learned."""


@dataclass(frozen=True)
class Threshold:
    """What threshold.json holds."""

    value: float  # answers of this confidence or more are sent
    target: float
    measure: Measure
    bad_below: float
    delta: float
    n: int  # prompts that it was chosen on
    coverage: float  # share of the evaluation's answers that it sends, malformed ones among them
    reached: float  # mean quality, or share of bad answers, of what it sends there
    scores: Kind = "sampled"  # of which the confidence is the quality
    source: str = ""  # the evaluation

    def save(self, path: Path) -> None:
        """Raises WriteError."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Threshold":
        """Raises FileError."""
        row = read_json(path)
        try:
            threshold = cls(**{f.name: row[f.name] for f in fields(cls)})
        except KeyError as error:
            raise FileError(
                f"{path}: {error.args[0]} is missing; make it again with predict.py --calibrate"
            ) from None
        if not isinstance(threshold.value, int | float) or not 0 <= threshold.value <= 1:
            raise FileError(
                f"{path}: value must be a number from 0 to 1, not {threshold.value!r}; make it "
                "again with predict.py --calibrate"
            )
        return threshold

    def promise(self) -> str:
        return f"{wished(self.measure, self.target, self.bad_below)}, at {1 - self.delta:.0%}"


def wished(measure: Measure, target: float, bad_below: float) -> str:
    if measure == "quality":
        return f"mean quality of at least {target:g}"
    return f"at most {target:.1%} with quality below {bad_below:g}"
