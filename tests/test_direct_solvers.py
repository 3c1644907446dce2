"""SparseGPT, MRP, exact and conjugate-gradient compensation against float64 references built from the definitions.

Weights are compared by the error they cause at the output (``gap``), which is what float32 solvers promise; exact zeros
and masks are compared as they are.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import NumericsError, UsageError
from sparsify.masks import keep_mask, satisfies
from sparsify.solvers import mrp as mrp_module
from sparsify.solvers import sparsegpt as sparsegpt_module
from sparsify.solvers.exact import exact
from sparsify.solvers.mrp import best_masks, mrp
from sparsify.solvers.quadratic import Gram, Solution, lipschitz, relative_error, retarget, value
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import Group, NofM, Pattern, Unstructured

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Solver = Callable[[torch.Tensor, Gram, Pattern], Solution]
SolverOnMask = Callable[[torch.Tensor, Gram, torch.Tensor], Solution]
# Of a mask, for the weights and inverse that it was chosen from.
Check = Callable[[Array, Array, Mask], None]

HALF = Unstructured(Fraction(1, 2))
ROWS = Unstructured(Fraction(1, 2), "row")
NONE = Unstructured(Fraction(0))
ALL = Unstructured(Fraction(1))

# Everything that turns a weight, a Gram matrix and a pattern into a solution.
SOLVERS: dict[str, Solver] = {
    "sparsegpt": sparsegpt,
    "mrp": mrp,
    "mrp-right": lambda w, g, p: mrp(w, g, p, free="right"),
    "mrp-SM-4": lambda w, g, p: mrp(w, g, p, variant="SM", block=4, free="right"),
    "exact": lambda w, g, p: exact(w, g, by_magnitude(w, p)),
    "refit": lambda w, g, p: refit(w, g, by_magnitude(w, p)),
}
# Those that choose the mask.
CHOOSERS = ("sparsegpt", "mrp", "mrp-right", "mrp-SM-4")
# The same with the mask given; weights are compared with references.
SOLVERS_ON_MASK: dict[str, SolverOnMask] = {
    "sparsegpt": lambda w, g, keep: sparsegpt(w, g, HALF, keep=keep),
    "mrp": lambda w, g, keep: mrp(w, g, HALF, keep=keep),
    "mrp-right-3": lambda w, g, keep: mrp(w, g, HALF, keep=keep, free="right", block=3),
    "exact": exact,
    "refit": lambda w, g, keep: refit(w, g, keep, n_iter=300, tolerance=1e-6),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_solver_on_mask = pytest.mark.parametrize("solver", SOLVERS_ON_MASK.values(), ids=SOLVERS_ON_MASK)
seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 14), st.integers(1, 40))


def by_magnitude(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return keep_mask(weight.abs(), pattern)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, n_tokens: int, n_in: int) -> torch.Tensor:
    """Correlated inputs of unequal size, [n_tokens, n_in] float64."""
    x = random(seed, n_tokens, n_in) + random(seed + 1, n_tokens, 1)
    return x * (0.3 + random(seed + 2, n_in).abs())


def gram_of(x: torch.Tensor, damping: float = 0.01) -> Gram:
    return Gram((x.T @ x).float(), len(x), damping)


def problem(seed: int, n_out: int, n_in: int, n_tokens: int = 60) -> tuple[torch.Tensor, Gram]:
    return random(seed + 3, n_out, n_in).float(), gram_of(inputs(seed, n_tokens, n_in))


def random_keep(seed: int, n_out: int, n_in: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(seed)) < share


def array(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def energy(delta: Array, h: Array) -> float:
    return float(np.trace(delta @ h @ delta.T))


def gap(a: torch.Tensor | Array, b: torch.Tensor | Array, gram: Gram, weight: torch.Tensor) -> float:
    """||(a - b) X|| / ||W X|| with damping, float64."""
    h = array(gram.damped)
    whole = energy(array(gram.live(weight)), h)
    first, second = (array(v) if isinstance(v, torch.Tensor) else v for v in (a, b))
    return float(np.sqrt(energy(first - second, h) / whole)) if whole else float(np.abs(first - second).max())


# float32 rounding at the conditioning that 1 % of damping leaves.
CLOSE = 2e-5


def loss(weight: torch.Tensor, solution: torch.Tensor, gram: Gram) -> float:
    """1/2 tr(d H dᵀ), H damped, float64."""
    return 0.5 * energy(array(solution) - array(gram.live(weight)), array(gram.damped))


def optimum(weight: Array, h: Array, keep: Mask) -> Array:
    """The definition by lstsq: min ||Lᵀ (v − w)|| over v supported on K, with H = L Lᵀ."""
    root = np.linalg.cholesky(h).T
    result = np.zeros_like(weight)
    for row, w, kept in zip(result, weight, keep, strict=True):
        row[kept] = np.linalg.lstsq(root[:, kept], root @ w, rcond=None)[0]
    return result


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


def naive_sparsegpt(weight: Array, h: Array, keep: Mask, width: int, check: Check | None = None) -> Array:
    """Algorithm 1 as prose: one column at a time, the inverse of what is left downdated by elimination.

    ``check`` gets the updated columns of a block of ``width``, the pivots these will meet (a diagonal), and its mask.
    """
    w, n_in = weight.copy(), len(h)
    # inverses[j] = inverse of H[j:, j:]
    inverses = [np.linalg.inv(h)]
    for _ in range(n_in - 1):
        g = inverses[-1]
        inverses.append(g[1:, 1:] - np.outer(g[1:, 0], g[0, 1:]) / g[0, 0])
    for j in range(n_in):
        if check is not None and j % width == 0:
            end = min(j + width, n_in)
            check(w[:, j:end], np.diag([inverses[k][0, 0] for k in range(j, end)]), keep[:, j:end])
        for row, kept in zip(w, keep[:, j], strict=True):
            if not kept:
                row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return w


def naive_right_only(weight: Array, h: Array, keep: Mask, width: int, check: Check | None = None) -> Array:
    """Section 3.2: blocks of ``width`` with the inverse of the trailing matrix; ``check`` gets its corner."""
    w, n_in = weight.copy(), len(h)
    for a in range(0, n_in, width):
        b = min(a + width, n_in)
        g = np.linalg.inv(h[a:, a:])
        if check is not None:
            check(w[:, a:b], g[: b - a, : b - a], keep[:, a:b])
        for row, kept in zip(w, keep[:, a:b], strict=True):
            gone = np.flatnonzero(~kept)
            row[a:] -= np.linalg.solve(g[np.ix_(gone, gone)], row[a:b][gone]) @ g[gone]
            row[a:b][gone] = 0
    return w


def check_lowest(w: Array, g: Array, kept: Mask, n_remove: int) -> None:
    """The mask removes the ``n_remove`` lowest single-weight scores w² / g, up to float32's idea of a tie."""
    assert int((~kept).sum()) == n_remove
    root = np.abs(w) / np.sqrt(np.diag(g))
    if 0 < n_remove < kept.size:
        assert root[~kept].max() <= root[kept].min() + 1e-4 * root.max()


def singles(n: int, m: int) -> Check:
    """N:M by single-weight scores."""

    def check(w: Array, g: Array, keep: Mask) -> None:
        for a in range(0, w.shape[1], m):
            part = slice(a, a + m)
            for row, kept in zip(w[:, part], keep[:, part], strict=True):
                check_lowest(row, g[part, part], kept, m - n)

    return check


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


def shares(pattern: Unstructured, group: str) -> Check:
    """The share of every block that keeps the running total exact."""
    done = 0

    def check(w: Array, g: Array, keep: Mask) -> None:
        nonlocal done
        start, done = done, done + w.shape[1]
        groups = [(w, keep)] if group == "layer" else list(zip(w[:, None], keep[:, None], strict=True))
        for part, kept in groups:
            before, after = (int(pattern.sparsity * len(part) * end) for end in (start, done))
            check_lowest(part, g, kept, after - before)

    return check


def joint_loss(w: Array, inverse: Array, gone: tuple[int, ...]) -> float:
    part = w[list(gone)]
    return 0.5 * float(part @ np.linalg.solve(inverse[np.ix_(gone, gone)], part))


def all_masks(n_in: int, m: int, n: int) -> list[Mask]:
    """Every N:M mask of one row."""
    masks: list[Mask] = [np.ones(0, dtype=bool)]
    for _ in range(n_in // m):
        masks = [np.concatenate([mask, np.isin(range(m), c)]) for mask in masks for c in combinations(range(m), n)]
    return masks


# --- the Gram matrix ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 30), st.sampled_from([1e-3, 0.01, 1.0]), st.booleans())
def test_damping_is_a_share_of_the_mean_diagonal_of_live_inputs(
    seed: int, n_in: int, n_tokens: int, damping: float, dead: bool
) -> None:
    x = inputs(seed, n_tokens, n_in)
    if dead:
        x[:, seed % n_in] = 0
    gram = gram_of(x, damping)
    full = array(x).T @ array(x)
    live = np.diag(full) > 0
    assert np.array_equal(~gram.dead.numpy(), live)
    if live.any():
        np.testing.assert_allclose(
            array(gram.damped), full + damping * np.diag(full)[live].mean() * np.eye(n_in), rtol=1e-5, atol=1e-6
        )


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 14), st.integers(1, 40))
def test_trailing_blocks_of_the_upper_factor_give_trailing_inverses(seed: int, n_in: int, n_tokens: int) -> None:
    gram = gram_of(inputs(seed, n_tokens, n_in))
    h, u = array(gram.damped), array(gram.inverse_upper)
    assert np.array_equal(u, np.triu(u))
    np.testing.assert_allclose(array(gram.inverse), np.linalg.inv(h), rtol=1e-7, atol=1e-9 * np.abs(u).max() ** 2)
    for a in range(n_in):
        inverse = np.linalg.inv(h[a:, a:])
        np.testing.assert_allclose(u[a:, a:].T @ u[a:, a:], inverse, rtol=1e-7, atol=1e-9 * np.abs(inverse).max())


@pytest.mark.parametrize("first", ["inverse", "inverse_upper"])
@pytest.mark.parametrize("off", [0.5, 1.003, 1.05, 2.5, 50.0])
def test_damping_grows_tenfold_until_the_matrix_is_positive_definite(off: float, first: str) -> None:
    """The lowest eigenvalue is 1 − off. What was derived before is derived again."""
    gram = Gram(torch.tensor([[1.0, off], [off, 1.0]]), 9)
    _ = gram.damped, gram.scaled, gram.spectrum
    getattr(gram, first)
    steps = [0.01 * 10**k for k in range(6)]
    assert gram.damping_used == pytest.approx(min(s for s in steps if 1 + s > off))
    expected = np.array([[1.0, off], [off, 1.0]]) + gram.damping_used * np.eye(2)
    np.testing.assert_allclose(array(gram.damped), expected, rtol=1e-6)
    np.testing.assert_allclose(array(gram.inverse), np.linalg.inv(expected), rtol=1e-3)
    np.testing.assert_allclose(array(gram.inverse_upper.T @ gram.inverse_upper), array(gram.inverse), rtol=1e-9)
    scaled = expected / expected[0, 0]
    np.testing.assert_allclose(array(gram.scaled[1]), scaled, rtol=1e-6)
    np.testing.assert_allclose(array(gram.spectrum[0]), np.linalg.eigvalsh(scaled), rtol=1e-3)


def test_a_singular_matrix_without_damping_gets_some() -> None:
    gram = Gram(torch.ones(5, 5), 9, 0.0)
    assert bool(torch.isfinite(gram.inverse_upper).all())
    assert 0 < gram.damping_used < 0.01
    assert gram.damping == 0
    assert np.linalg.eigvalsh(array(gram.damped)).min() > 0


def test_hopeless_matrices_are_refused() -> None:
    with pytest.raises(NumericsError, match="singular"):
        _ = Gram(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 9).inverse_upper


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[0, 2] = bad
    with pytest.raises(NumericsError, match="NaN"):
        Gram(matrix, 1)


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-7, 1e-6])
@pytest.mark.parametrize("kind", ["duplicates", "one duplicate", "low rank"])
def test_next_to_no_damping_on_dependent_inputs_gives_weights_or_a_numerics_error(kind: str, damping: float) -> None:
    """Factorising one order may succeed where the other fails; no solver may end in an error of torch's."""
    answered = 0
    for seed in range(12):
        x = random(seed, 5 if kind == "low rank" else 60, 16)
        if kind == "duplicates":
            x[:, 8:] = x[:, :8]
        elif kind == "one duplicate":
            x[:, 5] = x[:, 4]
        weight = random(seed + 1, 4, 16).float()
        for solver in SOLVERS.values():
            for pattern in (NofM(2, 4), ROWS):
                gram = gram_of(x, damping)
                try:
                    solution = solver(weight, gram, pattern)
                except NumericsError as error:
                    assert "damping" in str(error)  # noqa: PT017
                    continue
                answered += 1
                assert satisfies(solution.weight, pattern)
                assert bool(torch.isfinite(solution.weight).all())
    assert answered > 20


@pytest.mark.parametrize("n_in", [1, 5, 40])
def test_scaled_matrix_and_spectrum(n_in: int) -> None:
    gram = gram_of(inputs(0, 60, n_in))
    scale, scaled = gram.scaled
    np.testing.assert_allclose(array(scaled).diagonal(), 1, rtol=1e-6)
    np.testing.assert_allclose(array(scaled * scale * scale[:, None]), array(gram.damped), rtol=1e-5)
    values, vectors = (array(part) for part in gram.spectrum)
    assert (values >= 0).all()
    np.testing.assert_allclose((vectors * values) @ vectors.T, array(scaled), atol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n_in), atol=1e-5)


def test_permuted_is_the_gram_matrix_of_permuted_inputs() -> None:
    x, perm = inputs(0, 30, 9), torch.from_numpy(np.random.default_rng(0).permutation(9))
    permuted, direct = gram_of(x).permuted(perm), gram_of(x[:, perm])
    np.testing.assert_allclose(array(permuted.matrix), array(direct.matrix), rtol=1e-6)
    np.testing.assert_allclose(array(permuted.damped), array(direct.damped), rtol=1e-6)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_what_is_known_of_a_gram_matrix_goes_along_when_inputs_are_permuted(damping: float) -> None:
    perm = torch.from_numpy(np.random.default_rng(3).permutation(12))
    # Singular, so that without damping some has to be found.
    gram = gram_of(inputs(2, 5, 12), damping)
    assert gram.inverse.shape == gram.spectrum[1].shape
    moved, fresh = gram.permuted(perm), Gram(gram.matrix[perm][:, perm], gram.n_tokens, gram.damping_used)
    assert moved.damping_used == gram.damping_used
    assert torch.equal(moved.damped, fresh.damped)
    np.testing.assert_allclose(array(moved.inverse @ fresh.damped.double()), np.eye(12), atol=1e-6)
    values, vectors = moved.spectrum
    np.testing.assert_allclose(array((vectors * values) @ vectors.t()), array(fresh.scaled[1]), atol=1e-5)


@pytest.mark.parametrize("n_in", [1, 2, 17, 64, 256])
@pytest.mark.parametrize("kind", ["white", "tall", "shifted", "low rank", "even spectrum", "damped", "diagonal"])
def test_lipschitz_bounds_the_largest_eigenvalue_closely(kind: str, n_in: int) -> None:
    for seed in range(4):
        x = random(seed, 4 * n_in, n_in)
        if kind == "tall":
            x = random(seed, 20 * n_in, n_in)
        elif kind == "shifted":
            x += 0.3
        elif kind == "low rank":
            x = x[: max(n_in // 4, 1)]
        elif kind == "even spectrum":
            x = torch.linalg.qr(x)[0] * torch.linspace(0.1, 1, n_in, dtype=torch.float64).sqrt()
            x = x @ torch.linalg.qr(random(seed + 1, n_in, n_in))[0]
        matrix = (x.T @ x).float()
        if kind == "damped":
            matrix = gram_of(x).scaled[1]
        elif kind == "diagonal":
            matrix = torch.diag(matrix.diagonal())
        largest = float(np.linalg.eigvalsh(array(matrix)).max())
        assert largest <= lipschitz(matrix) <= 1.1 * largest


def test_lipschitz_of_nothing_is_zero() -> None:
    assert lipschitz(torch.zeros(4, 4)) == 0


@settings(max_examples=30, deadline=None)
@given(seeds, sizes)
def test_value_and_relative_error_are_those_of_the_outputs(seed: int, size: tuple[int, int, int]) -> None:
    n_out, n_in, n_tokens = size
    x, w, v = inputs(seed, n_tokens, n_in), random(seed + 3, n_out, n_in), random(seed + 4, n_out, n_in)
    matrix = gram_of(x).matrix
    error, whole = (float(torch.linalg.matrix_norm(x @ d.T) ** 2) for d in (w - v, w))
    # Relative to all that is summed: a small result of large terms is rounding.
    scale = float(torch.linalg.matrix_norm(x) ** 2 * torch.linalg.matrix_norm(w - v) ** 2)
    assert value((w - v).float(), matrix) == pytest.approx(error / 2, rel=1e-5, abs=1e-6 * scale)
    if whole > 1e-3 * scale:
        assert relative_error(w.float(), v.float(), matrix) == pytest.approx(error / whole, rel=1e-3, abs=1e-3)


def test_relative_error_where_there_is_no_output() -> None:
    w = torch.ones(2, 3)
    assert relative_error(w, torch.zeros_like(w), torch.zeros(3, 3)) == 0
    assert relative_error(torch.zeros_like(w), w, torch.eye(3)) == 0


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_tokens", [5, 50])
def test_retarget_solves_the_stated_problem(share: float, shift_share: float | None, n_tokens: int) -> None:
    """Target and masked optimum, against lstsq on rows for tokens and rows for the damping."""
    n_out, n_in = 3, 8
    for seed in range(5):
        x, w = inputs(seed, n_tokens, n_in), random(seed + 3, n_out, n_in).float()
        dense = x + 0.3 * random(seed + 4, n_tokens, n_in)
        stream, dense_stream = random(seed + 5, n_tokens, n_out), random(seed + 6, n_tokens, n_out)
        gram = gram_of(x)
        shift = None if shift_share is None else ((dense_stream - stream).T @ x).float()
        target = retarget(w, gram, (dense.T @ x).float(), share, shift, shift_share or 0.0)

        wanted = (x + share * (dense - x)) @ w.double().T + (shift_share or 0.0) * (dense_stream - stream)
        root = float(0.01 * (x.T @ x).diagonal().mean()) ** 0.5
        left = torch.cat([x, root * torch.eye(n_in, dtype=torch.float64)])
        right = torch.cat([wanted, root * w.double().T])
        assert gap(target, torch.linalg.lstsq(left, right).solution.T, gram, w) < 1e-4

        keep = random_keep(seed, n_out, n_in)
        best = torch.zeros(n_out, n_in, dtype=torch.float64)
        for row, kept, column in zip(best, keep, right.T, strict=True):
            row[kept] = torch.linalg.lstsq(left[:, kept], column[:, None]).solution[:, 0]
        assert gap(exact(target, gram, keep).weight, best, gram, w) < 1e-4


def test_retarget_without_a_share_or_a_difference_returns_the_weight() -> None:
    x, w = inputs(0, 30, 7), random(3, 4, 7).float()
    gram = gram_of(x)
    assert torch.equal(retarget(w, gram, random(5, 7, 7).float(), 0.0), w)
    assert torch.equal(retarget(w, gram, gram.matrix), w)


def test_retarget_leaves_weights_of_dead_inputs_but_makes_up_for_them() -> None:
    dense, w = inputs(0, 40, 6), random(3, 4, 6).float()
    x = dense.clone()
    x[:, 2] = 0
    target = retarget(w, gram_of(x), (dense.T @ x).float())
    assert torch.equal(target[:, 2], w[:, 2])

    def error(v: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(x @ v.double().T - dense @ w.double().T))

    assert error(target) < 0.9 * error(w)


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
    rivals += [solver(w, gram, keep).weight for solver in SOLVERS_ON_MASK.values()]
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
    gram._damped = gram.matrix
    with pytest.raises(NumericsError, match=r"row 1.*damping"):
        exact(torch.ones(2, 3), gram, torch.tensor([[1, 0, 0], [1, 1, 0]]).bool())


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


# --- SparseGPT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "n_in"),
    [(2, 4, 300), (1, 4, 40), (3, 4, 40), (4, 8, 144), (2, 5, 265), (1, 3, 129), (20, 40, 160), (70, 140, 280)],
)
def test_sparsegpt_n_of_m_is_the_literal_algorithm(n: int, m: int, n_in: int) -> None:
    """Widths beyond a block and a panel, groups that divide neither and groups larger than either."""
    w, gram = problem(m, 5, n_in, 2 * n_in)
    solution = sparsegpt(w, gram, NofM(n, m))
    expected = naive_sparsegpt(array(w), array(gram.damped), solution.keep.numpy(), m, singles(n, m))
    assert torch.equal(solution.weight != 0, solution.keep)
    assert gap(solution.weight, expected, gram, w) < CLOSE


@pytest.mark.parametrize("group", ["layer", "row"])
@pytest.mark.parametrize(("block", "panel", "n_in"), [(128, 16, 300), (8, 3, 29), (5, 5, 13), (4, 16, 16), (1, 1, 6)])
def test_sparsegpt_unstructured_is_the_literal_algorithm(
    block: int, panel: int, n_in: int, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt_module, "BLOCK", block)
    monkeypatch.setattr(sparsegpt_module, "_PANEL", panel)
    pattern = Unstructured(Fraction(6, 10))
    w, gram = problem(n_in, 5, n_in, 2 * n_in)
    solution = sparsegpt(w, gram, pattern, group=group)
    keep = solution.keep.numpy()
    expected = naive_sparsegpt(array(w), array(gram.damped), keep, block, shares(pattern, group))
    assert torch.equal(solution.weight != 0, solution.keep)
    assert gap(solution.weight, expected, gram, w) < CLOSE


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.integers(1, 80), st.floats(0, 1))
def test_sparsegpt_on_a_given_mask_is_the_literal_algorithm(
    seed: int, n_out: int, n_in: int, n_tokens: int, share: float
) -> None:
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep = random_keep(seed, n_out, n_in, share)
    expected = naive_sparsegpt(array(w), array(gram.damped), keep.numpy(), n_in)
    for pattern in (HALF, NofM(2, 4)):
        solution = sparsegpt(w, gram, pattern, keep=keep)
        assert torch.equal(solution.keep, keep)
        assert bool((solution.weight[~keep] == 0).all())
        assert gap(solution.weight, expected, gram, w) < CLOSE


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(0, 100),
    st.sampled_from(["layer", "row"]),
    st.sampled_from([1, 4, 7, 128]),
    st.sampled_from([None, 1, 5]),
)
def test_unstructured_counts_are_exact(
    seed: int, n_out: int, n_in: int, percent: int, group: Group, sparsegpt_block: int, mrp_block: int | None
) -> None:
    """Over the whole linear or every row, whatever the blocks; the pattern's group goes before the method's."""
    w, gram = problem(seed, n_out, n_in)
    pattern = Unstructured(Fraction(percent, 100), group)
    other = "row" if group == "layer" else "layer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsegpt_module, "BLOCK", sparsegpt_block)
        found = [
            sparsegpt(w, gram, pattern, group=other),
            mrp(w, gram, pattern, group=other, block=mrp_block),
            mrp(w, gram, pattern, group=other, block=mrp_block, free="right"),
        ]
    for solution in found:
        zeros = solution.weight == 0
        assert torch.equal(zeros, ~solution.keep)
        if group == "layer":
            assert int(zeros.sum()) == percent * n_out * n_in // 100
        else:
            assert (zeros.sum(dim=1) == percent * n_in // 100).all()


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (2, 5)])
@pytest.mark.parametrize("name", CHOOSERS)
def test_n_of_m_counts_are_exact(name: str, n: int, m: int) -> None:
    w, gram = problem(0, 6, 6 * m)
    solution = SOLVERS[name](w, gram, NofM(n, m))
    assert ((solution.weight != 0).reshape(6, -1, m).sum(dim=2) == n).all()
    assert torch.equal(solution.weight != 0, solution.keep)


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_width_that_groups_do_not_divide_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a multiple"):
        SOLVERS[name](*problem(0, 2, 10), NofM(2, 4))


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF, ROWS], ids=str)
def test_nan_among_the_weights_is_refused(name: str, pattern: Pattern) -> None:
    """It would outrank every weight and spread to the columns that follow."""
    w, gram = problem(0, 2, 4)
    w[0, 1] = torch.nan
    with pytest.raises(NumericsError, match="check the weights"):
        SOLVERS[name](w, gram, pattern)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 10), st.integers(1, 60), st.sampled_from([NofM(2, 4), HALF, ROWS]))
def test_exact_never_loses_to_sparsegpt_on_its_mask(
    seed: int, n_out: int, n_groups: int, n_tokens: int, pattern: Pattern
) -> None:
    w, gram = problem(seed, n_out, 4 * n_groups, n_tokens)
    rival = sparsegpt(w, gram, pattern)
    slack = 1e-6 * loss(w, torch.zeros_like(w), gram)
    assert loss(w, exact(w, gram, rival.keep).weight, gram) <= loss(w, rival.weight, gram) + slack


# --- MRP ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("group", ["layer", "row"])
@pytest.mark.parametrize(("block", "n_in"), [(1, 20), (7, 20), (20, 20), (None, 20), (None, 200)])
def test_right_only_chooses_unstructured_masks_as_defined(block: int | None, n_in: int, group: str) -> None:
    w, gram = problem(0, 4, n_in, 2 * n_in)
    solution = mrp(w, gram, HALF, block=block, free="right", group=group)
    keep = solution.keep.numpy()
    expected = naive_right_only(array(w), array(gram.damped), keep, block or 128, shares(HALF, group))
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
        found = {name: loss(w, solver(w, gram, NofM(2, 4)).weight, gram) for name, solver in SOLVERS.items()}
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


# --- symmetries --------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF, ROWS], ids=str)
def test_rows_are_independent_of_their_order(solver: Solver, pattern: Pattern) -> None:
    w, gram = problem(0, 9, 24)
    perm = torch.from_numpy(np.random.default_rng(0).permutation(9))
    straight, permuted = solver(w, gram, pattern), solver(w[perm], gram, pattern)
    assert torch.equal(permuted.keep, straight.keep[perm])
    np.testing.assert_allclose(array(permuted.weight), array(straight.weight[perm]), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seeds, sizes)
def test_exact_follows_a_permutation_of_inputs(seed: int, size: tuple[int, int, int]) -> None:
    n_out, n_in, n_tokens = size
    w, gram = problem(seed, n_out, n_in, n_tokens)
    keep, perm = random_keep(seed, n_out, n_in), torch.from_numpy(np.random.default_rng(seed).permutation(n_in))
    permuted = exact(w[:, perm], gram.permuted(perm), keep[:, perm]).weight
    assert gap(permuted[:, perm.argsort()], exact(w, gram, keep).weight, gram, w) < CLOSE


@every_solver
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF], ids=str)
@pytest.mark.parametrize("power", [-20, 7])
def test_scaling_weights_scales_the_result_and_scaling_inputs_does_not(
    solver: Solver, pattern: Pattern, power: int
) -> None:
    """By powers of two, so that floating point follows exactly: no threshold anywhere has a unit."""
    w, gram = problem(0, 7, 24)
    plain = solver(w, gram, pattern)
    scaled = solver(w * 2.0**power, gram, pattern)
    assert torch.equal(scaled.keep, plain.keep)
    assert torch.equal(scaled.weight, plain.weight * 2.0**power)
    louder = solver(w, Gram(gram.matrix * 4.0**power, gram.n_tokens), pattern)
    assert torch.equal(louder.keep, plain.keep)
    assert torch.equal(louder.weight, plain.weight)


# --- special inputs and masks ------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF, ROWS], ids=str)
def test_uncorrelated_inputs_need_no_compensation(solver: Solver, pattern: Pattern) -> None:
    w = random(0, 6, 16).float()
    gram = Gram(torch.diag(random(1, 16).square().float() + 0.1), 9, 0.0)
    solution = solver(w, gram, pattern)
    np.testing.assert_allclose(array(solution.weight), array(w * solution.keep), rtol=1e-6)


@pytest.mark.parametrize("pattern", [NofM(2, 4), ROWS], ids=str)
@pytest.mark.parametrize("name", ["sparsegpt", "mrp", "mrp-right"])
def test_uncorrelated_inputs_get_wandas_masks(name: str, pattern: Pattern) -> None:
    w, size = random(0, 6, 16).float(), random(1, 16).square().float() + 0.1
    solution = SOLVERS[name](w, Gram(torch.diag(size), 9, 0.0), pattern)
    assert torch.equal(solution.keep, keep_mask(w.abs() * size.sqrt(), pattern))


@every_solver
@pytest.mark.parametrize("dead", [False, True])
def test_removing_nothing_changes_nothing(solver: Solver, dead: bool) -> None:
    x, w = inputs(0, 30, 12), random(3, 5, 12).float()
    if dead:
        x[:, 4] = 0
    solution = solver(w, gram_of(x), NONE)
    assert bool(solution.keep.all())
    live = torch.arange(12) != (4 if dead else -1)
    assert torch.equal(solution.weight[:, live], w[:, live])
    assert bool((solution.weight[:, ~live] == 0).all())


@every_solver_on_mask
def test_rows_without_a_removal_are_left_as_they_are(solver: SolverOnMask) -> None:
    w, gram = problem(0, 6, 12)
    keep = random_keep(0, 6, 12)
    keep[2] = True
    assert torch.equal(solver(w, gram, keep).weight[2], w[2])


@every_solver
def test_removing_everything_leaves_nothing(solver: Solver) -> None:
    w, gram = problem(0, 5, 12)
    solution = solver(w, gram, ALL)
    assert not bool(solution.keep.any())
    assert torch.equal(solution.weight, torch.zeros(5, 12))
    assert loss(w, solution.weight, gram) == pytest.approx(0.5 * energy(array(w), array(gram.damped)))


@every_solver_on_mask
@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_dead_input_is_as_if_it_were_not_there(solver: SolverOnMask, at: int) -> None:
    x, w, keep = inputs(0, 40, 12), random(3, 5, 12).float(), random_keep(1, 5, 12)
    x[:, at] = 0
    rest = torch.arange(12) != at
    gram = gram_of(x)
    solution = solver(w, gram, keep)
    assert bool((solution.weight[:, at] == 0).all())
    # Blocks of three shift with the removed column, everything else is the same problem.
    if solver is not SOLVERS_ON_MASK["mrp-right-3"]:
        without = torch.zeros_like(w)
        without[:, rest] = solver(w[:, rest], gram_of(x[:, rest]), keep[:, rest]).weight
        assert gap(solution.weight, without, gram, w) < CLOSE


@pytest.mark.parametrize("pattern", [NofM(1, 4), ROWS], ids=str)
@pytest.mark.parametrize("name", ["sparsegpt", "mrp", "mrp-right"])
def test_a_dead_input_goes_first(name: str, pattern: Pattern) -> None:
    x, w = inputs(0, 40, 12), random(3, 5, 12).float()
    x[:, 5] = 0
    solution = SOLVERS[name](w, gram_of(x), pattern)
    assert not bool(solution.keep[:, 5].any())
    assert satisfies(solution.weight, pattern)


def odd_inputs() -> dict[str, torch.Tensor]:
    x = inputs(0, 40, 16)
    doubled, mirrored, dead = x.clone(), x.clone(), x.clone()
    doubled[:, 8:] = doubled[:, :8]
    mirrored[:, 1] = -mirrored[:, 0]
    dead[:, 3] = 0
    loud = x * torch.where(torch.arange(16) == 6, 1e3, 1.0)
    return {
        "dead column": dead,
        "all dead": torch.zeros(40, 16, dtype=torch.float64),
        "one token": x[:1],
        "fewer tokens than inputs": x[:5],
        "duplicates": doubled,
        "opposites": mirrored,
        "all alike": x[:, :1].expand(-1, 16),
        "one loud input": loud,
    }


@every_solver
@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(3, 4), HALF, ROWS], ids=str)
@pytest.mark.parametrize("kind", odd_inputs())
def test_odd_inputs_give_finite_weights_with_exact_counts(solver: Solver, pattern: Pattern, kind: str) -> None:
    x, w = odd_inputs()[kind], random(3, 5, 16).float()
    w[2] = 0
    gram = gram_of(x)
    solution = solver(w, gram, pattern)
    assert gram.damping_used == 0.01
    assert bool(torch.isfinite(solution.weight).all())
    assert bool((solution.weight[~solution.keep] == 0).all())
    assert int((~solution.keep).sum()) == 80 * (pattern.sparsity if isinstance(pattern, NofM) else Fraction(1, 2))
    assert satisfies(solution.weight, pattern)
    assert bool((solution.weight[2] == 0).all())


@pytest.mark.parametrize("name", SOLVERS_ON_MASK)
@pytest.mark.parametrize("kind", odd_inputs())
def test_odd_inputs_on_a_given_mask(name: str, kind: str) -> None:
    x, w, keep = odd_inputs()[kind], random(3, 5, 16).float(), random_keep(0, 5, 16)
    w[2] = 0
    gram = gram_of(x)
    v = SOLVERS_ON_MASK[name](w, gram, keep).weight
    live, h = array(gram.live(w)), array(gram.damped)
    if name == "sparsegpt":
        expected = naive_sparsegpt(live, h, keep.numpy(), 16)
    elif name == "mrp-right-3":
        expected = naive_right_only(live, h, keep.numpy(), 3)
    else:
        expected = optimum(live, h, keep.numpy())
    assert bool((v[~keep] == 0).all())
    assert gap(v, expected, gram, w) < 1e-4


@every_solver_on_mask
def test_a_twin_takes_the_weight_of_a_removed_input(solver: SolverOnMask) -> None:
    """Inputs 2 and 7 are the same; 2 goes, 7 stays and becomes w_2 + w_7, without loss."""
    x, w = inputs(0, 60, 10), random(3, 4, 10).float()
    x[:, 7] = x[:, 2]
    gram, keep = gram_of(x, 1e-6), torch.ones(4, 10, dtype=torch.bool)
    keep[:, 2] = False
    v = solver(w, gram, keep).weight
    expected = w * keep
    expected[:, 7] += w[:, 2]
    np.testing.assert_allclose(array(v), array(expected), atol=2e-3)
    assert relative_error(w, v, gram.matrix) < 1e-5 < relative_error(w, w * keep, gram.matrix)


@every_solver
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (1, 12), (12, 1)])
def test_one_row_and_one_column(solver: Solver, n_out: int, n_in: int) -> None:
    w, gram = problem(0, n_out, n_in)
    solution = solver(w, gram, HALF)
    assert solution.weight.shape == w.shape
    assert int((solution.weight == 0).sum()) == n_out * n_in // 2
    if n_in == 1:
        # Nothing else is there to make up for a removed weight.
        np.testing.assert_allclose(array(solution.weight), array(w * solution.keep), rtol=1e-6)


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_back_in_float32_and_arguments_stay_as_they_were(solver: Solver, dtype: torch.dtype) -> None:
    w, gram = problem(0, 4, 16)
    narrow = w.to(dtype)
    weight_before, matrix_before = narrow.clone(), gram.matrix.clone()
    solution = solver(narrow, gram, NofM(2, 4))
    assert solution.weight.dtype == torch.float32
    assert torch.equal(narrow, weight_before)
    assert torch.equal(gram.matrix, matrix_before)
    assert torch.equal(solution.weight, solver(narrow.float(), gram, NofM(2, 4)).weight)


@every_solver_on_mask
def test_a_given_mask_stays_as_it_was(solver: SolverOnMask) -> None:
    w, gram = problem(0, 4, 16)
    keep = random_keep(0, 4, 16)
    before = keep.clone()
    assert torch.equal(solver(w, gram, keep).keep, before)
    assert torch.equal(keep, before)
