"""What a worker leaves in its folder for temporary files goes with it, however it ends."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.bench.workers import WorkerProcess
from sparsify.errors import MeasurementError, ModelError, SparsifyError, UsageError

# Fills its folder, says where that is, and does with the next request what it is told.
SCRIPT = """#!/bin/bash
for last; do :; done
mkdir -p "$TMPDIR/cache/deep"
echo words | tee "$TMPDIR/cache/deep/log" > "$TMPDIR/cache/other"
ln -s {outside} "$TMPDIR/cache/link"
read request
printf '{{"found": {{"folder": "%s"}}}}\\n{{"done": true}}\\n' "$TMPDIR" >&$last
{then}
"""
Start = Callable[..., WorkerProcess]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders for temporary files are made."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is somebody else's."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("kept")
    return folder


@pytest.fixture
def start(tmp_path: Path, temporary: Path, outside: Path) -> Start:
    """Starts a worker that does ``then`` with its second request."""

    def started(then: str, timeout_s: float = 60) -> WorkerProcess:
        script = tmp_path / "python"
        script.write_text(SCRIPT.format(outside=outside, then=then))
        script.chmod(0o755)
        return WorkerProcess("w", python=str(script), variables={"TMPDIR": "elsewhere"}, timeout_s=timeout_s)

    return started


@pytest.mark.parametrize(
    ("then", "timeout_s", "error"),
    [
        ("read more; sleep 600", 0.5, "no answer for 0.5 s"),
        ("read more; kill -9 $$", 60, "killed by SIGKILL"),
        ("read more; echo nonsense >&$last; sleep 600", 60, "said what it should not"),
    ],
)
def test_a_worker_that_is_killed_leaves_nothing(
    start: Start, temporary: Path, outside: Path, then: str, timeout_s: float, error: str
) -> None:
    with start(then, timeout_s) as worker:
        folder = Path(worker.ask("where")["folder"])
        assert folder.parent == temporary
        assert (folder / "cache" / "deep" / "log").read_text() == "words\n"
        with pytest.raises(MeasurementError, match=error):
            worker.ask("more")
        assert not folder.exists()
    assert not list(temporary.iterdir())
    assert (outside / "file").read_text() == "kept"


def test_a_worker_that_ends_leaves_nothing(start: Start, temporary: Path, outside: Path) -> None:
    one, other = start("read more"), start("read more")
    with one, other:
        assert one.ask("where")["folder"] != other.ask("where")["folder"]
        assert len(list(temporary.iterdir())) == 2
    assert not list(temporary.iterdir())
    assert (outside / "file").read_text() == "kept"


def test_a_file_that_an_error_names_stays(start: Start, temporary: Path) -> None:
    say = """printf '{"error": "died; log: %s/cache/deep/log", "kind": "ModelError"}\\n' "$TMPDIR" >&$last"""
    with start(f"read more; {say}") as worker:
        folder = Path(worker.ask("where")["folder"])
        with pytest.raises(ModelError, match="log: "):
            worker.ask("more")
    assert [path for path in temporary.rglob("*") if not path.is_dir()] == [folder / "cache" / "deep" / "log"]


def test_a_worker_that_cannot_start_leaves_nothing(temporary: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot start"):
        WorkerProcess("w", python=str(tmp_path / "absent"), variables={}, timeout_s=60)
    assert not list(temporary.iterdir())


def test_without_room_for_temporary_files_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(SparsifyError, match=r"no room for temporary files.*set TMPDIR"):
        WorkerProcess("w", python="python", variables={}, timeout_s=60)
