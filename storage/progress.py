"""Progress display: a bar in a terminal, elsewhere a line every half minute. Work that takes less
than that prints no line."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

SECONDS = 30.0  # between two lines, without a terminal
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """Standard error for tqdm, where each refresh becomes a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable | None = None,
    *,
    desc: str,
    total: int | None = None,
    leave: bool = True,
    rank: int = 0,
) -> tqdm:
    """A tqdm bar over `items`, or over `total` calls of its `update`; shown on rank 0 only.
    `leave`: leave the bar on the screen when the work is done."""
    if sys.stderr.isatty():
        style = {}
    else:
        style = {"file": _Lines(), "bar_format": LINE, "delay": SECONDS}
        style |= {"mininterval": SECONDS, "maxinterval": SECONDS}
    disable = rank != 0 or total == 0
    return tqdm(items, desc=desc, total=total, leave=leave, disable=disable, **style)
