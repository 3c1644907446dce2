"""ADMM on the layer problem with a gradually growing sparsity.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938, algorithms 1 and 2.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from sparsify.masks import keep_mask
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
    regularised = gram.matrix / scale / scale[:, None]
    regularised.diagonal().add_(_REGULARISER)
    system = regularised.double()
    system.diagonal().add_(_RHO)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system)).float()
    dense = gram.live(weight).mul_(scale)
    target = dense @ regularised
    iterate, dual = dense.clone(), torch.zeros_like(dense)
    mask = torch.ones_like(dense, dtype=torch.bool) if keep is None else keep
    gap = float("inf")
    # A schedule that outlasts the iterations would end short of the pattern.
    n_gradual = max(min(n_gradual, n_iter), 1)
    for t in range(n_iter):
        shifted = iterate + dual
        if keep is None and t < n_gradual:
            mask = _gradual(shifted.abs(), pattern, group, t + 1, n_gradual)
        projected = shifted * mask
        dual += iterate
        dual -= projected
        iterate = (target + _RHO * (projected - dual)) @ inverse
        if t == n_iter - 1:
            size = float(torch.linalg.vector_norm(iterate))
            gap = float(torch.linalg.vector_norm(iterate - projected)) / size if size > 0 else 0.0
    return Solution((iterate + dual) * mask / scale, mask, n_iter, "converged" if gap < 1e-3 else "max_iter")


def _units(gram: Gram) -> torch.Tensor:
    """[in], the norm of each input, and a share of the root mean square of them all for those that are fainter.

    In units of its own the regulariser of an input that is all but silent is next to nothing, and if it echoes a loud
    one it may get a weight without bounds. With this floor no weight grows beyond 160 times those it stands in for.
    """
    energy = gram.matrix.diagonal()
    live = energy[~gram.dead]
    floor = _FAINT * float(live.double().mean()) if len(live) else 1.0
    return energy.clamp_min(floor).sqrt()


def _gradual(score: torch.Tensor, pattern: Pattern, group: str, step: int, n_steps: int) -> torch.Tensor:
    # As exact fractions: the last step must be the pattern itself.
    level = 1 - (1 - Fraction(step, n_steps)) ** 3
    if isinstance(pattern, NofM):
        final = keep_mask(score, pattern)
        if step == n_steps:
            return final
        return keep_mask(score.masked_fill(final, torch.inf), Unstructured(pattern.sparsity * level, "layer"))
    return keep_mask(score, Unstructured(pattern.sparsity * level, pattern.group), default_group=group)
