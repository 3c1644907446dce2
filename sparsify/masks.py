"""Score to ``keep``: the patterns, with exact counts and a deterministic order among ties.

Among equal scores the weight with the lower index is removed first, in every pattern. Weights that were once
quantised tie often, so the order is part of the result.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsify.errors import NumericsError, UsageError
from sparsify.types import NofM, Pattern, Unstructured

# Groups up to this size are ranked by comparing all pairs, which beats sorting very short rows.
_FEW = 32


def keep_mask(score: torch.Tensor, pattern: Pattern, *, default_group: str = "layer") -> torch.Tensor:
    """``keep`` [out, in] bool: the weights of highest ``score`` that the pattern allows.

    Solves: maximise the sum of kept scores subject to the pattern. Exact, since groups are independent.

    Args:
        score: [out, in] float, higher = more worth keeping.
        pattern: what to keep.
        default_group: comparison group where the pattern leaves it open.

    Raises:
        NumericsError: a NaN in the score.
        UsageError: M does not divide the width.
    """
    if torch.isnan(score).any():
        raise NumericsError("the score holds NaN; check the weights and the calibration activations")
    if isinstance(pattern, NofM):
        return _keep_n_of_m(score, pattern)
    return _keep_unstructured(score, pattern, pattern.group or default_group)


def _keep_n_of_m(score: torch.Tensor, pattern: NofM) -> torch.Tensor:
    n_out, n_in = score.shape
    if n_in % pattern.m:
        raise UsageError(f"pattern {pattern}: a width of {n_in} is not a multiple of {pattern.m}")
    if pattern.m > _FEW:
        # Stable: among equal scores the lower index comes first and is removed first.
        order = score.reshape(n_out, -1, pattern.m).sort(dim=2, stable=True).indices
        keep = torch.ones_like(order, dtype=torch.bool)
        keep.scatter_(2, order[:, :, : pattern.m - pattern.n], False)
        return keep.reshape(n_out, n_in)
    # Lanes first, so that each comparison below runs over contiguous memory instead of short rows of M.
    lanes = score.reshape(n_out, n_in // pattern.m, pattern.m).permute(2, 0, 1).contiguous()
    # wins[j] counts the group members that j outranks; the higher index wins a tie.
    wins = torch.zeros(lanes.shape, dtype=torch.int16, device=score.device)
    for high in range(1, pattern.m):
        for low in range(high):
            high_wins = lanes[high] >= lanes[low]
            wins[high] += high_wins
            wins[low] += ~high_wins
    keep = wins >= pattern.m - pattern.n
    return keep.permute(1, 2, 0).reshape(n_out, n_in)


def _keep_unstructured(score: torch.Tensor, pattern: Unstructured, group: str) -> torch.Tensor:
    if group not in ("layer", "row"):
        raise UsageError(f"group {group!r} is unknown; choose layer or row")
    groups = score.reshape(1, -1) if group == "layer" else score
    n_remove = int(pattern.sparsity * groups.shape[1])
    if n_remove == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(groups, n_remove)
    below = groups < threshold
    tied = groups == threshold
    n_tied_to_remove = n_remove - below.sum(dim=1, keepdim=True)
    removed = below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= n_tied_to_remove))
    return ~removed.reshape(score.shape)


def _kth_smallest(groups: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest of each row, [rows, 1]."""
    if groups.device.type != "cpu" or groups.dtype not in (torch.float32, torch.float64):
        return groups.kthvalue(k, dim=1, keepdim=True).values
    # The same value in half the time, and iterative solvers ask for it often.
    return torch.from_numpy(np.partition(groups.detach().numpy(), k - 1, axis=1)[:, k - 1 : k])


def satisfies(weight: torch.Tensor, pattern: Pattern) -> bool:
    """True if the zeros of ``weight`` [out, in] fulfil the pattern.

    That is at most N non-zeros in each group of M, or at least the asked number of zeros in the layer or each row.
    """
    zero = weight == 0
    if isinstance(pattern, NofM):
        if weight.shape[1] % pattern.m:
            return False
        zeros_per_group = zero.reshape(weight.shape[0], -1, pattern.m).sum(dim=2)
        return bool((zeros_per_group >= pattern.m - pattern.n).all())
    if pattern.group == "row":
        return bool((zero.sum(dim=1) >= int(pattern.sparsity * weight.shape[1])).all())
    return int(zero.sum()) >= int(pattern.sparsity * weight.numel())
