"""Records: what is written is read again, and whatever else a file holds is an error of one line, never a traceback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.record_check import KINDS
from sparsify.bench.records import Record, read, writer
from sparsify.errors import DataError, OutputError
from tests.bench_records import write_example, write_run
from tests.record_files import END, refused, short_run


def small(path: Path) -> Path:
    """A run of a few hundred bytes."""
    with writer(path) as out:
        out.write("missing", what="a", why="b", failed=False, artifact=None, runtime=None, scenario=None)
        out.write("end", **END)
    run = short_run(out.run)
    path.write_bytes(json.dumps(run).encode() + b"\n" + path.read_bytes())
    assert len(read([path]).lines) == 3
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, written = tmp_path / "deep" / "r.jsonl", []
    with writer(path) as out:
        original = out.write

        def keep(kind: str, /, **fields: Any) -> Record:
            written.append(original(kind, **fields))
            return written[-1]

        out.write = keep  # type: ignore[method-assign]
        write_run(out, seed=3, rounds=3, runtimes=("torch", "onnxruntime"))
    found = read([path])
    assert len(found.lines) == len(written) > 40
    assert list(found.lines) == json.loads(json.dumps(written))
    assert [found.source(line) for line in found.lines] == [f"{path}:{i}" for i in range(1, len(written) + 1)]
    assert {kind for kind in KINDS if found.of(kind)} == set(KINDS)
    assert found.of("latency", "0" * 16) == []
    assert all(len(line["run"]) == 16 for line in found.lines)


def test_several_files_are_one_set_of_records(tmp_path: Path) -> None:
    paths = [write_example(tmp_path / f"{i}.jsonl", seed=i, rounds=1, runtimes=("torch",)) for i in range(2)]
    both = read(paths)
    assert len(both.of("run")) == 2
    assert both.source(both.of("run")[1]) == f"{paths[1]}:1"
    with pytest.raises(DataError, match="is there twice"):
        read([paths[0], paths[0]])


def test_cut_at_every_byte(tmp_path: Path) -> None:
    path = small(tmp_path / "r.jsonl")
    data, cut = path.read_bytes(), tmp_path / "cut.jsonl"
    whole = 0
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        before = data[:length].count(b"\n")
        if length == 0:
            refused(cut, "holds no record")
        elif data[length - 1 : length] == b"\n" or data[length : length + 1] == b"\n":
            # At the end of a line nothing of a record is lost: it is a run without its end.
            found = read([cut])
            assert len(found.lines) == before + (data[length - 1 : length] != b"\n")
            assert bool(found.of("end")) == (length == len(data) - 1)
            whole += 1
        else:
            refused(cut, f"line {before + 1} is cut off", f"{before} records before it are whole", "measure again")
    assert whole == 5


def test_cut_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    path = write_example(tmp_path / "r.jsonl", rounds=2, runtimes=("torch",))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    lines = data[: len(data) // 2].count(b"\n")
    refused(path, f"line {lines + 1} is cut off", f"the {lines} records before it are whole")


_DEEP = b'{"format":' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["holds no record", "run sparsify bench"]),
        (b"\n \n", ["holds no record"]),
        (b"{}\n", ["line 1", "format is None"]),
        (b"[]\n", ["line 1", "list"]),
        (b"3\n", ["line 1", "int"]),
        (b"null\n", ["line 1", "NoneType"]),
        (b'"x"\n', ["line 1", "str"]),
        (b"hello\n", ["line 1", "no JSON", "column 1"]),
        (b"\x00\x01\x02\xff\n", ["line 1", "no UTF-8"]),
        (bytes(range(256)) + b"\n", ["line 1"]),
        (b"\xef\xbb\xbf{}\n", ["line 1", "BOM"]),
        (b'{"format": NaN}\n', ["line 1", "NaN is no number"]),
        (b'{"format": -Infinity}\n', ["line 1", "-Infinity is no number"]),
        (b'{"format": 1e999}\n', ["line 1", "too large"]),
        (b'{"format": ' + b"9" * 6000 + b"}\n", ["line 1", "too large"]),
        (b'{"format": ' + b"9" * 30 + b"}\n", ["line 1", "too large"]),
        (b'{"format": "\\ud800"}\n', ["line 1", "no UTF-8"]),
        (_DEEP + b"\n", ["line 1", "nested too deeply"]),
        (b'{"format": 2, "record": "run"}\n', ["line 1", "format is 2", "reads 1"]),
        (b'{"format": true, "record": "run"}\n', ["line 1"]),
        (b'{"format": 1}\n', ["record is 'None'"]),
        (b'{"format": 1, "record": ["run"]}\n', ["none of run, artifact"]),
        (b'{"format": 1, "record": "rum"}\n', ["record is 'rum'"]),
        (b'{"format": 1, "record": "run"}\n', ["required property"]),
    ],
)
def test_hostile_files(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    refused(path, *words)


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "absent.jsonl", "No such file", "sparsify bench")
    refused(tmp_path, "is no file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no file")
    refused(Path("/dev/zero"), "is no file")
    path = small(tmp_path / "r.jsonl")
    refused(path / "below", "Not a directory")
    monkeypatch.setattr("sparsify.bench.records._MOST_BYTES", 10)
    refused(path, "is larger")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path / "r.jsonl")

    def denied(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        # The superuser may read anything, so that a mode of 0 would not do.
        patch.setattr(Path, "read_bytes", denied)
        refused(path, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(OutputError, match="Permission denied; choose another"), writer(path, append=True):
            pass
    with monkeypatch.context() as patch, writer(tmp_path / "new.jsonl") as out:
        patch.setattr("sparsify.bench.records.os.open", denied)
        with pytest.raises(OutputError, match=r"new\.jsonl: not writable"):
            out.write("end", **END)


def test_lines_ended_as_on_windows_and_a_last_line_without_an_end(tmp_path: Path) -> None:
    path = small(tmp_path / "r.jsonl")
    before = read([path]).lines
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read([path]).lines == before
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    assert read([path]).lines == before
