"""ALPS: ADMM with a penalty that rises until the mask stops moving, then least squares on it.

Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024, arXiv 2406.07831, algorithm 1.
"""

from __future__ import annotations

import torch

from sparsify.masks import keep_mask
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.solvers.refit import refit
from sparsify.types import Pattern

_CHECK_EVERY = 3
# Share of the support that moved since the last check -> factor on the penalty.
_RAISE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_RHO_MAX = 1e6


def alps(
    weight: torch.Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    n_iter: int = 300,
    n_settled: int = 30,
    settled: float = 3e-4,
    n_refit: int = 10,
    rho: float = 0.1,
    group: str = "layer",
) -> Solution:
    """Split V into B (solves the quadratic) and D (has the pattern) and raise the penalty on B ≠ D.

    In scaled variables (unit diagonal of G'): B = (G' + ρI)⁻¹ (G'W − U + ρD), D = the largest of B + U/ρ that the
    pattern allows, U += ρ(B − D).
    Every third iteration ρ grows by 1.3, 1.2 or 1.1 according to how much of the support moved; at the first of these
    all of it counts as moved. The support of B ends as the mask, and conjugate gradients solve for the weights on it.

    Args:
        weight: [out, in].
        gram: inputs, with damping (the paper's is 0.01).
        pattern: what to keep.
        n_iter: the most ADMM iterations.
        n_settled: iterations after which a share of the support below ``settled`` may still move at the end.
        settled: that share.
        n_refit: the most conjugate gradient steps; 0 leaves B on the mask.
        rho: the penalty it begins with, above 0, in units of the scaled diagonal; the paper's is 0.1. From a higher one
            fewer iterations settle the mask, at a slightly higher objective.
        group: comparison group where the pattern leaves it open.

    Raises:
        NumericsError: a NaN in the weights.
    """
    scale, scaled = gram.scaled
    dense = gram.live(weight).mul_(scale)
    target = dense @ scaled
    # One eigendecomposition serves every ρ: (G' + ρI)⁻¹ = Q (Λ + ρ)⁻¹ Qᵀ.
    values, vectors = gram.spectrum
    status = "max_iter"
    split, dual = dense.clone(), torch.zeros_like(dense)
    inverse: torch.Tensor | None = None
    last: torch.Tensor | None = None
    iterate = dense
    t = 0
    for t in range(1, n_iter + 1):
        if inverse is None:
            inverse = (vectors / (values + rho)) @ vectors.t()
        iterate = torch.add(target, split, alpha=rho).sub_(dual) @ inverse
        shifted = torch.add(iterate, dual, alpha=1 / rho)
        support = keep_mask(shifted.abs(), pattern, default_group=group)
        torch.mul(shifted, support, out=split)
        # U + ρ(B − D) is ρ times what the projection removed.
        torch.sub(shifted, split, out=dual).mul_(rho)
        if t % _CHECK_EVERY:
            continue
        moved = int((support ^ last).sum()) / 2 if last is not None else float(support.sum())
        share = moved / max(int(support.sum()), 1)
        last = support
        if moved < 1:
            status = "converged"
            break
        rho, inverse = min(rho * next(f for s, f in _RAISE if share > s), _RHO_MAX), None
        if t > n_settled and share < settled:
            status = "converged"
            break
    keep = keep_mask(iterate.abs(), pattern, default_group=group)
    result = (iterate / scale).masked_fill_(~keep, 0)
    if n_refit:
        result = refit(weight, gram, keep, start=result, n_iter=n_refit).weight
    return Solution(result, keep, t, status)
