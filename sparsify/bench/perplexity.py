"""How much a model's predictions are worth: perplexity of one session, KL divergence between two.

Perplexity is exp of the mean of -log p(token | tokens before it in its window), in nats, over every counted token.
KL(reference || candidate) = sum over the vocabulary of p (log p - log q), the mean over positions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, ModelError, NumericsError
from sparsify.runtimes.session import Session

# Elements of a block of positions x vocabulary: bounds each temporary copy (16 MiB in float32, 32 MiB in float64)
# where the logits of one window alone can reach gigabytes.
BLOCK_ELEMENTS = 2**22

Progress = Callable[[int, int], None]


@runtime_checkable
class Scorer(Protocol):
    """A session that scores tokens itself, where a runtime gives log-probabilities and no logits (vLLM)."""

    def prompt_logprobs(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability [batch, length - 1], in nats, of each token of ids [batch, length] given those before it."""
        ...


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a session on token windows.

    Attributes:
        perplexity: exp(nll_mean); infinite where that overflows.
        nll_mean: mean negative log-likelihood of a counted token, in nats.
        n_tokens: tokens predicted and counted.
        n_windows: windows run.
        length: tokens of a window.
        stride: tokens from the start of a window to the start of the next.
    """

    perplexity: float
    nll_mean: float
    n_tokens: int
    n_windows: int
    length: int
    stride: int


@dataclass(frozen=True)
class KlDivergence:
    """How far a candidate's predictions lie from a reference's.

    Attributes:
        mean_nats: mean over positions of KL(reference || candidate), in nats.
        standard_error_nats: standard error of that mean taken over windows; None for a single window.
        n_tokens: positions compared.
        n_windows: windows run.
        top1_agreement: fraction of positions where both put the same token first.
    """

    mean_nats: float
    standard_error_nats: float | None
    n_tokens: int
    n_windows: int
    top1_agreement: float


def _check_windows(windows: NDArray[Any], shortest: int) -> None:
    if windows.dtype != np.int64 or windows.ndim != 2:
        raise DataError(f"windows: want int64 [n, length], got {windows.dtype} {list(windows.shape)}")
    if windows.shape[0] == 0 or windows.shape[1] < shortest:
        raise DataError(f"windows: {list(windows.shape)} holds nothing to predict; give more text or a smaller length")


def _check_stride(windows: NDArray[Any], stride: int | None) -> int:
    _check_windows(windows, shortest=2)
    length = int(windows.shape[1])
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise DataError(f"stride {stride}: want 1 to the window length of {length}")
    if not np.array_equal(windows[:-1, stride:], windows[1:, : length - stride]):
        raise DataError(f"windows: do not overlap by {length - stride} tokens, as stride {stride} says")
    return stride


def _blocks(length: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _finite(block: NDArray[np.float32], session: Session, window: int, start: int) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        position = start + int(np.argmin(finite))
        raise NumericsError(f"{session.name}: logits of window {window}, position {position} hold NaN or Inf")


def perplexity(
    session: Session,
    windows: NDArray[np.int64],
    *,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a session on token windows, one window at a time.

    With ``stride`` equal to the length (the default) windows do not overlap, and each predicts all its tokens but
    the first. With a smaller stride each window starts ``stride`` tokens after the one before, and of every window
    after the first only the last ``stride`` tokens count: no token twice, each with at least length - stride
    tokens of context.

    Args:
        session: the model.
        windows: [n, length] int64 token ids.
        stride: 1 to length.
        progress: called with (windows done, windows in all).

    Raises:
        DataError: no windows, windows of fewer than 2 tokens, a stride out of range, or windows that do not overlap
            as the stride says.
        NumericsError: NaN or Inf among the logits; names window and position.
    """
    stride = _check_stride(windows, stride)
    n_windows, length = windows.shape
    total = _Likelihood(length, stride)
    for i in range(n_windows):
        if isinstance(session, Scorer):
            total.add_scores(session, i, session.prompt_logprobs(windows[i : i + 1])[0])
        else:
            total.add(session, i, windows[i], session.logits(windows[i : i + 1])[0])
        if progress is not None:
            progress(i + 1, n_windows)
    return total.result(n_windows)


class _Likelihood:
    """Sum of -log p over the counted tokens of one session."""

    def __init__(self, length: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.total, self.n_tokens = 0.0, 0

    def add(self, session: Session, i: int, window: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        # logits[t] predicts token t + 1, hence the last ``stride`` tokens are predicted by rows from length-1-stride.
        first = 0 if i == 0 else max(0, self.length - 1 - self.stride)
        targets = window[first + 1 :]
        for rows in _blocks(len(targets), logits.shape[-1]):
            block = logits[first + rows.start : first + rows.stop]
            _finite(block, session, i, first + rows.start)
            highest = block.max(axis=1, keepdims=True)
            # float32 for the exponentials; only the sums need more.
            log_norm = np.log(np.exp(block - highest).sum(axis=1, dtype=np.float64))
            picked = np.take_along_axis(block, targets[rows, None], axis=1).astype(np.float64)
            self.total += float((log_norm - (picked - highest)[:, 0]).sum())
        self.n_tokens += len(targets)

    def add_scores(self, session: Session, i: int, logprobs: NDArray[np.float32]) -> None:
        counted = logprobs[0 if i == 0 else max(0, self.length - 1 - self.stride) :]
        _finite(counted[:, None], session, i, self.length - 1 - len(counted))
        self.total -= float(counted.sum(dtype=np.float64))
        self.n_tokens += len(counted)

    def result(self, n_windows: int) -> Perplexity:
        mean = self.total / self.n_tokens
        value = math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf
        return Perplexity(value, mean, self.n_tokens, n_windows, self.length, self.stride)


def _log_softmax(block: NDArray[np.float32]) -> NDArray[np.float64]:
    # float64: a KL divergence of 1e-6 is a difference of logarithms that float32 would round away.
    shifted = block.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(
    reference: Session,
    candidate: Session,
    windows: NDArray[np.int64],
    progress: Progress | None = None,
) -> KlDivergence:
    """KL(reference || candidate) over every position of every window; two windows of logits are held at a time.

    Args:
        reference: the session whose predictions count as right.
        candidate: the session to judge.
        windows: [n, length] int64 token ids.
        progress: called with (windows done, windows in all).

    Raises:
        DataError: no windows, or empty ones.
        ModelError: the two sessions have vocabularies of different sizes.
        NumericsError: NaN or Inf among either's logits; names window and position.
    """
    _check_windows(windows, shortest=1)
    divergence = _Divergence(windows.shape)
    for i in range(len(windows)):
        left, right = (session.logits(windows[i : i + 1])[0] for session in (reference, candidate))
        divergence.add(reference, candidate, i, left, right)
        if progress is not None:
            progress(i + 1, len(windows))
    return divergence.result()


class _Divergence:
    """KL divergence and agreement of the first choice, window by window."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.n_windows, self.length = shape
        self.means = np.zeros(self.n_windows, dtype=np.float64)
        self.agreed = 0

    def add(
        self, reference: Session, candidate: Session, i: int, left: NDArray[np.float32], right: NDArray[np.float32]
    ) -> None:
        if left.shape != right.shape:
            raise ModelError(
                f"{candidate.name}: its vocabulary of {right.shape[-1]} is not the {left.shape[-1]} of {reference.name}"
            )
        for rows in _blocks(self.length, left.shape[-1]):
            _finite(left[rows], reference, i, rows.start)
            _finite(right[rows], candidate, i, rows.start)
            log_p, log_q = _log_softmax(left[rows]), _log_softmax(right[rows])
            self.means[i] += float((np.exp(log_p) * (log_p - log_q)).sum())
            self.agreed += int((left[rows].argmax(axis=1) == right[rows].argmax(axis=1)).sum())
        self.means[i] /= self.length

    def result(self) -> KlDivergence:
        error = float(self.means.std(ddof=1) / math.sqrt(self.n_windows)) if self.n_windows > 1 else None
        n_tokens = self.n_windows * self.length
        return KlDivergence(float(self.means.mean()), error, n_tokens, self.n_windows, self.agreed / n_tokens)


def compare(
    reference: Session,
    candidate: Session,
    windows: NDArray[np.int64],
    *,
    stride: int | None = None,
    progress: Progress | None = None,
) -> tuple[Perplexity, Perplexity, KlDivergence]:
    """Perplexity of both sessions and the divergence between them, with each window run once in each.

    Raises:
        DataError, ModelError, NumericsError: as ``perplexity`` and ``kl_divergence``.
    """
    stride = _check_stride(windows, stride)
    n_windows, length = windows.shape
    of_reference, of_candidate = _Likelihood(length, stride), _Likelihood(length, stride)
    divergence = _Divergence(windows.shape)
    for i in range(n_windows):
        left, right = (session.logits(windows[i : i + 1])[0] for session in (reference, candidate))
        of_reference.add(reference, i, windows[i], left)
        of_candidate.add(candidate, i, windows[i], right)
        divergence.add(reference, candidate, i, left, right)
        if progress is not None:
            progress(i + 1, n_windows)
    return of_reference.result(n_windows), of_candidate.result(n_windows), divergence.result()
