"""The sessions on the real vLLM: the same answers offline, served and in transformers, and every way it can end."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import AutoTokenizer

from sparsify.bench.perplexity import perplexity
from sparsify.errors import DataError, MissingExtraError, ModelError, UsageError
from sparsify.runtimes.session import collect
from sparsify.runtimes.torch_session import TorchSession
from sparsify.runtimes.vllm_server import VllmServer, _free_port, _groups
from sparsify.runtimes.vllm_session import VllmSession
from sparsify.source import resolve
from tests.conftest import SHARED, STORIES, alone

TEXT = SHARED / "data/text/wikitext2-tok-test.txt"


def windows(folder: Path, n: int, length: int) -> NDArray[np.int64]:
    """The first windows of a real text: [n, length] int64."""
    if not TEXT.exists():
        pytest.skip("the shared text is not here")
    text = TEXT.read_text(encoding="utf-8")[: 8 * n * length]
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return np.array(ids[: n * length], dtype=np.int64).reshape(n, length)


def alive(group: int) -> list[int]:
    return [pid for pid, other in _groups() if other == group]


def marked(value: str) -> list[Path]:
    """Living processes that were started with this value in their environment, whatever their group."""
    found = []
    for pid, _ in _groups():
        with suppress(OSError):
            if value.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(Path(f"/proc/{pid}"))
    return found


def soon(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that goes for the logs of failed servers, which stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Served:
    """A running server, and what requests were answered while it loaded."""

    session: VllmServer
    early: list[str]


@pytest.fixture(scope="module")
def pruned(stories: Path, make: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """(plain, compressed): what is served is compressed, and judged by the plain one."""
    return make(stories, pattern="2:4", method="magnitude")


@pytest.fixture(scope="module")
def served(pruned: tuple[Path, Path]) -> Iterator[Served]:
    port, early, ready = _free_port("127.0.0.1", None), [], threading.Event()
    body = json.dumps({"model": "any", "prompt": [[1]], "max_tokens": 1})

    def ask() -> None:
        while not ready.wait(0.5):
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                    early.append(str(connection.getresponse().status))
            except OSError as error:
                early.append(type(error).__name__)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            session = VllmServer(
                pruned[1], port=port, dtype="float32", kernel="packed", max_batch=64, startup_timeout_s=300
            )
        finally:
            ready.set()
        asking.result()
    with session:
        yield Served(session, early)


@pytest.fixture(scope="module")
def offline(pruned: tuple[Path, Path]) -> Iterator[VllmSession]:
    with VllmSession(pruned[0], dtype="float32") as session:
        yield session


@pytest.fixture(scope="module")
def ids(stories: Path) -> NDArray[np.int64]:
    return windows(stories, 4, 512)


def test_smollm2_as_in_transformers_and_its_memory_comes_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First, for memory comes back when no other engine is in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        with alone(tmp_path_factory, "smollm2"):
            folder = resolve("smollm2-135m").folder
    except MissingExtraError as error:
        pytest.skip(str(error))
    texts = windows(folder, 2, 512)
    with TorchSession(folder) as reference:
        want = perplexity(reference, texts).perplexity
    left = []
    for _ in range(2):
        with VllmSession(folder, dtype="float32", max_length=512) as session:
            assert perplexity(session, texts).perplexity == pytest.approx(want, rel=1e-4)
            held = resident()
        left.append(resident())
        # Weights alone are 540 MB; allocators keep some of what they have freed.
        assert left[-1] < held - 300e6
    assert left[1] < left[0] + 100e6


def test_a_request_during_the_load_gets_a_clean_answer(served: Served) -> None:
    """Refused while nothing listens; once something does, 404 for a model it has not got. Never silence."""
    assert len(served.early) > 3
    assert set(served.early) <= {"ConnectionRefusedError", "ConnectionResetError", "503", "404"}


def test_served_answers_are_the_offline_ones(served: Served, offline: VllmSession, ids: NDArray[np.int64]) -> None:
    server = served.session
    assert offline.name.startswith("vllm ")
    assert server.name == f"{offline.name} server"
    assert server.vocab_size == offline.vocab_size == 512
    assert np.array_equal(server.generate(ids[:, :100], 24), offline.generate(ids[:, :100], 24))
    # All 512 positions that the model has, in a prompt and in what follows one.
    theirs, ours = server.prompt_logprobs(ids), offline.prompt_logprobs(ids)
    assert theirs.shape == ours.shape == (4, 511)
    assert theirs.dtype == ours.dtype == np.float32
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    assert server.generate(ids[:1, :500], 13).shape == (1, 13)
    assert set(offline.engaged().values()) == {"dense"}
    assert set(server.engaged().values()) == {"packed"}
    sizes = server.weights()["packed"]
    assert sizes["resident_bytes"] < 0.57 * sizes["dense_bytes"]


def test_what_is_generated_is_scored_as_greedy(served: Served, offline: VllmSession, ids: NDArray[np.int64]) -> None:
    for session in (served.session, offline):
        text = np.concatenate([ids[:, :60], session.generate(ids[:, :60], 24)], axis=1)
        logprobs, greedy = session.prompt_scores(text)
        assert greedy[:, -24:].all()
        assert not greedy[:, :59].all()
        np.testing.assert_array_equal(logprobs, session.prompt_logprobs(text))
        text[:, -1] = (text[:, -1] + 1) % 512
        assert not session.prompt_scores(text)[1][:, -1].any()


@pytest.mark.parametrize("batch", [1, 3])
def test_streams_give_what_generate_gives(
    served: Served, offline: VllmSession, ids: NDArray[np.int64], batch: int
) -> None:
    prompts = ids[:batch, :100]
    want = offline.generate(prompts, 24)
    for session in (served.session, offline):
        steps = list(session.stream(prompts, 24))
        assert all(any(step) for step in steps)
        assert np.array_equal(collect(steps, batch, 24), want)
        # As they come, not at the end.
        assert len(steps) >= 12


def test_a_stream_of_the_engine_can_be_left_and_taken_over(
    offline: VllmSession, pruned: tuple[Path, Path], ids: NDArray[np.int64]
) -> None:
    assert offline._llm is not None
    engine = offline._llm.llm_engine
    want = offline.generate(ids[:3, :64], 16)
    stream = offline.stream(ids[:3, :64], 400)
    first = [next(stream) for _ in range(3)]
    assert engine.get_num_unfinished_requests() == 3
    stream.close()
    assert engine.get_num_unfinished_requests() == 0
    assert np.array_equal(collect(first, 3, 3), want[:, :3])
    calls: list[Callable[[], NDArray[np.int64]]] = [
        lambda: offline.generate(ids[:3, :64], 16),
        lambda: collect(offline.stream(ids[:3, :64], 16), 3, 16),
    ]
    for call in calls:
        stream = offline.stream(ids[:1], 1)
        assert len(list(stream)) == 1
        stream = offline.stream(ids[:2, :64], 400)
        next(stream)
        assert np.array_equal(call(), want)
        with pytest.raises(RuntimeError, match="asked something else"):
            next(stream)
        assert engine.get_num_unfinished_requests() == 0
    for given, n, word in ((ids[0], 1, "rank 1"), (ids, 0, "n is 0"), (ids, 2, "max_length is 512")):
        with pytest.raises(DataError, match=word):
            next(offline.stream(given, n))


def test_stories_as_in_transformers(offline: VllmSession, pruned: tuple[Path, Path], ids: NDArray[np.int64]) -> None:
    with TorchSession(pruned[0]) as reference:
        assert np.array_equal(offline.generate(ids[:2, :64], 16), reference.generate(ids[:2, :64], 16))
        for stride in (None, 256):
            overlapping = ids[:1] if stride else ids
            want = perplexity(reference, overlapping, stride=stride)
            assert perplexity(offline, overlapping, stride=stride).perplexity == pytest.approx(
                want.perplexity, rel=1e-4
            )


def test_64_requests_at_once_are_answered_as_one_by_one(served: Served, ids: NDArray[np.int64]) -> None:
    prompts = [ids.reshape(-1)[29 * i : 29 * i + 16 + i % 7][None] for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda prompt: served.session.generate(prompt, 12), prompts))
        scores = list(pool.map(served.session.prompt_logprobs, prompts))
    for prompt, tokens, logprobs in zip(prompts, together, scores, strict=True):
        assert np.array_equal(tokens, served.session.generate(prompt, 12))
        np.testing.assert_allclose(logprobs, served.session.prompt_logprobs(prompt), rtol=1e-5, atol=1e-5)


def test_a_cancelled_request_leaves_the_server_healthy(served: Served, ids: NDArray[np.int64]) -> None:
    before = served.session.generate(ids[:1, :16], 8)
    streams = [served.session.stream(ids[: i + 1, :100], 400) for i in range(4)]
    for stream in streams:
        next(stream)
        stream.close()
    assert np.array_equal(served.session.generate(ids[:1, :16], 8), before)


def test_500_requests_do_not_grow_the_server(served: Served, ids: NDArray[np.int64]) -> None:
    for _ in range(100):
        served.session.generate(ids[:1, :16], 2)
    early = served.session.memory_bytes()
    for _ in range(400):
        served.session.generate(ids[:1, :16], 2)
    assert served.session.memory_bytes() < 1.02 * early


def test_the_port_of_a_running_server_is_taken(served: Served, stories: Path) -> None:
    """vLLM itself would share the port with another vLLM."""
    with pytest.raises(UsageError, match=f"port {served.session.port} "):
        VllmServer(stories, port=served.session.port)


@pytest.mark.usefixtures("logs")
def test_a_start_that_takes_too_long_leaves_nothing(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK_OF_THIS_TEST", mark := secrets.token_hex(8))
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(refusal, lambda: VllmServer(stories, startup_timeout_s=4))
        assert soon(lambda: len(marked(mark)) >= 2, timeout_s=4)  # the server, and what watches it
        assert "not ready after 4 s" in text.result()
    assert marked(mark) == []


@pytest.mark.usefixtures("logs")
def test_refusals_hold_vllms_reason(stories: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(stories, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "nonesuch"}}))
    assert "Unknown quantization method: nonesuch" in refusal(lambda: VllmSession(odd))
    assert "Unknown quantization method: nonesuch" in refusal(lambda: VllmServer(odd))
    (odd / "config.json").write_text(json.dumps(config))
    with (odd / "model.safetensors").open("rb+") as file:
        file.truncate(200_000)
    assert "SafetensorError" in refusal(lambda: VllmSession(odd, dtype="float32"))


def test_what_only_the_first_token_shows_is_found_at_the_start() -> None:
    """No attention kernel for CPUs takes heads of 8."""
    import vllm.platforms

    if not vllm.platforms.current_platform.is_cpu():
        pytest.skip("for CPUs only")
    assert "head_dim=8" in refusal(lambda: VllmSession(STORIES, dtype="float32"))


def test_sessions_beside_and_after_each_other(
    pruned: tuple[Path, Path], offline: VllmSession, ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second engine gets processes of its own, here two that share the model; ending one leaves the others alone."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    before, want = dict(os.environ), offline.generate(ids[:2, :64], 16)
    with VllmSession(pruned[0], dtype="float32", tensor_parallel=2) as second:
        assert " x2 " in second.name
        assert {name: value for name, value in os.environ.items() if "VLLM" in name or "OMP" in name} == {
            name: value for name, value in before.items() if "VLLM" in name or "OMP" in name
        }
        assert np.array_equal(second.generate(ids[:2, :64], 16), want)
        stream = second.stream(ids[:2, :64], 400)
        # Requests reach an engine in another process one by one: a row may be a step behind.
        for row, steps in zip(want, zip(*(next(stream) for _ in range(5)), strict=True), strict=True):
            mine = [token for step in steps for token in step]
            assert mine
            assert mine == row[: len(mine)].tolist()
        stream.close()
        assert np.array_equal(collect(second.stream(ids[:2, :64], 16), 2, 16), want)
        stream = second.stream(ids[:2, :64], 400)
        next(stream)
        np.testing.assert_allclose(second.prompt_logprobs(ids), offline.prompt_logprobs(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="closed or asked"):
        next(stream)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with VllmSession(pruned[0], dtype="float32") as third:
        assert np.array_equal(third.generate(ids[:2, :64], 16), want)
    assert np.array_equal(offline.generate(ids[:2, :64], 16), want)


@pytest.mark.usefixtures("logs")
def test_closing_and_killing_leave_no_process(served: Served, stories: Path, ids: NDArray[np.int64]) -> None:
    """Last, for it ends the server that the others ask."""
    group = served.session._process.pid
    assert len(alive(group)) >= 3
    served.session.close()
    assert alive(group) == []
    with VllmServer(stories, dtype="float32", port=served.session.port, startup_timeout_s=300) as second:
        group = second._process.pid
        stream = second.stream(ids[:1, :16], 400)
        next(stream)
        os.killpg(group, signal.SIGKILL)
        assert "SIGKILL" in refusal(lambda: list(stream))
        assert "SIGKILL" in refusal(lambda: second.generate(ids[:1, :16], 4))
    assert alive(group) == []
