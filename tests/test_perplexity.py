"""Perplexity and KL divergence against torch's cross entropy and scipy, and what they refuse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from sparsify.bench import scoring
from sparsify.bench.perplexity import compare, kl_divergence, paired_increase, perplexity, ratio
from sparsify.errors import DataError, ModelError, NumericsError
from sparsify.runtimes.session import Session
from sparsify.runtimes.torch_session import TorchSession
from tests.fakes import FakeSession

STORIES = Path(__file__).parents[2] / "shared/data/models/stories260k"
VOCAB = 31


class Table(FakeSession):
    """A session whose logits are a fixed function of the window's tokens, so expected values are computable."""

    name = "table"

    def __init__(self, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> None:
        self.rows = (np.random.default_rng(seed).normal(size=(VOCAB, vocab)) * scale).astype(np.float32)
        super().__init__(self._look_up)

    def _look_up(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        # The running mean makes a row depend on the start of its window, as context does in a model.
        means = np.cumsum(ids, axis=1) / np.arange(1, ids.shape[1] + 1)
        values: NDArray[np.float32] = self.rows[ids] * (1 + means[..., None] / VOCAB).astype(np.float32)
        return values


def _tokens(n: int, seed: int = 1) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCAB, size=n, dtype=np.int64)


def _nll(session: Session, window: NDArray[np.int64]) -> torch.Tensor:
    logits = torch.from_numpy(session.logits(window[None])[0]).double()
    return torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(window[1:]), reduction="none")


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_perplexity_is_torch_cross_entropy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", block)
    windows = _tokens(4 * 12).reshape(4, 12)
    expected = torch.cat([_nll(Table(), window) for window in windows])
    result = perplexity(Table(), windows)
    assert result.nll_mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-6)
    assert (result.n_tokens, result.n_windows, result.length, result.stride) == (4 * 11, 4, 12, 12)


@pytest.mark.parametrize("stride", [1, 3, 9, 11])
def test_strided_windows_count_each_token_once(stride: int) -> None:
    length, n = 12, 5
    text = _tokens(length + stride * (n - 1))
    windows = np.stack([text[i * stride : i * stride + length] for i in range(n)])
    expected = torch.cat([_nll(Table(), w) if i == 0 else _nll(Table(), w)[-stride:] for i, w in enumerate(windows)])
    result = perplexity(Table(), windows, stride=stride)
    assert result.n_tokens == len(expected) == len(text) - 1
    assert result.nll_mean == pytest.approx(float(expected.mean()), rel=1e-6)


def test_windows_are_kept_and_give_the_standard_error() -> None:
    windows = _tokens(7 * 12).reshape(7, 12)
    means = np.array([float(_nll(Table(), window).mean()) for window in windows])
    result = perplexity(Table(), windows)
    assert result.window_nll == pytest.approx(means, rel=1e-6)
    assert result.window_tokens == (11,) * 7
    # Windows of one length: the standard error of the mean of their means, times the slope of exp.
    assert result.standard_error == pytest.approx(result.perplexity * means.std(ddof=1) / math.sqrt(7), rel=1e-6)
    assert perplexity(Table(), windows[:1]).standard_error is None
    assert perplexity(Table(scale=1e6), windows).standard_error is None
    # With a stride the first window counts more tokens than the others.
    text = _tokens(12 + 3 * 6)
    strided = perplexity(Table(), np.stack([text[i * 3 : i * 3 + 12] for i in range(7)]), stride=3)
    assert strided.window_tokens == (11, *[3] * 6)
    total = sum(n * nll for n, nll in zip(strided.window_tokens, strided.window_nll, strict=True))
    assert total / strided.n_tokens == pytest.approx(strided.nll_mean, rel=1e-12)


def _windows_of_unequal_length() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    tokens = rng.integers(50, 150, size=200)
    hard = rng.normal(3.0, 0.4, size=200)
    return hard, hard + rng.normal(0.1, 0.05, size=200), tokens


def test_standard_errors_are_the_bootstraps() -> None:
    dense, pruned, tokens = _windows_of_unequal_length()
    draws = np.random.default_rng(0).integers(0, len(tokens), size=(20000, len(tokens)))
    weights = tokens[draws]
    resampled = {
        name: (weights * values[draws]).sum(axis=1) / weights.sum(axis=1)
        for name, values in (("dense", dense), ("pruned", pruned))
    }
    mean, error = ratio(list(dense * tokens), list(tokens))
    assert mean == pytest.approx(float(np.average(dense, weights=tokens)))
    assert error == pytest.approx(resampled["dense"].std(), rel=0.03)
    increase, paired = paired_increase(list(dense), list(pruned), list(tokens))
    ratios = np.exp(resampled["pruned"] - resampled["dense"])
    assert increase == pytest.approx(math.exp(float(np.average(pruned - dense, weights=tokens))) - 1)
    assert paired == pytest.approx(ratios.std(), rel=0.03)
    # Paired, what is hard for both cancels: unpaired errors would be several times that.
    assert paired is not None
    assert error is not None
    assert paired < error / 4


def test_increase_of_two_sessions_is_the_ratio_of_their_perplexities() -> None:
    windows = _tokens(60).reshape(5, 12)
    dense, pruned, _ = compare(Table(0), Table(5), windows)
    increase, error = paired_increase(dense.window_nll, pruned.window_nll, dense.window_tokens)
    assert increase == pytest.approx(pruned.perplexity / dense.perplexity - 1, rel=1e-9)
    assert error is not None
    assert error > 0
    assert paired_increase(dense.window_nll, dense.window_nll, dense.window_tokens) == (0.0, 0.0)
    single, unknown = paired_increase([1.0], [2.0], [9])
    assert single == pytest.approx(math.e - 1)
    assert unknown is None
    assert paired_increase([1.0, 1.0], [1e6, 1e6], [9, 9]) == (math.inf, None)


@pytest.mark.parametrize(
    ("dense", "pruned", "tokens", "words"),
    [
        ([1.0, 2.0], [1.0], [4, 4], "2 windows of the dense model, 1 of the pruned one and 2 counts"),
        ([1.0, 2.0], [1.0, 2.0], [4], "and 1 counts of tokens cannot be paired"),
        ([], [], [], "at least one counted token"),
        ([1.0], [1.0], [0], "at least one counted token"),
        ([1.0, math.nan], [1.0, 1.0], [4, 4], "NaN"),
    ],
)
def test_what_cannot_be_paired(dense: list[float], pruned: list[float], tokens: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        paired_increase(dense, pruned, tokens)


def test_uniform_logits_give_the_vocabulary_size() -> None:
    assert perplexity(Table(scale=0.0), _tokens(20).reshape(2, 10)).perplexity == pytest.approx(VOCAB)


def test_hopeless_model_gives_infinity_not_an_overflow() -> None:
    assert perplexity(Table(scale=1e6), _tokens(20).reshape(2, 10)).perplexity == math.inf


def test_kl_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", 100)
    windows = _tokens(3 * 8).reshape(3, 8)
    log_p = log_softmax(Table(0).logits(windows).astype(np.float64), axis=-1)
    log_q = log_softmax(Table(5).logits(windows).astype(np.float64), axis=-1)
    per_position = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    result = kl_divergence(Table(0), Table(5), windows)
    assert result.mean_nats == pytest.approx(per_position.mean(), rel=1e-9)
    assert result.standard_error_nats == pytest.approx(per_position.mean(axis=1).std(ddof=1) / math.sqrt(3), rel=1e-9)
    assert result.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert (result.n_tokens, result.n_windows) == (24, 3)


@pytest.mark.parametrize("stride", [1, 3, 11])
def test_kl_of_overlapping_windows_counts_each_position_once(stride: int) -> None:
    length, n = 12, 6
    text = _tokens(length + stride * (n - 1))
    windows = np.stack([text[i * stride : i * stride + length] for i in range(n)])
    log_p, log_q = (
        log_softmax(session.logits(windows).astype(np.float64), axis=-1) for session in (Table(0), Table(5))
    )
    every, same = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1), log_p.argmax(-1) == log_q.argmax(-1)
    counted = np.array([[i == 0 or t >= length - stride for t in range(length)] for i in range(n)])
    result = kl_divergence(Table(0), Table(5), windows, stride=stride)
    assert result.n_tokens == counted.sum() == len(text)
    assert result.mean_nats == pytest.approx(every[counted].mean(), rel=1e-9)
    assert result.top1_agreement == pytest.approx(same[counted].mean())
    # Windows are the sampling unit, the first one with more positions than the others.
    sums, counts = (every * counted).sum(axis=1), counted.sum(axis=1)
    residuals = sums - every[counted].mean() * counts
    assert result.standard_error_nats == pytest.approx(math.sqrt(n / (n - 1) * (residuals**2).sum()) / len(text))
    assert compare(Table(0), Table(5), windows, stride=stride)[2] == result


def test_kl_of_a_model_with_itself_is_zero() -> None:
    result = kl_divergence(Table(), Table(), _tokens(8).reshape(1, 8))
    assert (result.mean_nats, result.top1_agreement, result.standard_error_nats) == (0.0, 1.0, None)


def test_compare_is_the_three_measurements_in_one_pass() -> None:
    windows = _tokens(24).reshape(3, 8)
    expected = (
        perplexity(Table(0), windows),
        perplexity(Table(5), windows),
        kl_divergence(Table(0), Table(5), windows),
    )
    assert compare(Table(0), Table(5), windows) == expected


def test_progress_counts_windows() -> None:
    calls: list[tuple[int, int]] = []
    windows = _tokens(30).reshape(3, 10)
    perplexity(Table(), windows, progress=lambda done, total: calls.append((done, total)))
    kl_divergence(Table(), Table(), windows, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize(
    "windows",
    [
        np.empty((0, 8), dtype=np.int64),
        np.empty((3, 0), dtype=np.int64),
        np.zeros(8, dtype=np.int64),
        np.zeros((2, 8), dtype=np.int32),
    ],
)
def test_nothing_to_measure_is_an_error(windows: NDArray[np.int64]) -> None:
    with pytest.raises(DataError, match="windows"):
        perplexity(Table(), windows)
    with pytest.raises(DataError, match="windows"):
        kl_divergence(Table(), Table(), windows)


def test_one_token_predicts_nothing() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(Table(), np.zeros((2, 1), dtype=np.int64))


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_stride_out_of_range(stride: int) -> None:
    with pytest.raises(DataError, match="stride"):
        perplexity(Table(), _tokens(16).reshape(2, 8), stride=stride)


def test_windows_that_do_not_overlap_as_said() -> None:
    with pytest.raises(DataError, match="overlap"):
        perplexity(Table(), _tokens(16).reshape(2, 8), stride=4)
    with pytest.raises(DataError, match="overlap"):
        kl_divergence(Table(), Table(), _tokens(16).reshape(2, 8), stride=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_name_window_and_position(bad: float) -> None:
    class Broken(Table):
        name = "broken"

        def logits(
            self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
        ) -> NDArray[np.float32]:
            values = super().logits(ids)
            values[ids == 7] = bad
            return values

    windows = np.zeros((3, 8), dtype=np.int64)
    windows[1, 4] = 7
    with pytest.raises(NumericsError, match="broken: logits of window 1, position 4"):
        perplexity(Broken(), windows)
    with pytest.raises(NumericsError, match="broken: logits of window 1, position 4"):
        kl_divergence(Table(), Broken(), windows)


def test_vocabularies_of_different_sizes() -> None:
    with pytest.raises(ModelError, match="vocabulary of 32 is not the 31"):
        kl_divergence(Table(), Table(vocab=32), _tokens(8).reshape(1, 8))


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/models/stories260k is absent")
def test_trained_model_predicts_its_own_text_better_than_noise() -> None:
    with TorchSession(STORIES) as session:
        start = np.array([[1]], dtype=np.int64)
        own = np.concatenate([start, session.generate(start, 63)], axis=1)
        noise = np.random.default_rng(0).integers(0, session.vocab_size, size=(1, 64), dtype=np.int64)
        assert perplexity(session, own).perplexity < 3
        assert perplexity(session, noise).perplexity > session.vocab_size
        coarse = kl_divergence(session, session, own)
    assert coarse.mean_nats == 0.0
