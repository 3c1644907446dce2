"""vLLM's HTTP server as a session: a process group of its own, maybe of another environment, and a client for it."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, MissingExtraError, ModelError, UsageError
from sparsify.runtimes.session import Stream
from sparsify.runtimes.vllm_http import Client, RefusedError
from sparsify.runtimes.vllm_runtime import LISTED, Completion, VllmRuntime, pick
from sparsify.runtimes.vllm_settings import INSTALL, cause, check_settings, read_report

# How long a server that was asked to stop may take before its processes are killed.
GRACE_S = 15.0
# How long a server whose connection has broken may take to say why and end.
LAST_WORDS_S = 3.0

_MODULE = "vllm.entrypoints.openai.api_server"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
# Waits until this process is gone, however it went; stops the group $1, kills it after $2 seconds, clears folder $3.
_WATCH = """
read -r _
kill -s TERM "$1"
for _ in $(seq "$2"); do kill -s 0 -- "-$1" || break; sleep 1; done
kill -s KILL -- "-$1"
rm -rf -- "$3"
"""


class VllmServer(VllmRuntime):
    """A Hugging Face folder behind vLLM's OpenAI-compatible server on a loopback address.

    Requests may come from several threads. The server's processes end with ``close``, and with this process if that
    comes first, by whatever signal.

    Args:
        path: local folder with config and safetensors.
        python: interpreter of the environment that has vLLM.
        host: loopback address to listen on.
        port: None takes a free one.
        startup_timeout_s: seconds until the server must answer.
        request_timeout_s: seconds of silence after which a request is given up.
        dtype, tensor_parallel, kernel, max_length, eager, quantization, max_batch: as ``VllmSession``.

    Attributes:
        port: that it listens on.
        log: file with everything the server has printed; kept when the server fails.

    Raises:
        MissingExtraError: that interpreter has no vLLM.
        UsageError: an option out of range, no such interpreter, or a port in use.
        ModelError: the server died or was not ready in time; holds its reason and names its log.
    """

    def __init__(
        self,
        path: Path,
        *,
        python: str | Path = sys.executable,
        host: str = "127.0.0.1",
        port: int | None = None,
        startup_timeout_s: float = 600.0,
        request_timeout_s: float = 600.0,
        dtype: str = "bfloat16",
        tensor_parallel: int = 1,
        kernel: str | None = None,
        max_length: int | None = None,
        eager: bool = True,
        quantization: str | None = None,
        max_batch: int = 8,
    ) -> None:
        self.settings = check_settings(
            path, dtype=dtype, tensor_parallel=tensor_parallel, kernel=kernel, max_length=max_length, eager=eager,
            quantization=quantization, max_batch=max_batch,
        )  # fmt: skip
        interpreter = shutil.which(python)
        if interpreter is None:
            raise UsageError(f"python {str(python)!r}: no such program")
        self.host, self.port = host, _free_port(host, port)
        self.request_timeout_s = request_timeout_s
        self._client = Client(host, self.port, request_timeout_s)
        self.name = "vllm server"
        self._failed = False
        self._watch: subprocess.Popen[bytes] | None = None
        # Any other server, one of vLLM's that shares the port included, answers 404 to this model name.
        self._model = f"sparsify-{secrets.token_hex(8)}"
        with ExitStack() as stack:
            self._folder = Path(tempfile.mkdtemp(prefix="sparsify-vllm-"))
            stack.callback(self._clear)
            self.log = self._folder / "server.log"
            self._launch(os.path.abspath(interpreter), stack)
            self._await(startup_timeout_s, str(python))
            self._report = read_report(self.settings, self._folder / "engaged")
            self._opened = stack.pop_all()

    def _launch(self, interpreter: str, stack: ExitStack) -> None:
        command = [interpreter, "-m", _MODULE, *self.settings.command_line(), "--host", self.host]
        command += ["--port", str(self.port), "--served-model-name", self._model]
        # With a tokenizer the server refuses ids that it does not know; without, they would end the engine.
        if not any((self.settings.path / name).exists() for name in _TOKENIZERS):
            command.append("--skip-tokenizer-init")
        environment = {**os.environ, **self.settings.environment(self._folder, "INFO"), "PYTHONUNBUFFERED": "1"}
        environment.pop("VLLM_API_KEY", None)  # of somebody's other server: this one would ask it of us
        with self.log.open("wb") as log:
            # In a folder of ours: `python -m` would import what lies in the current one.
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        stack.callback(self._stop)
        watch = ["/bin/sh", "-c", _WATCH, "watch", str(self._process.pid), str(round(GRACE_S)), str(self._folder)]
        self._watch = subprocess.Popen(
            watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def _await(self, timeout_s: float, python: str) -> None:
        """Wait until the server answers and has made a token."""
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            if self._process.poll() is not None:
                if "No module named 'vllm'" in self._text():
                    raise MissingExtraError(f"vllm is missing from {python}; {INSTALL}")
                raise self._failure("the server died while it started")
            if time.monotonic() > deadline:
                raise self._failure(f"the server was not ready after {timeout_s:g} s; raise startup_timeout_s", 0)
            time.sleep(0.2)
        version = self._request("GET", "/version").get("version", "")
        device = re.search(r"device_config=(\w+)", self._text())
        parts = ["vllm", version, device[1] if device else "", self.settings.dtype, "server"]
        if self.settings.tensor_parallel > 1:
            parts[2] += f" x{self.settings.tensor_parallel}"
        self.name = " ".join(part for part in parts if part)
        # Some refusals come with the first token only. It also shows that the answers are this server's.
        self._complete(np.zeros((1, 1), dtype=np.int64), 1, scored=False)

    def _healthy(self) -> bool:
        try:
            Client(self.host, self.port, 5).ask("GET", "/health")
        except (OSError, http.client.HTTPException, RefusedError):
            return False
        return True

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Raise what goes wrong with a request as one of our errors.

        Raises:
            DataError: the server refuses the request.
            ModelError: it does not answer, or has failed.
        """
        if self._process.poll() is not None:
            raise self._failure("the server is not running")
        try:
            yield
        except RefusedError as error:
            status, told = error.status, error.told
            if status == 400:
                raise DataError(f"{self.name}: refuses the request: {told}") from error
            if status == 404:
                raise ModelError(
                    f"{self.name}: port {self.port} is answered by another server; choose another port"
                ) from error
            raise self._failure(f"the server answered {status}" + (f" ({told})" if cause(told) else "")) from error
        except TimeoutError as error:
            raise self._failure(f"the server said nothing for {self.request_timeout_s:g} s", 0) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._failure("the server died during a request") from error
        except (ValueError, LookupError) as error:
            raise self._failure("the server failed during a request") from error

    def _request(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._failures():
            answer = json.loads(self._client.ask(method, route, body))
        return answer if isinstance(answer, dict) else {}

    def _body(self, ids: list[Any], n: int, **more: Any) -> dict[str, Any]:
        fixed = {"model": self._model, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        return {**fixed, "prompt": ids, "max_tokens": n, **more}

    def _complete(self, ids: NDArray[np.int64], n: int, *, scored: bool) -> list[Completion]:
        rows: list[list[int]] = ids.tolist()
        body = self._body(rows, n, **({"prompt_logprobs": LISTED} if scored else {}))
        choices = self._request("POST", "/v1/completions", body)["choices"]
        completions = []
        for row, choice in zip(rows, sorted(choices, key=lambda choice: int(choice["index"])), strict=True):
            tokens, scores = [int(token) for token in choice["token_ids"]], []
            if scored:
                at = choice["prompt_logprobs"]
                scores = [
                    pick({int(other): float(entry["logprob"]) for other, entry in at[i].items()}, row[i])
                    for i in range(1, len(row))
                ]
            completions.append((tokens, scores))
        return completions

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``VllmRuntime.stream``: a connection for each row, all at a time. May be called from several threads.

        Closing it early closes the connections, upon which the server stops working on the requests. What the server
        itself refuses of one row may be raised after tokens of another.
        """
        self._check(ids, n)
        bodies = [self._body(row, n, stream=True) for row in ids.tolist()]
        with self._failures():
            yield from self._client.follow("/v1/completions", bodies)

    def _failure(self, what: str, wait_s: float | None = None) -> ModelError:
        """An error that says what was seen and, from the log, why; the log is kept from now on."""
        self._failed = True
        # A connection breaks shortly before the process has written its last words.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_S if wait_s is None else wait_s)
        code = self._process.returncode
        killed = f" (killed by {signal.Signals(-code).name})" if code is not None and code < 0 else ""
        # Who is killed from outside writes no reason, and the last error in the log is that of an old request.
        outside = code is not None and -code in (signal.SIGKILL, signal.SIGTERM)
        reason = "" if outside else cause(self._text())
        return ModelError(f"{self.settings.path}: {what}{killed}{reason and ': '}{reason}; log: {self.log}")

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def processes(self) -> list[int]:
        """Process ids of the server and of what it started, from /proc; empty after ``close``."""
        return [pid for pid, group in _groups() if group == self._process.pid]

    def memory_bytes(self) -> int:
        """Resident memory of the server's processes, added up; pages that they share count in each.

        Raises:
            ModelError: the server is not running.
        """
        total = 0
        for pid in self.processes():
            with suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if total == 0:
            raise self._failure("the server is not running")
        return total

    def _stop(self) -> None:
        try:
            if self._process.poll() is None:
                self._process.terminate()
            _until(lambda: self._process.poll() is not None, GRACE_S)
            # What it leaves behind has no work any more, only shared memory to give back.
            _until(lambda: not self.processes(), min(GRACE_S, 2))
        finally:
            if self.processes():
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                _until(lambda: not self.processes(), GRACE_S)
            # Last: until here it would have ended the group, had this process been killed.
            if self._watch is not None:
                self._watch.kill()
                self._watch.communicate()

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not self._failed:
                path.unlink()
        with suppress(OSError):  # holds the log
            self._folder.rmdir()

    def close(self) -> None:
        """Stop the server and all its processes: asked first, killed after ``GRACE_S`` seconds."""
        self._opened.close()


def _free_port(host: str, port: int | None) -> int:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise UsageError(f"host {host!r}: want a loopback address such as 127.0.0.1") from error
    if not address.is_loopback:
        raise UsageError(f"host {host}: the server answers whoever reaches it; want a loopback address")
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"port {port}: want 1 to 65535")
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
        # Past the connections of a server that has just ended. vLLM itself would share the port with another vLLM.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
            probe.listen(1)
        except OSError as error:
            raise UsageError(
                f"port {port} of {host}: {error.strerror}; choose another, or none for a free one"
            ) from error
        return int(probe.getsockname()[1])


def _until(ended: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.05)


def _groups() -> Iterator[tuple[int, int]]:
    """(process id, process group) of every process that has not ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name in parentheses may hold anything.
            state, _, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state not in "ZX":
                yield int(stat.parent.name), int(group)
