"""One launch at a time works in a folder."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from storage.files import writing


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.json for a `with` block. The operating system frees the lock when the
    process ends, however it ends. Raises ValueError if another process holds it, WriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / "lock.json", "a+", encoding="utf-8")
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use {_holder(folder / 'lock.json')}") from None
        f.truncate(0)
        holder = {
            "host": socket.gethostname(),
            # What to end: torchrun, which ends its workers, or this process alone.
            "process": os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
        }
        f.write(json.dumps(holder))
        f.flush()
        yield


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        who = f"by process {held['process']} on {held['host']} since {held['since']}"
        end = f"`kill {held['process']}` there"
    except (OSError, ValueError, KeyError):
        who, end = "by another process", "ending that process"
    return f"{who}; wait until it is done, end it with {end}, or choose another folder"
