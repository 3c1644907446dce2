"""How much a model's predictions are worth: perplexity of one session, KL divergence between two.

Perplexity is exp of the mean of -log p(token | tokens before it in its window), in nats, over every counted token.
KL(reference || candidate) = sum over the vocabulary of p (log p - log q), the mean over positions. A position that
overlapping windows share counts once, in the first window that has it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.bench.scoring import Scorer, blocks, check_finite, of_logits
from sparsify.errors import DataError, ModelError
from sparsify.runtimes.session import Session

Progress = Callable[[int, int], None]


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
        standard_error: of ``perplexity``, by the delta method, with windows as the sampling unit, since tokens of one
            window depend on each other; None for one window, or where the perplexity is infinite.
        window_nll: of each window, the mean negative log-likelihood of its counted tokens, in nats.
        window_tokens: of each window, the tokens counted.
    """

    perplexity: float
    nll_mean: float
    n_tokens: int
    n_windows: int
    length: int
    stride: int
    standard_error: float | None
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]


@dataclass(frozen=True)
class KlDivergence:
    """How far a candidate's predictions lie from a reference's.

    Attributes:
        mean_nats: mean over positions of KL(reference || candidate), in nats.
        standard_error_nats: of that mean, with windows as the sampling unit (``ratio``); None for a single window.
        n_tokens: positions compared; the last of a window, which predicts no token there, is one.
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


def _check_stride(windows: NDArray[Any], stride: int | None, shortest: int = 2) -> int:
    _check_windows(windows, shortest)
    length = int(windows.shape[1])
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise DataError(f"stride {stride}: want 1 to the window length of {length}")
    if not np.array_equal(windows[:-1, stride:], windows[1:, : length - stride]):
        raise DataError(f"windows: do not overlap by {length - stride} tokens, as stride {stride} says")
    return stride


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
    """Sum of -log p over the counted tokens of one session, window by window."""

    def __init__(self, length: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.sums: list[float] = []
        self.counts: list[int] = []

    def _first(self, i: int) -> int:
        # logits[t] predicts token t + 1, hence the last ``stride`` tokens are predicted by rows from length-1-stride.
        return 0 if i == 0 else max(0, self.length - 1 - self.stride)

    def add(self, session: Session, i: int, window: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        first = self._first(i)
        logprobs, _ = of_logits(session, logits[first:-1], window[first + 1 :], start=first, place=f"window {i}, ")
        self._count(logprobs)

    def add_scores(self, session: Session, i: int, logprobs: NDArray[np.float32]) -> None:
        first = self._first(i)
        check_finite(logprobs[first:, None], session, first, f"window {i}, ")
        self._count(logprobs[first:].astype(np.float64))

    def _count(self, logprobs: NDArray[np.float64]) -> None:
        self.sums.append(-float(logprobs.sum()))
        self.counts.append(len(logprobs))

    def result(self, n_windows: int) -> Perplexity:
        mean, error = ratio(self.sums, self.counts)
        value = _exp(mean)
        return Perplexity(
            perplexity=value,
            nll_mean=mean,
            n_tokens=sum(self.counts),
            n_windows=n_windows,
            length=self.length,
            stride=self.stride,
            standard_error=None if error is None or math.isinf(value) else value * error,
            window_nll=tuple(total / n for total, n in zip(self.sums, self.counts, strict=True)),
            window_tokens=tuple(self.counts),
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.inf


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Sum of ``sums`` over sum of ``counts`` over sampling units, and its standard error (None for one unit).

    The error is that of a ratio estimator with residuals r = sum - ratio * count of each of k units:
    sqrt(k / (k - 1) * sum of r**2) / sum of counts. With equal counts it is that of the mean of the units' means.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = float(values.sum() / weights.sum())
    if len(values) < 2:
        return mean, None
    residuals = values - mean * weights
    spread = len(values) / (len(values) - 1) * float((residuals**2).sum())
    return mean, math.sqrt(spread) / float(weights.sum())


def paired_increase(
    dense_nll: Sequence[float], pruned_nll: Sequence[float], tokens: Sequence[int]
) -> tuple[float, float | None]:
    """Relative increase of perplexity from dense to pruned on the same windows: exp(mean difference) - 1.

    The differences are paired, so that what makes a window hard for both models does not count as uncertainty.

    Args:
        dense_nll: ``Perplexity.window_nll`` of the dense model.
        pruned_nll: the same of the pruned model.
        tokens: ``Perplexity.window_tokens``, which has to be the same in both.

    Returns:
        The increase (0.05 is 5 %), and its standard error over windows by the delta method; None for one window, or
        where the increase is infinite.

    Raises:
        DataError: lists of different lengths, no windows, or a window without tokens or with a value that is no number.
    """
    if not len(dense_nll) == len(pruned_nll) == len(tokens):
        raise DataError(
            f"window_nll: {len(dense_nll)} windows of the dense model, {len(pruned_nll)} of the pruned one and "
            f"{len(tokens)} counts of tokens cannot be paired; measure both on the same windows"
        )
    if not tokens or min(tokens) < 1:
        raise DataError("window_tokens: want windows with at least one counted token each")
    differences = np.asarray(pruned_nll, dtype=np.float64) - np.asarray(dense_nll, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise DataError("window_nll: holds NaN or Inf")
    mean, error = ratio(list(differences * np.asarray(tokens)), tokens)
    # expm1 keeps the digits of a small increase.
    increase = math.expm1(mean) if math.isfinite(_exp(mean)) else math.inf
    return increase, None if error is None or math.isinf(increase) else (1 + increase) * error


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
    *,
    stride: int | None = None,
    progress: Progress | None = None,
) -> KlDivergence:
    """KL(reference || candidate) over every position; two windows of logits are held at a time.

    With a ``stride`` below the length, of every window after the first only the last ``stride`` positions count: each
    position of the text once, as in ``perplexity`` each token.

    Args:
        reference: the session whose predictions count as right.
        candidate: the session to judge.
        windows: [n, length] int64 token ids.
        stride: 1 to length; None is the length.
        progress: called with (windows done, windows in all).

    Raises:
        DataError: no windows, empty ones, a stride out of range, or windows that do not overlap as it says.
        ModelError: the two sessions have vocabularies of different sizes.
        NumericsError: NaN or Inf among either's logits; names window and position.
    """
    divergence = _Divergence(windows.shape[-1], _check_stride(windows, stride, shortest=1))
    for i in range(len(windows)):
        left, right = (session.logits(windows[i : i + 1])[0] for session in (reference, candidate))
        divergence.add(reference, candidate, i, left, right)
        if progress is not None:
            progress(i + 1, len(windows))
    return divergence.result()


class _Divergence:
    """KL divergence and agreement of the first choice, window by window."""

    def __init__(self, length: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.sums: list[float] = []
        self.counts: list[int] = []
        self.agreed = 0

    def add(
        self, reference: Session, candidate: Session, i: int, left: NDArray[np.float32], right: NDArray[np.float32]
    ) -> None:
        if left.shape != right.shape:
            raise ModelError(
                f"{candidate.name}: its vocabulary of {right.shape[-1]} is not the {left.shape[-1]} of {reference.name}"
            )
        # The positions before these were in the window before.
        first, total = 0 if i == 0 else self.length - self.stride, 0.0
        left, right = left[first:], right[first:]
        for rows in blocks(len(left), left.shape[-1]):
            check_finite(left[rows], reference, first + rows.start, f"window {i}, ")
            check_finite(right[rows], candidate, first + rows.start, f"window {i}, ")
            log_p, log_q = _log_softmax(left[rows]), _log_softmax(right[rows])
            total += float((np.exp(log_p) * (log_p - log_q)).sum())
            self.agreed += int((left[rows].argmax(axis=1) == right[rows].argmax(axis=1)).sum())
        self.sums.append(total)
        self.counts.append(len(left))

    def result(self) -> KlDivergence:
        mean, error = ratio(self.sums, self.counts)
        n_tokens = sum(self.counts)
        return KlDivergence(mean, error, n_tokens, len(self.counts), self.agreed / n_tokens)


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
    divergence = _Divergence(length, stride)
    for i in range(n_windows):
        left, right = (session.logits(windows[i : i + 1])[0] for session in (reference, candidate))
        of_reference.add(reference, i, windows[i], left)
        of_candidate.add(candidate, i, windows[i], right)
        divergence.add(reference, candidate, i, left, right)
        if progress is not None:
            progress(i + 1, n_windows)
    return of_reference.result(n_windows), of_candidate.result(n_windows), divergence.result()
