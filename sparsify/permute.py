"""Channel permutation: an order of the inputs in which an N:M mask loses less score.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
section 4.2: heuristic channel allocation, then linear sum assignment. ``perm`` is [in];
``permuted[:, k] = original[:, perm[k]]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sparsify.errors import NumericsError, UsageError
from sparsify.types import NofM

_BUDGET = 1 << 27
# Rows summed in float32 before float64 takes over.
_ROWS = 512


@dataclass(frozen=True)
class Permutation:
    """``perm`` [in] int64, and the score that the N:M mask keeps with it and without (sums, float64)."""

    perm: torch.Tensor
    retained: float
    retained_identity: float
    n_sweeps: int


def search(
    score: torch.Tensor,
    pattern: NofM,
    *,
    n_sweeps: int = 1,
    n_parts: int = 1,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> Permutation:
    """Seek the order of inputs that maximises the score kept by the N:M mask; never worse than the order as it is.

    Args:
        score: [out, in], not negative; rows of every linear that shares the order, stacked.
        pattern: N:M.
        n_sweeps: the most sweeps of assignments, a lane after the other; from the second on, lanes are drawn anew.
        n_parts: solve assignments within this many parts of the groups (the official fast mode): cost falls with its
            square.
        seed: of the lanes drawn.
        tolerance: relative gain of a sweep below which it ends.

    Raises:
        UsageError: M does not divide the width, or ``n_parts`` the number of groups.
        NumericsError: NaN or Inf in the score.
    """
    n_in = score.shape[1]
    if n_in % pattern.m:
        raise UsageError(f"permutation: a width of {n_in} is not a multiple of {pattern.m}")
    n_groups = n_in // pattern.m
    if n_groups % n_parts:
        raise UsageError(f"permutation: {n_parts} parts do not divide {n_groups} groups")
    score = score.float()
    if not bool(torch.isfinite(score).all()):
        raise NumericsError("the score holds NaN or Inf; check the weights and the calibration activations")
    identity = torch.arange(n_in, device=score.device)
    before = best = retained(score, identity, pattern)
    perm = allocate_channels(score, pattern.m)
    first = retained(score, perm, pattern)
    if first > before:
        best = first
    else:
        perm = identity
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for done in range(1, n_sweeps + 1):
        groups = perm.reshape(n_groups, pattern.m)
        if done > 1:
            # Lanes have no meaning of their own: another choice of one channel a group is another neighbourhood.
            order = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(groups.device)
            groups = groups.gather(1, order)
        if n_parts > 1:
            parts = groups.reshape(n_parts, -1, pattern.m)
            groups = torch.cat([_sweep(score, part, pattern) for part in parts])
        else:
            groups = _sweep(score, groups, pattern)
        after = retained(score, groups.reshape(-1), pattern)
        # Rounding in the sums may make a sweep look better than it is.
        if after <= best:
            break
        perm, gain, best = groups.reshape(-1), after - best, after
        if gain < tolerance * best:
            break
    return Permutation(perm, best, before, done)


def allocate_channels(score: torch.Tensor, m: int) -> torch.Tensor:
    """Heuristic channel allocation: every group gets one channel of each stratum of column sums, in snake order.

    Returns perm [in]; equal sums stay in order.
    """
    n_groups = score.shape[1] // m
    strata = score.sum(dim=0, dtype=torch.float64).argsort(stable=True).reshape(m, n_groups)
    strata[1::2] = strata[1::2].flip(1)
    return strata.t().reshape(-1)


def retained(score: torch.Tensor, perm: torch.Tensor, pattern: NofM) -> float:
    """Σ of the N largest scores of every group of every row in the order ``perm``, in float64."""
    total = 0.0
    n_rows = max(_BUDGET // (4 * score.shape[1]), 1)
    for start in range(0, len(score), n_rows):
        part = score[start : start + n_rows, perm]
        groups = part.reshape(len(part), -1, pattern.m).permute(2, 0, 1).contiguous()
        total += float(_top_sum(groups, pattern.n).sum(dtype=torch.float64))
    return total


def _top_sum(lanes: torch.Tensor, n: int) -> torch.Tensor:
    """Sum of the n largest along dimension 0."""
    m = lanes.shape[0]
    if n == m:
        return lanes.sum(dim=0)
    if n > m - n:
        return lanes.sum(dim=0) + _top_sum(-lanes, m - n)
    if (n, m) == (2, 4):
        a, b = torch.maximum(lanes[0], lanes[1]), torch.minimum(lanes[0], lanes[1])
        c, d = torch.maximum(lanes[2], lanes[3]), torch.minimum(lanes[2], lanes[3])
        return torch.maximum(a, c) + torch.maximum(torch.minimum(a, c), torch.maximum(b, d))
    return lanes.topk(n, dim=0).values.sum(dim=0)


def _sweep(score: torch.Tensor, groups: torch.Tensor, pattern: NofM) -> torch.Tensor:
    """One optimal assignment of channels to groups for every lane in turn; ``groups`` [n_groups, m] of channels."""
    groups = groups.clone()
    for lane in range(pattern.m):
        gain = assignment_gain(score, groups, lane, pattern)
        _, chosen = linear_sum_assignment(centred(gain.cpu().numpy()), maximize=True)
        groups[:, lane] = groups[torch.from_numpy(chosen).to(groups.device), lane]
    return groups


def assignment_gain(score: torch.Tensor, groups: torch.Tensor, lane: int, pattern: NofM) -> torch.Tensor:
    """[n_groups, n_groups] float64: score kept in group b with the ``lane`` channel of group s, less that without any.

    Without its lane channel a group keeps the N largest of M − 1; a further x changes that by max(0, x − t), t being
    the N-th largest. That is exact, and nothing has to be sorted for a pair of groups.
    """
    columns = score.t()
    rest = torch.stack([columns[groups[:, k]] for k in range(pattern.m) if k != lane])  # [m - 1, groups, rows]
    threshold = rest.topk(pattern.n, dim=0).values[-1].contiguous()
    candidate = columns[groups[:, lane]].contiguous()
    # max(0, x - t) = (|x - t| + x - t) / 2, and summed over rows the first is an l1 distance, which torch computes
    # without an array of [groups, groups, rows].
    gain = candidate.sum(dim=1, dtype=torch.float64) - threshold.sum(dim=1, dtype=torch.float64)[:, None]
    for start in range(0, score.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        gain += torch.cdist(threshold[:, part], candidate[:, part], p=1.0)
    return gain / 2


def centred(gain: np.ndarray) -> np.ndarray:
    """``gain`` without its row and column means: the same optimum, and a far easier start for the assignment solver."""
    gain = gain - gain.mean(axis=1, keepdims=True)
    gain -= gain.mean(axis=0, keepdims=True)
    return gain


def parts_of(n_groups: int, most: int) -> int:
    """The greatest number of equal parts of ``n_groups``, no more than ``most``."""
    return max(n for n in range(1, min(most, n_groups) + 1) if n_groups % n == 0)


def inverse(perm: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``perm``."""
    result = torch.empty_like(perm)
    result[perm] = torch.arange(len(perm), device=perm.device)
    return result
