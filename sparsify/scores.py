"""Scores: ``(weight, stats) -> score`` [out, in], higher = more worth keeping. Pure functions, float32.

A new mask-only method is one function here, one row in ``SCORES`` and one in ``sparsify.methods``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsify.stats import InputStats


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|W_ij|, float32 [out, in]."""
    return weight.float().abs()


def wanda(weight: torch.Tensor, stats: InputStats) -> torch.Tensor:
    """|W_ij| * ||X_j||_2, float32 [out, in].

    The norm is taken per token (divided by sqrt of the token count), which no comparison inside a layer can see.

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, eq. 1.
    """
    return weight.float().abs() * stats.rms


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """RI_ij = |W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|, float32 [out, in].

    Sums to (columns with mass) + (rows with mass). A row or column without mass contributes 0, where the plain
    formula would be 0/0 and a NaN would be kept as if it were the largest score.

    Reference: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024, the first factor of eq. 3.
    """
    mass = weight.float().abs()
    columns = mass.sum(dim=0, keepdim=True)
    rows = mass.sum(dim=1, keepdim=True)
    # In place from here: a 28k x 8k layer is 0.9 GB, and every temporary counts.
    score = mass / columns.masked_fill(columns == 0, 1)
    return score.add_(mass.div_(rows.masked_fill(rows == 0, 1)))


def ria(weight: torch.Tensor, stats: InputStats, *, exponent: float = 0.5) -> torch.Tensor:
    """RIA_ij = RI_ij * ||X_j||_2 ^ a, float32 [out, in]; ``exponent`` is a, and a = 0 needs no data.

    Reference: as ``relative_importance``, eq. 3.
    """
    return relative_importance(weight).mul_(stats.rms**exponent)


SCORES: dict[str, Callable[[torch.Tensor, InputStats | None, float | None], torch.Tensor]] = {
    "magnitude": lambda weight, stats, exponent: magnitude(weight),
    "wanda": lambda weight, stats, exponent: wanda(weight, _needed(stats)),
    "ria": lambda weight, stats, exponent: ria(weight, _needed(stats), exponent=0.5 if exponent is None else exponent),
}


def _needed(stats: InputStats | None) -> InputStats:
    if stats is None:
        raise ValueError("this score needs calibration statistics")
    return stats
