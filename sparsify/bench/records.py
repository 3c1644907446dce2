"""Records of measurements: JSON lines that are checked when they are written and when they are read.

A run appends each record as soon as it is complete, so that whatever happens later leaves it. ``record.schema.json``
beside this file is the published schema; what it cannot say (which record names which) is checked here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sparsify.errors import DataError, MissingExtraError, OutputError
from sparsify.files import writing

FORMAT = 1
KINDS = ("run", "artifact", "latency", "memory", "perplexity", "task", "kernel", "missing", "end")
# A line is one record; the longest, latencies of long generations, have some megabytes.
_MOST_BYTES = 256 << 20

Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """What was read: every record, in order, of whole files.

    Attributes:
        lines: the records.
        sources: for each record the file and line that it is from.
    """

    lines: tuple[Record, ...]
    sources: tuple[str, ...]

    def of(self, kind: str, run: str | None = None) -> list[Record]:
        """The records of one kind, of one run or of all."""
        return [line for line in self.lines if line["record"] == kind and run in (None, line["run"])]

    def source(self, record: Record) -> str:
        """``file:line`` of a record."""
        return next(at for line, at in zip(self.lines, self.sources, strict=True) if line is record)


class Writer:
    """Appends records of one run to a file; see ``writer``."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self.run = secrets.token_hex(8)
        self._flags = flags
        self._file: int | None = None

    def write(self, kind: str, /, **fields: Any) -> Record:
        """Append a record and flush it to disk; returns it.

        Raises:
            OutputError: disk full, not writable.
            DataError: NaN or Inf, or not what the schema asks for: a fault of the caller.
        """
        record = {"format": FORMAT, "record": kind, "run": self.run, "time": _now(), **fields}
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise DataError(f"{self.path}: a {kind} record holds NaN or Inf and is not written") from error
        # What a reader sees, tuples as lists.
        check(json.loads(text), f"{self.path}: a {kind} record that was to be written")
        with writing(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | self._flags, 0o666)
            data = memoryview(text.encode("utf-8") + b"\n")
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        return record

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def writer(path: Path, *, append: bool = False, overwrite: bool = False) -> Iterator[Writer]:
    """A writer of a new run to ``path``.

    Args:
        path: a new file, or with ``append`` one whose records can be read, or with ``overwrite`` any records file.
        append: add a run to the file.
        overwrite: replace it, once this run writes its first record.

    Raises:
        OutputError: it exists and neither is given, holds something else, or cannot be written.
        DataError: with ``append``: a record in it is damaged.
    """
    if path.exists():
        if not (append or overwrite):
            raise OutputError(
                f"{path}: exists; add to it with --append, replace it with --overwrite, or choose another"
            )
        if not path.is_file() or not _is_records(path):
            raise OutputError(f"{path}: is no file of records; choose another")
        if append:
            read([path])
    made = Writer(path, os.O_APPEND if append else os.O_TRUNC)
    try:
        yield made
    finally:
        made.close()


def _is_records(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096)
    return not start or (start.startswith(b"{") and b'"record"' in start)


def read(paths: Sequence[Path]) -> Records:
    """Every record of ``paths``, checked.

    Raises:
        DataError: a file is missing, empty or damaged; names file and line, and what to do.
    """
    lines: list[Record] = []
    sources: list[str] = []
    for path in paths:
        for number, record in _parse(path):
            lines.append(record)
            sources.append(f"{path}:{number}")
    records = Records(tuple(lines), tuple(sources))
    _check_names(records)
    return records


def _parse(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB; give files that sparsify bench wrote")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a file that sparsify bench wrote") from None
    if not data.strip():
        raise DataError(f"{path}: holds no record; run sparsify bench again")
    complete = data.endswith(b"\n")
    parts = data.split(b"\n")[: -1 if complete else None]
    for number, part in enumerate(parts, 1):
        where = f"{path}: line {number}"
        try:
            record = json.loads(part.decode("utf-8"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            if number == len(parts) and not complete:
                raise DataError(
                    f"{where} is cut off; the {number - 1} records before it are whole: remove it, or measure again"
                ) from None
            raise DataError(f"{where} is not JSON ({error}); remove it, or measure again") from None
        check(record, where)
        yield number, record


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _check_names(records: Records) -> None:
    """Every record is of a run that begins with its ``run`` record, and names artifacts that the run has described."""
    known: dict[str, set[str]] = {}
    for record, source in zip(records.lines, records.sources, strict=True):
        run, kind = record["run"], record["record"]
        if kind == "run":
            if run in known:
                raise DataError(f"{source}: run {run} is there twice; give each records file once")
            known[run] = set()
            continue
        if run not in known:
            raise DataError(f"{source}: run {run} has no run record before this one; give the whole file")
        if kind == "artifact":
            if record["artifact"] in known[run]:
                raise DataError(f"{source}: artifact {record['artifact']!r} is described twice in run {run}")
            known[run].add(record["artifact"])
            continue
        kl = record.get("kl") or {}
        for name in (record.get("artifact"), record.get("baseline"), kl.get("reference")):
            if name is not None and name not in known[run]:
                raise DataError(f"{source}: artifact {name!r} is not described in run {run}; measure again")


def check(record: Any, where: str) -> None:
    """Refuse what is no record by the schema.

    Raises:
        DataError: one line with ``where``, the key and what is wrong with it.
        MissingExtraError: jsonschema is not installed.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where} is no record but {type(record).__name__}; give a file that sparsify bench wrote")
    if record.get("format") != FORMAT:
        found = str(record.get("format"))[:40]
        raise DataError(f"{where}: format is {found}, this version reads {FORMAT}; use a sparsify that fits")
    kind = record.get("record")
    if kind not in KINDS:
        raise DataError(f"{where}: record is {str(kind)[:40]!r}, none of {', '.join(KINDS)}")
    error = next(iter(sorted(_validator(kind).iter_errors(record), key=lambda e: e.json_path)), None)
    if error is not None:
        key = error.json_path.removeprefix("$.") if error.json_path != "$" else kind
        message = error.message if len(error.message) < 200 else f"{error.message[:80]} ... {error.message[-80:]}"
        raise DataError(f"{where}: {key}: {message}; remove the record, or measure again")


@cache
def _validator(kind: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise MissingExtraError('records need jsonschema; run: pip install "sparsify-toolkit[bench]"') from error
    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema()["$defs"]})


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of a record."""
    text = resources.files("sparsify.bench").joinpath("record.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def by_artifact(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the artifact they are of, in order of appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["artifact"], []).append(record)
    return found
