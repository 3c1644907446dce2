"""ALPS against the paper's iterations and the optimum on a mask, in float64."""

import pytest
import torch

from sparsify.solvers.alps import alps
from sparsify.solvers.quadratic import Gram
from sparsify.solvers.refit import refit
from sparsify.types import parse_pattern
from tests.problems import assert_exact, each_pattern, error, layer_problem, on_mask, pattern_of, rounded


@pytest.mark.parametrize("rho", [0.1, 0.3])
@each_pattern
def test_alps_begins_with_the_paper_s_iterations_at_any_penalty(text: str, group: str, rho: float) -> None:
    # Three iterations, up to the first change of the penalty.
    w, gram = layer_problem(7)
    pattern = pattern_of(text, group)
    damped = gram.damped.double()
    scale = damped.diagonal().sqrt()
    a, dense = damped / scale / scale[:, None], w.double() * scale
    d, u, unit = dense, torch.zeros_like(dense), Gram(torch.eye(16), 1)
    for t in range(1, 4):
        b = torch.linalg.solve(a + rho * torch.eye(16), (dense @ a - u + rho * d).t()).t()
        d = rounded(b + u / rho, unit, pattern, False)
        u = u + rho * (b - d)
        solution = alps(w, gram, pattern, n_iter=t, n_refit=0, rho=rho)
        assert torch.equal(solution.keep, rounded(b, unit, pattern, False) != 0)
        torch.testing.assert_close(solution.weight.double(), b / scale * solution.keep, rtol=1e-4, atol=1e-4)
        assert (solution.n_iter, solution.status) == (t, "max_iter")


@each_pattern
def test_the_refit_of_alps_only_helps_and_ends_at_the_optimum_of_its_mask(text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    for seed in range(3):
        w, gram = layer_problem(seed)
        raw, some, full = (alps(w, gram, pattern, n_refit=n) for n in (0, 10, 200))
        assert torch.equal(raw.keep, some.keep)
        assert torch.equal(raw.keep, full.keep)
        before, after, least = (error(w, s.weight, gram.damped) for s in (raw, some, full))
        assert least * (1 - 1e-5) <= after <= before * (1 + 1e-6)
        best = on_mask(w, gram.damped, raw.keep)
        assert least == pytest.approx(error(w, best, gram.damped), rel=1e-4)
        # From the dense weights it is another way to the same place.
        again = refit(w, gram, raw.keep, n_iter=200).weight
        torch.testing.assert_close(full.weight, again, rtol=1e-2, atol=1e-2)


@each_pattern
def test_alps_reports_whether_its_mask_settled(text: str, group: str) -> None:
    w, gram = layer_problem(2)
    pattern = pattern_of(text, group)
    for n_iter in (1, 2, 3, 5):
        short = alps(w, gram, pattern, n_iter=n_iter)
        assert (short.status, short.n_iter) == ("max_iter", n_iter)
        assert_exact(short.keep, text, group)
    settled = alps(w, gram, pattern)
    assert settled.status == "converged"
    assert 5 < settled.n_iter < 300
    # What settled stays: one iteration fewer is cut short, and more change nothing.
    assert alps(w, gram, pattern, n_iter=settled.n_iter - 1).status == "max_iter"
    longer = alps(w, gram, pattern, n_iter=1000)
    assert torch.equal(longer.weight, settled.weight)


def test_alps_may_end_early_where_little_still_moves() -> None:
    w, gram = layer_problem(2, n_out=24, n_in=32, n_tokens=128)
    pattern = parse_pattern("0.6")
    patient = alps(w, gram, pattern, settled=0.0)
    hasty = alps(w, gram, pattern, settled=1.0, n_settled=7)
    assert hasty.n_iter == 9 < patient.n_iter
    assert hasty.status == patient.status == "converged"
