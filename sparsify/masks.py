"""Score to ``keep``: the patterns, with exact counts and a deterministic order among ties.

Among equal scores the weight with the lower index is removed first, in every pattern. Weights that were once
quantised tie often, so the order is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sparsify.chunks import chunks
from sparsify.errors import NumericsError, UsageError
from sparsify.types import NofM, Pattern, Unstructured

# Groups up to this size are ranked by comparing all pairs, which beats sorting very short rows.
_FEW = 32


def keep_mask(score: torch.Tensor, pattern: Pattern, *, default_group: str = "layer") -> torch.Tensor:
    """``keep`` [out, in] bool: the weights of highest ``score`` that the pattern allows.

    Solves: maximise the sum of kept scores subject to the pattern. Exact, since groups are independent.

    Working set: the mask, 6 chunks of rows, and the scores close to the lowest that is kept.

    Args:
        score: [out, in] float, higher = more worth keeping.
        pattern: what to keep.
        default_group: comparison group where the pattern leaves it open.

    Raises:
        NumericsError: a NaN in the score.
        UsageError: M does not divide the width.
    """
    return keep_by(lambda rows: score[rows], score, pattern, default_group=default_group)


def keep_largest(weight: torch.Tensor, pattern: Pattern, *, default_group: str = "layer") -> torch.Tensor:
    """``keep_mask`` of |``weight``|, which is never there as a whole."""
    return keep_by(lambda rows: weight[rows].abs(), weight, pattern, default_group=default_group)


def keep_by(
    score: Callable[[slice], torch.Tensor], like: torch.Tensor, pattern: Pattern, *, default_group: str = "layer"
) -> torch.Tensor:
    """``keep_mask`` of a score that is computed for a few rows at a time, several times over.

    Args:
        score: rows -> their score [rows, in] float.
        like: [out, in], a tensor of that shape on that device.
        pattern: what to keep.
        default_group: comparison group where the pattern leaves it open.

    Raises:
        NumericsError: a NaN in the score.
        UsageError: M does not divide the width.
    """
    n_out, n_in = like.shape
    group = (pattern.group or default_group) if isinstance(pattern, Unstructured) else "row"
    if group not in ("layer", "row"):
        raise UsageError(f"group {group!r} is unknown; choose layer or row")
    if isinstance(pattern, NofM) and n_in % pattern.m:
        raise UsageError(f"pattern {pattern}: a width of {n_in} is not a multiple of {pattern.m}")
    parts = list(chunks(n_out, n_in))
    keep = torch.empty(n_out, n_in, dtype=torch.bool, device=like.device)
    if group == "layer":
        assert isinstance(pattern, Unstructured)
        return _keep_of_all(score, keep, parts, int(pattern.sparsity * n_out * n_in))
    for rows in parts:
        part = _checked(score(rows))
        keep[rows] = _keep_n_of_m(part, pattern) if isinstance(pattern, NofM) else _keep_of_rows(part, pattern)
    return keep


def _checked(score: torch.Tensor) -> torch.Tensor:
    # The greatest is NaN if anything is.
    if score.numel() and torch.isnan(score.max()):
        raise NumericsError("the score holds NaN; check the weights and the calibration activations")
    return score


def _keep_n_of_m(score: torch.Tensor, pattern: NofM) -> torch.Tensor:
    n_out, n_in = score.shape
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


def _keep_of_rows(score: torch.Tensor, pattern: Unstructured) -> torch.Tensor:
    n_remove = int(pattern.sparsity * score.shape[1])
    if n_remove == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, n_remove)
    below = score < threshold
    tied = score == threshold
    return ~(below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= n_remove - below.sum(dim=1, keepdim=True))))


def _keep_of_all(
    score: Callable[[slice], torch.Tensor], keep: torch.Tensor, parts: list[slice], n_remove: int
) -> torch.Tensor:
    """All rows in one comparison; fills ``keep`` and returns it."""
    if len(parts) == 1:
        whole = _checked(score(parts[0]))
        score, close, left = partial(_itself, whole), [whole.reshape(-1)], n_remove
    else:
        close, left = _close_to(score, parts, n_remove)
    if n_remove == 0:
        return keep.fill_(True)
    threshold = _kth_smallest(torch.cat(close).unsqueeze(0), left)
    left -= sum(int((each < threshold).count_nonzero()) for each in close)
    for rows, each in zip(parts, close, strict=True):
        part = score(rows)
        n_tied = int((each == threshold).count_nonzero())
        if n_tied <= left:
            keep[rows] = part > threshold
        else:
            tied = (part == threshold).reshape(-1)
            removed = tied.logical_and_(tied.cumsum(dim=0, dtype=torch.int32) <= left).reshape(part.shape)
            keep[rows] = removed.logical_or_(part < threshold).logical_not_()
        left -= min(n_tied, left)
    return keep


def _close_to(score: Callable[[slice], torch.Tensor], parts: list[slice], k: int) -> tuple[list[torch.Tensor], int]:
    """Of each part the scores that share the leading bits of the k-th smallest of all, and which of them that is."""
    # Leading bits -> how many scores have them. Scores may be made anew at every call.
    counts = sum(torch.bincount(_leading_bits(_checked(score(rows))), minlength=1 << 16) for rows in parts)
    assert isinstance(counts, torch.Tensor)
    up_to = counts.cumsum(0)
    at = int((up_to < k).sum())
    close = [part[_leading_bits(part) == at] for part in (score(rows).reshape(-1) for rows in parts)]
    return close, k - int(up_to[at] - counts[at])


def _itself(score: torch.Tensor, rows: slice) -> torch.Tensor:
    return score


def _kth_smallest(groups: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest of each row, [rows, 1]."""
    if groups.device.type != "cpu" or groups.dtype not in (torch.float32, torch.float64):
        return groups.kthvalue(k, dim=1, keepdim=True).values
    # The same value in half the time, and iterative solvers ask for it often.
    return torch.from_numpy(np.partition(groups.detach().numpy(), k - 1, axis=1)[:, k - 1 : k])


def _leading_bits(score: torch.Tensor) -> torch.Tensor:
    """The sign, the exponent and 7 more bits of float32 numbers, as whole numbers in the same order."""
    # The sum makes zeros equal whatever their sign.
    bits = (score.detach().float().contiguous() + 0.0).view(torch.int32).reshape(-1)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).bitwise_right_shift_(16).add_(1 << 15)


def satisfies(weight: torch.Tensor, pattern: Pattern) -> bool:
    """True if the zeros of ``weight`` [out, in] fulfil the pattern.

    That is at most N non-zeros in each group of M, or at least the asked number of zeros in the layer or each row.
    """
    if not isinstance(pattern, NofM) and pattern.group != "row":
        return weight.numel() - int(weight.count_nonzero()) >= int(pattern.sparsity * weight.numel())
    width = pattern.m if isinstance(pattern, NofM) else weight.shape[1]
    if weight.shape[1] % width:
        return False
    wanted = int(pattern.sparsity * width)
    parts = (weight[rows] == 0 for rows in chunks(*weight.shape))
    return all(bool((zero.reshape(len(zero), -1, width).sum(dim=2) >= wanted).all()) for zero in parts)
