"""Exact 1-swaps of a mask: give one weight of a row up for another while that lowers the layer error.

The move is the one of Zimmer et al., "SparseSwaps", arXiv 2512.10922; the formulas follow from the objective. Weights
keep their dense values; a refit or solver may follow.
"""

from __future__ import annotations

import torch

from sparsify.chunks import chunks
from sparsify.solvers.quadratic import Gram
from sparsify.types import NofM, Pattern

_BUDGET = 1 << 27


def swaps(
    weight: torch.Tensor,
    gram: Gram,
    keep: torch.Tensor,
    pattern: Pattern,
    *,
    n_iter: int = 100,
    candidates: int | None = 64,
) -> tuple[torch.Tensor, int, str]:
    """Swap until no pair helps; returns keep [out, in], the swaps made in the busiest row, and a status.

    With u = removed weights of a row and c = G u, the error is uᵀ G u, and removing kept i while restoring removed j
    changes it by 2 w_i c_i + w_i² G_ii − 2 w_j c_j + w_j² G_jj − 2 w_i w_j G_ij. Every iteration makes the best swap of
    every row at once if it lowers the error. Row counts stay; for N:M a swap stays in its group.

    Working set: the Gram matrix; beside ``weight``, a mask, 12 chunks of rows and the pairs tried, up to 512 MiB.

    Args:
        weight: [out, in], dense.
        gram: inputs; not damped, since no system is solved.
        keep: [out, in] bool, the start.
        pattern: only N:M restricts the pairs.
        n_iter: the most swaps a row.
        candidates: for unstructured patterns, pairs are sought among this many of the cheapest to remove and the best
            to restore; None tries all pairs (a fixed point is then a true local optimum).
    """
    keep, most, status = keep.clone(), 0, "converged"
    for rows in chunks(*weight.shape):
        n, settled = _swap_rows(gram.live(weight[rows]), gram.matrix, keep[rows], pattern, n_iter, candidates)
        most, status = max(most, n), status if settled else "max_iter"
    return keep, most, status


def _swap_rows(
    dense: torch.Tensor,
    matrix: torch.Tensor,
    keep: torch.Tensor,
    pattern: Pattern,
    n_iter: int,
    candidates: int | None,
) -> tuple[int, bool]:
    """Swap in place in ``keep``; returns the swaps made in the busiest row, and whether none is left."""
    diagonal = matrix.diagonal()
    removed = dense.masked_fill(keep, 0)
    error = removed @ matrix
    active = torch.arange(len(dense), device=dense.device)
    for done in range(n_iter):
        w, on, c = dense[active], keep[active], error[active]
        linear, square = 2 * w * c, w.square() * diagonal
        lose = (linear + square).masked_fill(~on, torch.inf)
        gain = (square - linear).masked_fill(on, torch.inf)
        if isinstance(pattern, NofM):
            change, i, j = _best_in_group(w, lose, gain, matrix, pattern.m)
        else:
            change, i, j = _best_pair(w, lose, gain, matrix, candidates)
        # Below rounding, an improvement may be none: without this the same two could swap for ever. The sums that
        # are rounded are of removed weights; a loud input that is kept says nothing about them.
        whole = square.masked_fill(on, 0).sum(dim=1)
        better = change < -1e-6 * whole
        active, i, j = active[better], i[better], j[better]
        if not len(active):
            return done, True
        keep[active, i], keep[active, j] = False, True
        error[active] += dense[active, i, None] * matrix[i] - dense[active, j, None] * matrix[j]
    return n_iter, False


def _best_pair(
    w: torch.Tensor, lose: torch.Tensor, gain: torch.Tensor, matrix: torch.Tensor, candidates: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = w.shape[1] if candidates is None else min(candidates, w.shape[1])
    found = []
    n_rows = max(_BUDGET // (4 * k * k), 1)
    for start in range(0, len(w), n_rows):
        part = slice(start, start + n_rows)
        a, i = lose[part].topk(k, dim=1, largest=False)
        b, j = gain[part].topk(k, dim=1, largest=False)
        cross = matrix[i.unsqueeze(2), j.unsqueeze(1)]
        cross *= (2 * w[part].gather(1, i)).unsqueeze(2) * w[part].gather(1, j).unsqueeze(1)
        pairs = (a.unsqueeze(2) + b.unsqueeze(1) - cross).flatten(1)
        change, at = pairs.min(dim=1)
        row = torch.arange(len(at), device=at.device)
        found.append((change, i[row, at // k], j[row, at % k]))
    change, first, second = (torch.cat(parts) for parts in zip(*found, strict=True))
    return change, first, second


def _best_in_group(
    w: torch.Tensor, lose: torch.Tensor, gain: torch.Tensor, matrix: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (len(w), -1, m)
    n_groups = w.shape[1] // m
    within = matrix.reshape(n_groups, m, n_groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    groups = w.reshape(shape)
    best = torch.full((len(w),), torch.inf, device=w.device)
    first, second = (torch.zeros(len(w), dtype=torch.long, device=w.device) for _ in range(2))
    # Lane by lane: all pairs of all groups at once would be m² copies of the weight.
    for p in range(m):
        for q in range(m):
            if p == q:
                continue
            cross = 2 * groups[:, :, p] * groups[:, :, q] * within[:, p, q]
            change, at = (lose.reshape(shape)[:, :, p] + gain.reshape(shape)[:, :, q] - cross).min(dim=1)
            better = change < best
            best = torch.where(better, change, best)
            first = torch.where(better, at * m + p, first)
            second = torch.where(better, at * m + q, second)
    return best, first, second
