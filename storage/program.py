"""Which program makes a run: the method (cycle.py) or a variant of it, and from which sources.

A variant replaces functions of the method, which its config.json does not show. So every launch
records the name of its main program and a hash of each of its own source files in env.json, and a
folder is continued by the program that began it.
"""

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

from storage.files import read_json
from storage.run_folder import Folder

ROOT = Path(__file__).parent.parent


def program() -> str:
    """The main program's module: "cycle" for the method itself, "ablations.no_mask" for a
    variant."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):  # python -m
        return spec.name
    return Path(getattr(main, "__file__", "interactive")).stem


def sources() -> dict[str, str]:
    """Hash by path of every source file imported so far that lies in this project or beside the
    main program, whether git knows it or not."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    homes = [ROOT, Path(main).resolve().parent] if main else [ROOT]
    found = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "none").resolve()
        home = next((home for home in homes if path.is_relative_to(home)), None)
        if home and path.suffix == ".py" and path.is_file() and "site-packages" not in path.parts:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            found[path.relative_to(home).as_posix()] = digest
    return dict(sorted(found.items()))


def check_same_program(folder: Folder) -> None:
    """Raises ValueError if another program made what the folder holds; warns if it is the same
    program from other sources, so that an update does not end a run."""
    launches = read_json(folder.env_file, list) if folder.env_file.exists() else []
    if not launches or "program" not in launches[-1]:  # older runs do not say
        return
    former, present = launches[-1], program()
    if former["program"] != present:
        raise ValueError(
            f"{folder} was made by {former['program']} and not by {present}, which is another "
            f"variant of the method; choose another --name, or continue it with "
            f"{former['program']}"
        )
    before, now = former["sources"], sources()
    changed = sorted(path for path in before.keys() & now.keys() if before[path] != now[path])
    if changed:
        warnings.warn(
            f"{folder} was begun with other sources ({', '.join(changed)} changed since); this "
            "launch is recorded with its own in env.json",
            stacklevel=2,
        )


def source_id(launch: dict) -> str | None:
    """A hash of all sources of a launch in env.json; None for older ones."""
    if "sources" not in launch:
        return None
    return hashlib.blake2b(json.dumps(launch["sources"]).encode(), digest_size=5).hexdigest()


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files have uncommitted changes); None where git or a checkout is
    missing."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(*args: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return result.stdout.strip() if result.returncode == 0 else None
