"""What every runtime offers: a context manager with logits, greedy generation, and a report of what ran.

A session is for evaluation, not for serving: outputs are fresh arrays the caller owns, and inputs are checked.
"""

from collections.abc import Generator, Iterable
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError

# Between the names of kernels in ``engaged`` where ranks of one linear differ: ``dense | packed``.
RANKS = " | "
# Of each step, per row the tokens that came with it.
Stream = Generator[list[list[int]], None, None]


class Session(Protocol):
    """An artifact opened in a runtime; leaving the context frees it.

    Attributes:
        name: runtime and how it runs, for reports (``onnxruntime CPUExecutionProvider``).
    """

    name: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Logits [batch, length, vocab] float32 of ids [batch, length] int64.

        ``attention_mask`` [batch, length] is 1 for tokens and 0 for padding, on either side; positions count the
        tokens only. What stands at padded positions of the result means nothing and may be NaN.

        Raises:
            DataError: ids or mask of another dtype, rank or shape, or ids outside the vocabulary.
        """
        ...

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """The next ``n`` tokens of every row of ids [batch, length], greedily, with a key/value cache, as they come.

        Each item holds, per row, the tokens that came with this step: none where another row's came, several where a
        step makes several, but at least one in all. They are on the host, so that a clock read now is right. Nothing
        stops a row before its ``n`` tokens.

        Nothing is checked, run or held before the first item is asked for, and closing the stream early frees what it
        holds and ends what is under way. Until it is over or closed, nothing else should be asked of the session:
        where generations share memory, the stream that was interrupted raises RuntimeError.

        Raises:
            DataError: as ``logits``, or ``n`` is below 1; when the first item is asked for.
        """
        ...

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """What ``stream`` gives, all at once: the next ``n`` tokens [batch, n] int64.

        Raises:
            DataError: as ``stream``.
        """
        ...

    def engaged(self) -> dict[str, str]:
        """Per linear, the sparse kernel that really ran, or ``dense``."""
        ...


def check_ids(ids: NDArray[Any], vocab_size: int) -> None:
    """Refuse ids that are not int64 [batch, length] with both at least 1 and values in [0, vocab_size).

    Raises:
        DataError: what is wrong, in one line.
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 2:
        got = f"{ids.dtype} of rank {ids.ndim}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise DataError(f"token ids: want an int64 array [batch, length], got {got}")
    if ids.size == 0:
        raise DataError(f"token ids: nothing to run in an array of shape {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(f"token ids: {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}")


def check_mask(mask: NDArray[Any] | None, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The attention mask for ids [batch, length], all ones where none is given.

    Raises:
        DataError: not int64, not the shape of ``ids``, values besides 0 and 1, or a row without a token.
    """
    if mask is None:
        return np.ones_like(ids)
    if mask.dtype != np.int64 or mask.shape != ids.shape:
        raise DataError(f"attention mask: want int64 {list(ids.shape)}, got {mask.dtype} {list(mask.shape)}")
    if not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise DataError("attention mask: want 0 and 1 only, and at least one 1 in every row")
    checked: NDArray[np.int64] = mask
    return checked


def positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token of a mask [batch, length]: padding does not count, and padded places get 0 or a repeat."""
    counted: NDArray[np.int64] = np.maximum(np.cumsum(mask, axis=1, dtype=np.int64) - 1, 0)
    return counted


def collect(stream: Iterable[list[list[int]]], batch: int, n: int) -> NDArray[np.int64]:
    """The tokens [batch, n] int64 of a ``Session.stream`` of as many rows and tokens."""
    made: list[list[int]] = [[] for _ in range(batch)]
    for step in stream:
        for row, tokens in zip(made, step, strict=True):
            row += tokens
    return np.array(made, dtype=np.int64).reshape(batch, n)


def check_count(n: int) -> None:
    """Refuse a number of tokens to generate below 1 (``DataError``)."""
    if n < 1:
        raise DataError(f"generate: n is {n}, want at least 1")
