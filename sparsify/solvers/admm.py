"""ADMM on the layer problem with a gradually growing sparsity.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch

from sparsify.chunks import chunks
from sparsify.errors import NumericsError
from sparsify.masks import keep_by, keep_largest
from sparsify.offload import zeros
from sparsify.solvers.factor import factorise_, invert_, times_inverse_
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.types import NofM, Pattern, Unstructured

# Added to the unit diagonal of the scaled Gram matrix; the paper's value, and its penalty parameter.
_REGULARISER = 0.1
_RHO = 1.0
# Energy of an input, relative to the mean over inputs, below which it is measured in units of the others.
_FAINT = 1e-4


def admm(
    weight: torch.Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    n_iter: int = 20,
    n_gradual: int = 15,
    keep: torch.Tensor | None = None,
    group: str = "layer",
) -> Solution:
    """Alternate between the exact solution of the penalised problem and the projection on the mask.

    Inputs are scaled to unit norm first, so that the size of a weight is its Wanda score. In the first ``n_gradual``
    iterations the mask is chosen anew at sparsity s·(1 − (1 − (t + 1)/n)³); after them it is fixed.
    For N:M the schedule first decides over the whole linear among the weights that N:M may remove (all but the best N
    of each group), so it ends at N:M exactly.

    Working set: the Gram matrix and its inverse, float32 (5 more such while it is inverted, unless ``Gram.wide``);
    beside ``weight``, 2 float32 weights (target, and the sum of iterate and dual), 3 masks and 6 chunks of rows.

    Args:
        weight: [out, in].
        gram: inputs; its damping is not used, the paper's regulariser, 0.1 of the scaled diagonal, is.
        pattern: what to keep.
        n_iter: iterations in all, at least 1.
        n_gradual: those in which the mask still grows, no more than ``n_iter``.
        keep: a given mask; only the weights are solved for.
        group: comparison group where the pattern leaves it open.

    Returns:
        the solution; ``converged`` where the iterate and its projection agree to 1e-3, else ``max_iter``, which is
        usual: the number of iterations is the method's own rule.
    """
    scale = _units(gram)
    # Of iterate B and dual U only the sum is kept: what the mask lets through of it is the projection, the rest is the
    # next U. It begins as the dense weights.
    total = gram.live(weight).mul_(scale)
    target = torch.empty_like(total)
    inverse = _inverse(gram, scale, total, target)
    mask = torch.ones_like(total, dtype=torch.bool) if keep is None else keep
    # A schedule that outlasts the iterations would end short of the pattern.
    n_gradual = max(min(n_gradual, n_iter), 1)
    size = gap = 0.0
    for t in range(n_iter):
        if keep is None and t < n_gradual:
            mask = _gradual(total, pattern, group, t + 1, n_gradual)
        size = gap = 0.0
        for rows in chunks(*total.shape):
            projected = total[rows] * mask[rows]
            dual = total[rows] - projected
            iterate = inverse(target[rows] + _RHO * (projected - dual))
            torch.add(iterate, dual, out=total[rows])
            if t == n_iter - 1:
                size += float(torch.linalg.vector_norm(iterate, dtype=torch.float64)) ** 2
                gap += float(torch.linalg.vector_norm(iterate.sub_(projected), dtype=torch.float64)) ** 2
    close = gap < 1e-6 * size or size == 0
    for rows in chunks(*total.shape):
        total[rows].mul_(mask[rows]).div_(scale)
    return Solution(total, mask, n_iter, "converged" if close else "max_iter")


def _inverse(
    gram: Gram, scale: torch.Tensor, dense: torch.Tensor, target: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Product with the inverse of the penalised system; ``target`` receives ``dense`` times the regularised matrix."""
    # What else was derived can be had again, at a third of the cost of this.
    gram.release()
    regularised = torch.div(gram.matrix, scale, out=zeros(gram.n_in, gram.n_in, gram.matrix.device))
    regularised.div_(scale[:, None]).diagonal().add_(_REGULARISER)
    for rows in chunks(*dense.shape):
        target[rows] = dense[rows] @ regularised
    if gram.wide:
        regularised.diagonal().add_(_RHO)
        # Its eigenvalues lie between 1.1 and the width.
        if not factorise_(regularised):
            raise NumericsError("the Gram matrix of the inputs is far from positive semidefinite")
        invert_(regularised)
        return lambda rows: times_inverse_(rows, regularised)
    regularised = regularised.double()
    regularised.diagonal().add_(_RHO)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised)).float()
    return lambda rows: rows @ inverse


def _units(gram: Gram) -> torch.Tensor:
    """[in], the norm of each input, and a share of the root mean square of them all for those that are fainter.

    In units of its own the regulariser of an input that is all but silent is next to nothing, and if it echoes a loud
    one it may get a weight without bounds. With this floor no weight grows beyond 160 times those it stands in for.
    """
    energy = gram.matrix.diagonal()
    live = energy[~gram.dead]
    floor = _FAINT * float(live.double().mean()) if len(live) else 1.0
    return energy.clamp_min(floor).sqrt()


def _gradual(total: torch.Tensor, pattern: Pattern, group: str, step: int, n_steps: int) -> torch.Tensor:
    # As exact fractions: the last step must be the pattern itself.
    level = 1 - (1 - Fraction(step, n_steps)) ** 3
    if isinstance(pattern, NofM):
        final = keep_largest(total, pattern)
        if step == n_steps:
            return final

        def score(rows: slice) -> torch.Tensor:
            return total[rows].abs().masked_fill_(final[rows], torch.inf)

        return keep_by(score, total, Unstructured(pattern.sparsity * level, "layer"))
    return keep_largest(total, Unstructured(pattern.sparsity * level, pattern.group), default_group=group)
