"""A small program in place of vLLM's server, and the fixtures that open it as a session."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import SparsifyError
from sparsify.runtimes import vllm_server
from sparsify.runtimes.vllm_server import VllmServer

# Next token: (last + 1) % 64. Log-probability of a token: -(it + 3 * the one before) / 8. FAKE says what goes wrong, or
# how streams depend on each other; one that the client has closed is noted by the last token of its prompt.
FAKE = r"""
import json, os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

arguments, mode = sys.argv[1:], os.environ.get("FAKE", "")
option = lambda name: arguments[arguments.index(name) + 1]
with open(os.environ["FAKE_RECORD"], "a") as file:
    file.write(json.dumps({"pid": os.getpid(), "arguments": arguments, "environment": dict(os.environ)}) + "\n")
if mode == "absent":
    sys.exit("python: Error while finding module specification (ModuleNotFoundError: No module named 'vllm')")
if mode == "crash":
    print("(EngineCore pid=7) ERROR 11-25 22:59:01 [core.py:9] ValueError: no such head size\n"
          "RuntimeError: Engine core initialization failed. See root cause above.\n"
          "resource_tracker: There appear to be 1 leaked semaphore objects", flush=True)
    sys.exit(1)
# A worker that outlives its parent, in the same group.
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
if mode == "slow":
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("INFO 01-01 00:00:00 [core.py:1] config: device_config=cpu, x", flush=True)
early = [503, 503] if mode == "loading" else []
three, first_is_over = threading.Barrier(3), threading.Event()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        if self.path == "/health":
            return self.answer(early.pop() if early else 200, {})
        self.answer(200, {"version": "9.9"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n, rows = body["max_tokens"], body["prompt"]
        if body["model"] != option("--served-model-name") or mode == "other":
            return self.answer(404, {"error": {"message": "no such model"}})
        if n > 1 and mode == "killed":
            os.killpg(0, signal.SIGKILL)
        if n > 1 and mode == "hang":
            time.sleep(600)
        if n > 1 and mode == "engine":
            print("(Worker pid=8) ERROR 11-25 22:59:01 [w.py:9] RuntimeError: out of blocks", flush=True)
            return self.answer(500, {"error": {"message": "EngineCore encountered an issue. See stack trace (above)"}})
        if body.get("stream"):
            return self.stream(rows, n)
        choices = []
        for index, row in enumerate(rows):
            if 63 in row:
                return self.answer(400, {"error": {"message": "Token id 63 is out of vocabulary"}})
            scores = [{"0": {"logprob": 0.0}} | {str(t): {"logprob": -(t + 3 * p) / 8}} for p, t in zip(row, row[1:])]
            made = [(row[-1] + 1 + i) % 64 for i in range(n)]
            choices.insert(0, {"index": index, "token_ids": made, "prompt_logprobs": [None, *scores]})
        self.answer(200, {"choices": choices})

    def stream(self, row, n):
        if 63 in row:
            return self.answer(400, {"error": {"message": "Token id 63 is out of vocabulary"}})
        if mode in ("endless", "broken", "garbled"):
            n = sys.maxsize
        if mode == "together":
            three.wait(60)
        if mode == "in turn" and row[0] != 5:
            first_is_over.wait(60)
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(b'data: {"choices": [{"token_ids": []}]}\n\n: a comment\n\n')
            for i in range(n):
                chunk = {"choices": [{"token_ids": [(row[-1] + 1 + i) % 64]}]}
                if i == 3 and row[0] == 5 and mode == "broken":
                    return
                if i == 3 and row[0] == 5 and mode == "garbled":
                    chunk = {"error": {"message": "EngineCore encountered an issue"}}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\n\n")
            if row[0] == 5:
                first_is_over.set()
        except ConnectionError:
            with open(os.environ["FAKE_RECORD"] + ".cancelled", "a") as file:
                file.write(f"{row[-1]}\n")

report = os.environ["SPARSIFY_ENGAGED_DIR"]
if mode == "plugin":
    for rank, kernel in ((0, "packed"), (1, "dense")):
        linears = {"a": {"kernel": "packed", "dense_bytes": 64, "resident_bytes": 36},
                   "b": {"kernel": kernel, "dense_bytes": 10, "resident_bytes": 8}}
        with open(f"{report}/{rank}.json", "w") as file:
            json.dump({"rank": rank, "linears": linears}, file)

class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

Server((option("--host"), int(option("--port"))), Handler).serve_forever()
"""

Start = Callable[..., VllmServer]


@pytest.fixture(scope="module")
def model(random_models: Callable[[str], Path]) -> Path:
    return random_models("llama")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_RECORD", str(tmp_path / "record"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # logs of failures stay
    monkeypatch.setattr(vllm_server, "GRACE_S", 0.3)
    monkeypatch.setattr(vllm_server, "LAST_WORDS_S", 0.3)
    return tmp_path / "record"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "python"
    path.with_name("fake.py").write_text(FAKE)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "${{0%/*}}/fake.py" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def start(model: Path, program: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """The fake as a session that is closed after the test; ``mode`` says what goes wrong."""
    opened = []

    def run(mode: str = "", **options: Any) -> VllmServer:
        monkeypatch.setenv("FAKE", mode)
        opened.append(VllmServer(model, **{"python": program, "startup_timeout_s": 60, "dtype": "float32", **options}))
        return opened[-1]

    yield run
    for session in opened:
        session.close()


def started(record: Path) -> dict[str, Any]:
    """What the newest fake has seen of its arguments and environment."""
    seen: dict[str, Any] = json.loads(record.read_text().splitlines()[-1])
    return seen


def alive(group: int) -> list[int]:
    return [pid for pid, other in vllm_server._groups() if other == group]


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def one_line(error: pytest.ExceptionInfo[SparsifyError], *words: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text
