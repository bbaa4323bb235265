"""Files that appear whole or not at all, and JSONL files that survive a kill."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file: aside, to disk, then renamed into place."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def publish(aside: Path, target: Path) -> None:
    """Rename a finished folder into place, its contents safely on disk first."""
    for path in (*(p for p in aside.rglob("*") if p.is_file()), aside):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    os.rename(aside, target)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` once the block has ended
    well."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(folder, ignore_errors=True)
    publish(aside, folder)


def read_lines(
    path: Path, offset: int = 0, number: int = 0, what: str = "a JSON object"
) -> Iterator[tuple[int, int, dict]]:
    """(line number, offset after it, row) of each whole line from a byte offset on; `number` lines
    stand before it. A last line without an end is being written, or was cut short by a kill, and is
    left out.

    Raises ValueError with file and line for one that is not `what`.
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
                    "line: what it held is then computed or asked again"
                ) from None
            yield number, offset, row


def append_line(path: Path, row: dict) -> None:
    """Add a line of JSON in one locked write, on disk when this returns; processes can share a
    file. What a kill left of a half-written last line is dropped first."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        _drop_torn(path, f)
        f.write(line.encode(errors="backslashreplace"))  # a lone surrogate as JSON's own escape
        os.fsync(f.fileno())


def drop_torn_line(path: Path) -> None:
    """Cut off what a kill left of a half-written last line."""
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
