"""The other end of ``sparsify.bench.worker``: start one, ask it, and say why it ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

from sparsify import errors
from sparsify.bench.process_memory import Memory, memory_of, session_members, tree
from sparsify.errors import MeasurementError, SparsifyError

# After it was asked to end.
_GRACE_S = 20.0
# Between looks at whether a silent process is still there.
_LOOK_S = 1.0
_LOG_LINES = 400


class WorkerProcess:
    """A process that holds one artifact in one runtime.

    Args:
        name: of it, for errors.
        python: its interpreter.
        variables: environment variables besides this process's.
        timeout_s: longest wait for an answer.
    """

    def __init__(self, name: str, *, python: str, variables: Mapping[str, str], timeout_s: float) -> None:
        self.name, self._python, self._timeout_s = name, python, timeout_s
        try:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        except OSError as error:
            raise MeasurementError(f"{name}: no room for a log ({error.strerror}); set TMPDIR") from error
        reads, writes = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -P: not what lies in the current folder under the name of a module.
                [python, "-P", "-m", "sparsify.bench.worker", str(writes)],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=(writes,),
                env={"HF_HUB_OFFLINE": "1", **os.environ, **variables}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(reads)
            self._log.close()
            raise errors.UsageError(f"{name}: cannot start {python}: {error.strerror}") from error
        finally:
            os.close(writes)
        self._answers, self._buffer, self._closed = reads, b"", False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, /, **request: Any) -> dict[str, Any]:
        """The one answer to a request.

        Raises:
            MeasurementError: the process died, or did not answer in time.
            SparsifyError: what the worker met.
        """
        found = list(self.ask_all(do, **request))
        if len(found) != 1:
            raise self._nonsense(f"{len(found)} answers to {do!r}")
        return found[0]

    def ask_all(self, do: str, /, **request: Any) -> Iterator[dict[str, Any]]:
        """The answers to a request, as they come; as ``ask`` else."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        while True:
            line = self._line()
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if not isinstance(answer, dict) or not answer.keys() & {"error", "done", "found"}:
                raise self._nonsense(repr(line[:80]))
            if "error" in answer:
                raise _error(str(answer.get("kind")), str(answer["error"]))
            if "done" in answer:
                return
            if not isinstance(answer["found"], dict):
                raise self._nonsense(repr(line[:80]))
            yield answer["found"]

    def _nonsense(self, what: str) -> MeasurementError:
        self._kill()
        return MeasurementError(f"{self.name}: its process said what it should not ({what}); it was ended")

    def _line(self) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                # What the process has started may hold the pipe open after it has ended: look at both.
                if left > 0 and not selector.select(min(left, _LOOK_S)):
                    if self._process.poll() is not None and not selector.select(0):
                        raise self._ended()
                    continue
                if left <= 0:
                    self._kill()
                    raise MeasurementError(
                        f"{self.name}: no answer for {self._timeout_s:g} s; raise --timeout or ask for less at once"
                    )
                data = os.read(self._answers, 1 << 20)
                if not data:
                    raise self._ended()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> MeasurementError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._kill()
        code = self._process.returncode
        if "No module named 'sparsify'" in self._text():
            return MeasurementError(f"{self.name}: sparsify is not installed for {self._python}; install it there")
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return MeasurementError(f"{self.name}: its process died ({how}){_reason(self._text())}")

    def _text(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:])

    def memory(self) -> Memory:
        """Of the process and what it started."""
        return memory_of(self._process.pid)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def _kill(self) -> None:
        """End the process and what it started, also where that has lost its parent."""
        while pids := {*session_members(self._process.pid), *self._tree()}:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        self._process.wait()

    def _tree(self) -> list[int]:
        # Once it has been waited for, its number may be another's.
        return tree(self._process.pid) if self._process.returncode is None else []

    def close(self) -> None:
        """Ask it to end, then make it; what it started ends too."""
        if self._closed:
            return
        self._closed = True
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        finally:
            self._kill()
            with suppress(OSError):
                os.close(self._answers)
            self._log.close()


def _error(kind: str, message: str) -> SparsifyError:
    """What a worker met; that it could not write is no matter of the records."""
    found = getattr(errors, kind, None)
    if not isinstance(found, type) or not issubclass(found, SparsifyError) or issubclass(found, errors.OutputError):
        found = MeasurementError
    return found(message)


def _reason(text: str) -> str:
    """The last line of an exception in what a process printed, or nothing."""
    from sparsify.runtimes.vllm_settings import cause

    found = cause(text)
    return f": {found}" if found else ""
