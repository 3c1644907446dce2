"""ALPS: ADMM with a penalty that rises until the mask stops moving, then least squares on it.

Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024, arXiv 2406.07831, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsify.chunks import chunks
from sparsify.masks import keep_largest
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

    Working set: the Gram matrix and the inverse for the ρ at hand (where not ``Gram.wide``, eigenvectors and another
    12 matrices while they are computed); beside ``weight``, 3 float32 weights (target, B, and what it is rounded
    from), 3 masks and 6 chunks of rows.

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
    # B + U/ρ, of which ``support`` lets D through; U + ρ(B − D) is ρ times the rest, with the ρ of that iteration.
    shifted = gram.live(weight).mul_(scale)
    support = torch.ones_like(shifted, dtype=torch.bool)
    target, iterate = torch.empty_like(shifted), torch.empty_like(shifted)
    for rows in chunks(*shifted.shape):
        target[rows] = shifted[rows] @ scaled
    status = "max_iter"
    inverse: Callable[[torch.Tensor], torch.Tensor] | None = None
    last: torch.Tensor | None = None
    earlier = rho
    t = 0
    for t in range(1, n_iter + 1):
        if inverse is None:
            inverse = gram.resolvent(rho)
        for rows in chunks(*shifted.shape):
            split = shifted[rows] * support[rows]
            dual = torch.sub(shifted[rows], split).mul_(earlier)
            iterate[rows] = inverse(torch.add(target[rows], split, alpha=rho).sub_(dual))
            torch.add(iterate[rows], dual, alpha=1 / rho, out=shifted[rows])
        earlier = rho
        support = keep_largest(shifted, pattern, default_group=group)
        if t % _CHECK_EVERY:
            continue
        # Not sum(), which would make eight bytes of every bool.
        size = int(support.count_nonzero())
        moved = int((support ^ last).count_nonzero()) / 2 if last is not None else float(size)
        share = moved / max(size, 1)
        last = support
        if moved < 1:
            status = "converged"
            break
        rho, inverse = min(rho * next(f for s, f in _RAISE if share > s), _RHO_MAX), None
        if t > n_settled and share < settled:
            status = "converged"
            break
    del target, shifted, inverse
    keep = keep_largest(iterate, pattern, default_group=group)
    result = iterate.div_(scale).masked_fill_(~keep, 0)
    if n_refit:
        result = refit(weight, gram, keep, start=result, n_iter=n_refit).weight
    return Solution(result, keep, t, status)
