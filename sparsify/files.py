"""Files that appear whole or not at all: atomic writes, hashes, and the staging folder that becomes the output."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsify.errors import OutputError, SparsifyError

_LOCK = ".lock"
_STATE = ".state.json"
# Files that mark a folder as an output of ours, and what such a file holds at least: the names alone are anybody's.
_MARKS = {
    "sparsify.json": ("format", "kind", "files"),
    "report.json": ("model", "coverage", "artifacts"),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failing write below ``path`` into an ``OutputError`` with the remedy."""
    try:
        yield
    except OSError as error:
        raise _output_error(path, error) from error
    except Exception as error:
        # safetensors reports I/O failures as its own exception with the operating system's text in it.
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            raise OutputError(f"{path}: cannot write: {error}; free space or choose another --out") from error
        raise


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{path}: the disk is full; free space and run the same command again, it will resume")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{path}: not writable; change its permissions or choose another --out")
    return OutputError(f"{path}: {error.strerror or error}; choose another --out")


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Of the names that ``temporary_beside`` makes; an output may have files of its own that end in ``.tmp``.
_TEMPORARY = f"*.{'[0-9a-f]' * 12}.tmp"


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new file in the folder of ``path`` that nobody else writes to; removed at the end if it is still there.

    Its name is its own: two threads, or processes that share a folder but not their numbers, may write ``path`` at
    once. It ends in ``.tmp``, and who is killed leaves it.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    # Not tempfile: its files are private, and this one is as readable as any file the user creates.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, flush it to disk, then rename it to ``path``.

    Raises:
        OutputError: disk full, not writable.
    """
    with writing(path), temporary_beside(path) as temporary:
        mode = temporary.stat().st_mode
        write(temporary)
        # safetensors makes its files private.
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; keys keep their order."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Total size in bytes of the files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def staging_path(out: Path) -> Path:
    """Where the output for ``out`` is built before it appears: a sibling, so that the rename stays on one disk."""
    return out.with_name(out.name + ".partial")


class Staging:
    """A locked folder in which an output is built; ``commit`` makes it appear.

    Attributes:
        path: the folder.
        state: what ``save`` last stored, or None where the work starts afresh.
    """

    def __init__(self, path: Path, out: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.state: dict[str, Any] | None = None
        self._out = out
        self._fingerprint = fingerprint

    def save(self, state: dict[str, Any]) -> None:
        """Store how far the work is, atomically; the next process that works on the same output finds it."""
        self.state = state
        write_json(self.path / _STATE, {"fingerprint": self._fingerprint, "state": state})

    def load(self, check: Callable[[Path, Any], str | None]) -> str | None:
        """Read what an interrupted process stored; returns what stands against going on from there, or None."""
        if not (self.path / _STATE).exists():
            # Whatever else lies here was never committed to.
            with writing(self.path):
                clear(self.path)
            return None
        with writing(self.path):
            # Of a process that was killed while it wrote: under their names nothing will replace them.
            for left in self.path.rglob(_TEMPORARY):
                if left.is_file():
                    left.unlink()
        try:
            stored = read_json(self.path / _STATE)
            before, state = dict(stored["fingerprint"]), stored["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"holds interrupted work that cannot be read ({error})"
        for key in before.keys() | self._fingerprint.keys():
            if before.get(key) != self._fingerprint.get(key):
                return f"holds an interrupted run with another {key}; repeat that command to resume it"
        try:
            damage = check(self.path, state)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            damage = f"its record is malformed ({type(error).__name__}: {error})"
        if damage:
            return f"holds an interrupted run that was damaged: {damage}; repair it"
        self.state = state
        return None

    def commit(self) -> None:
        """Make the folder appear as the output, at once; what stood there is removed only afterwards.

        Raises:
            OutputError: the rename failed; the output is then as it was.
        """
        with writing(self._out):
            if self._out.exists() and any(self._out.iterdir()):
                # The old output is about to be a staging folder; a process killed before it is removed leaves one.
                (self._out / _LOCK).touch()
                _exchange(self.path, self._out)
                _remove(self.path)
            else:
                self.path.replace(self._out)
            sync_folder(self._out.parent)
            for name in (_STATE, _LOCK):
                (self._out / name).unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: in one step where the file system can, else in three."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is not None and exchange(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name}-", dir=other.parent))
    other.replace(aside / "old")
    try:
        one.replace(other)
    except OSError:
        (aside / "old").replace(other)
        raise
    (aside / "old").replace(one)
    aside.rmdir()


@contextmanager
def staging_folder(
    out: Path,
    fingerprint: dict[str, Any],
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    check: Callable[[Path, Any], str | None] = lambda folder, state: None,
) -> Iterator[Staging]:
    """A locked folder next to ``out`` to build in; an interrupted run of the same ``fingerprint`` is found again.

    The folder stays after an error, so that the run can resume; ``Staging.commit`` makes it the output. Only where
    nothing was committed to yet, and the error is not one of writing, there is nothing to resume and it is removed.

    Args:
        out: the final folder; must not exist, or be empty, unless ``overwrite``.
        fingerprint: everything the result depends on, as JSON values.
        overwrite: allow ``out`` to be an earlier output (it is replaced only by ``commit``), and forget interrupted
            work that cannot be resumed.
        inputs: folders that are read, which no output may replace.
        check: (folder, stored state) -> what is wrong with it, or None; called where the fingerprint fits.

    Raises:
        OutputError: ``out`` exists, is not ours to replace, is not writable, or another process works on it.
    """
    # Links are followed now: work on the disk that the user chose, and a rename that replaces the folder, not the link.
    out = Path(os.path.realpath(out))
    for folder in inputs:
        if Path(os.path.realpath(folder)).is_relative_to(out):
            raise OutputError(f"{out}: holds the input {folder}; choose another --out")
    _check_replaceable(out, overwrite)
    path = staging_path(out)
    with writing(path):
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if names and not names & {_LOCK, _STATE}:
            raise OutputError(f"{path}: is not a folder of sparsify's; move it away or choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{path}: another sparsify process is writing here; wait for it to finish") from None
        staging = Staging(path, out, fingerprint)
        obstacle = staging.load(check)
        if obstacle and not overwrite:
            raise OutputError(f"{path}: {obstacle}, or pass --overwrite to start again")
        if obstacle:
            with writing(path):
                clear(path)
        try:
            yield staging
        except OutputError:
            raise
        except SparsifyError:
            # A folder within is an output of its own that may have come far.
            if not staging.state and not any(entry.is_dir() for entry in path.iterdir()):
                with writing(path):
                    _remove(path)
            raise


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")
    if os.path.ismount(out) or Path.cwd().is_relative_to(out):
        # Neither can be replaced by a rename, and that would show only after the work.
        what = "a mount point" if os.path.ismount(out) else "the current folder"
        raise OutputError(f"{out}: is {what}, which no output can replace; choose a folder inside it as --out")
    with writing(out):
        empty = all(path.name == _LOCK for path in out.iterdir())
    if empty:
        return
    if not overwrite:
        raise OutputError(f"{out}: exists and is not empty; choose another --out or pass --overwrite")
    foreign = sorted(_files(out) - _our_files(out))
    if foreign:
        raise OutputError(
            f"{out}: {foreign[0]} is not part of an output of sparsify, so --overwrite leaves the folder alone; "
            "move that away or choose another --out"
        )


def _files(folder: Path) -> set[str]:
    """Paths, relative to ``folder``, of everything in it that is not a folder."""
    found: set[str] = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found.update((Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links))
    return found


def _our_files(folder: Path) -> set[str]:
    """Paths of the files that ``folder`` has as an output of ours; none if it is no such output."""
    for mark, keys in _MARKS.items():
        try:
            value = read_json(folder / mark)
        except (OSError, ValueError):
            continue
        if not isinstance(value, dict) or not all(key in value for key in keys):
            continue
        own = {mark, "run.json", "journal.jsonl", "report.md", _LOCK, _STATE}
        if mark == "sparsify.json":
            return own | (set(value["files"]) if isinstance(value["files"], dict) else set())
        artifacts = value["artifacts"] if isinstance(value["artifacts"], list) else []
        targets = {str(entry.get("path")) for entry in artifacts if isinstance(entry, dict)} | {"checkpoint"}
        below = {target for target in targets if Path(target).name == target}
        return own.union(*({f"{target}/{name}" for name in _our_files(folder / target)} for target in below))
    return set()


def _remove(folder: Path) -> None:
    """Remove a staging folder; its lock goes last, so that what a kill leaves is known to be one."""
    clear(folder)
    shutil.rmtree(folder)


def clear(folder: Path) -> None:
    """Empty a staging folder, its lock excepted."""
    for entry in folder.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> [bytes, modification time in ns]: whether files changed since an interrupted run."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        OSError: it cannot be read.
        ValueError: not UTF-8 JSON; the caller knows what the file is for and words the error.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
