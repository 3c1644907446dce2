"""Scores of tokens from logits and from runtimes that score tokens themselves, against torch's log_softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparsify.bench import scoring
from sparsify.bench.scoring import score
from sparsify.errors import DataError, NumericsError
from sparsify.runtimes.vllm_runtime import pick
from tests.fakes import FakeSession

VOCAB = 29


def _logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    rows = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) * 3
    return rows[np.cumsum(ids, axis=1) % VOCAB].astype(np.float32)


class OwnScores(FakeSession):
    """As vLLM: it lists the likeliest tokens of each place and the one that stands there."""

    def prompt_scores(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        table = torch.from_numpy(self.of(ids)).log_softmax(dim=-1)
        found = []
        for row, tokens in zip(table[0, :-1], ids[0, 1:].tolist(), strict=True):
            listed = {*row.topk(2).indices.tolist(), tokens}
            found.append(pick({token: float(row[token]) for token in listed}, tokens))
        values, greedy = zip(*found, strict=True)
        return np.array([values], dtype=np.float32), np.array([greedy])

    def prompt_logprobs(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.prompt_scores(ids)[0]


def _ids(greedy: int) -> NDArray[np.int64]:
    """A text whose last ``greedy`` tokens are the likeliest."""
    ids = np.array([[3, 7, 1, 20]], dtype=np.int64)
    for _ in range(greedy):
        ids = np.concatenate([ids, _logits(ids)[:, -1].argmax(axis=-1)[:, None]], axis=1)
    return ids


@pytest.mark.parametrize("block", [1, 70, 2**22])
def test_scores_are_log_softmax(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", block)
    ids = _ids(greedy=3)
    table = torch.from_numpy(_logits(ids)[0]).double().log_softmax(dim=-1)
    expected = [float(table[i, token]) for i, token in enumerate(ids[0, 1:])]
    for session in (FakeSession(_logits), OwnScores(_logits)):
        logprobs, greedy = score(session, ids)
        assert logprobs == pytest.approx(expected, abs=1e-5)
        assert greedy.tolist() == [False] * 3 + [True] * 3
        last, choices = score(session, ids, 4)
        assert last.tolist() == logprobs[-4:].tolist()
        assert choices.tolist() == greedy[-4:].tolist()


def test_the_last_token_is_predicted_and_not_run() -> None:
    seen = []

    def of(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        seen.append(ids[0].tolist())
        return _logits(ids)

    score(FakeSession(of), np.array([[4, 5, 6]]), 1)
    assert seen == [[4, 5]]


@pytest.mark.parametrize(
    ("listed", "token", "greedy"),
    [
        ({5: -1.0, 9: -2.0}, 5, True),
        ({5: -1.0, 9: -2.0}, 9, False),
        ({5: -1.0, 9: -1.0}, 5, True),
        ({5: -1.0, 9: -1.0}, 9, False),
        ({5: -1.0, 9: -1.0, 2: -4.0}, 2, False),
    ],
)
def test_of_equal_tokens_the_lowest_is_greedy(listed: dict[int, float], token: int, greedy: bool) -> None:
    assert pick(listed, token) == (listed[token], greedy)
    # As argmax has it, which of_logits takes.
    row = np.full((1, 2, 12), -20.0, dtype=np.float32)
    for other, value in listed.items():
        row[..., other] = value
    assert score(FakeSession(lambda ids: row[:, :1]), np.array([[0, token]]))[1].tolist() == [greedy]


def test_refusals() -> None:
    session = FakeSession(_logits)
    with pytest.raises(DataError, match="at least 2 tokens"):
        score(session, np.array([[1]]))
    with pytest.raises(DataError, match="one sequence"):
        score(session, np.array([[1, 2], [3, 4]]))
    for last in (0, 2):
        with pytest.raises(DataError, match="want 1 to 1"):
            score(session, np.array([[1, 2]]), last)
    with pytest.raises(NumericsError, match="fake: logits of position 2"):
        score(FakeSession(lambda ids: np.where(ids[..., None] == 6, np.nan, _logits(ids))), np.array([[4, 5, 6, 7]]))
