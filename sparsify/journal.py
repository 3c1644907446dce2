"""What a run leaves for others to watch: journal lines, metrics, a snapshot. Written by the driver's process alone.

The journal is a record, never a commit point: what a run resumes from is the staging folder's state, and without its
journal it resumes just as well.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sparsify import __version__
from sparsify.errors import OutputError, SparsifyError
from sparsify.files import temporary_beside, writing
from sparsify.metrics import exposition
from sparsify.processes import identity
from sparsify.progress import Progress, Silent
from sparsify.tally import Tally

if TYPE_CHECKING:
    from sparsify.types import PrunedLinear

JOURNAL = "journal.jsonl"
METRICS = "metrics.prom"
SNAPSHOT = ".progress.json"
FORMAT = 1
# Snapshot and metrics are replaced at most this often for steps, and else whenever something begins or ends.
_EVERY_S = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class About:
    """What is run, for those that watch it.

    Attributes:
        model, method, pattern: as the user named them.
        fingerprint: what the result depends on, as the staging folder has it; the journal keeps its SHA-256.
        threads: of the driver.
        workers: processes it gives tasks to; 0 where it computes itself.
        device: where it computes.
    """

    model: str = ""
    method: str = ""
    pattern: str = ""
    fingerprint: Mapping[str, Any] | None = None
    threads: int | None = None
    workers: int = 0
    device: str = "cpu"


class Stopwatch:
    """Adds up the time of the steps of one block: ``with clock("solve"): ...``, then ``clock.seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the time of the context, in seconds, as ``step``'s."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - began


class Journal:
    """A ``Progress`` that writes down what it hears, for ``sparsify status``, scrapers and those who come later.

    A context: an exception that leaves it is recorded as the run's end. Calls may come from several threads of the
    driver's process; workers tell the driver, and write nothing.

    Args:
        folder: the staging folder, locked.
        inner: is told of stages, steps and notices too.
        about: what is run.
        done: blocks that an earlier process finished.
        clock: seconds since 1970.

    Raises:
        OutputError: the journal cannot be written. Metrics and snapshot raise it for a full disk only; where they
            cannot be written for another reason there is a notice, and the run goes on without them.
    """

    def __init__(
        self,
        folder: Path,
        inner: Progress | None = None,
        about: About | None = None,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._inner = inner or Silent()
        self._clock = clock
        self._lock = threading.RLock()
        self._run = secrets.token_hex(8)
        self._next = 0.0
        self._ended = False
        self._blind = False
        self._torn = False
        about = about or About()
        self._tally = Tally(clock, about.model, about.method, about.pattern)
        self._path = folder / JOURNAL
        with writing(self._path):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._path, flags, 0o666)
        try:
            self._start(about, done)
        except BaseException:
            os.close(self._file)
            raise

    def _start(self, about: About, done: int) -> None:
        with writing(self._path):
            size = os.fstat(self._file).st_size
            # A process that was killed while it wrote: what it left stays, as a line that nobody can read.
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        facts = asdict(about)
        text = json.dumps(facts.pop("fingerprint"), sort_keys=True, default=str)
        self._line(
            "resume" if size or done else "start",
            format=FORMAT,
            run=self._run,
            version=__version__,
            **identity(),
            command=command(),
            cwd=_working_folder(),
            **facts,
            fingerprint=None if about.fingerprint is None else hashlib.sha256(text.encode()).hexdigest(),
            blocks_done=done,
        )
        self._publish(force=True)

    # --- progress --------------------------------------------------------------------------------------------------

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins; the one before it is over."""
        self._inner.stage(name, total)
        with self._lock:
            self._tally.stage(name, total)
            self._line("stage", stage=name, steps=total)
            self._publish(force=True)

    def advance(self, steps: int = 1) -> None:
        """``steps`` of the stage are done."""
        self._advance(steps, 0)

    def skip(self, steps: int) -> None:
        """``steps`` of the stage were done by an earlier process: shown as done, and not counted for the speed."""
        self._advance(steps, steps)

    def _advance(self, steps: int, skipped: int) -> None:
        self._inner.advance(steps)
        with self._lock:
            self._tally.advance(steps, skipped)
            self._publish()

    def notice(self, text: str) -> None:
        """Something the user should know that is not an error."""
        self._inner.notice(text)
        with self._lock:
            self._line("notice", text=text)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def blocks(self, total: int, done: Collection[int] = (), *, weights: Sequence[int] | None = None) -> None:
        """Work on the decoder blocks begins: time left is reckoned from here on.

        Args:
            total: blocks of the model.
            done: those that an earlier process finished.
            weights: of each block those that are pruned; without them blocks count alike.
        """
        with self._lock:
            self._tally.blocks(total, done, weights)
            self._line("blocks", total=total, done=len(done))
            self._publish(force=True)

    def block(
        self,
        index: int,
        rows: Sequence[PrunedLinear],
        seconds: Mapping[str, float],
        *,
        workers: Sequence[str] = (),
        peak_memory_bytes: int | None = None,
    ) -> None:
        """Block ``index`` is finished and committed; called after ``blocks``, in any order, once for each.

        Args:
            index: its number.
            rows: its pruned linears.
            seconds: time by step (load, statistics, solve, outputs, write), summed over the workers.
            workers: who worked on it.
            peak_memory_bytes: the largest of theirs.
        """
        selected = sum(row.shape[0] * row.shape[1] for row in rows)
        worst = max(rows, key=lambda row: row.relative_error, default=None)
        with self._lock:
            took = self._tally.block(index, seconds)
            self._line(
                "block",
                block=index,
                took_s=round(took, 3),
                seconds={step: round(value, 3) for step, value in seconds.items()},
                linears=len(rows),
                weights=selected,
                sparsity=sum(row.zeros for row in rows) / selected if selected else None,
                worst={"linear": worst.name, "relative_error": worst.relative_error} if worst else None,
                workers=list(workers),
                peak_memory_bytes=peak_memory_bytes,
            )
            self._publish(force=True)

    # --- workers and tasks -----------------------------------------------------------------------------------------

    def worker(
        self, name: str, doing: str | None = None, block: int | None = None, *, peak_memory_bytes: int | None = None
    ) -> None:
        """Worker ``name`` was heard of: it does ``doing`` (a kind of task; None: it waits) for ``block``."""
        with self._lock:
            # That it began is worth a file: it may be the last that is heard for hours.
            self._publish(force=self._tally.worker(name, doing, block, peak_memory_bytes))

    def seen(self, name: str) -> None:
        """Worker ``name`` was heard of; it does what it did."""
        with self._lock:
            self._tally.seen(name)
            self._publish()

    def lost(self, name: str, error: str) -> None:
        """Worker ``name`` is gone; that its task failed is told by ``task``."""
        with self._lock:
            before = self._tally.lost(name)
            self._line("lost", worker=name, error=error, doing=before.doing, block=before.block)
            self._publish(force=True)

    def task(self, kind: str, block: int | None, worker: str, error: str, *, attempt: int, retried: bool) -> None:
        """A task failed, for the ``attempt``-th time counted from 1; ``retried``: it is given out again."""
        with self._lock:
            self._tally.task(retried)
            state = "retried" if retried else "failed"
            self._line("task", state=state, kind=kind, block=block, worker=worker, error=error, attempt=attempt)
            self._publish(force=True)

    def beat(self) -> None:
        """The driver is alive; for loops that wait."""
        with self._lock:
            self._publish()

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The work is done, and about to be committed: the last line; metrics and snapshot go, the journal stays."""
        with self._lock:
            self._line("end", state="finished", error=None)
            self._ended = True
            for name in (METRICS, SNAPSHOT):
                with writing(self.folder / name):
                    (self.folder / name).unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if error is not None:
                self._ended = False
                text = str(error) if isinstance(error, SparsifyError) else f"{type(error).__name__}: {error}"
                state = "failed" if isinstance(error, Exception) else "interrupted"
                # The disk may be full; what matters is the error that is on its way.
                with suppress(OutputError):
                    self._line("end", state=state, error=" ".join(text.split()))
                    self._publish(state, force=True)
            self._ended = True
            os.close(self._file)

    # --- files -----------------------------------------------------------------------------------------------------

    def _line(self, event: str, **fields: Any) -> None:
        if self._ended:
            return
        value = {"event": event, "time": round(self._clock(), 3), **fields}
        data = ("\n" * self._torn + json.dumps(_finite(value)) + "\n").encode("ascii")
        with writing(self._path):
            while data:
                data = data[os.write(self._file, data) :]
                self._torn = bool(data)

    def _publish(self, state: str = "running", *, force: bool = False) -> None:
        """Replace metrics and snapshot, unless they are fresh."""
        ticks = time.monotonic()
        if self._ended or self._blind or (ticks < self._next and not force):
            return
        self._next = ticks + _EVERY_S
        snapshot = self._tally.snapshot(state)
        value = {"format": FORMAT, "run": self._run, **asdict(snapshot)}
        try:
            _replace(self.folder / METRICS, exposition(snapshot))
            _replace(self.folder / SNAPSHOT, json.dumps(_finite(value)) + "\n")
        except OSError as error:
            if error.errno in _FULL:
                with writing(self.folder / METRICS):
                    raise
            self._blind = True
            self._inner.notice(f"{self.folder / METRICS}: not written any more ({error.strerror or error})")


def _replace(path: Path, text: str) -> None:
    """Replace ``path`` at once. Not flushed to the disk as an output is: after a power failure it has no news."""
    with temporary_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def _finite(value: Any) -> Any:
    """``value`` with None for the floats that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        # Removed since.
        return None


def command() -> list[str]:
    """What was typed to start this process, as far as it can be typed again."""
    if Path(sys.argv[0]).name == "sparsify":
        # The script that pip installs names its interpreter itself.
        return list(sys.argv)
    return list(sys.orig_argv)
