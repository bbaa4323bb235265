"""Progress of long work: a bar in a terminal; elsewhere a line every half minute, and none for work
that is done sooner."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

SECONDS = 30.0  # between two lines where there is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """Standard error for tqdm: each refresh becomes a line."""

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
    """A tqdm bar over `items`, or over `total` calls of its `update`; shown on rank 0 alone.
    `leave`: keep the bar on the screen when the work is done."""
    if sys.stderr.isatty():
        how = {}
    else:
        how = {"file": _Lines(), "bar_format": LINE, "mininterval": SECONDS, "delay": SECONDS}
    return tqdm(items, desc=desc, total=total, leave=leave, disable=rank != 0 or total == 0, **how)
