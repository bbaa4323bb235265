"""The commit of this checkout."""

import subprocess
from pathlib import Path


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files have uncommitted changes); None where git or a checkout is
    missing."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(*args: str) -> str | None:
    root = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return result.stdout.strip() if result.returncode == 0 else None
