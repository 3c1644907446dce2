"""Which code produced a record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where the working tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def earlier(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark wrote to ``path`` before, to be added to; empty where it has not.

    ``record`` has what must be the same in both: commit and arguments.
    """
    if not path.exists():
        return {}
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(before[key] != value for key, value in record.items()):
        raise SystemExit(f"{path}: is of another commit, or of other arguments; remove it")
    return before
