"""Least squares on a given mask: the best weights that the mask allows, from the dense weights.

For row i with kept set K the optimum is V_K = (G_KK)⁻¹ (W G)_K (normal equations). It is exact for the damped G, so it
is never worse on that objective than any other method's weights on the same mask.
"""

from __future__ import annotations

import torch

from sparsify.chunks import chunks
from sparsify.solvers.quadratic import Gram, Solution


def refit(
    weight: torch.Tensor,
    gram: Gram,
    keep: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    n_iter: int = 32,
    tolerance: float = 1e-4,
) -> Solution:
    """Minimise the layer objective over V with support ``keep``, by conjugate gradients on all rows at once.

    The step is projected onto the mask and preconditioned by diag(G); every row has its own step length, and a row
    whose residual has fallen by ``tolerance`` stops. One product with G an iteration; the objective falls in every
    iteration, so it can be ended early.

    Working set: the Gram matrix (and a factor once, where damping is not settled); beside ``weight`` and ``start``, 1
    float32 weight, the result, and 8 chunks of rows.

    Args:
        weight: [out, in], the dense weight W.
        gram: inputs, with damping.
        keep: [out, in] bool.
        start: [out, in], where to begin; ``weight`` on the mask by default.
        n_iter: the most iterations.
        tolerance: on the norm of the preconditioned residual of a row, relative to its first.

    Returns:
        the solution; status ``max_iter`` where a row has not reached ``tolerance``.
    """
    result = torch.empty(weight.shape, device=weight.device)
    done, converged = 0, True
    with gram.loaded() as g:
        for rows in chunks(*weight.shape):
            dense = gram.live(weight[rows])
            begin = dense if start is None else start[rows].float()
            result[rows], n, settled = _refit_rows(dense, g, keep[rows], begin, n_iter, tolerance)
            done, converged = max(done, n), converged and settled
    return Solution(result, keep, done, "converged" if converged else "max_iter")


def _refit_rows(
    dense: torch.Tensor, g: torch.Tensor, keep: torch.Tensor, start: torch.Tensor, n_iter: int, tolerance: float
) -> tuple[torch.Tensor, int, bool]:
    """Weights, iterations, and whether all rows have reached ``tolerance``."""
    solution = start.masked_fill(~keep, 0)
    inverse = keep / g.diagonal()
    residual = ((dense - solution) @ g).mul_(keep)
    z = residual * inverse
    direction = z.clone()
    rho = (residual * z).sum(dim=1, keepdim=True, dtype=torch.float64)
    target = rho * tolerance**2
    done = 0
    while done < n_iter:
        moved = direction @ g
        curvature = (direction * moved).sum(dim=1, keepdim=True, dtype=torch.float64)
        step = torch.where((rho > target) & (curvature > 0), rho / curvature.clamp_min(1e-300), 0.0)
        if not bool(step.any()):
            break
        done += 1
        step = step.float()
        solution.addcmul_(direction, step)
        residual.addcmul_(moved.mul_(keep), step, value=-1)
        torch.mul(residual, inverse, out=z)
        new = (residual * z).sum(dim=1, keepdim=True, dtype=torch.float64)
        direction.mul_((new / rho.clamp_min(1e-300)).float()).add_(z)
        rho = torch.where(step > 0, new, rho)
    return solution, done, bool((rho <= target).all())
