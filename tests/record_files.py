"""Small files of records, and the one line by which a file that holds none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.record_check import FORMAT
from sparsify.bench.records import Record, read
from sparsify.errors import DataError

END: dict[str, Any] = {"seconds": 1.5, "failed": 0, "load_1m": None, "gpu": None}


def dump(path: Path, *records: Any) -> Path:
    """Write ``records``, a line each."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def short_run(run: str) -> Record:
    """The shortest record of a run."""
    host: dict[str, Any] = dict.fromkeys(("governor", "load_1m", "threads"))
    host |= {"processor": "é", "cores": 1, "memory_bytes": 1, "system": "", "wait_policy": ""}
    return {
        "format": FORMAT, "record": "run", "run": run, "time": "", "command": [], "seed": 0, "rounds": 1, "warm_up": 0,
        "environment": {"host": host, "gpu": None, "versions": {}}, "ceilings": [],
    }  # fmt: skip


def refused(path: Path, *words: str) -> str:
    """That the file is an error of one short line with ``words`` in it; returns the line."""
    with pytest.raises(DataError) as caught:
        read([path])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600 + len(str(path)), message
    for word in (str(path), *words):
        assert word in message, message
    return message
