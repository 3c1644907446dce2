"""Gram matrices: damping, factors and inverses, permutations, bounds and the errors measured with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import NumericsError
from sparsify.grams import Grams
from sparsify.masks import satisfies
from sparsify.solvers.fista import lipschitz
from sparsify.solvers.quadratic import Gram, relative_error, value
from sparsify.solvers.targets import retarget
from sparsify.stats import InputStats, Wanted
from sparsify.sums import Accumulator
from sparsify.types import NofM
from tests.problems import DIRECT, ROWS, array, gram_of, inputs, random, seeds, sizes


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
    refusals: list[str] = []
    answered = 0
    for seed in range(12):
        x = random(seed, 5 if kind == "low rank" else 60, 16)
        if kind == "duplicates":
            x[:, 8:] = x[:, :8]
        elif kind == "one duplicate":
            x[:, 5] = x[:, 4]
        weight = random(seed + 1, 4, 16).float()
        for solver in DIRECT.values():
            for pattern in (NofM(2, 4), ROWS):
                gram = gram_of(x, damping)
                try:
                    solution = solver(weight, gram, pattern)
                except NumericsError as error:
                    refusals.append(str(error))
                    continue
                answered += 1
                assert satisfies(solution.weight, pattern)
                assert bool(torch.isfinite(solution.weight).all())
    assert all("damping" in refusal for refusal in refusals)
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


def test_value_of_more_inputs_than_a_strip_has() -> None:
    x, d = inputs(1, 900, 700), random(2, 5, 700)
    matrix = gram_of(x).matrix
    assert value(d.float(), matrix) == pytest.approx(float(torch.linalg.matrix_norm(x @ d.T) ** 2) / 2, rel=1e-5)
    assert relative_error(d.float(), torch.zeros_like(d).float(), matrix) == pytest.approx(1)


def test_relative_error_where_there_is_no_output() -> None:
    w = torch.ones(2, 3)
    assert relative_error(w, torch.zeros_like(w), torch.zeros(3, 3)) == 0
    assert relative_error(torch.zeros_like(w), w, torch.eye(3)) == 0


def test_grams_are_made_once_per_input_follow_an_order_and_are_let_go() -> None:
    stats = InputStats(torch.ones(12), 60, gram=gram_of(inputs(4, 60, 12)).matrix)
    told: list[str] = []
    grams = Grams(0.01, length=8, tell=lambda text, kind: told.append(text))
    gram = grams.of(stats, "a")
    assert gram is not None
    assert grams.of(stats, "b") is gram
    assert grams.of(None, "c") is None
    assert grams.of(InputStats(torch.ones(12), 60), "d") is None
    assert not told
    assert gram.inverse.shape == (12, 12)
    perm = torch.from_numpy(np.random.default_rng(0).permutation(12))
    matrix, inverse = gram.matrix.clone(), gram.inverse.clone()
    moved = grams.reordered(stats, perm)
    after = grams.of(moved, "a")
    assert after is not None
    assert torch.equal(after.matrix, matrix[perm][:, perm])
    assert torch.equal(after.inverse, inverse[perm][:, perm])
    # In the same storage: a wide matrix is gigabytes.
    assert moved.gram is after.matrix is stats.gram
    grams.forget(moved)
    assert grams.of(moved, "a") is not after
    few = InputStats(torch.ones(12), 20, gram=stats.gram)
    assert grams.of(few, "e") is not None
    assert len(told) == 1
    assert "e: 20 calibration tokens for 12 inputs" in told[0]
    assert "--windows 15" in told[0]
    unseen = grams.of(InputStats(torch.zeros(12), 0, gram=torch.zeros(12, 12)), "f")
    assert unseen is not None
    assert torch.equal(unseen.matrix, torch.eye(12))


@pytest.mark.parametrize("width", [1, 3, 5, 33])
def test_accumulated_sums_are_those_of_all_tokens_however_split(width: int) -> None:
    """Gram matrix and drift against float64, in windows of any length; whole and symmetric in spite of panels."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(60, width, generator=generator, dtype=torch.float64)
    dense = x + 0.1 * torch.randn(60, width, generator=generator, dtype=torch.float64)
    for splits in ([60], [1, 59], [7, 20, 33]):
        sums = Accumulator(width, wanted=Wanted(gram=True, drift=True))
        for part, other in zip(torch.split(x.float(), splits), torch.split(dense.float(), splits), strict=True):
            sums.add(part.unsqueeze(0), other.unsqueeze(0))
        stats = sums.result("x")
        assert stats.gram is not None
        assert stats.drift is not None
        torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(stats.drift.double(), (dense - x).T @ x, rtol=1e-5, atol=1e-4)
        assert torch.equal(stats.gram, stats.gram.T)


def test_drift_keeps_its_digits_beside_a_very_large_activation() -> None:
    """Its share of the output is what counts: Σ d xᵀ − Σ x xᵀ would round it away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 32, generator=generator)
    x[0, 3] = 1e4
    dense = x + 1e-3 * torch.randn(512, 32, generator=generator)
    dense[0, 3] = x[0, 3]
    sums = Accumulator(32, wanted=Wanted(gram=True, drift=True))
    sums.add(x, dense)
    drift = sums.result("x").drift
    expected = (dense.double() - x.double()).T @ x.double()
    assert drift is not None
    assert float((drift - expected).norm() / expected.norm()) < 1e-5


def test_without_drift_targets_are_the_weights_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 8, generator=generator), torch.randn(4, 8, generator=generator)
    sums = Accumulator(8, wanted=Wanted(gram=True, drift=True))
    sums.add(x, x.clone())
    stats = sums.result("x")
    assert stats.gram is not None
    assert stats.drift is not None
    assert torch.equal(retarget(w, Gram(stats.gram, 50, 0.01), stats.drift), w)
