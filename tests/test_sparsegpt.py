"""SparseGPT against its algorithm, column by column in float64."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.solvers import sparsegpt as sparsegpt_module
from sparsify.solvers.exact import exact
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import NofM, Pattern, Unstructured
from tests.problems import (
    CLOSE,
    HALF,
    ROWS,
    array,
    gap,
    loss,
    naive_sparsegpt,
    problem,
    random_keep,
    seeds,
    shares,
    singles,
)


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


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 10), st.integers(1, 60), st.sampled_from([NofM(2, 4), HALF, ROWS]))
def test_exact_never_loses_to_sparsegpt_on_its_mask(
    seed: int, n_out: int, n_groups: int, n_tokens: int, pattern: Pattern
) -> None:
    w, gram = problem(seed, n_out, 4 * n_groups, n_tokens)
    rival = sparsegpt(w, gram, pattern)
    slack = 1e-6 * loss(w, torch.zeros_like(w), gram)
    assert loss(w, exact(w, gram, rival.keep).weight, gram) <= loss(w, rival.weight, gram) + slack
