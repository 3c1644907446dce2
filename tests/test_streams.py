"""Token streams of the sessions that need no GPU and no server: tokens as they come, refusals, an early end."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.errors import DataError
from sparsify.runtimes.genai_session import GenaiSession
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.session import Session, collect
from sparsify.runtimes.torch_session import TorchSession
from tests.onnxruntime_artifacts import CONTEXT, ONE, VOCAB, make, random_ids

KINDS: dict[str, Callable[[pytest.TempPathFactory], Any]] = {
    "torch": lambda factory: TorchSession(make("checkpoint", factory)),
    "onnxruntime standard": lambda factory: OnnxRuntimeSession(make("standard", factory), ONE),
    "onnxruntime genai": lambda factory: OnnxRuntimeSession(make("genai", factory), ONE),
    "onnxruntime-genai": lambda factory: GenaiSession(make("genai", factory), threads=1),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with KINDS[kind](tmp_path_factory) as opened:
        yield opened


def without_cache(session: Session, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The next tokens, each from the logits of everything before it."""
    for _ in range(n):
        ids = np.concatenate([ids, session.logits(ids)[:, -1].argmax(axis=-1)[:, None]], axis=1)
    return ids[:, -n:]


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_as_they_come(session: Session, kind: str, batch: int) -> None:
    ids = random_ids(batch, 9)
    steps = list(session.stream(ids, 12))
    made = collect(steps, batch, 12)
    assert made.dtype == np.int64
    np.testing.assert_array_equal(made, without_cache(session, ids, 12))
    np.testing.assert_array_equal(made, session.generate(ids, 12))
    counts = [[len(tokens) for tokens in step] for step in steps]
    if kind == "onnxruntime-genai":  # one row after the other
        assert counts == [[int(row == i) for i in range(batch)] for row in range(batch) for _ in range(12)]
    else:
        assert counts == [[1] * batch] * 12
    assert all(type(token) is int for step in steps for tokens in step for token in tokens)


def test_closing_early_frees_the_cache(session: Session, kind: str) -> None:
    ids = random_ids(2, 9)
    stream = session.stream(ids, 30)
    first = [next(stream), next(stream)]
    held = [weakref.ref(value) for name, value in inspect.getgeneratorlocals(stream).items() if name == "past"]
    assert len(held) == (kind != "onnxruntime-genai")
    assert all(ref() is not None for ref in held)
    stream.close()
    assert all(ref() is None for ref in held)
    made = session.generate(ids, 2)
    if kind == "onnxruntime-genai":
        assert first == [[[made[0, 0]], []], [[made[0, 1]], []]]
    else:
        assert first == [made[:, :1].tolist(), made[:, 1:].tolist()]


def test_bad_input_is_refused_when_the_first_token_is_asked_for(session: Session, kind: str) -> None:
    ids = random_ids(2, 9)
    refused: list[tuple[Any, int, str]] = [
        (ids.astype(np.int32), 1, "int64"),
        (ids[0], 1, "rank 1"),
        (np.full((1, 2), VOCAB), 1, f"{VOCAB} is outside"),
        (ids, 0, "n is 0"),
    ]
    if kind != "torch":
        refused.append((ids, CONTEXT, f"tokens are more than the {CONTEXT}"))
    for given, n, word in refused:
        stream = session.stream(given, n)
        with pytest.raises(DataError, match=word):
            next(stream)
