"""Dense targets: what a linear should compute from the inputs it sees for its output to be the dense model's."""

from __future__ import annotations

import torch

from sparsify.chunks import chunks
from sparsify.solvers.quadratic import Gram


def retarget(
    weight: torch.Tensor,
    gram: Gram,
    drift: torch.Tensor,
    share: float = 1.0,
    shift: torch.Tensor | None = None,
    shift_share: float = 1.0,
) -> torch.Tensor:
    """The dense weights that bring the dense model's output about from the inputs the pruned model has.

    With X the inputs seen, D those of the dense model, R and E the residual streams that the output is added to in
    either, and A = XᵀX damped,

        T = W + (share · W (D − X)ᵀX + shift_share · (E − R)ᵀX) A⁻¹

    minimises ||X Tᵀ − (X + share (D − X)) Wᵀ − shift_share (E − R)||² plus the damping times ||T − W||². Minimising
    tr((V − T) A (V − T)ᵀ) over V is then the same as minimising the error against that target, up to a constant, so
    every solver of the layer problem gets dense targets by solving for T in the place of W.

    Args:
        weight: [out, in], W.
        gram: of the inputs seen.
        drift: [in, in], (D − X)ᵀX.
        share: how far targets move from the output on the inputs seen (0) to the dense output (1).
        shift: [out, in], (E − R)ᵀX, where the linear writes to the residual stream.
        shift_share: the share of the stream's error so far that this linear should make up for.

    Returns:
        T, [out, in] float32.

    Raises:
        NumericsError: A is singular in spite of damping.
    """
    return retarget_(weight, gram, correction(weight, drift, share, shift, shift_share))


def correction(
    weight: torch.Tensor,
    drift: torch.Tensor,
    share: float = 1.0,
    shift: torch.Tensor | None = None,
    shift_share: float = 1.0,
) -> torch.Tensor:
    """The bracket of ``retarget``, [out, in] float32: all that is needed of ``drift`` and ``shift``."""
    moved = torch.empty(weight.shape, device=weight.device)
    for rows in chunks(*weight.shape):
        part = (weight[rows].float() @ drift).mul_(share)
        if shift is not None:
            part += shift_share * shift[rows]
        moved[rows] = part
    return moved


def retarget_(weight: torch.Tensor, gram: Gram, moved: torch.Tensor) -> torch.Tensor:
    """``retarget`` from its ``correction``, which T overwrites."""
    for rows in chunks(len(weight), 2 * gram.n_in):
        moved[rows] = weight[rows].float() + gram.times_inverse(moved[rows])
    return moved
