"""Log-probabilities of given tokens and whether each is the greedy choice, the same from every session.

Of equally likely tokens greedy decoding takes the one of the lowest id, in PyTorch as in NumPy.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, NumericsError
from sparsify.runtimes.session import Session

# Elements of a block of positions x vocabulary: bounds each temporary copy (16 MiB in float32, 32 MiB in float64)
# where the logits of one window alone can reach gigabytes.
BLOCK_ELEMENTS = 2**22


@runtime_checkable
class Scorer(Protocol):
    """A session that scores tokens itself, where a runtime gives log-probabilities and no logits (vLLM)."""

    def prompt_logprobs(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability [batch, length - 1], in nats, of each token of ids [batch, length] given those before it."""
        ...

    def prompt_scores(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``prompt_logprobs``, and for each of these tokens whether it is the greedy choice [batch, length - 1]."""
        ...


def blocks(length: int, vocab_size: int) -> Iterator[slice]:
    """Slices of ``length`` positions whose logits are at most ``BLOCK_ELEMENTS``, or one position."""
    step = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def check_finite(block: NDArray[np.float32], session: Session, start: int, place: str = "") -> None:
    """Refuse NaN and Inf among ``block`` [n, ...], whose first row is position ``start``.

    Raises:
        NumericsError: names ``place`` and the position.
    """
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        position = start + int(np.argmin(finite))
        raise NumericsError(f"{session.name}: logits of {place}position {position} hold NaN or Inf")


def of_logits(
    session: Session, logits: NDArray[np.float32], tokens: NDArray[np.int64], *, start: int = 0, place: str = ""
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability [n] in nats of each of ``tokens`` [n], and whether it is the greedy choice.

    Args:
        session: that gave the logits, for errors.
        logits: [n, vocab], each row predicting the token of that row.
        tokens: [n].
        start: position of the first row, for errors.
        place: what the positions count in (``window 3, ``), for errors.

    Raises:
        NumericsError: NaN or Inf among the logits.
    """
    logprobs, greedy = np.empty(len(tokens)), np.empty(len(tokens), dtype=np.bool_)
    for rows in blocks(len(tokens), logits.shape[-1]):
        block, wanted = logits[rows], tokens[rows]
        check_finite(block, session, start + rows.start, place)
        chosen = block.argmax(axis=1)
        highest = np.take_along_axis(block, chosen[:, None], axis=1)
        # float32 for the exponentials; only the sums need more.
        log_norm = np.log(np.exp(block - highest).sum(axis=1, dtype=np.float64))
        picked = np.take_along_axis(block, wanted[:, None], axis=1).astype(np.float64)
        logprobs[rows] = (picked - highest)[:, 0] - log_norm
        greedy[rows] = chosen == wanted
    return logprobs, greedy


def score(
    session: Session, ids: NDArray[np.int64], last: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """How likely each token of ``ids`` is given those before it.

    A session with logits runs all tokens but the last, so that ``ids`` may be one longer than its context; a
    ``Scorer`` runs all of them.

    Args:
        session: opened.
        ids: [1, length] int64 token ids, length at least 2.
        last: tokens to score, counted from the end; None is all but the first.

    Returns:
        Log-probabilities [last] float64 in nats, and whether each is the greedy choice [last].

    Raises:
        DataError: another shape, fewer than 2 tokens, ``last`` out of range, or what the session refuses.
        NumericsError: NaN or Inf among the logits.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise DataError(f"token ids: want one sequence of at least 2 tokens to score, got {list(ids.shape)}")
    before = ids.shape[1] - 1
    last = before if last is None else last
    if not 1 <= last <= before:
        raise DataError(f"token ids: {last} tokens to score, want 1 to {before}")
    start = before - last
    if isinstance(session, Scorer):
        logprobs, greedy = session.prompt_scores(ids)
        check_finite(logprobs[0, start:, None], session, start)
        return logprobs[0, start:].astype(np.float64), greedy[0, start:]
    logits = session.logits(ids[:, :-1])[0, start:]
    return of_logits(session, logits, ids[0, start + 1 :], start=start)
