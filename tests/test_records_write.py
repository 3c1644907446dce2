"""Records: what is added to, replaced and left alone, and that whatever ends a run loses no whole record."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.bench.record_check import check
from sparsify.bench.records import read, writer
from sparsify.errors import DataError, OutputError
from tests.bench_records import write_example
from tests.record_files import END, short_run


def run_of(path: Path, **options: bool) -> str:
    with writer(path, **options) as out:
        fields = short_run(out.run)
        for key in ("format", "record", "run", "time"):
            fields.pop(key)
        out.write("run", **fields)
        out.write("end", **END)
    return out.run


def runs(path: Path) -> list[str]:
    return [record["run"] for record in read([path]).of("run")]


def test_append_and_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    with pytest.raises(OutputError, match="exists; add to it with --append, replace it with --overwrite"):
        run_of(path)
    assert runs(path) == [first]
    second = run_of(path, append=True)
    assert runs(path) == [first, second]
    third = run_of(path, overwrite=True)
    assert runs(path) == [third]
    assert run_of(tmp_path / "new.jsonl", append=True)
    assert run_of(tmp_path / "newer.jsonl", overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new.jsonl", "newer.jsonl", "r.jsonl"]
    # Group and others read it as they read any new file.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_append_after_a_line_without_an_end_and_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    second = run_of(path, append=True)
    assert runs(path) == [first, second]
    path.write_bytes(b"")
    third = run_of(path, append=True)
    assert runs(path) == [third]


def test_append_to_a_damaged_file_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run_of(path)
    data = path.read_bytes()[:-5]
    path.write_bytes(data)
    with pytest.raises(DataError, match="line 2 is cut off"):
        run_of(path, append=True)
    assert path.read_bytes() == data
    run_of(path, overwrite=True)
    assert len(runs(path)) == 1


@pytest.mark.parametrize("option", ["append", "overwrite"])
def test_what_is_no_file_of_records_is_left_alone(tmp_path: Path, option: str) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("dear diary\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (notes, folder, Path("/dev/null")):
        with pytest.raises(OutputError, match="is no file of records"):
            run_of(path, **{option: True})
        with pytest.raises(OutputError, match="is no file of records"):
            run_of(path)
    assert notes.read_text() == "dear diary\n"
    with pytest.raises(OutputError, match="choose another"):
        run_of(notes / "below.jsonl", **{option: True})


def test_overwrite_keeps_the_old_records_until_there_are_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    with writer(path, overwrite=True):
        pass
    assert runs(path) == [first]
    with writer(path, overwrite=True) as out, pytest.raises(DataError):
        out.write("end", seconds=float("nan"), failed=0, load_1m=None, gpu=None)
    assert runs(path) == [first]


def test_a_file_that_appeared_meanwhile_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with writer(path) as out:
        other = run_of(path)
        with pytest.raises(OutputError, match=str(path)):
            out.write("end", **END)
    assert runs(path) == [other]


@pytest.mark.parametrize("option", ["append", "overwrite"])
def test_two_writers_of_one_file(tmp_path: Path, option: str) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process adds records"):
            run_of(path, **{option: True})
    assert runs(path) == [first]
    run_of(path, **{option: True})
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.jsonl"]


def test_what_cannot_be_a_record_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    with writer(path, append=True) as out:
        for bad in (float("nan"), float("inf"), -1.0, "1", None):
            with pytest.raises(DataError, match=r"r\.jsonl: a end record"):
                out.write("end", **{**END, "seconds": bad})
        with pytest.raises(DataError, match="no Unicode"):
            out.write(
                "missing",
                what=os.fsdecode(b"\xff.bin"),
                why="",
                failed=True,
                artifact=None,
                runtime=None,
                scenario=None,
            )
        with pytest.raises(DataError, match="none of run, artifact"):
            out.write("endless")
    assert runs(path) == [first]


_FILLS = """
import resource, sys
from pathlib import Path
from sparsify.bench.records import writer
from sparsify.errors import SparsifyError
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with writer(Path(sys.argv[1]), overwrite=len(sys.argv) > 3) as out:
    n = 0
    try:
        while True:
            out.write("missing", what="x" * 100, why="é" * 50, failed=False, artifact=None, runtime=None, scenario=None)
            n += 1
    except SparsifyError as error:
        print(n, type(error).__name__, error)
"""


def filling(path: Path, limit: int, *options: str) -> tuple[int, str]:
    """Write records until files of this size are full, in a process with that limit; how many were written."""
    found = subprocess.run(
        [sys.executable, "-c", _FILLS, path, str(limit), *options], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    n, _, rest = found.stdout.partition(" ")
    return int(n), rest


def test_a_full_disk_keeps_whole_records_only(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    n, message = filling(path, 2000)
    assert n >= 3
    assert message.startswith(f"OutputError {path}: the disk is full")
    assert "records before this missing record are whole" in message
    assert "--append" in message
    data = path.read_bytes()
    assert data.endswith(b"\n")
    assert data.count(b"\n") == n
    assert 1000 < len(data) <= 2000
    for line in data.splitlines():
        check(json.loads(line), "x")


def test_a_full_disk_leaves_what_would_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = run_of(path)
    n, message = filling(path, 100, "overwrite")
    assert n == 0
    assert "disk is full" in message
    assert runs(path) == [first]
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_killed_run_leaves_every_record_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom sparsify.bench.records import writer\n"
        "from tests.bench_records import write_run\n"
        "with writer(Path(sys.argv[1])) as out:\n"
        "    write_run(out, seed=0, rounds=2, runtimes=('torch',))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code, path], cwd=root, timeout=60)
    assert found.returncode == -9
    whole = write_example(tmp_path / "whole.jsonl", rounds=2, runtimes=("torch",))
    assert len(read([path]).lines) == len(read([whole]).lines)
