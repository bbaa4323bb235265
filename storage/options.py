"""Options with a range: declared in a field's type, shown by --help, checked where the dataclass is
made."""

import re
from typing import Annotated, ClassVar, NamedTuple, get_type_hints

import tyro

_INTERVAL = re.compile(r"([\[(])([-\w.]+), ([-\w.]+)([\])])")


class Range(NamedTuple):
    """An interval in the usual notation, such as "(0, 1]"."""

    interval: str

    def __contains__(self, value: float) -> bool:
        left, low, high, right = _INTERVAL.fullmatch(self.interval).groups()
        above = value >= float(low) if left == "[" else value > float(low)
        below = value <= float(high) if right == "]" else value < float(high)
        return above and below  # False for NaN


def in_range(kind: type, interval: str):
    """The type of an option whose values lie in an interval; None, if `kind` allows it, is not
    checked."""
    shown = "INT" if kind in (int, int | None) else "FLOAT"
    return Annotated[kind, Range(interval), tyro.conf.arg(metavar=f"{shown} in {interval}")]


Count = in_range(int, "[1, inf)")
CountOrZero = in_range(int, "[0, inf)")
Positive = in_range(float, "(0, inf)")
NotNegative = in_range(float, "[0, inf)")
Finite = in_range(float, "(-inf, inf)")


class Options:
    """Base of option dataclasses. Raises ValueError for a value outside its field's range."""

    prefix: ClassVar[str] = ""  # of the options' names on the command line

    def __post_init__(self):
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for allowed in getattr(hint, "__metadata__", ()):
                if isinstance(allowed, Range):
                    self._check(name, allowed)

    def _check(self, name: str, allowed: Range) -> None:
        value = getattr(self, name)
        for x in value if isinstance(value, tuple) else (value,):
            if x is not None and x not in allowed:
                raise ValueError(f"--{self.prefix}{name} must be in {allowed.interval}, not {x}")
