"""Atomic writing of files and folders, and JSONL files that survive a kill."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: write a temporary file, fsync it, rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def publish(temporary: Path, target: Path) -> None:
    """Fsync a finished temporary folder with its files, then rename it to `target`."""
    for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    os.rename(temporary, target)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty temporary folder to write to; it replaces `folder` if the `with` block ends without
    an exception."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    publish(temporary, folder)


def read_lines(
    path: Path, offset: int = 0, number: int = 0, what: str = "a JSON object"
) -> Iterator[tuple[int, int, dict]]:
    """(line number, byte offset after the line, row) of each complete line from byte `offset` on,
    before which there are `number` lines. A last line without a newline, which is being written or
    was cut short by a kill, is left out.

    Raises ValueError with file and line for a line that is not a JSON object; `what` names in the
    message what was expected.
    """
    with open(path, "rb") as f:
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                return
            number, offset = number + 1, offset + len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: not {what} ({error}); restore the file, or delete this "
                    "line: its content is then computed or requested again"
                ) from None
            yield number, offset, row


def append_line(path: Path, row: dict) -> None:
    """Append a line of JSON in one write under a file lock, so that processes can share a file. The
    line is on disk when this returns. An incomplete last line, left by a kill, is dropped first."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        _drop_torn(path, f)
        f.write(line.encode(errors="backslashreplace"))  # a lone surrogate becomes a JSON escape
        os.fsync(f.fileno())


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a kill."""
    with open(path, "r+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        _drop_torn(path, f)


def _drop_torn(path: Path, f) -> None:
    if not (end := f.seek(0, os.SEEK_END)):
        return
    f.seek(end - 1)
    if f.read(1) != b"\n":
        warnings.warn(f"{path}: its last line was cut short and is dropped", stacklevel=3)
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
