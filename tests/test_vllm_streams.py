"""Token streams of the vLLM server, from a small program in its place: a connection a row, merged, ended, broken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.errors import DataError, ModelError
from sparsify.runtimes.session import collect
from tests import fake_vllm
from tests.fake_vllm import Start, one_line, soon

# The fixtures of the fake server.
model, program, record, start = fake_vllm.model, fake_vllm.program, fake_vllm.record, fake_vllm.start

IDS: NDArray[np.int64] = np.array([[5, 6, 9], [1, 60, 2], [7, 7, 40]])


@pytest.mark.parametrize(("batch", "mode"), [(1, ""), (3, "together")])
def test_rows_come_at_a_time_and_are_those_of_generate(start: Start, batch: int, mode: str) -> None:
    """Of three streams none sends anything before all three have been asked for."""
    session = start(mode)
    steps = list(session.stream(IDS[:batch], 20))
    assert all(len(step) == batch and any(step) for step in steps)
    made = collect(steps, batch, 20)
    assert np.array_equal(made, (IDS[:batch, -1:] + np.arange(1, 21)) % 64)
    assert np.array_equal(made, session.generate(IDS[:batch], 20))


def test_a_row_does_not_wait_for_another(start: Start) -> None:
    """The others begin when the first is over."""
    steps = list(start("in turn").stream(IDS, 5))
    places = [row for step in steps for row, tokens in enumerate(step) for _ in tokens]
    assert places[:5] == [0] * 5
    assert sorted(places) == [0] * 5 + [1] * 5 + [2] * 5


def test_closing_early_closes_every_connection(start: Start, record: Path) -> None:
    threads = threading.active_count()
    session = start("endless")
    stream = session.stream(IDS, 60)
    # Until each has come: a request that has not arrived cannot be seen to be cancelled.
    started: set[int] = set()
    while len(started) < 3:
        started |= {row for row, tokens in enumerate(next(stream)) if tokens}
    assert threading.active_count() == threads + 3
    stream.close()
    assert threading.active_count() == threads
    cancelled = Path(f"{record}.cancelled")
    assert soon(lambda: cancelled.exists() and sorted(cancelled.read_text().split()) == ["2", "40", "9"])
    assert session.generate(IDS, 2).shape == (3, 2)
    session.close()
    # Nothing has failed: no log is left.
    assert not session.log.parent.exists()


def test_a_stream_that_nobody_reads_asks_for_nothing(start: Start, record: Path) -> None:
    session = start()
    stream = session.stream(IDS, 3)
    stream.close()
    session.close()
    with pytest.raises(ModelError, match="is not running"):
        next(session.stream(IDS, 3))
    assert not Path(f"{record}.cancelled").exists()


@pytest.mark.parametrize(
    ("mode", "word"), [("broken", "died during"), ("garbled", "failed during"), ("killed", "SIGKILL")]
)
def test_what_goes_wrong_with_one_row_ends_all(start: Start, record: Path, mode: str, word: str) -> None:
    session = start(mode)
    threads = threading.active_count()
    with pytest.raises(ModelError, match=word) as error:
        list(session.stream(IDS, 60))
    one_line(error, str(session.log))
    assert threading.active_count() == threads
    if mode != "killed":
        cancelled = Path(f"{record}.cancelled")
        assert soon(lambda: cancelled.exists() and {"2", "40"} <= set(cancelled.read_text().split()))


def test_a_server_that_says_nothing(start: Start) -> None:
    with pytest.raises(ModelError, match=r"said nothing for 0\.5 s"):
        next(start("hang", request_timeout_s=0.5).stream(IDS, 2))


def test_bad_input_is_refused_when_the_first_token_is_asked_for(start: Start) -> None:
    session = start(max_length=8)
    refused: list[tuple[Any, int, str]] = [
        (IDS.astype(np.int32), 1, "int64"),
        (IDS + 10, 1, "70"),
        (IDS, 0, "at least 1"),
        (IDS, 7, "max_length is 8"),
        (IDS[1:2] + 3, 1, "Token id 63"),
    ]
    for ids, n, word in refused:
        stream = session.stream(ids, n)
        with pytest.raises(DataError, match=word) as error:
            next(stream)
        one_line(error)
    # What only the server knows of one row may come after tokens of another.
    with pytest.raises(DataError, match="Token id 63"):
        list(session.stream(IDS + 3, 2))
