"""Swaps against trying them all, in float64."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch

from sparsify.masks import keep_mask
from sparsify.solvers import swaps as swaps_module
from sparsify.solvers.swaps import swaps
from sparsify.types import NofM, parse_pattern
from tests.problems import (
    INPUT_KINDS,
    Array,
    activations,
    assert_exact,
    each_pattern,
    gram_of,
    layer_problem,
    pattern_of,
    weights,
)


def kept_error(w: torch.Tensor, keep: torch.Tensor, matrix: torch.Tensor) -> Array:
    """uᵀ G u of every row, u its removed weights, in float64."""
    u = (w * ~keep).double()
    return np.asarray(((u @ matrix.double()) * u).sum(dim=1).numpy())


def best_swap(w: torch.Tensor, keep: torch.Tensor, matrix: torch.Tensor, m: int) -> float:
    """The least error of one row after any single swap within groups of ``m``, by trying all."""
    errors = [np.inf]
    for i in keep.nonzero().flatten().tolist():
        for j in (~keep).nonzero().flatten().tolist():
            if i // m == j // m:
                swapped = keep.clone()
                swapped[i], swapped[j] = False, True
                errors.append(float(kept_error(w[None], swapped[None], matrix)[0]))
    return min(errors)


@each_pattern
def test_every_swap_is_the_best_and_a_fixed_point_has_none(text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    m = pattern.m if isinstance(pattern, NofM) else 16
    for seed in range(3):
        w, gram = layer_problem(seed, n_out=4)
        start = keep_mask(w.abs(), pattern)
        final, n_swaps, status = swaps(w, gram, start, pattern, candidates=None)
        assert status == "converged"
        assert n_swaps > 0
        keep = start
        for step in range(1, n_swaps + 2):
            later, done, _ = swaps(w, gram, start, pattern, n_iter=step, candidates=None)
            assert done == min(step, n_swaps)
            assert torch.equal(later.sum(dim=1), start.sum(dim=1))
            assert torch.equal(later.reshape(4, -1, m).sum(dim=2), start.reshape(4, -1, m).sum(dim=2))
            before, after = kept_error(w, keep, gram.matrix), kept_error(w, later, gram.matrix)
            for row in range(4):
                best = best_swap(w[row], keep[row], gram.matrix, m)
                n_changed = int((keep[row] ^ later[row]).sum())
                assert n_changed in (0, 2)
                if n_changed:
                    assert after[row] == pytest.approx(best, rel=1e-4)
                    assert after[row] < before[row]
                else:
                    scale = float((w[row].square() * gram.matrix.diagonal()).sum())
                    assert best >= before[row] - 3e-6 * scale
            keep = later
        assert torch.equal(keep, final)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("candidates", [None, 4])
def test_the_change_that_is_computed_is_the_change_that_happens(
    text: str, candidates: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, gram = layer_problem(3)
    pattern = parse_pattern(text)
    predicted: list[float] = []
    for name in ("_best_pair", "_best_in_group"):
        original = getattr(swaps_module, name)

        def spy(*args: object, original: Callable[..., tuple[torch.Tensor, ...]] = original) -> object:
            found = original(*args)
            predicted.append(float(found[0][0]))
            return found

        monkeypatch.setattr(swaps_module, name, spy)
    n_checked = 0
    for row in range(8):
        keep = keep_mask(w[row, None].abs(), pattern)
        while True:
            later, _, _ = swaps(w[row, None], gram, keep, pattern, n_iter=1, candidates=candidates)
            if torch.equal(later, keep):
                break
            happened = kept_error(w[row, None], later, gram.matrix) - kept_error(w[row, None], keep, gram.matrix)
            assert predicted[-1] == pytest.approx(float(happened[0]), rel=1e-3)
            keep, n_checked = later, n_checked + 1
    assert n_checked > 8


def test_few_candidates_lower_the_error_too_and_all_are_no_worse_at_the_first_swap() -> None:
    w, gram = layer_problem(4, n_out=16, n_in=32, n_tokens=128)
    start = keep_mask(w.abs() * gram.matrix.diagonal().sqrt(), parse_pattern("0.5", "row"))
    before = kept_error(w, start, gram.matrix)
    errors = {}
    for candidates in (1, 4, 32, 64, None):
        first, _, _ = swaps(w, gram, start, parse_pattern("0.5"), n_iter=1, candidates=candidates)
        last, _, _ = swaps(w, gram, start, parse_pattern("0.5"), candidates=candidates)
        errors[candidates] = kept_error(w, first, gram.matrix)
        assert (kept_error(w, last, gram.matrix) <= errors[candidates]).all()
        assert (errors[candidates] <= before).all()
    np.testing.assert_array_equal(errors[32], errors[None])
    np.testing.assert_array_equal(errors[64], errors[None])
    for fewer, more in ((1, 4), (4, 32)):
        assert (errors[more] <= errors[fewer] + 1e-5 * before).all()
        assert errors[more].sum() < errors[fewer].sum()


def test_swaps_find_the_best_of_all_masks_where_one_swap_is_enough() -> None:
    # From a neighbour of the optimum, the best swap leads there or to something as good as any neighbour.
    for seed in range(5):
        w, gram = layer_problem(seed, n_out=1, n_in=8, n_tokens=32)
        masks = []
        for removed in combinations(range(8), 4):
            mask = torch.ones(1, 8, dtype=torch.bool)
            mask[0, list(removed)] = False
            masks.append(mask)
        best = min(masks, key=lambda mask: float(kept_error(w, mask, gram.matrix)[0]))
        assert torch.equal(swaps(w, gram, best, parse_pattern("0.5"), candidates=None)[0], best)
        for mask in masks:
            if int((mask ^ best).sum()) == 2:
                assert torch.equal(swaps(w, gram, mask, parse_pattern("0.5"), n_iter=1, candidates=None)[0], best)


def test_swaps_stop_at_their_limit_and_do_nothing_without_a_choice() -> None:
    w, gram = layer_problem(5)
    start = keep_mask(w.abs(), parse_pattern("0.5", "row"))
    untouched = start.clone()
    assert swaps(w, gram, start, parse_pattern("0.5"), n_iter=1)[1:] == (1, "max_iter")
    zero = swaps(w, gram, start, parse_pattern("0.5"), n_iter=0)
    assert torch.equal(zero[0], start)
    assert zero[1:] == (0, "max_iter")
    for keep in (torch.ones_like(start), torch.zeros_like(start)):
        for text in ("0.5", "2:4"):
            result = swaps(w, gram, keep, parse_pattern(text))
            assert torch.equal(result[0], keep)
            assert result[1:] == (0, "converged")
    assert torch.equal(start, untouched)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_swaps_end_and_do_not_harm_whatever_the_inputs(text: str, candidates: int | None, kind: str) -> None:
    w, gram = weights(6, 6, 16), gram_of(INPUT_KINDS[kind](activations(6, 16, 64)))
    pattern = parse_pattern(text)
    start = keep_mask(w.abs(), pattern)
    keep, n_swaps, status = swaps(w, gram, start, pattern, n_iter=2000, candidates=candidates)
    assert status == "converged"
    before, after = kept_error(w, start, gram.matrix), kept_error(w, keep, gram.matrix)
    assert (after <= before + 1e-5 * (w.square() @ gram.matrix.diagonal()).numpy()).all()
    assert torch.equal(keep.sum(dim=1), start.sum(dim=1))
    if text == "2:4":
        assert_exact(keep, text, "")
    assert (n_swaps == 0) == torch.equal(keep, start)
    assert (kind == "all zero") <= (n_swaps == 0)
