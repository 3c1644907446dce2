"""MRP's masks and compensation against their definitions and all masks there are."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import UsageError
from sparsify.masks import keep_mask
from sparsify.solvers import mrp as mrp_module
from sparsify.solvers.exact import exact
from sparsify.solvers.mrp import best_masks, mrp
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import NofM, Pattern
from tests.problems import (
    CLOSE,
    DIRECT,
    HALF,
    Array,
    Check,
    Mask,
    array,
    energy,
    gap,
    loss,
    naive_right_only,
    optimum,
    problem,
    random_keep,
    seeds,
    shares,
    singles,
    sizes,
)


def joint_loss(w: Array, inverse: Array, gone: tuple[int, ...]) -> float:
    part = w[list(gone)]
    return 0.5 * float(part @ np.linalg.solve(inverse[np.ix_(gone, gone)], part))


def joints(n: int, m: int) -> Check:
    """N:M by the loss of removing all M − N together."""

    def check(w: Array, g: Array, keep: Mask) -> None:
        for a in range(0, w.shape[1], m):
            part = slice(a, a + m)
            for row, kept in zip(w[:, part], keep[:, part], strict=True):
                gone = tuple(np.flatnonzero(~kept).tolist())
                assert len(gone) == m - n
                least = min(joint_loss(row, g[part, part], c) for c in combinations(range(m), m - n))
                whole = joint_loss(row, g[part, part], tuple(range(m)))
                assert joint_loss(row, g[part, part], gone) <= least + 1e-4 * whole

    return check


def all_masks(n_in: int, m: int, n: int) -> list[Mask]:
    """Every N:M mask of one row."""
    masks: list[Mask] = [np.ones(0, dtype=bool)]
    for _ in range(n_in // m):
        masks = [np.concatenate([mask, np.isin(range(m), c)]) for mask in masks for c in combinations(range(m), n)]
    return masks


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 14), st.integers(1, 40), st.integers(1, 16), st.floats(0, 1))
def test_right_only_on_a_given_mask_is_the_blockwise_definition(
    seed: int, n_out: int, n_in: int, n_tokens: int, block: int, share: float
) -> None:
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep = random_keep(seed, n_out, n_in, share)
    solution = mrp(w, gram, HALF, free="right", block=block, keep=keep)
    expected = naive_right_only(array(w), array(gram.damped), keep.numpy(), block)
    assert bool((solution.weight[~keep] == 0).all())
    assert gap(solution.weight, expected, gram, w) < CLOSE


@settings(max_examples=20, deadline=None)
@given(seeds, sizes)
def test_right_only_lies_between_sparsegpt_and_exact(seed: int, size: tuple[int, int, int]) -> None:
    """Blocks of one column are SparseGPT, one block of all columns is exact, and so is freeing all weights."""
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep = random_keep(seed, n_out, n_in)
    one = mrp(w, gram, HALF, free="right", block=1, keep=keep).weight
    assert gap(one, sparsegpt(w, gram, HALF, keep=keep).weight, gram, w) < CLOSE
    least = exact(w, gram, keep).weight
    assert gap(mrp(w, gram, HALF, free="right", block=n_in, keep=keep).weight, least, gram, w) < CLOSE
    for variant in ("SM", "MM"):
        assert torch.equal(mrp(w, gram, HALF, variant=variant, keep=keep).weight, least)


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (2, 5)]),
    st.integers(1, 4),
    st.sampled_from([None, 1, 8, 10, 64]),
    st.sampled_from(["SM", "MM"]),
)
def test_right_only_chooses_n_of_m_masks_as_defined(
    seed: int, nm: tuple[int, int], n_groups: int, block: int | None, variant: str
) -> None:
    n, m = nm
    width = m if block is None else max(block // m, 1) * m
    w, gram = problem(seed, 4, n_groups * m)
    solution = mrp(w, gram, NofM(n, m), variant=variant, block=block, free="right")
    check = joints(n, m) if variant == "MM" else singles(n, m)
    expected = naive_right_only(array(w), array(gram.damped), solution.keep.numpy(), width, check)
    assert gap(solution.weight, expected, gram, w) < CLOSE


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(3, 5)])
@pytest.mark.parametrize("block", [None, 60, 300])
def test_right_only_is_the_definition_past_a_panel_of_narrow_blocks(pattern: NofM, block: int | None) -> None:
    m = pattern.m
    w, gram = problem(1, 3, 300 // m * m, 400)
    solution = mrp(w, gram, pattern, variant="MM", block=block, free="right")
    width = m if block is None else block // m * m
    check = joints(pattern.n, m)
    expected = naive_right_only(array(w), array(gram.damped), solution.keep.numpy(), width, check)
    assert gap(solution.weight, expected, gram, w) < CLOSE


@pytest.mark.parametrize("group", ["layer", "row"])
@pytest.mark.parametrize(("block", "n_in"), [(1, 20), (7, 20), (20, 20), (None, 20), (None, 200)])
def test_right_only_chooses_unstructured_masks_as_defined(block: int | None, n_in: int, group: str) -> None:
    w, gram = problem(0, 4, n_in, 2 * n_in)
    solution = mrp(w, gram, HALF, block=block, free="right", group=group)
    keep = solution.keep.numpy()
    expected = naive_right_only(array(w), array(gram.damped), keep, block or 16, shares(HALF, group))
    assert gap(solution.weight, expected, gram, w) < CLOSE


def test_variants_are_made_of_mask_and_compensation() -> None:
    pattern = NofM(2, 4)
    w, gram = problem(0, 8, 32)
    by_variant = {v: mrp(w, gram, pattern, variant=v, free="right") for v in ("SS", "SM", "MS", "MM")}
    dense = sparsegpt(w, gram, pattern)
    assert torch.equal(by_variant["SS"].weight, dense.weight)
    assert torch.equal(by_variant["MS"].keep, by_variant["MM"].keep)
    assert torch.equal(by_variant["MS"].weight, sparsegpt(w, gram, pattern, keep=by_variant["MM"].keep).weight)
    for variant in ("SM", "MM"):
        free = mrp(w, gram, pattern, variant=variant)
        assert torch.equal(free.keep, by_variant[variant].keep)
        assert torch.equal(free.weight, exact(w, gram, free.keep).weight)
    # Not the same thing under four names.
    assert not torch.equal(by_variant["SM"].keep, by_variant["MM"].keep)
    assert not torch.equal(by_variant["MS"].weight, by_variant["MM"].weight)


@pytest.mark.parametrize(
    ("pattern", "variant"), [(NofM(2, 4), "MM"), (NofM(4, 8), "MM"), (NofM(8, 16), "SM"), (HALF, "SM")]
)
def test_auto_enumerates_where_it_can(pattern: Pattern, variant: str) -> None:
    w, gram = problem(0, 8, 32)
    assert torch.equal(mrp(w, gram, pattern).weight, mrp(w, gram, pattern, variant=variant).weight)


def test_an_unknown_freedom_is_refused() -> None:
    w, gram = problem(0, 2, 8)
    with pytest.raises(UsageError, match="free 'left' is unknown"):
        mrp(w, gram, NofM(2, 4), free="left")


@pytest.mark.parametrize(
    ("pattern", "variant", "message"),
    [
        (NofM(2, 4), "XX", "unknown"),
        (HALF, "MM", "N:M only"),
        (HALF, "MS", "N:M only"),
        (NofM(8, 16), "MM", "12870"),
    ],
)
def test_impossible_variants_are_refused(pattern: Pattern, variant: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mrp(*problem(0, 2, 16), pattern, variant=variant)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (2, 5), (1, 2)]), st.integers(1, 40))
def test_enumeration_finds_the_best_mask_of_one_group(seed: int, nm: tuple[int, int], n_tokens: int) -> None:
    """M inputs in all: no mask whatever has a lower loss."""
    n, m = nm
    w, gram = problem(seed, 4, m, n_tokens)
    solution = mrp(w, gram, NofM(n, m), variant="MM")
    masks = all_masks(m, m, n)
    assert len(masks) == comb(m, n)
    for row in range(4):
        one = w[row : row + 1]
        h, dense = array(gram.damped), array(one)
        least = min(0.5 * energy(optimum(dense, h, mask[None]) - dense, h) for mask in masks)
        slack = 1e-5 * loss(one, torch.zeros_like(one), gram)
        assert loss(one, solution.weight[row : row + 1], gram) == pytest.approx(least, abs=slack)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8)]), st.integers(1, 3))
def test_enumeration_is_best_in_every_group(seed: int, nm: tuple[int, int], n_groups: int) -> None:
    n, m = nm
    w, gram = problem(seed, 3, n_groups * m)
    keep = best_masks(w, gram.inverse, NofM(n, m))
    joints(n, m)(array(w), array(gram.inverse), keep.numpy())
    if m - n == 1:
        # One removal a group: the single-weight score decides.
        assert torch.equal(keep, keep_mask(w.square() / gram.inverse.diagonal(), NofM(n, m)))


def test_enumeration_takes_the_first_of_equals() -> None:
    keep = best_masks(torch.tensor([[0.0, 0, 0, 0], [2, 1, 1, 1]]), torch.eye(4), NofM(2, 4))
    assert keep.tolist() == [[False, False, True, True], [True, False, False, True]]


def test_no_method_beats_the_best_of_all_masks_and_mrp_comes_near() -> None:
    """One row, eight inputs, two 2:4 groups: 36 masks."""
    masks = all_masks(8, 4, 2)
    assert len(masks) == 36
    ratios = []
    for seed in range(40):
        w, gram = problem(seed, 1, 8)
        h, dense = array(gram.damped), array(w)
        least = min(0.5 * energy(optimum(dense, h, mask[None]) - dense, h) for mask in masks)
        found = {name: loss(w, solver(w, gram, NofM(2, 4)).weight, gram) for name, solver in DIRECT.items()}
        slack = 1e-6 * loss(w, torch.zeros_like(w), gram)
        assert all(one >= least - slack for one in found.values())
        ratios.append(found["mrp"] / least)
    assert 1 <= np.mean(ratios) < 2


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_mrp_does_not_depend_on_how_rows_are_batched(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem(0, 7, 16)
    whole = mrp(w, gram, NofM(2, 4), block=8, free="right")
    monkeypatch.setattr(mrp_module, "_BUDGET", 4 * 8 * 8 * rows)
    parts = mrp(w, gram, NofM(2, 4), block=8, free="right")
    assert torch.equal(parts.keep, whole.keep)
    np.testing.assert_allclose(array(parts.weight), array(whole.weight), rtol=1e-4, atol=1e-5)
