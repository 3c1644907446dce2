"""Scores: ``(weight, stats, plan, seed) -> score`` [out, in], higher = more worth keeping. Pure functions, float32.

A new score is one function here, one row in ``SCORES``, and its name and settings in ``sparsify.methods``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsify.methods import Method
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


def column_masses(weight: torch.Tensor) -> torch.Tensor:
    """sum_i |W_ij|, float32 [1, in]."""
    return weight.abs().sum(dim=0, keepdim=True, dtype=torch.float32)


def relative_importance(weight: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """RI_ij = |W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|, float32 [out, in].

    Sums to (columns with mass) + (rows with mass). A row or column without mass contributes 0, where the plain
    formula would be 0/0 and a NaN would be kept as if it were the largest score. Where ``weight`` is some rows of a
    matrix, ``columns`` are the ``column_masses`` of that; None: its own.

    Reference: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024, the first factor of eq. 3.
    """
    if columns is None:
        columns = column_masses(weight)
    mass = weight.float().abs()
    rows = mass.sum(dim=1, keepdim=True)
    # In place from here: a 28k x 8k layer is 0.9 GB, and every temporary counts.
    score = mass / columns.masked_fill(columns == 0, 1)
    return score.add_(mass.div_(rows.masked_fill(rows == 0, 1)))


def ria(weight: torch.Tensor, stats: InputStats, *, exponent: float = 0.5) -> torch.Tensor:
    """RIA_ij = RI_ij * ||X_j||_2 ^ a, float32 [out, in]; ``exponent`` is a, and a = 0 needs no data.

    Reference: as ``relative_importance``, eq. 3.
    """
    return relative_importance(weight).mul_(stats.rms**exponent)


def stochria(
    weight: torch.Tensor, stats: InputStats, *, share: float = 0.1, exponent: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """RIA with the sums of rows and columns estimated from a random ``share`` of them, float32 [out, in].

    Row masses come from one random set of columns, column masses from one random set of rows, drawn without
    replacement and shared by all rows and columns, so that a tenth of the additions is also a tenth of the work. Sums
    are scaled up by the sizes of the sets, without which the two terms would be weighted by the layer's shape.
    ``share`` = 1 is RIA with that exponent exactly. A row or column whose sample has no mass counts as without mass.

    Reference: Yi and Richtárik, "Symmetric Pruning for Large Language Models", arXiv 2501.18980, stochRIA; the subsets
    are drawn per row and column there.
    """
    n_out, n_in = weight.shape
    tau = max(1, int(share * min(n_out, n_in)))
    if tau == min(n_out, n_in):
        return ria(weight, stats, exponent=exponent)
    generator = torch.Generator().manual_seed(seed)
    some_rows = torch.randperm(n_out, generator=generator)[:tau].to(weight.device)
    some_columns = torch.randperm(n_in, generator=generator)[:tau].to(weight.device)
    columns = weight.index_select(0, some_rows).float().abs().sum(dim=0, keepdim=True).mul_(n_out / tau)
    rows = weight.index_select(1, some_columns).float().abs().sum(dim=1, keepdim=True).mul_(n_in / tau)
    # Three passes over the weight, where RIA takes seven: sums and quotients are of vectors.
    norm = stats.rms**exponent
    return torch.addcmul(_reciprocal(columns) * norm, _reciprocal(rows), norm).mul_(weight).abs_()


def symwanda(
    weight: torch.Tensor,
    stats: InputStats,
    *,
    norms: str = "both",
    output: float = 1.0,
    units: str = "mean",
    p: float = 1.0,
    strategy: int = 1,
    exponent: float = 0.5,
) -> torch.Tensor:
    """The symmetric score: what removing one weight adds to an input-side and an output-side error, float32 [out, in].

    With x_j the norm of input j and y_i that of output i over the calibration tokens, in the paper's units (``raw``) or
    each divided by its ``mean``, so that ``output`` (μ) weighs them against each other whatever their units:

    ========= ==========================================================================================
    norms     score
    ========= ==========================================================================================
    input     |W_ij| x_j: Wanda
    output    |W_ij| y_i
    both      |W_ij| (x_j + μ y_i): the objective with norms
    squared   |W_ij| sqrt(x_j² + μ² y_i²): the objective with squared norms
    weights   |W_ij| sqrt(Σ_i W_ij² + Σ_j W_ij²), X = Y = Wᵀ: needs no text
    lp        with c_j and r_i the l_p norms of columns and rows, times the input norm to the power ``exponent``: S1
              |W_ij| (1/c_j + 1/r_i), S2 (c_j + r_i), S3 1/(c_j + r_i), S4 1/(1/c_j + 1/r_i); p = 1 in S1 is RIA
    ========= ==========================================================================================

    Reference: Yi and Richtárik, arXiv 2501.18980, the symmetric objective, table 1 and the strategies of the appendix.
    """
    size = weight.float().abs()
    if norms == "weights":
        squares = size.square()
        return size * (squares.sum(dim=0, keepdim=True) + squares.sum(dim=1, keepdim=True)).sqrt_()
    if norms == "lp":
        return _lp(size, p, strategy).mul_(stats.rms**exponent)
    x = stats.rms if units == "raw" else _unit_mean(stats.rms)
    if norms == "input":
        return size.mul_(x)
    y = output_norms(weight, stats).unsqueeze(1)
    if units == "mean":
        y = _unit_mean(y)
    if norms == "output":
        return size.mul_(y)
    if norms == "both":
        return size.mul_(x + output * y)
    return size.mul_((x.square() + (output * y).square()).sqrt_())


def output_norms(weight: torch.Tensor, stats: InputStats) -> torch.Tensor:
    """[out] float32: root mean square of each output over the calibration tokens, from the inputs' Gram matrix.

    Ones where nothing but zeros arrived, as for the inputs: zeros would make all scores equal.
    """
    if stats.gram is None:
        raise ValueError("output norms need the Gram matrix")
    if stats.silent:
        return torch.ones(len(weight), device=weight.device)
    energy = (weight.float() @ stats.gram).mul_(weight).sum(dim=1)
    norms: torch.Tensor
    norms = (energy / stats.n_tokens).clamp_min(0).sqrt()
    return norms


def _lp(size: torch.Tensor, p: float, strategy: int) -> torch.Tensor:
    columns, rows = _norms(size, p, 0), _norms(size, p, 1)
    if strategy == 1:
        return size * (_reciprocal(columns) + _reciprocal(rows))
    if strategy == 2:
        return size * (columns + rows)
    if strategy == 3:
        return size * _reciprocal(columns + rows)
    return size * _reciprocal(_reciprocal(columns) + _reciprocal(rows))


def _norms(size: torch.Tensor, p: float, dim: int) -> torch.Tensor:
    # Relative to the greatest: 0.02^30 is less than float32 holds, and 5^60 more.
    unit = size.amax(dim=dim, keepdim=True) if p else torch.ones((), device=size.device)
    unit = unit.masked_fill(unit == 0, 1)
    norms: torch.Tensor = torch.linalg.vector_norm(size / unit, ord=p, dim=dim, keepdim=True)
    return norms.mul_(unit)


def _unit_mean(norms: torch.Tensor) -> torch.Tensor:
    mean = norms.mean()
    return norms / mean if mean > 0 else norms


def _reciprocal(mass: torch.Tensor) -> torch.Tensor:
    """1/mass, and 0 where there is none: a weight there is 0 itself, and 0/0 would outrank every other."""
    return torch.where(mass > 0, 1 / mass.clamp_min(torch.finfo(mass.dtype).tiny), 0)


Score = Callable[[torch.Tensor, InputStats | None, Method, int], torch.Tensor]
SCORES: dict[str, Score] = {
    "magnitude": lambda weight, stats, plan, seed: magnitude(weight),
    "wanda": lambda weight, stats, plan, seed: wanda(weight, _needed(stats)),
    "ria": lambda weight, stats, plan, seed: ria(weight, _needed(stats), exponent=plan.setting("ria.exponent")),
    "stochria": lambda weight, stats, plan, seed: stochria(
        weight,
        _needed(stats),
        share=plan.setting("stochria.share"),
        exponent=plan.setting("stochria.exponent"),
        seed=seed,
    ),
    "symwanda": lambda weight, stats, plan, seed: symwanda(
        weight,
        stats if stats is not None else InputStats(torch.ones(weight.shape[1], device=weight.device), 1),
        norms=plan.setting("symwanda.norms"),
        output=plan.setting("symwanda.output"),
        units=plan.setting("symwanda.units"),
        p=plan.setting("symwanda.p"),
        strategy=plan.setting("symwanda.strategy"),
        exponent=plan.setting("symwanda.exponent"),
    ),
}


def _needed(stats: InputStats | None) -> InputStats:
    if stats is None:
        raise ValueError("this score needs calibration statistics")
    return stats
