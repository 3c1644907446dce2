"""ADMM against the paper's iterations and the optimum on a mask, in float64."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from sparsify.solvers.admm import admm
from sparsify.types import parse_pattern
from tests.problems import assert_exact, each_pattern, error, layer_problem, on_mask, pattern_of


@each_pattern
def test_admm_is_the_algorithm_of_the_paper(text: str, group: str) -> None:
    w, gram = layer_problem(7)
    solution = admm(w, gram, pattern_of(text, group))
    g = gram.matrix.double()
    scale = g.diagonal().sqrt()
    scaled = g / scale / scale[:, None] + 0.1 * torch.eye(16)
    dense = w.double() * scale
    v, u = dense, torch.zeros_like(dense)
    target = float(Fraction(1, 2) if text in ("2:4", "4:8") else Fraction(3, 4) if text == "1:4" else Fraction(text))
    for t in range(20):
        size = (v + u).abs()
        level = target - target * (1 - (t + 1) / 15) ** 3 if t < 15 else target
        if t < 15:
            if ":" in text:
                n, m = map(int, text.split(":"))
                final = size.reshape(-1, m).argsort(dim=1, descending=True)[:, :n]
                size = size.reshape(-1, m).scatter(1, final, torch.inf).reshape(w.shape)
            groups = size if group == "row" else size.reshape(1, -1)
            gone = groups.argsort(dim=1)[:, : int(level * groups.shape[1] + 1e-9)]
            mask = torch.ones_like(groups).scatter_(1, gone, 0).reshape(w.shape)
        z = (v + u) * mask
        u = u + v - z
        v = torch.linalg.solve(scaled + torch.eye(16), (dense @ scaled + z - u).t()).t()
    assert torch.equal(solution.keep, mask.bool())
    torch.testing.assert_close(solution.weight.double(), (v + u) * mask / scale, rtol=1e-4, atol=1e-4)
    assert solution.n_iter == 20


@pytest.mark.parametrize("n_iter", [1, 2, 9, 14, 15, 16])
@each_pattern
def test_admm_reaches_the_pattern_in_any_number_of_iterations(text: str, group: str, n_iter: int) -> None:
    w, gram = layer_problem(8)
    for n_gradual in (0, 1, 15):
        solution = admm(w, gram, pattern_of(text, group), n_iter=n_iter, n_gradual=n_gradual)
        assert_exact(solution.keep, text, group)
        assert not solution.weight[~solution.keep].any()
        assert solution.n_iter == n_iter


def test_admm_approaches_the_optimum_on_a_given_mask() -> None:
    w, gram = layer_problem(9)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    # The objective that it solves has a tenth of the diagonal added.
    matrix = gram.matrix + 0.1 * gram.matrix.diagonal().diag()
    best = error(w, on_mask(w, matrix, keep), matrix)
    excess = []
    for n_iter in (1, 5, 20, 400):
        solution = admm(w, gram, parse_pattern("0.5"), keep=keep, n_iter=n_iter)
        assert torch.equal(solution.keep, keep)
        assert not solution.weight[~keep].any()
        excess.append(error(w, solution.weight, matrix) / best - 1)
    assert all(-1e-5 < later < earlier for earlier, later in pairwise(excess))
    assert excess[-1] < 1e-4
    torch.testing.assert_close(solution.weight.double(), on_mask(w, matrix, keep), rtol=1e-3, atol=1e-3)
    # A pattern that the mask does not have is not asked.
    assert torch.equal(admm(w, gram, parse_pattern("2:4"), keep=keep).keep, keep)


def test_admm_says_whether_iterates_and_projection_agree() -> None:
    w, gram = layer_problem(9)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    statuses = [admm(w, gram, parse_pattern("0.5"), keep=keep, n_iter=n).status for n in (1, 2, 1000)]
    assert statuses == ["max_iter", "max_iter", "converged"]
    assert admm(torch.zeros_like(w), gram, parse_pattern("0.5")).status == "converged"
