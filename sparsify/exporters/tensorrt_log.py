"""What TensorRT says and how far it is: its log kept line by line, its phases as progress, its failures as errors.

TensorRT calls back into Python from C++, and its bindings print and drop what is raised there. So whatever must stop
the work (Ctrl-C, a full disk under the log, an exception of the progress display) is kept in the ``BuildLog``, ends
the build at its next step, and is raised when the call is over.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from sparsify.errors import SparsifyError
from sparsify.progress import Progress

# TensorRT's, CUDA's and torch's own words for it.
_NO_MEMORY = (
    *("outofmemory", "out of memory", "out_of_memory", "insufficient memory"),
    *("memoryallocation", "alloc_failed"),
)


def out_of_memory(message: str) -> bool:
    """Whether a message of TensorRT, CUDA or torch says that memory ran out."""
    return any(words in message.lower() for words in _NO_MEMORY)


class BuildLog:
    """What TensorRT said, line by line, in a file and in part in memory.

    Attributes:
        errors: messages of severity ERROR and INTERNAL_ERROR, in order.
        stop: the first exception that a callback met; the work is to end for it.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self.errors: list[str] = []
        self.stop: BaseException | None = None
        self._file = file
        self._start = time.monotonic()

    def write(self, severity: str, message: str) -> None:
        """One message; ``severity`` is the name of a member of TensorRT's enum, as INFO."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        if self._file is not None:
            self._file.write(f"{time.monotonic() - self._start:9.3f} {severity} {message}\n")

    def last_error(self) -> str:
        """The last error in one line of at most 300 characters, or a sentence that there was none."""
        return " ".join(self.errors[-1].split())[:300] if self.errors else "TensorRT gave no reason"

    def guard(self, call: Callable[[], object]) -> None:
        """Make a call on behalf of TensorRT, and keep what it raises."""
        try:
            call()
        except BaseException as error:  # an exception must not travel through TensorRT's C++ frames
            self.stop = self.stop or error


@contextmanager
def listening(log: BuildLog) -> Iterator[None]:
    """Around calls of TensorRT: raises at the end what a callback met, and keeps Ctrl-C from being lost in one.

    Ctrl-C ends a build at its next step. A second one ends the process at once, for versions and calls without steps.
    """
    previous = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and callable(previous)

    def interrupt(number: int, frame: object) -> None:
        log.stop = log.stop or KeyboardInterrupt()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if log.stop is not None:
            raise log.stop from None
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, previous)
    if log.stop is not None:
        raise log.stop


def native_logger(base: Any, log: BuildLog) -> Any:
    """An object of TensorRT's class ``base``, its ``ILogger``, that writes every message to ``log``."""

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.guard(lambda: log.write(severity.name, message))

    return Logger()


def native_monitor(base: Any, log: BuildLog, progress: Progress) -> Any:
    """An object of TensorRT's class ``base``, its ``IProgressMonitor``, that reports to ``progress``.

    TensorRT's phases are nested: the outermost is the stage. A step cancels the build where ``log`` holds a reason.
    """

    class ProgressMonitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.outermost: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outermost = phase_name
                log.guard(lambda: progress.stage(phase_name, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                log.guard(progress.advance)
            return log.stop is None

        def phase_finish(self, phase_name: str) -> None:
            pass

    return ProgressMonitor()


def failure(log: BuildLog, what: str, kind: type[SparsifyError] = SparsifyError) -> SparsifyError:
    """The error to raise where TensorRT returned nothing: want of memory is told apart from the rest."""
    for message in log.errors:
        line = " ".join(message.split())[:300]
        if out_of_memory(message):
            return SparsifyError(f"{what}: out of memory; lower workspace=, level= or the profile sizes: {line}")
        if "workspace limit" in message.lower():
            return SparsifyError(f"{what}: no kernel fits the scratch memory; raise workspace=: {line}")
    return kind(f"{what}: {log.last_error()}")
