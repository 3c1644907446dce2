"""Matrices that are factorised in their own storage, and rows taken a few at a time: the same results as otherwise."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import chunks as chunks_module
from sparsify.errors import NumericsError
from sparsify.layer import prune_layer
from sparsify.masks import keep_mask
from sparsify.methods import METHODS, resolve
from sparsify.solvers import factor as factor_module
from sparsify.solvers import quadratic
from sparsify.solvers.exact import exact
from sparsify.solvers.factor import factorise_, invert_, reorder_, times_inverse_
from sparsify.solvers.quadratic import Gram, distance, removal, value
from sparsify.solvers.swaps import swaps
from sparsify.solvers.targets import correction, retarget
from sparsify.stats import InputStats
from sparsify.types import NofM, parse_pattern
from tests.problems import HALF, ROWS, array, error, gram_of, inputs, layer_problem, random, random_keep, seeds

METHODS_SOLVING = sorted(name for name, method in METHODS.items() if method.solver != "none")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix counts as wide, and panels are narrow."""
    monkeypatch.setattr(quadratic, "WIDE", 0)
    monkeypatch.setattr(factor_module, "PANEL", 5)


def few_rows(monkeypatch: pytest.MonkeyPatch, n_rows: int) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks_module, "_LEAST", n_rows)


def test_chunks_cover_every_row_once_and_depend_on_the_shape_alone() -> None:
    for shape in ((0, 5), (1, 1), (8192, 28672), (28672, 8192), (3, 10**9), (70000, 64)):
        slices = list(chunks_module.chunks(*shape))
        assert sum(part.stop - part.start for part in slices) == shape[0]
        assert [part.start for part in slices] == [0, *(part.stop for part in slices)][: len(slices)]
        sizes = [part.stop - part.start for part in slices]
        assert all(4 * size * shape[1] <= 1 << 26 or size <= 64 for size in sizes)
        assert len(set(sizes[:-1])) <= 1


# --- factors ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 24), st.integers(1, 9), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
def test_factor_and_inverse_take_the_place_of_the_matrix(
    seed: int, n: int, panel: int, n_rows: int, dtype: torch.dtype
) -> None:
    gram = gram_of(inputs(seed, 2 * n, n)).damped.to(dtype)
    full, tolerance = array(gram), 1e-5 if dtype == torch.float32 else 1e-12
    rows = random(seed, 3, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor_module, "PANEL", panel)
        few_rows(patch, n_rows)
        # What lies below the diagonal is not read.
        matrix = gram.triu() + torch.full((n, n), 1e9, dtype=dtype).tril(-1)
        assert factorise_(matrix)
        f = array(matrix.clone())
        assert np.array_equal(f, np.triu(f))
        np.testing.assert_allclose(f @ f.T, full, atol=tolerance * np.abs(full).max())
        invert_(matrix)
        u = array(matrix)
        assert np.array_equal(u, np.triu(u))
        np.testing.assert_allclose(u @ f, np.eye(n), atol=300 * tolerance)
        expected = array(rows) @ u.T @ u
        product = times_inverse_(rows.clone(), matrix)
    np.testing.assert_allclose(array(product), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("at", range(11))
def test_an_indefinite_matrix_is_refused_wherever_it_shows(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_module, "PANEL", 4)
    matrix = gram_of(inputs(0, 30, 11)).damped
    assert factorise_(matrix.clone())
    matrix[at, at] = -1
    assert not factorise_(matrix)


@pytest.mark.parametrize("n_rows", [1, 3, 100])
def test_reordering_in_place_is_indexing(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows(monkeypatch, n_rows)
    matrix, perm = random(0, 17, 17), torch.from_numpy(np.random.default_rng(0).permutation(17))
    expected = matrix[perm][:, perm]
    assert reorder_(matrix, perm) is matrix
    assert torch.equal(matrix, expected)


# --- wide Gram matrices -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wide")
@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 14), st.integers(1, 40))
def test_what_is_derived_of_a_wide_matrix_is_right_in_any_order(seed: int, n_in: int, n_tokens: int) -> None:
    x = inputs(seed, n_tokens, n_in)
    gram = gram_of(x)
    assert gram.wide
    own, h = gram.matrix.clone(), array(gram_of(x).damped)
    inverse, scale = np.linalg.inv(h), np.sqrt(np.diag(h))
    rows = random(seed, 3, n_in).float()

    def upper() -> None:
        u = array(gram.inverse_upper)
        assert np.array_equal(u, np.triu(u))
        assert close(u.T @ u, inverse)
        assert close(array(gram.inverse_diagonal), np.diag(inverse))
        assert close(array(gram.times_inverse(rows)), array(rows) @ inverse)
        assert close(array(gram.inverse), inverse)

    def scaled() -> None:
        s, g = gram.scaled
        assert close(array(s), scale)
        assert close(array(g), h / scale / scale[:, None])

    def resolvent() -> None:
        shifted = np.linalg.inv(h / scale / scale[:, None] + 0.3 * np.eye(n_in))
        assert close(array(gram.resolvent(0.3)(rows.clone())), array(rows) @ shifted)

    def release() -> None:
        gram.release()
        assert gram._only is None

    def loaded() -> None:
        with gram.loaded() as g:
            assert g is gram.matrix
            assert close(array(g), h)
        assert torch.equal(gram.matrix, own)

    def close(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b).max() <= 1e-3 * np.abs(b).max())

    steps: list[Callable[[], None]] = [upper, scaled, resolvent, loaded, release]
    for index in np.random.default_rng(seed).permutation(np.repeat(range(5), 2)):
        steps[index]()
    assert torch.equal(gram.matrix, own)
    # One derived matrix at a time.
    assert not any(kept is not None for kept in (gram._inverse, gram._upper, gram._scaled, gram._spectrum))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("off", [0.5, 1.003, 1.05, 2.5, 50.0])
def test_damping_of_a_wide_matrix_grows_as_that_of_others(off: float) -> None:
    gram = Gram(torch.tensor([[1.0, off], [off, 1.0]]), 9)
    _ = gram.inverse_upper
    assert gram.damping_used == pytest.approx(min(0.01 * 10**k for k in range(6) if 1 + 0.01 * 10**k > off))
    expected = np.array([[1.0, off], [off, 1.0]]) + gram.damping_used * np.eye(2)
    np.testing.assert_allclose(array(gram.damped), expected, rtol=1e-6)
    with pytest.raises(NumericsError, match="singular"):
        _ = Gram(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 9).inverse_upper


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("method", METHODS_SOLVING)
def test_methods_do_as_well_on_wide_matrices(method: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = parse_pattern(text)
    plan = resolve(method, {"permute": "none"}, {}, grouped=isinstance(pattern, NofM))
    for seed in range(3):
        w, usual = layer_problem(seed, 12, 40, 200)
        w_before, matrix = w.clone(), usual.matrix.clone()
        drift = 0.1 * random(seed, 40, 40).float() @ matrix
        stats = InputStats(matrix.diagonal().clone(), 200, gram=matrix, drift=drift)
        plain = prune_layer(w, stats, usual, pattern, plan)
        with monkeypatch.context() as patch:
            patch.setattr(quadratic, "WIDE", 0)
            patch.setattr(factor_module, "PANEL", 16)
            few_rows(patch, 5)
            gram = Gram(matrix.clone(), 200, usual.damping)
            found = prune_layer(w, stats, gram, pattern, plan)
            torch.testing.assert_close(
                retarget(w, gram, drift, 0.5), retarget(w, usual, drift, 0.5), rtol=1e-3, atol=1e-3
            )
        assert gram.wide
        assert not usual.wide
        assert torch.equal(gram.matrix, matrix)
        assert torch.equal(w, w_before)
        assert found.status == plain.status
        assert found.objective == pytest.approx(plain.objective, rel=1e-3)
        # Near ties may fall otherwise.
        assert int(((found.weight != 0) ^ (plain.weight != 0)).sum()) <= 4
        least = error(w, exact(w, usual, found.weight != 0).weight, usual.damped)
        assert error(w, found.weight, usual.damped) >= least * (1 - 1e-4)


# --- a few rows at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [HALF, ROWS, NofM(2, 4), NofM(20, 40)], ids=str)
@pytest.mark.parametrize("n_values", [2, 5, 10**6])
def test_masks_do_not_depend_on_the_chunk(pattern: NofM, n_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties are the rule for few values; which of them go is counted over all chunks."""
    generator = torch.Generator().manual_seed(n_values)
    score = torch.randint(n_values, (37, 40), generator=generator).float()
    whole = keep_mask(score, pattern)
    for n_rows in (1, 2, 7, 36, 37):
        few_rows(monkeypatch, n_rows)
        assert torch.equal(keep_mask(score, pattern), whole)
    score[36, 3] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        keep_mask(score, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_lowest_of_many_chunks_are_removed_whatever_their_sign_and_size(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(30, 40, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-44, 38, (30, 40))
    score[3, :9], score[5, :9], score[7, :9], score[9, :9] = 0.0, -0.0, torch.inf, -torch.inf
    score = score.to(dtype)
    few_rows(monkeypatch, 4)
    for percent in (0, 1, 2, 30, 47, 49, 50, 51, 80, 99):
        pattern = parse_pattern(f"0.{percent:02}")
        keep = keep_mask(score, pattern)
        order = score.flatten().argsort(stable=True)[: 12 * percent]
        assert torch.equal((~keep).flatten().nonzero().flatten(), order.sort().values)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 9))
def test_sums_over_rows_have_the_same_bits_in_any_chunk(seed: int, n_rows: int) -> None:
    """Of whole numbers, whose products are exact: what a BLAS makes of another number of rows is its own affair."""
    generator = torch.Generator().manual_seed(seed)
    w, v, g = (torch.randint(-9, 10, shape, generator=generator).float() for shape in ((11, 8), (11, 8), (8, 8)))
    keep = random_keep(seed, 11, 8)

    def results() -> tuple[float, float, float, list[float]]:
        return value(w, g), distance(w, v, g), removal(w, keep, g), correction(w, g, 1.0, v, 2.0).flatten().tolist()

    with pytest.MonkeyPatch.context() as patch:
        few_rows(patch, n_rows)
        parts = results()
    assert parts == results()
    assert parts[0] == value(w, g) == 0.5 * float(((w.double() @ g.double()) * w).sum())
    assert parts[2] == distance(w, w * keep, g)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_swaps_of_a_row_do_not_depend_on_the_others(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = parse_pattern(text)
    w, gram = layer_problem(3, n_out=11)
    w = (4 * w).round()
    gram = Gram((gram.matrix / 8).round(), 64)
    start = keep_mask(w.abs(), pattern, default_group="row")
    whole = [swaps(w, gram, start, pattern, n_iter=n) for n in (1, 2, 100)]
    for n_rows in (1, 4, 10):
        few_rows(monkeypatch, n_rows)
        parts = [swaps(w, gram, start, pattern, n_iter=n) for n in (1, 2, 100)]
        for (keep, n, status), (other, m, other_status) in zip(whole, parts, strict=True):
            assert torch.equal(keep, other)
            assert (n, status) == (m, other_status)
    assert [status for *_, status in (whole[0], whole[-1])] == ["max_iter", "converged"]
