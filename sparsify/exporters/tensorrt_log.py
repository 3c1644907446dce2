"""What TensorRT says and how far it is: its log kept line by line, its phases as progress, its failures as errors."""

from __future__ import annotations

import time
from typing import IO, Any

from sparsify.errors import SparsifyError
from sparsify.progress import Progress

# TensorRT's and CUDA's own words for it.
_NO_MEMORY = ("outofmemory", "out of memory", "out_of_memory", "cudaerrormemoryallocation", "insufficient memory")


class BuildLog:
    """What TensorRT said, line by line, in a file and in part in memory.

    Attributes:
        errors: messages of severity ERROR and INTERNAL_ERROR, in order.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self.errors: list[str] = []
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


class Monitor:
    """Turns TensorRT's nested phases into our flat stages: the outermost phase is the stage.

    Attributes:
        native: TensorRT's object, kept alive here: the build configuration holds no reference.
        error: what ``progress`` raised; the build was cancelled for it and the caller raises it again.
    """

    def __init__(self, progress: Progress) -> None:
        self.native: Any = None
        self.error: BaseException | None = None
        self._progress = progress
        self._outermost: str | None = None

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins."""
        if parent:
            return
        self._outermost = phase
        self._report(lambda: self._progress.stage(phase, steps))

    def step(self, phase: str) -> bool:
        """A step is done; False cancels the build."""
        if phase == self._outermost:
            self._report(self._progress.advance)
        return self.error is None

    def _report(self, call: Any) -> None:
        try:
            call()
        except BaseException as error:  # an exception must not travel through TensorRT's C++ frames
            self.error = error


def failure(log: BuildLog, what: str, kind: type[SparsifyError] = SparsifyError) -> SparsifyError:
    """The error to raise where TensorRT returned nothing: want of memory is told apart from the rest."""
    for message in log.errors:
        line = " ".join(message.split())[:300]
        if any(word in message.lower() for word in _NO_MEMORY):
            return SparsifyError(f"{what}: out of memory; lower workspace=, level= or the profile sizes: {line}")
        if "workspace limit" in message.lower():
            return SparsifyError(f"{what}: no kernel fits the scratch memory; raise workspace=: {line}")
    return kind(f"{what}: {log.last_error()}")
