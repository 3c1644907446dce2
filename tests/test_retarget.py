"""Targets that make up for other inputs, against least squares on the tokens."""

import pytest
import torch

from sparsify.solvers.exact import exact
from sparsify.solvers.targets import retarget
from tests.problems import gap, gram_of, inputs, random, random_keep


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
        target = retarget(w, gram, ((dense - x).T @ x).float(), share, shift, shift_share or 0.0)

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
    assert torch.equal(retarget(w, gram, torch.zeros(7, 7)), w)


def test_retarget_leaves_weights_of_dead_inputs_but_makes_up_for_them() -> None:
    dense, w = inputs(0, 40, 6), random(3, 4, 6).float()
    x = dense.clone()
    x[:, 2] = 0
    target = retarget(w, gram_of(x), ((dense - x).T @ x).float())
    assert torch.equal(target[:, 2], w[:, 2])

    def error(v: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(x @ v.double().T - dense @ w.double().T))

    assert error(target) < 0.9 * error(w)
