"""A process of ours that answers requests: start one, ask it, say why it ended; and the other end, ``serve``.

Each line of the process's standard input is a request; each answer is a line on a descriptor of its own. What libraries
print there goes into a log, whose end says why a process died.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from sparsify import errors
from sparsify.errors import SparsifyError, UsageError
from sparsify.process_memory import Memory, memory_of, session_members, tree

# After it was asked to end.
_GRACE_S = 20.0
# Between looks at whether a silent process is still there.
_LOOK_S = 1.0
_LOG_LINES = 400
# <sys/prctl.h>
_PR_SET_PDEATHSIG = 1


Say = Callable[..., None]
Handlers = Mapping[str, Callable[..., Iterator[dict[str, Any]]]]


class WorkerProcess:
    """A process that runs ``module`` and answers requests there by ``serve``.

    It has a folder of its own for temporary files (``TMPDIR``), which goes with it: whoever is killed clears nothing.
    A file there that an error has named stays, for people to look at.

    Args:
        name: of it, for errors.
        module: that is run with the number of the descriptor for answers as argument.
        python: its interpreter.
        variables: environment variables besides this process's.
        timeout_s: longest wait for an answer; None waits as long as the process lives.
        gone: the error that is raised where the process died or said nonsense, and where it met what has no place here.
        why: the reason in what the process printed, or None.
        makes_output: whether it writes what the caller is to make: that it cannot is then an ``OutputError`` of the
            caller's too, else ``gone``.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        python: str,
        variables: Mapping[str, str],
        timeout_s: float | None,
        gone: type[SparsifyError],
        why: Callable[[str], str | None],
        makes_output: bool = False,
    ) -> None:
        self.name, self._python, self._timeout_s = name, python, timeout_s
        self._gone, self._why, self._makes_output = gone, why, makes_output
        self._told = ""
        try:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
            # Short: sockets in it have to have a path of at most 107 bytes.
            self._folder = Path(tempfile.mkdtemp(prefix="sp-"))
        except OSError as error:
            raise gone(f"{name}: no room for temporary files ({error.strerror}); set TMPDIR") from error
        reads, writes = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -P: not what lies in the current folder under the name of a module.
                [python, "-P", "-m", module, str(writes)],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=(writes,),
                env={"HF_HUB_OFFLINE": "1", **os.environ, **variables, "TMPDIR": str(self._folder)},
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(reads)
            self._log.close()
            self._folder.rmdir()
            raise UsageError(f"{name}: cannot start {python}: {error.strerror}") from error
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
            SparsifyError: ``gone``, where the process died or did not answer in time; else what the worker met.
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
                raise self._met(str(answer.get("kind")), str(answer["error"]))
            if "done" in answer:
                return
            if not isinstance(answer["found"], dict):
                raise self._nonsense(repr(line[:80]))
            yield answer["found"]

    def _met(self, kind: str, message: str) -> SparsifyError:
        """What a worker met; that it could not write matters to whoever asked where it writes for them."""
        found = getattr(errors, kind, None)
        if not isinstance(found, type) or not issubclass(found, SparsifyError):
            found = self._gone
        if issubclass(found, errors.OutputError) and not self._makes_output:
            found = self._gone
        self._told += message
        return found(message)

    def _nonsense(self, what: str) -> SparsifyError:
        self.kill()
        return self._gone(f"{self.name}: its process said what it should not ({what}); it was ended")

    def _line(self) -> bytes:
        deadline = time.monotonic() + (math.inf if self._timeout_s is None else self._timeout_s)
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
                    self.kill()
                    raise self._gone(
                        f"{self.name}: no answer for {self._timeout_s:g} s; raise --timeout or ask for less at once"
                    )
                data = os.read(self._answers, 1 << 20)
                if not data:
                    raise self._ended()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> SparsifyError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.kill()
        code = self._process.returncode
        if "No module named 'sparsify'" in self._text():
            return self._gone(f"{self.name}: sparsify is not installed for {self._python}; install it there")
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        reason = self._why(self._text())
        return self._gone(f"{self.name}: its process died ({how}){f': {reason}' if reason else ''}")

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

    def kill(self) -> None:
        """End the process and what it started, also where that has lost its parent; remove its temporary files."""
        while pids := {*session_members(self._process.pid), *self._tree()}:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        self._process.wait()
        self._clear()

    def _clear(self) -> None:
        # What lies in a folder comes before it in this order; links are removed, not followed.
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if str(path) not in self._told:
                with suppress(OSError):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        with suppress(OSError):  # holds what was named
            self._folder.rmdir()

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
            self.kill()
            with suppress(OSError):
                os.close(self._answers)
            self._log.close()


def serve(handlers: Callable[[Say], Handlers]) -> None:
    """Answer requests from standard input until it ends, on the descriptor that is this process's first argument.

    Args:
        handlers: given a function that sends an answer at once, from any thread, what is done for each request: an
            iterator of answers.
    """
    end_with_parent()
    answers = int(sys.argv[1])
    os.set_inheritable(answers, False)

    one = threading.Lock()

    def say(**what: Any) -> None:
        data = memoryview(json.dumps(what).encode() + b"\n")
        with one:
            while data:
                data = data[os.write(answers, data) :]

    known = handlers(lambda **found: say(found=found))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            handle = known.get(request.pop("do"))
            if handle is None:
                raise UsageError(f"request {line[:80]!r} is unknown")
            for found in handle(**request):
                say(found=found)
            say(done=True)
        except SparsifyError as error:
            say(error=" ".join(str(error).split()), kind=type(error).__name__)


def end_with_parent() -> None:
    """Have the system end this process when its parent ends: one that is killed tells nobody (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
