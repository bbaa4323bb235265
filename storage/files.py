"""Atomic writing of files and folders, and JSONL files that survive a kill."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FileError(ValueError):
    """A file that cannot be used; the message names it, the line if there is one, and a remedy."""


class WriteError(OSError):
    """A file that could not be written. Nothing of it is left behind; the message says what to
    do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the operating system as one sentence."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}); free disk space or make its "
            "folder writable, then run the same command again: it goes on from what is on file"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: write a temporary file, fsync it, rename it. Raises
    WriteError, and the old file stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Fsync a finished temporary folder with its files, then rename it to `target`."""
    for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(temporary, target)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty temporary folder to write to; it replaces `folder` if the `with` block ends without
    an exception. Raises WriteError."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(folder, ignore_errors=True)
            publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, kind: type = dict):
    """The JSON object (or, with `kind` list, list) of a small file. Raises FileError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(
            f"{path}: cannot be read as JSON ({error}); restore it, or fetch or make it again"
        ) from None
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise FileError(f"{path}: expected {expected}; restore it, or fetch or make it again")
    return content


def read_lines(
    path: Path, offset: int = 0, number: int = 0, what: str = "a JSON object"
) -> Iterator[tuple[int, int, dict]]:
    """(line number, byte offset after the line, row) of each complete line from byte `offset` on,
    before which there are `number` lines. A last line without a newline, which is being written or
    was cut short by a kill, is left out.

    Raises FileError with file and line for a line that is not a JSON object; `what` names in the
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
            except (ValueError, RecursionError) as error:
                raise FileError(
                    f"{path}:{number}: not {what} ({error}); restore the file, or delete this "
                    "line: its content is then computed or requested again"
                ) from None
            yield number, offset, row


def append_line(path: Path, row: dict) -> None:
    """Append a line of JSON under a lock, all of it on disk when this returns; several processes
    can share a file. A torn last line, left by a kill, is dropped first. Raises WriteError, and the
    file is as it was."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    data = memoryview(line.encode(errors="backslashreplace"))  # a lone surrogate as JSON escapes it
    with writing(path), open(path, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        _drop_torn(path, f)
        end = f.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[f.write(data) :]  # a nearly full disk takes a part
            os.fsync(f.fileno())
        except OSError:
            with suppress(OSError):
                f.truncate(end)
            raise


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
