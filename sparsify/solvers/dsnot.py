"""DSnoT and R²-DSnoT: swap weights of a row so that its mean output error goes to zero; weights stay as they are.

Zhang et al., "Dynamic Sparse No Training", ICLR 2024, arXiv 2310.08915 (DSnoT). Yi and Richtárik, "Symmetric Pruning
for Large Language Models", arXiv 2501.18980, section on training-free fine-tuning (R²-DSnoT): relative importance in
one or both of the criteria and a regulariser. Both are one loop with other settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.chunks import chunks
from sparsify.scores import column_masses, relative_importance
from sparsify.stats import InputStats
from sparsify.types import NofM, Pattern


@dataclass(frozen=True)
class _Criteria:
    """What swaps of some rows go by, each [rows, in] float32.

    Attributes:
        contribution: of each weight to the mean output, in units of a sequence's sum.
        grow: for restoring a weight, where the row's error is positive.
        prune: for removing one, the least first.
        bonus: added to ``grow`` whatever the error's sign; None: nothing.
    """

    contribution: torch.Tensor
    grow: torch.Tensor
    prune: torch.Tensor
    bonus: torch.Tensor | None


def dsnot(
    weight: torch.Tensor,
    stats: InputStats,
    keep: torch.Tensor,
    pattern: Pattern,
    *,
    n_iter: int = 50,
    threshold: float = 0.1,
    exponent: float = 1.0,
    variance_power: float = 1.0,
    reweight: str = "none",
    gamma_grow: float = 0.0,
    gamma_prune: float = 0.0,
    norm: float = 2.0,
    safe: bool = False,
    tokens_per_sequence: int = 1,
) -> tuple[torch.Tensor, int, str]:
    """Swap while a row's mean error exceeds ``threshold``; returns keep, the cycles run, and a status.

    The status is ``converged`` when no row has a swap left to make: its error is small, or no candidate remains.

    e = Σ_removed W_r E[x_r] is the mean of dense minus sparse output of a row. A cycle restores the removed weight that
    moves e towards 0 the most per variance of its input, and removes the kept weight of least importance that moves it
    towards 0 too. A weight is moved once at most. Row counts stay.

    For N:M the weight removed is the least important one of the group, whichever way it moves e (among two kept weights
    there is little choice), and a row is done before the first swap that would turn the sign of e, as in the authors'
    code.

    Args:
        weight: [out, in], dense.
        stats: inputs, with means.
        keep: [out, in] bool, the start.
        pattern: only N:M restricts the pairs.
        n_iter: the most cycles.
        threshold: on |e| in units of a sequence's sum (mean times ``tokens_per_sequence``).
        exponent: of the input norm in the importance of a kept weight: 1 is DSnoT (Wanda), 0.5 R²-DSnoT.
        variance_power: of the variance that divides the criterion for restoring.
        reweight: ``none`` (DSnoT), ``grow``, ``prune`` or ``both``: where relative importance replaces |W|.
        gamma_grow: weight of |W|^norm in the criterion for restoring.
        gamma_prune: weight of |W|^norm in the criterion for removing.
        norm: power in these two.
        safe: only make swaps after which |e| is smaller; |e| then never grows.
        tokens_per_sequence: length of a calibration window.
    """
    columns = column_masses(weight) if reweight != "none" else None
    kept, most, converged = keep.clone(), 0, True
    # Rows know nothing of each other but for the masses of columns.
    for rows in chunks(*weight.shape):
        dense = weight[rows].detach().float()
        contribution = dense * (stats.mean * tokens_per_sequence)
        size = dense.abs()
        importance = size if columns is None else relative_importance(weight[rows], columns)
        grow = dense.sign() * (importance if reweight in ("grow", "both") else size) * stats.mean
        grow /= stats.variance.clamp_min(1e-12) ** variance_power
        prune = (importance if reweight in ("prune", "both") else size) * stats.rms**exponent
        if gamma_prune:
            prune = prune + gamma_prune * size**norm
        criteria = _Criteria(contribution, grow, prune, gamma_grow * size**norm if gamma_grow else None)
        done, ended = _swap(kept[rows], criteria, pattern, n_iter=n_iter, threshold=threshold, safe=safe)
        most, converged = max(most, done), converged and ended
    return kept, most, "converged" if converged else "max_iter"


def _swap(
    keep: torch.Tensor, of: _Criteria, pattern: Pattern, *, n_iter: int, threshold: float, safe: bool
) -> tuple[int, bool]:
    """Swap in the rows of ``keep``, in place; returns the cycles run, and whether no swap is left to make."""
    contribution = of.contribution
    # An unchanging weight is no swap: a zero weight or a dead input would be moved for nothing, and for ever.
    free = contribution != 0
    error = contribution.masked_fill(keep, 0).sum(dim=1, dtype=torch.float64)
    active = (error.abs() > threshold).nonzero().squeeze(1)
    for done in range(n_iter):
        if not len(active):
            return done, True
        on, movable, sign = keep[active], free[active], error[active].sign().float().unsqueeze(1)
        gain = of.grow[active] * sign
        if of.bonus is not None:
            gain += of.bonus[active]
        gain.masked_fill_(on | ~movable, -torch.inf)
        best, i = gain.max(dim=1)
        if isinstance(pattern, NofM):
            of_group = torch.arange(keep.shape[1], device=keep.device) // pattern.m
            candidates = on & movable & (of_group == (i // pattern.m).unsqueeze(1))
        else:
            candidates = on & movable & (contribution[active] * sign < 0)
        least, j = of.prune[active].masked_fill(~candidates, torch.inf).min(dim=1)
        row = active
        after = error[row] - contribution[row, i].double() + contribution[row, j].double()
        found = torch.isfinite(best) & torch.isfinite(least)
        if safe:
            found &= after.abs() < error[row].abs()
        if isinstance(pattern, NofM):
            # Without a partner in its group a candidate is passed over, and the row goes on to its next.
            overshoots = found & (after.sign() != error[row].sign())
            found &= ~overshoots
            free[row[~found], i[~found]] = False
            going_on = torch.isfinite(best) & ~overshoots
        else:
            going_on = found
        row, i, j = row[found], i[found], j[found]
        keep[row, i], keep[row, j] = True, False
        free[row, i] = free[row, j] = False
        error[row] = after[found]
        active = active[going_on]
        active = active[error[active].abs() > threshold]
    return n_iter, not len(active)
