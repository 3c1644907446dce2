"""What SparseGPT, MRP, exact and conjugate-gradient compensation share: counts, symmetries, odd inputs.

Weights are compared by the error they cause at the output (``gap``), which is what float32 solvers promise; exact zeros
and masks are compared as they are.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import NumericsError, UsageError
from sparsify.masks import keep_mask, satisfies
from sparsify.solvers import sparsegpt as sparsegpt_module
from sparsify.solvers.mrp import mrp
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import Group, NofM, Pattern, Unstructured
from tests.problems import (
    CLOSE,
    DIRECT,
    DIRECT_ON_MASK,
    HALF,
    ROWS,
    Solver,
    SolverOnMask,
    array,
    energy,
    gap,
    gram_of,
    inputs,
    loss,
    naive_right_only,
    naive_sparsegpt,
    optimum,
    problem,
    random,
    random_keep,
    seeds,
)

NONE = Unstructured(Fraction(0))
ALL = Unstructured(Fraction(1))
# Those that choose the mask.
CHOOSERS = ("sparsegpt", "mrp", "mrp-right", "mrp-SM-4")
every_solver = pytest.mark.parametrize("solver", DIRECT.values(), ids=DIRECT)
every_solver_on_mask = pytest.mark.parametrize("solver", DIRECT_ON_MASK.values(), ids=DIRECT_ON_MASK)


# --- masks that are chosen ---------------------------------------------------------------------------------------


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
    solution = DIRECT[name](w, gram, NofM(n, m))
    assert ((solution.weight != 0).reshape(6, -1, m).sum(dim=2) == n).all()
    assert torch.equal(solution.weight != 0, solution.keep)


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_width_that_groups_do_not_divide_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a multiple"):
        DIRECT[name](*problem(0, 2, 10), NofM(2, 4))


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF, ROWS], ids=str)
def test_nan_among_the_weights_is_refused(name: str, pattern: Pattern) -> None:
    """It would outrank every weight and spread to the columns that follow."""
    w, gram = problem(0, 2, 4)
    w[0, 1] = torch.nan
    with pytest.raises(NumericsError, match="check the weights"):
        DIRECT[name](w, gram, pattern)


# --- symmetries --------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("pattern", [NofM(2, 4), HALF, ROWS], ids=str)
def test_rows_are_independent_of_their_order(solver: Solver, pattern: Pattern) -> None:
    w, gram = problem(0, 9, 24)
    perm = torch.from_numpy(np.random.default_rng(0).permutation(9))
    straight, permuted = solver(w, gram, pattern), solver(w[perm], gram, pattern)
    assert torch.equal(permuted.keep, straight.keep[perm])
    np.testing.assert_allclose(array(permuted.weight), array(straight.weight[perm]), rtol=1e-4, atol=1e-5)


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
    solution = DIRECT[name](w, Gram(torch.diag(size), 9, 0.0), pattern)
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
    if solver is not DIRECT_ON_MASK["mrp-right-3"]:
        without = torch.zeros_like(w)
        without[:, rest] = solver(w[:, rest], gram_of(x[:, rest]), keep[:, rest]).weight
        assert gap(solution.weight, without, gram, w) < CLOSE


@pytest.mark.parametrize("pattern", [NofM(1, 4), ROWS], ids=str)
@pytest.mark.parametrize("name", ["sparsegpt", "mrp", "mrp-right"])
def test_a_dead_input_goes_first(name: str, pattern: Pattern) -> None:
    x, w = inputs(0, 40, 12), random(3, 5, 12).float()
    x[:, 5] = 0
    solution = DIRECT[name](w, gram_of(x), pattern)
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


@pytest.mark.parametrize("name", DIRECT_ON_MASK)
@pytest.mark.parametrize("kind", odd_inputs())
def test_odd_inputs_on_a_given_mask(name: str, kind: str) -> None:
    x, w, keep = odd_inputs()[kind], random(3, 5, 16).float(), random_keep(0, 5, 16)
    w[2] = 0
    gram = gram_of(x)
    v = DIRECT_ON_MASK[name](w, gram, keep).weight
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
