"""Records of measurements: JSON lines that are checked when they are written and when they are read.

A run appends each record as soon as it is complete, so that whatever happens later leaves it. ``record.schema.json``
beside this file is the published schema (``record_check.py`` holds records against it); which record names which is
checked here.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EDQUOT, EFBIG, ENOSPC
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sparsify.bench.record_check import FORMAT, record_of, told
from sparsify.bench.record_check import Record as Record
from sparsify.bench.record_check import check as check
from sparsify.errors import DataError, OutputError
from sparsify.files import temporary_beside, writing

# A line is one record; the longest, latencies of long generations, have some megabytes.
_MOST_BYTES = 256 << 20

Mode = Literal["new", "append", "overwrite"]


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
        """``file:line`` of a record, which has to be one of ``lines`` itself."""
        return self._sources[id(record)]

    @cached_property
    def _sources(self) -> dict[int, str]:
        return {id(line): at for line, at in zip(self.lines, self.sources, strict=True)}


class Writer:
    """Appends records of one run to a file; see ``writer``."""

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path = path
        self.run = secrets.token_hex(8)
        self._mode = mode
        self._file: int | None = None

    def write(self, kind: str, /, **fields: Any) -> Record:
        """Append a record and flush it to disk; returns it.

        A record is in the file as a whole or not at all.

        Raises:
            OutputError: disk full, not writable, another process writes there.
            DataError: NaN or Inf, or not what the schema asks for: a fault of the caller.
        """
        record = {"format": FORMAT, "record": kind, "run": self.run, "time": _now(), **fields}
        where = f"{self.path}: a {kind} record that was to be written"
        try:
            data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        except UnicodeEncodeError as error:
            raise DataError(f"{where} holds text that is no Unicode: {error.object[:200]!a}") from error
        except ValueError as error:
            raise DataError(f"{where} holds NaN or Inf") from error
        # What a reader sees, tuples as lists.
        check(record_of(data), where)
        try:
            with writing(self.path):
                self._append(data)
        except OutputError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (ENOSPC, EDQUOT, EFBIG):
                raise OutputError(
                    f"{self.path}: the disk is full; records before this {kind} record are whole: free space and "
                    "measure the rest with --append"
                ) from error
            raise
        return record

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._mode == "overwrite":
                self._replace(data)
                return
            # A file that was not there must not be there now: somebody else's would be lost, or both mixed.
            flags = os.O_APPEND if self._mode == "append" else os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._file = self._locked(os.open(self.path, os.O_RDWR | flags, 0o666))
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                data = b"\n" + data
        before = os.fstat(self._file).st_size
        try:
            _write_all(self._file, data)
        except OSError:
            # Half a line would make the whole file unreadable.
            os.ftruncate(self._file, before)
            raise

    def _replace(self, data: bytes) -> None:
        """The old file stays until the new one holds its first record."""
        os.close(self._locked(os.open(self.path, os.O_RDWR)))
        with temporary_beside(self.path) as temporary:
            file = self._locked(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666))
            try:
                _write_all(file, data)
                os.replace(temporary, self.path)
            except OSError:
                os.close(file)
                raise
        self._file = file

    def _locked(self, file: int) -> int:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise OutputError(
                f"{self.path}: another process adds records to it; wait for it, or choose another file"
            ) from None
        return file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)


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
    there = _there(path)
    if there and not (append or overwrite):
        raise OutputError(f"{path}: exists; add to it with --append, replace it with --overwrite, or choose another")
    if there and append and path.stat().st_size:
        read([path])
    mode: Mode = "new" if not there else "append" if append else "overwrite"
    made = Writer(path, mode)
    try:
        yield made
    finally:
        made.close()


def _there(path: Path) -> bool:
    """Whether there is a file of records; anything else there is refused."""
    try:
        if not path.exists():
            return False
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(4096)
            if not start or (start.startswith(b"{") and b'"record"' in start):
                return True
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; choose another file for records") from None
    raise OutputError(f"{path}: is no file of records; choose another")


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
        if path.exists() and not path.is_file():
            # A pipe would be waited for, a device read for ever.
            raise DataError(f"{path}: is no file; give a file that sparsify bench wrote")
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
            record = record_of(part)
        except (ValueError, RecursionError) as error:
            if number == len(parts) and not complete:
                raise DataError(
                    f"{where} is cut off; the {number - 1} records before it are whole: remove it, or measure again"
                ) from None
            raise DataError(f"{where} is no JSON ({told(error)}); remove it, or measure again") from None
        check(record, where)
        yield number, record


def _check_names(records: Records) -> None:
    """A run begins with its ``run`` record, ends with ``end``, and names artifacts that it has described."""
    roles: dict[str, dict[str, str]] = {}
    ended: set[str] = set()
    for record, source in zip(records.lines, records.sources, strict=True):
        run, kind = record["run"], record["record"]
        if kind == "run":
            if run in roles:
                raise DataError(f"{source}: run {run} is there twice; give each records file once")
            roles[run] = {}
            continue
        if run not in roles:
            raise DataError(f"{source}: run {run} has no run record before this one; give the whole file")
        if run in ended:
            raise DataError(f"{source}: run {run} has ended before this record; measure again")
        if kind == "end":
            ended.add(run)
        if kind == "artifact":
            if record["artifact"] in roles[run]:
                raise DataError(f"{source}: artifact {record['artifact']!r} is described twice in run {run}")
            roles[run][record["artifact"]] = record["role"]
            continue
        dense = (record.get("baseline"), (record.get("kl") or {}).get("reference"))
        for name in (record.get("artifact"), *dense):
            if name is not None and name not in roles[run]:
                raise DataError(f"{source}: artifact {name!r} is not described in run {run}; measure again")
        for name in dense:
            if name is not None and roles[run][name] != "baseline":
                raise DataError(f"{source}: artifact {name!r} is compared with, but is no baseline; measure again")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
