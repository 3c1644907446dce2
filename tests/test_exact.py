"""The optimum for a mask, solved exactly and by conjugate gradients, against its definition in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import SingularError
from sparsify.solvers.exact import exact
from sparsify.solvers.quadratic import Gram, value
from sparsify.solvers.refit import refit
from tests.problems import (
    CLOSE,
    DIRECT_ON_MASK,
    Array,
    Mask,
    array,
    gap,
    gram_of,
    inputs,
    loss,
    optimum,
    problem,
    random,
    random_keep,
    seeds,
    sizes,
)


def inverse_form(weight: Array, h: Array, keep: Mask) -> tuple[Array, float]:
    """Equations 11 and 12 of MRP: weights and their loss."""
    inverse = np.linalg.inv(h)
    result, total = weight.copy(), 0.0
    for row, kept in zip(result, keep, strict=True):
        gone = ~kept
        w = row[gone]
        multipliers = np.linalg.solve(inverse[np.ix_(gone, gone)], w)
        row -= multipliers @ inverse[gone]
        row[gone] = 0
        total += 0.5 * float(w @ multipliers)
    return result, total


# --- the optimum for a mask --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, st.floats(0, 1))
def test_exact_is_the_least_squares_solution_in_every_form(seed: int, size: tuple[int, int, int], share: float) -> None:
    n_out, n_in, n_tokens = size
    x, w = inputs(seed, n_tokens, n_in), random(seed + 3, n_out, n_in).float()
    gram, keep = gram_of(x), random_keep(seed, n_out, n_in, share)
    solution = exact(w, gram, keep)
    v, d, h = array(solution.weight), array(solution.weight) - array(w), array(gram.damped)
    assert solution.status == "exact"
    assert (v[~keep.numpy()] == 0).all()
    by_inverse, by_formula = inverse_form(array(w), h, keep.numpy())
    assert gap(v, optimum(array(w), h, keep.numpy()), gram, w) < CLOSE
    assert gap(v, by_inverse, gram, w) < CLOSE
    # From the inputs themselves: ||dX||² + damping ||d||².
    extra = 0.01 * float((x.T @ x).diagonal().mean())
    by_outputs = 0.5 * (float(np.linalg.norm(array(x) @ d.T) ** 2) + extra * float(np.linalg.norm(d) ** 2))
    whole = loss(w, torch.zeros_like(w), gram)
    for reported in (value(solution.weight - w, gram.damped), loss(w, solution.weight, gram), by_outputs):
        assert reported == pytest.approx(by_formula, rel=1e-4, abs=1e-6 * whole)
    # Stationarity, relative to the size of the terms that cancel.
    assert (np.abs(d @ h)[keep.numpy()] <= 1e-4 * (np.abs(array(w)) @ np.abs(h)).max()).all()


@settings(max_examples=25, deadline=None)
@given(seeds, sizes)
def test_no_feasible_weights_beat_exact(seed: int, size: tuple[int, int, int]) -> None:
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep = random_keep(seed, n_out, n_in)
    least = exact(w, gram, keep).weight
    slack = 1e-6 * loss(w, torch.zeros_like(w), gram)
    rivals = [w * keep, random(seed, n_out, n_in).float() * keep]
    rivals += [least + scale * random(seed, n_out, n_in).float() * keep for scale in (1e-3, 0.1)]
    rivals += [solver(w, gram, keep).weight for solver in DIRECT_ON_MASK.values()]
    for rival in rivals:
        assert bool((rival[~keep] == 0).all())
        assert loss(w, least, gram) <= loss(w, rival, gram) + slack


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 40))
def test_removing_one_weight_is_optimal_brain_surgery(seed: int, n_in: int, n_tokens: int) -> None:
    w, gram = problem(seed, n_in, n_in, n_tokens)
    # Row i loses weight i.
    v = exact(w, gram, ~torch.eye(n_in, dtype=torch.bool)).weight
    g = np.linalg.inv(array(gram.damped))
    expected = array(w) - np.diag(array(w) / g)[:, None] * g
    assert gap(v, expected, gram, w) < CLOSE
    losses = [loss(w[i : i + 1], v[i : i + 1], gram) for i in range(n_in)]
    scale = loss(w, torch.zeros_like(w), gram)
    np.testing.assert_allclose(losses, np.diag(array(w)) ** 2 / (2 * np.diag(g)), rtol=1e-3, atol=1e-6 * scale)


@settings(max_examples=25, deadline=None)
@given(seeds, sizes)
def test_nested_masks_compose_and_their_losses_add(seed: int, size: tuple[int, int, int]) -> None:
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    outer = random_keep(seed, n_out, n_in, 0.7)
    inner = outer & random_keep(seed + 1, n_out, n_in, 0.6)
    first, direct = exact(w, gram, outer).weight, exact(w, gram, inner).weight
    second = exact(first, gram, inner).weight
    assert gap(second, direct, gram, w) < CLOSE
    slack = 1e-5 * loss(w, torch.zeros_like(w), gram)
    total = loss(w, direct, gram)
    assert loss(w, first, gram) + loss(first, second, gram) == pytest.approx(total, abs=slack)
    assert loss(w, first, gram) <= total + slack


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_exact_does_not_depend_on_how_rows_are_batched(rows: int) -> None:
    w, gram = problem(0, 11, 12)
    # Rows that keep nothing, everything, and all counts between.
    keep = torch.arange(12) < torch.arange(11)[:, None] * 12 // 10
    assert {0, 12} <= set(keep.sum(dim=1).tolist())
    solution = exact(w, gram, keep, budget=8 * 12 * 12 * rows)
    assert solution.status == "exact"
    np.testing.assert_allclose(array(solution.weight), array(exact(w, gram, keep).weight), rtol=1e-4, atol=1e-5)


def test_exact_falls_back_to_conjugate_gradients_and_says_so() -> None:
    w, gram = problem(0, 6, 20)
    keep = random_keep(1, 6, 20)
    solution = exact(w, gram, keep, budget=1)
    assert solution.status.startswith("fallback")
    assert "conjugate gradients" in solution.status
    assert "converged" in solution.status
    assert solution.n_iter > 0
    assert torch.equal(solution.weight != 0, keep)
    assert gap(solution.weight, exact(w, gram, keep).weight, gram, w) < CLOSE


def test_exact_solves_with_the_damping_that_a_singular_gram_takes() -> None:
    gram, keep = Gram(torch.ones(3, 3), 5, 0.0), torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    found = exact(torch.ones(2, 3), gram, keep).weight
    assert gram.damping_used > gram.damping
    # All inputs are the same one: only the sum of a row matters, and damping spreads it evenly.
    np.testing.assert_allclose(array(found), np.array([[3, 0, 0], [1.5, 1.5, 0]]), rtol=1e-4)


def test_exact_refuses_a_singular_system() -> None:
    gram = Gram(torch.ones(3, 3), 5, 0.0)
    gram._diagonal = gram.matrix.diagonal().clone()
    with pytest.raises(SingularError, match="row 1 is singular"):
        exact(torch.ones(2, 3), gram, torch.tensor([[1, 0, 0], [1, 1, 0]]).bool())


@settings(max_examples=20, deadline=None)
@given(seeds, sizes)
def test_exact_follows_a_permutation_of_inputs(seed: int, size: tuple[int, int, int]) -> None:
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep, perm = random_keep(seed, n_out, n_in), torch.from_numpy(np.random.default_rng(seed).permutation(n_in))
    permuted = exact(w[:, perm], gram.permuted(perm), keep[:, perm]).weight
    assert gap(permuted[:, perm.argsort()], exact(w, gram, keep).weight, gram, w) < CLOSE


# --- conjugate gradients -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, sizes, st.floats(0, 1), st.booleans())
def test_refit_reaches_the_optimum(seed: int, size: tuple[int, int, int], share: float, warm: bool) -> None:
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep = random_keep(seed, n_out, n_in, share)
    start = random(seed + 9, n_out, n_in).float() if warm else None
    solution = refit(w, gram, keep, start=start, n_iter=200, tolerance=1e-6)
    assert solution.status == "converged"
    assert bool((solution.weight[~keep] == 0).all())
    assert gap(solution.weight, optimum(array(w), array(gram.damped), keep.numpy()), gram, w) < 5 * CLOSE


def test_refit_falls_in_every_iteration_and_says_when_it_was_cut_short() -> None:
    w, gram = problem(0, 6, 40)
    keep = random_keep(1, 6, 40)
    whole = refit(w, gram, keep, n_iter=400)
    assert whole.status == "converged"
    assert 3 < whole.n_iter < 400
    losses = []
    for n_iter in range(whole.n_iter + 1):
        solution = refit(w, gram, keep, n_iter=n_iter)
        assert solution.n_iter == n_iter
        assert solution.status == ("converged" if n_iter == whole.n_iter else "max_iter")
        losses.append(loss(w, solution.weight, gram))
    assert losses[0] == pytest.approx(loss(w, w * keep, gram))
    assert all(after < before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[-1] < losses[0] * 0.9


def test_refit_without_anything_to_do_does_no_iteration() -> None:
    w, gram = problem(0, 3, 8)
    solution = refit(w, gram, torch.ones(3, 8, dtype=torch.bool))
    assert (solution.n_iter, solution.status) == (0, "converged")
    assert torch.equal(solution.weight, w)


def test_refit_starts_where_it_is_told() -> None:
    w, gram = problem(0, 4, 16)
    keep = random_keep(1, 4, 16)
    start = random(2, 4, 16).float()
    assert torch.equal(refit(w, gram, keep, start=start, n_iter=0).weight, start * keep)
