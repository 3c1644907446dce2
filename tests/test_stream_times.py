"""Times of a generation by a clock that the test moves, and prompts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.bench.latency import latency_record, same
from sparsify.bench.stream_times import prompts, time_stream, trace_sha256
from sparsify.errors import MeasurementError, ModelError


class Scripted:
    """A session whose steps come at given times: (seconds since the last, tokens of each row)."""

    name = "scripted"

    def __init__(self, *steps: tuple[float, list[list[int]]]) -> None:
        self.now, self._steps = 100.0, steps

    def stream(self, ids: NDArray[np.int64], n: int) -> Iterator[list[list[int]]]:
        for seconds, tokens in self._steps:
            self.now += seconds
            yield tokens

    def time(self, batch: int, n: int) -> dict[str, Any]:
        session: Any = self
        return time_stream(session, np.zeros((batch, 4), dtype=np.int64), n, clock=lambda: self.now)


def test_each_row_has_its_own_times() -> None:
    found = Scripted((0.5, [[7], []]), (0.25, [[8], [3]]), (0.125, [[9], [4]]), (1.0, [[], [5]])).time(2, 3)
    assert found["ttft_s"] == [0.5, 0.75]
    assert found["gaps_s"] == [[0.25, 0.125], [0.125, 1.0]]
    assert found["total_s"] == 1.875
    assert found["tokens"] == [[7, 8, 9], [3, 4, 5]]


def test_tokens_that_come_together_share_their_time() -> None:
    found = Scripted((0.5, [[7]]), (0.5, [[8, 9]])).time(1, 3)
    assert found["ttft_s"] == [0.5]
    assert found["gaps_s"] == [[0.25, 0.25]]
    # With the first there is no earlier token to share with, and it was not there before.
    found = Scripted((0.5, [[7, 8]]), (0.25, [[9]])).time(1, 3)
    assert (found["ttft_s"], found["gaps_s"]) == ([0.5], [[0.0, 0.25]])


@pytest.mark.parametrize("tokens", [[[1]], [[1, 2, 3]]])
def test_another_number_of_tokens_is_no_measurement(tokens: list[list[int]]) -> None:
    with pytest.raises(ModelError, match="asked for 2 tokens a row and got"):
        Scripted((1.0, tokens)).time(1, 2)


def test_prompts_are_the_same_for_the_same_arguments_only() -> None:
    ids = prompts(0, 50, 3, 64)
    assert ids.shape == (3, 50)
    assert ids.min() >= 3
    assert ids.max() < 64
    assert trace_sha256(ids) == trace_sha256(prompts(0, 50, 3, 64))
    others = [prompts(1, 50, 3, 64), prompts(0, 51, 3, 64), prompts(0, 50, 2, 64), ids[:, ::-1]]
    assert len({trace_sha256(each) for each in [ids, *others]}) == 5
    assert set(prompts(0, 10, 2, 1).ravel()) == {0}


def test_statistics_are_those_of_the_samples() -> None:
    rounds = []
    for i in range(7):
        times = Scripted((0.5 + i, [[7], [7]]), (0.25, [[8], [8]])).time(2, 2)  # both rows together: one sample
        rounds.append({"round": i, "position": 0, "again": False, "trace_sha256": "a" * 64, **times})
    found = latency_record(rounds, 2, 2, [[7, 8], [7, 9]])
    first = found["statistics"]["ttft_s"]
    assert (first["median"], first["min"], first["max"], first["n"], first["p90"]) == (3.5, 0.5, 6.5, 7, None)
    assert found["statistics"]["tpot_s"]["n"] == 7
    apart = Scripted((0.5, [[7], []]), (0.25, [[], [7]]), (0.125, [[8], [8]])).time(2, 2)
    alone = latency_record([{**rounds[0], **apart}], 2, 2, None)["statistics"]
    assert (alone["ttft_s"]["n"], alone["tpot_s"]["n"]) == (2, 2)
    assert found["statistics"]["tpot_s"]["median"] == 0.25
    assert found["statistics"]["tokens_per_s"]["max"] == 4 / 0.75
    assert found["same_tokens"] == [2, 1]
    assert "tokens" not in found["rounds"][0]
    assert same([1, 2], [3, 2]) == 0
    with pytest.raises(MeasurementError, match="0 traces"):
        latency_record([], 2, 2, None)
    rounds[3]["trace_sha256"] = "b" * 64
    with pytest.raises(MeasurementError, match="2 traces"):
        latency_record(rounds, 2, 2, None)
