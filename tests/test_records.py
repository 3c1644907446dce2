"""Records: what is written is read again, and whatever else a file holds is an error of one line, never a traceback."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sparsify.bench.record_check import FORMAT, KINDS, check, schema
from sparsify.bench.records import Record, Records, read, writer
from sparsify.errors import DataError, OutputError
from tests.bench_records import write_example, write_run

END: dict[str, Any] = {"seconds": 1.5, "failed": 0, "load_1m": None, "gpu": None}


@pytest.fixture
def example(tmp_path: Path) -> Path:
    return write_example(tmp_path / "r.jsonl", rounds=2, runtimes=("torch",))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """One record of every kind, in order."""
    path = write_example(tmp_path_factory.mktemp("records") / "r.jsonl", rounds=2, runtimes=("torch",))
    found: dict[str, Record] = {}
    for record in read([path]).lines:
        if record["record"] != "artifact" or record["role"] == "baseline":
            found.setdefault(record["record"], record)
    found["kernel"]["artifact"] = "dense"
    assert set(found) == set(KINDS)
    return list(found.values())


def dump(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small(path: Path) -> Path:
    """A run of a few hundred bytes."""
    with writer(path) as out:
        out.write("missing", what="a", why="b", failed=False, artifact=None, runtime=None, scenario=None)
        out.write("end", **END)
    # The run record is long; a short one that the schema takes as well.
    run = read_example_run(out.run)
    path.write_bytes(json.dumps(run).encode() + b"\n" + path.read_bytes())
    assert len(read([path]).lines) == 3
    return path


def read_example_run(run: str) -> Record:
    host: dict[str, Any] = dict.fromkeys(("governor", "load_1m", "threads"))
    host |= {"processor": "é", "cores": 1, "memory_bytes": 1, "system": "", "wait_policy": ""}
    return {
        "format": FORMAT, "record": "run", "run": run, "time": "", "command": [], "seed": 0, "rounds": 1, "warm_up": 0,
        "environment": {"host": host, "gpu": None, "versions": {}}, "ceilings": [],
    }  # fmt: skip


def refused(path: Path, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        read([path])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600 + len(str(path)), message
    for word in (str(path), *words):
        assert word in message, message
    return message


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


def test_the_schema_is_valid_and_published_whole() -> None:
    Draft202012Validator.check_schema(schema())
    kinds = [entry["$ref"].removeprefix("#/$defs/") for entry in schema()["oneOf"]]
    assert sorted(kinds) == sorted(KINDS)
    for kind in KINDS:
        body = schema()["$defs"][kind]
        assert body["properties"]["record"] == {"const": kind}
        assert body["properties"]["format"] == {"const": FORMAT}
        # Nothing may be there that nobody described, and nothing left out silently.
        assert body["additionalProperties"] is False
        assert sorted(body["required"]) == sorted(body["properties"])


def test_whole_schema_and_reader_agree(lines: list[Record]) -> None:
    whole = Draft202012Validator(schema())
    for record in lines:
        assert whole.is_valid(record)
        for key in record:
            less = {name: value for name, value in record.items() if name != key}
            assert not whole.is_valid(less)
            with pytest.raises(DataError):
                check(less, "x")


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


def test_cut_in_the_middle_of_a_large_file(example: Path) -> None:
    data = example.read_bytes()
    example.write_bytes(data[: len(data) // 2])
    lines = data[: len(data) // 2].count(b"\n")
    refused(example, f"line {lines + 1} is cut off", f"the {lines} records before it are whole")


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


def test_nested_within_what_a_record_may_hold(tmp_path: Path, lines: list[Record]) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"x": [deep]}
    path = dump(tmp_path / "r.jsonl", {**lines[0], "environment": deep})
    refused(path, "line 1", "environment")


Damage = Callable[[Record], object]
DAMAGE: list[tuple[str, str, Damage]] = [
    ("run", "rounds", lambda r: r.update(rounds="7")),
    ("run", "rounds", lambda r: r.update(rounds=0)),
    ("run", "run", lambda r: r.update(run="x")),
    ("run", "environment.host", lambda r: r["environment"]["host"].pop("cores")),
    ("run", "environment.host.cores", lambda r: r["environment"]["host"].update(cores=1.5)),
    ("run", "ceilings[0].bytes_per_s", lambda r: r["ceilings"][0].update(bytes_per_s=0)),
    ("run", "'surprise'", lambda r: r.update(surprise=1)),
    ("artifact", "sha256", lambda r: r.update(sha256="A" * 64)),
    ("artifact", "artifact", lambda r: r.update(artifact="")),
    ("artifact", "artifact", lambda r: r.update(artifact="a" * 201)),
    ("artifact", "role", lambda r: r.update(role="bystander")),
    ("artifact", "sparsity", lambda r: r.update(sparsity=1.01)),
    ("latency", "rounds", lambda r: r.update(rounds=[])),
    ("latency", "rounds[0].total_s", lambda r: r["rounds"][0].update(total_s=0)),
    ("latency", "rounds[0].ttft_s[0]", lambda r: r["rounds"][0].update(ttft_s=[-1e-9])),
    ("latency", "one is there twice", lambda r: r["rounds"].append(r["rounds"][0])),
    ("latency", "not the 1 rows", lambda r: r["rounds"][0].update(ttft_s=[1, 2])),
    ("latency", "not the 1 rows", lambda r: r["rounds"][1].update(gaps_s=[[1], [2]])),
    ("latency", "statistics.ttft_s", lambda r: r["statistics"]["ttft_s"].pop("median")),
    ("latency", "scenario.load", lambda r: r["scenario"].update(load="heavy")),
    ("latency", "engaged", lambda r: r["engaged"].update(x=None)),
    ("memory", "peak_resident_bytes", lambda r: r.update(peak_resident_bytes=0)),
    ("perplexity", "window_nll", lambda r: r["window_nll"].pop()),
    ("perplexity", "window_tokens", lambda r: r["window_tokens"].append(3)),
    ("perplexity", "n_tokens", lambda r: r.update(n_tokens=r["n_tokens"] + 1)),
    ("perplexity", "nll_mean is not", lambda r: r["window_nll"].__setitem__(0, 1e308)),
    ("perplexity", "nll_mean is not", lambda r: r.update(nll_mean=r["nll_mean"] * 1.001)),
    ("perplexity", "is not exp of", lambda r: r.update(perplexity=r["perplexity"] * 1.001)),
    ("perplexity", "is not exp of", lambda r: r.update(perplexity=0)),
    ("perplexity", "kl", lambda r: r["kl"].update(top1_agreement=2)),
    ("task", "value", lambda r: r.update(value=None)),
    ("task", "samples", lambda r: r.pop("samples")),
    ("task", "samples", lambda r: r.update(samples=["right"])),
    ("task", "samples are not n", lambda r: r["samples"].pop()),
    ("task", "value is not the mean", lambda r: r["samples"].__setitem__(0, 0.0)),
    ("kernel", "shape", lambda r: r.update(shape=[1])),
    ("kernel", "best_dense is none", lambda r: r.update(best_dense="x")),
    ("kernel", "auto is none", lambda r: r.update(auto="x")),
    ("kernel", "kernels", lambda r: r.update(kernels={})),
    ("missing", "why", lambda r: r.update(why=5)),
    ("end", "seconds", lambda r: r.update(seconds=-1)),
]


@pytest.mark.parametrize(("kind", "key", "damage"), DAMAGE, ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(DAMAGE)])
def test_a_damaged_record_is_named(tmp_path: Path, lines: list[Record], kind: str, key: str, damage: Damage) -> None:
    records = json.loads(json.dumps(lines))
    read([dump(tmp_path / "whole.jsonl", *records)])
    at = next(i for i, record in enumerate(records) if record["record"] == kind)
    damage(records[at])
    refused(dump(tmp_path / "r.jsonl", *records), f"line {at + 1}", key)


def test_long_and_hostile_keys_are_shortened(tmp_path: Path, lines: list[Record]) -> None:
    engaged = {"\x1b[2J" + "k" * 5000: "v" * 5000, "x" * 3000: 4}
    latency = {**next(line for line in lines if line["record"] == "latency"), "engaged": engaged}
    message = refused(dump(tmp_path / "r.jsonl", *lines[:2], latency), "line 3", "engaged")
    assert message.isprintable()


def test_records_name_what_was_described(tmp_path: Path, lines: list[Record]) -> None:
    path = tmp_path / "r.jsonl"
    run, artifact = lines[0], next(line for line in lines if line["record"] == "artifact")
    memory = next(line for line in lines if line["record"] == "memory")
    latency = next(line for line in lines if line["record"] == "latency")
    perplexity = next(line for line in lines if line["record"] == "perplexity")
    end = next(line for line in lines if line["record"] == "end")
    candidate = {**artifact, "artifact": "2of4", "role": "candidate"}
    for records, words in (
        ([artifact], ["no run record"]),
        ([memory, run], ["no run record", ":1"]),
        ([run, {**artifact, "run": "0" * 16}], ["0000000000000000", "no run record"]),
        ([run, memory], ["'dense' is not described"]),
        ([run, artifact, {**latency, "baseline": "other"}], ["'other' is not described", ":3"]),
        ([run, artifact, {**perplexity, "kl": {**perplexity["kl"], "reference": "other"}}], ["'other'"]),
        ([run, artifact, candidate, {**latency, "baseline": "2of4"}], ["'2of4'", "is no baseline"]),
        ([run, artifact, artifact], ["described twice"]),
        ([run, run], ["is there twice"]),
        ([run, end, artifact], ["has ended before", ":3"]),
        ([run, end, end], ["has ended before"]),
    ):
        refused(dump(path, *records), *words)


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


def run_of(path: Path, **options: bool) -> str:
    with writer(path, **options) as out:
        fields = read_example_run(out.run)
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


def attempt(path: Path) -> tuple[Records | None, str]:
    """The records, or else what the error says; any other exception is a fault."""
    try:
        return read([path]), ""
    except DataError as error:
        return None, str(error)


def _mutated(data: bytes, where: list[tuple[int, int]], cuts: tuple[int, int], swap: bool) -> bytes:
    changed = bytearray(data)
    for place, value in where:
        changed[place % len(changed)] = value
    low, high = sorted(cut % (len(changed) + 1) for cut in cuts)
    return bytes(changed[high:] + changed[low:high] + changed[:low]) if swap else bytes(changed[:low] + changed[high:])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    cuts=st.tuples(st.integers(0, 1 << 16), st.integers(0, 1 << 16)) | st.just((0, 0)),
    swap=st.booleans(),
)
def test_random_damage_is_an_error_or_records(
    tmp_path: Path, fuzzed: bytes, where: list[tuple[int, int]], cuts: tuple[int, int], swap: bool
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(_mutated(fuzzed, where, cuts, swap))
    found, message = attempt(path)
    if found is None:
        assert str(path) in message
        assert message.isprintable()
        return
    for line in found.lines:
        check(line, "x")
        assert found.source(line).startswith(str(path))


@pytest.fixture(scope="module")
def fuzzed(lines: list[Record]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_place_of_another_is_an_error_or_a_record(
    tmp_path: Path, lines: list[Record], data: st.DataObject
) -> None:
    record = json.loads(json.dumps(data.draw(st.sampled_from(lines))))
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(_JSON)
    path = tmp_path / "r.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in (*lines[:2], record))
    path.write_text(text)
    found, message = attempt(path)
    assert (found is not None) or (str(path) in message and message.isprintable())
