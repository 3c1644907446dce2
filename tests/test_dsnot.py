"""DSnoT and R²-DSnoT against a literal loop in float64."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsify.masks import keep_mask
from sparsify.scores import relative_importance
from sparsify.solvers.dsnot import dsnot
from sparsify.stats import InputStats
from sparsify.types import NofM, Pattern, parse_pattern
from tests.problems import Array, activations, weights


def stats_of(x: torch.Tensor) -> InputStats:
    scatter = (x - x.mean(dim=0)).square().sum(dim=0).float()
    return InputStats(x.square().sum(dim=0).float(), len(x), x.sum(dim=0).float(), scatter=scatter)


def literal_dsnot(
    w: Array,
    x: Array,
    keep: npt.NDArray[np.bool_],
    m: int,
    n_iter: int = 50,
    threshold: float = 0.1,
    length: int = 1,
    importance: tuple[Array, Array] | None = None,
    exponent: float = 1.0,
    gammas: tuple[float, float] = (0.0, 0.0),
    norm: float = 2.0,
    safe: bool = False,
) -> npt.NDArray[np.bool_]:
    """One row and one swap after the other; ``m`` is the group a swap stays in, ``importance`` for grow and prune."""
    mean, variance, rms = x.mean(axis=0), x.var(axis=0), np.sqrt((x**2).mean(axis=0))
    grow_by, prune_by = importance or (np.abs(w), np.abs(w))
    keep = keep.copy()
    for q in range(len(w)):
        c = w[q] * mean * length
        e = c[~keep[q]].sum()
        used: set[int] = set()
        for _ in range(n_iter):
            if abs(e) <= threshold:
                break
            sign = 1 if e > 0 else -1
            grow = sign * np.sign(w[q]) * grow_by[q] * mean / variance + gammas[0] * np.abs(w[q]) ** norm
            prune = prune_by[q] * rms**exponent + gammas[1] * np.abs(w[q]) ** norm
            pruned = [r for r in range(len(c)) if not keep[q, r] and r not in used]
            if not pruned:
                break
            i = max(pruned, key=lambda r: float(grow[r]))
            kept = [r for r in range(len(c)) if keep[q, r] and r not in used and r // m == i // m]
            if m == len(c):
                kept = [r for r in kept if sign * c[r] < 0]
            j = min(kept, key=lambda r: float(prune[r]), default=None)
            if j is None or (safe and abs(e - c[i] + c[j]) >= abs(e)):
                # A group without a partner does not end the row for N:M.
                if m == len(c):
                    break
                used.add(i)
                continue
            if m < len(c) and sign * (e - c[i] + c[j]) <= 0:
                break
            keep[q, i], keep[q, j] = True, False
            used |= {i, j}
            e += c[j] - c[i]
    return keep


def dsnot_case(seed: int, text: str = "0.5") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pattern, int]:
    w, x = weights(seed, 10, 24), activations(seed, 24, 96)
    pattern = parse_pattern(text, None if ":" in text else "row")
    keep = keep_mask(w.abs() * x.square().mean(dim=0).sqrt(), pattern)
    return w, x, keep, pattern, pattern.m if isinstance(pattern, NofM) else 24


def mean_error(w: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> Array:
    """Mean of dense minus sparse output of every row, from the tokens."""
    return np.asarray((x @ (w * ~keep).double().t()).mean(dim=0).numpy())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8", "1:4"])
def test_dsnot_makes_the_swaps_of_a_literal_loop(text: str, safe: bool) -> None:
    n_swapped = 0
    for seed in range(5):
        w, x, keep, pattern, m = dsnot_case(seed, text)
        for n_iter, length in ((1, 1), (3, 1), (50, 1), (50, 64)):
            ours, cycles, status = dsnot(
                w, stats_of(x), keep, pattern, n_iter=n_iter, safe=safe, tokens_per_sequence=length
            )
            expected = literal_dsnot(
                w.double().numpy(), x.numpy(), keep.numpy(), m, n_iter=n_iter, safe=safe, length=length
            )
            np.testing.assert_array_equal(ours.numpy(), expected)
            n_swapped += int((ours & ~keep).sum())
            assert cycles <= n_iter
            assert status == "max_iter" or cycles < n_iter or n_iter < 50
    assert n_swapped > 20


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("reweight", ["none", "grow", "prune", "both"])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (1.0, 2.0)])
def test_r2_dsnot_makes_the_swaps_of_a_literal_loop(text: str, reweight: str, gammas: tuple[float, float]) -> None:
    differs = False
    for seed in range(4):
        w, x, keep, pattern, m = dsnot_case(seed, text)
        size = w.double().abs()
        relative = (size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)).numpy()
        torch.testing.assert_close(torch.from_numpy(relative).float(), relative_importance(w))
        importance = (
            relative if reweight in ("grow", "both") else size.numpy(),
            relative if reweight in ("prune", "both") else size.numpy(),
        )
        ours, _, _ = dsnot(
            w, stats_of(x), keep, pattern, reweight=reweight, exponent=0.5, norm=1.5,
            gamma_grow=gammas[0], gamma_prune=gammas[1],
        )  # fmt: skip
        expected = literal_dsnot(
            w.double().numpy(), x.numpy(), keep.numpy(), m,
            importance=importance, exponent=0.5, norm=1.5, gammas=gammas,
        )  # fmt: skip
        np.testing.assert_array_equal(ours.numpy(), expected)
        differs |= not torch.equal(ours, dsnot(w, stats_of(x), keep, pattern, exponent=0.5)[0])
    assert differs == (reweight != "none" or gammas != (0.0, 0.0))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8"])
def test_every_cycle_keeps_counts_and_moves_the_mean_error(text: str, safe: bool) -> None:
    fell = grew = False
    for seed in range(4):
        w, x, start, pattern, m = dsnot_case(seed, text)
        before = start
        moved = torch.zeros_like(start)
        for n_iter in range(1, 25):
            after, _, _ = dsnot(w, stats_of(x), start, pattern, n_iter=n_iter, safe=safe)
            assert torch.equal(after.reshape(10, -1, m).sum(dim=2), start.reshape(10, -1, m).sum(dim=2))
            restored, removed = after & ~before, before & ~after
            assert int(restored.sum(dim=1).max()) <= 1
            assert torch.equal(restored.sum(dim=1), removed.sum(dim=1))
            # No weight is moved twice.
            assert not (moved & (restored | removed)).any()
            moved |= restored | removed
            e_before, e_after = mean_error(w, x, before), mean_error(w, x, after)
            contribution = w.double().numpy() * x.mean(dim=0).numpy()
            for q in restored.any(dim=1).nonzero().flatten().tolist():
                assert abs(e_before[q]) > 0.1 * (1 - 1e-5)
                i, j = int(restored[q].nonzero()), int(removed[q].nonzero())
                sign = np.sign(e_before[q])
                assert contribution[q, j] * sign < 0 or ":" in text
                assert e_after[q] * sign > 0 or ":" not in text
                towards = ~before[q].numpy() & ~moved[q].numpy() & (contribution[q] * sign > 0)
                # For N:M what is restored also needs a partner in its group.
                assert contribution[q, i] * sign > 0 or not towards.any() or ":" in text
                assert e_after[q] == pytest.approx(e_before[q] - contribution[q, i] + contribution[q, j], abs=1e-9)
                fell |= abs(e_after[q]) < abs(e_before[q])
                grew |= abs(e_after[q]) > abs(e_before[q])
                assert abs(e_after[q]) < abs(e_before[q]) or not safe
            before = after
    assert fell
    assert grew != safe


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_rows_within_the_threshold_stay(text: str) -> None:
    w, x, keep, pattern, _ = dsnot_case(1, text)
    size = np.abs(mean_error(w, x, keep))
    threshold = float(np.median(size))
    after, _, _ = dsnot(w, stats_of(x), keep, pattern, threshold=threshold)
    quiet = torch.from_numpy(size <= threshold)
    assert torch.equal(after[quiet], keep[quiet])
    assert (after[~quiet] ^ keep[~quiet]).any()
    result = dsnot(w, stats_of(x), keep, pattern, threshold=float(size.max()) * 1.01)
    assert torch.equal(result[0], keep)
    assert result[1:] == (0, "converged")


def test_dsnot_without_cycles_or_tokens_or_choice_returns_the_mask() -> None:
    w, x, keep, pattern, _ = dsnot_case(2)
    result = dsnot(w, stats_of(x), keep, pattern, n_iter=0)
    assert torch.equal(result[0], keep)
    assert result[1:] == (0, "max_iter")
    nothing = InputStats(torch.zeros(24), 0, torch.zeros(24))
    assert torch.equal(dsnot(w, nothing, keep, pattern)[0], keep)
    for every in (torch.ones_like(keep), torch.zeros_like(keep)):
        for each in (pattern, parse_pattern("2:4")):
            after, _, status = dsnot(w, stats_of(x), every, each)
            assert torch.equal(after, every)
            assert status == "converged"


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_dsnot_leaves_dead_inputs_and_zero_weights_where_they_are(text: str) -> None:
    w, x, _, pattern, _ = dsnot_case(3, text)
    w[:, 5] = 0
    x[:, 11] = 0
    keep = torch.zeros_like(w, dtype=torch.bool)
    keep[:, ::2] = True
    before, original = w.clone(), keep.clone()
    after, _, _ = dsnot(w, stats_of(x), keep, pattern)
    assert torch.equal(after[:, [5, 11]], keep[:, [5, 11]])
    assert not torch.equal(after, keep)
    assert torch.equal(w, before)
    assert torch.equal(keep, original)


def test_the_threshold_of_dsnot_is_that_of_a_sequence_s_sum() -> None:
    w, x, keep, pattern, _ = dsnot_case(4)
    for threshold in (0.0, 0.3, 2.0):
        long, _, _ = dsnot(w, stats_of(x), keep, pattern, threshold=threshold * 32, tokens_per_sequence=32)
        assert torch.equal(long, dsnot(w, stats_of(x), keep, pattern, threshold=threshold)[0])


def test_the_variance_enters_the_choice_of_what_to_restore_only_by_its_power() -> None:
    w, x, keep, pattern, _ = dsnot_case(5)
    louder = x.clone()
    louder[::2] += 3
    louder[1::2] -= 3
    # The same means and other variances: without the power, which then also leaves norms out, nothing changes.
    after = [
        [dsnot(w, stats_of(tokens), keep, pattern, exponent=0, variance_power=power)[0] for tokens in (x, louder)]
        for power in (0.0, 1.0)
    ]
    assert torch.equal(*after[0])
    assert not torch.equal(*after[1])


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("reweight", ["none", "both"])
def test_masks_do_not_depend_on_how_rows_are_cut(pattern: str, reweight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = activations(3, 32, 200), weights(4, 50, 32)
    parsed = parse_pattern(pattern)
    keep = keep_mask(w.abs(), parsed)
    found = []
    for size, least in ((1 << 26, 64), (4 * 32 * 7, 1)):
        monkeypatch.setattr("sparsify.chunks.CHUNK_BYTES", size)
        monkeypatch.setattr("sparsify.chunks._LEAST", least)
        found.append(dsnot(w, stats_of(x), keep, parsed, reweight=reweight, tokens_per_sequence=64))
    (whole, *told), (cut, *same) = found
    assert torch.equal(whole, cut)
    assert told == same
    assert not torch.equal(whole, keep)
