"""The optimum for a given mask by one Cholesky factorisation a row: MRP's "all unpruned weights are free".

Zhang et al., "Pruning Foundation Models for High Accuracy without Retraining", Findings of EMNLP 2024,
arXiv 2410.15567, eq. 11 to 13, in the equivalent form of a system of the kept weights.
"""

from __future__ import annotations

import torch

from sparsify.chunks import chunks
from sparsify.errors import SingularError
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.solvers.refit import refit

# Bytes of batched systems held at once.
BUDGET = 1 << 28


def exact(weight: torch.Tensor, gram: Gram, keep: torch.Tensor, *, budget: int = BUDGET) -> Solution:
    """V_K = W_K + (G_KK)⁻¹ G_KP W_P for every row, K its kept inputs and P the others; V_P = 0.

    No other weights on this mask have a lower objective for the damped G. Costs Σ_rows |K|³/3 multiplications.

    Working set: the Gram matrix (and a factor once, where damping is not settled); beside ``weight``, 2 float32
    weights, 5 chunks of rows and four times ``budget``.

    Args:
        weight: [out, in], dense.
        gram: inputs, with damping.
        keep: [out, in] bool; rows may keep different numbers.
        budget: bytes for the batched systems. Where a single row's does not fit, conjugate gradients take over
            (``refit``, run to 1e-7), and the status says so.

    Raises:
        SingularError: a row's system is singular in spite of damping.
    """
    counts = torch.empty(len(keep), dtype=torch.long, device=keep.device)
    for rows in chunks(*keep.shape):
        counts[rows] = keep[rows].sum(dim=1)
    most = int(counts.max()) if keep.numel() else 0
    if most == 0:
        return Solution(torch.zeros(weight.shape, device=weight.device), keep)
    if 8 * most * most > budget:
        solution = refit(weight, gram, keep, n_iter=500, tolerance=1e-7)
        return Solution(
            solution.weight, keep, solution.n_iter, f"fallback to conjugate gradients for memory: {solution.status}"
        )
    with gram.loaded() as g:
        return Solution(_by_rows(gram.live(weight), g, keep, counts, budget), keep)


def _by_rows(
    dense: torch.Tensor, g: torch.Tensor, keep: torch.Tensor, counts: torch.Tensor, budget: int
) -> torch.Tensor:
    """The optimum, which overwrites ``dense``."""
    # The change is solved for, not the weights: rounding is then relative to the change, and no removal means none.
    target = torch.empty_like(dense)
    for rows in chunks(*dense.shape):
        target[rows] = dense[rows].masked_fill(keep[rows], 0) @ g
    result = dense.masked_fill_(~keep, 0)
    # Systems of a batch are filled up to the largest: rows that keep as many go together.
    order, start = counts.argsort(descending=True), 0
    # Where rows keep next to nothing, sorting their columns takes the most.
    n_rows = next(chunks(*keep.shape)).stop
    while start < len(order) and (most := int(counts[order[start]])):
        part = order[start : start + max(min(budget // (8 * most * most), n_rows), 1)]
        start += len(part)
        index, valid = _kept(keep[part], most)
        right = target[part].gather(1, index).mul_(valid).unsqueeze(2)
        system = _system(g, index, valid)
        factor, info = torch.linalg.cholesky_ex(system)
        if bool(info.any()):
            factor, info = torch.linalg.cholesky_ex(_system(g, index, valid).double())
            if bool(info.any()):
                row = int(part[info.nonzero()[0]])
                raise SingularError(f"the system of the kept weights of row {row} is singular at this damping")
        solved = torch.cholesky_solve(right.to(factor.dtype), factor).squeeze(2).float()
        result[part] = result[part].scatter_add_(1, index, solved.mul_(valid))
    return result


def _kept(keep: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept columns of each row, [rows, most], and which of these are real; shorter rows are filled up."""
    # Kept columns first, in order; sorting booleans stably does that.
    index = (~keep).byte().argsort(dim=1, stable=True)[:, :most]
    return index, keep.gather(1, index)


def _system(gram: torch.Tensor, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """G_KK of each row, [rows, most, most], with identity where a row has fewer kept weights."""
    system = gram[index.unsqueeze(2), index.unsqueeze(1)]
    system *= valid.unsqueeze(1)
    system *= valid.unsqueeze(2)
    system.diagonal(dim1=1, dim2=2).add_(~valid)
    return system
