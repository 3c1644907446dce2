"""MRP, the multiple removal problem: the optimal update when several weights of a row go at once.

Zhang et al., "Pruning Foundation Models for High Accuracy without Retraining", Findings of EMNLP 2024,
arXiv 2410.15567. With G⁻¹ of the damped Gram matrix and P the pruned inputs of a row, removing P costs
1/2 w_P [(G⁻¹)_PP]⁻¹ w_Pᵀ (eq. 12) and moves the row by −w_P [(G⁻¹)_PP]⁻¹ (G⁻¹)_P: (eq. 11).

Two letters name a variant: how the mask is chosen, then how the rest is compensated. S looks at one weight at a time
(eq. 14), M at all that go together. SS is SparseGPT.

An S score within a block counts on all others of the block: each of two equal inputs looks superfluous, and both may
go. SparseGPT scores the second without the first.
"""

from __future__ import annotations

from itertools import combinations

import torch

from sparsify.chunks import chunks
from sparsify.errors import NumericsError, SingularError, UsageError
from sparsify.masks import keep_mask
from sparsify.solvers.exact import exact
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.solvers.sparsegpt import block_share, sparsegpt
from sparsify.types import MAX_MASKS, NofM, Pattern, check_enumerable, n_masks

VARIANTS = ("auto", "SS", "SM", "MS", "MM")
FREE = ("right", "all")
# Columns whose mask is chosen together where the pattern has no groups: the scores of few count on few others.
BLOCK = 16
# Columns that narrow blocks pass their updates on to one by one, before one matrix product passes them to the rest.
_PANEL = 128
_BUDGET = 1 << 28


def mrp(
    weight: torch.Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    variant: str = "auto",
    block: int | None = None,
    free: str = "all",
    keep: torch.Tensor | None = None,
    group: str = "layer",
) -> Solution:
    """MRP on one linear.

    Working set: the Gram matrix and U (``Gram``); beside ``weight``, 1 float32 weight and a mask, and the systems of a
    block, up to 512 MiB; where all weights are free, then that of ``exact``.

    Args:
        weight: [out, in].
        gram: inputs, with damping.
        pattern: what to keep. M masks exist for N:M only.
        variant: one of ``VARIANTS``; ``auto`` is MM where the masks of a group can be enumerated, else SM.
        block: columns whose mask is chosen and compensated together; by default a group for N:M, 16 for unstructured:
            narrow blocks choose the better masks.
        free: ``right`` updates the columns from the current block on, as SparseGPT does; ``all`` then solves once
            more for every kept weight from the dense ones, which is the optimum for the mask.
        keep: a given mask; only the weights are then solved for.
        group: comparison group where the pattern leaves it open.

    Raises:
        UsageError: an unknown variant or ``free``, an M mask for an unstructured pattern or one with too many
            candidates, or a width that M does not divide.
        NumericsError: G is singular in spite of damping, or a NaN among the weights.
        SingularError: a system of some rows or groups is, though G is not.
    """
    if variant not in VARIANTS:
        raise UsageError(f"mrp variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if free not in FREE:
        raise UsageError(f"mrp free {free!r} is unknown; choose one of {', '.join(FREE)}")
    if variant == "auto":
        variant = "MM" if 0 < n_masks(pattern) <= MAX_MASKS else "SM"
    joint = variant[0] == "M"
    if joint and keep is None:
        check_enumerable(pattern)
    if variant[1] == "S":
        if joint and keep is None:
            keep = _right_only(weight, gram, pattern, joint, block, None, group)[1]
        return sparsegpt(weight, gram, pattern, keep=keep, group=group)
    if free == "all" and keep is not None:
        return exact(weight, gram, keep)
    result, mask = _right_only(weight, gram, pattern, joint, block, keep, group)
    return exact(weight, gram, mask) if free == "all" else Solution(result, mask)


def _right_only(
    weight: torch.Tensor,
    gram: Gram,
    pattern: Pattern,
    joint: bool,
    block: int | None,
    keep: torch.Tensor | None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and mask after one pass over blocks of columns, those to the left of a block staying as they are."""
    upper = gram.inverse_upper
    n_in = gram.n_in
    work = gram.live(weight).contiguous()
    mask = torch.ones_like(work, dtype=torch.bool) if keep is None else keep
    m = pattern.m if isinstance(pattern, NofM) else 1
    width = max((block or (m if m > 1 else BLOCK)) // m, 1) * m
    panel = max(_PANEL // width, 1) * width
    for first in range(0, n_in, panel):
        last = min(first + panel, n_in)
        errors = torch.empty(len(work), last - first, device=work.device)
        for start in range(first, last, width):
            end = min(start + width, last)
            # With U the trailing corner of the factor, Uᵀ U is the inverse of the trailing matrix; its first columns
            # are those of ``corner`` alone.
            corner = upper[start:end, start:end].double()
            inverse = corner.t() @ corner
            part = work[:, start:end]
            if keep is None:
                if joint and isinstance(pattern, NofM):
                    mask[:, start:end] = best_masks(part, inverse, pattern)
                elif isinstance(pattern, NofM):
                    mask[:, start:end] = keep_mask(part.square() / inverse.diagonal().float(), pattern)
                else:
                    score = (part.square() / inverse.diagonal().float()).t()
                    mask[:, start:end] = block_share(score, pattern, pattern.group or group, start, end).t()
            gone = ~mask[:, start:end]
            error = _multipliers(part, inverse, gone) @ corner.t().float()
            work[:, start:last].sub_(error @ upper[start:end, start:last].float())
            work[:, start:end].masked_fill_(gone, 0)
            errors[:, start - first : end - first] = error
        passed_on = upper[first:last].float()
        for some in chunks(n_in - last, len(work)):
            columns = slice(last + some.start, last + some.stop)
            work[:, columns].sub_(errors @ passed_on[:, columns])
    return work, mask


def _multipliers(part: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """w_P [(G⁻¹)_PP]⁻¹ of each row, zero outside P, [rows, block] float32; ``inverse`` is float64."""
    result = torch.empty_like(part)
    narrow = inverse.float()
    n_rows = max(_BUDGET // (4 * inverse.numel()), 1)
    for start in range(0, len(part), n_rows):
        rows = slice(start, start + n_rows)
        on = gone[rows]
        factor, info = torch.linalg.cholesky_ex(_padded(narrow, on))
        if bool(info.any()):
            factor, info = torch.linalg.cholesky_ex(_padded(inverse, on))
            _refuse_singular(info)
        right = (part[rows] * on).unsqueeze(2).to(factor.dtype)
        result[rows] = torch.cholesky_solve(right, factor).squeeze(2).float() * on
    return result


def _padded(inverse: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """(G⁻¹)_PP of each row, [rows, block, block], filled up with the identity outside P."""
    system = inverse * on.unsqueeze(1) * on.unsqueeze(2)
    system.diagonal(dim1=1, dim2=2).add_(~on)
    return system


def _refuse_singular(info: torch.Tensor) -> None:
    if bool(info.any()):
        raise SingularError("inputs of a block of columns are linearly dependent up to rounding at this damping")


def best_masks(part: torch.Tensor, inverse: torch.Tensor, pattern: NofM) -> torch.Tensor:
    """The mask of least joint loss in every group of every row, by trying all of them; [rows, columns] bool.

    Solves: min over c of 1/2 w_c [(G⁻¹)_cc]⁻¹ w_cᵀ with c the removed positions of a group; groups are taken one by
    one, so it is optimal where the width is M. Of equal losses the first in lexicographic order of c wins.

    Args:
        part: [rows, columns], whole groups.
        inverse: [columns, columns] float64, the corner of the inverse that belongs to them.
        pattern: N:M.

    Raises:
        NumericsError: a NaN among the weights.
        SingularError: the corner is singular.
        UsageError: M does not divide the width.
    """
    m = pattern.m
    if part.shape[1] % m:
        raise UsageError(f"pattern {pattern}: {part.shape[1]} columns are left, not a multiple of {m}")
    if torch.isnan(part).any():
        raise NumericsError("the weights hold NaN; check the weights and the calibration activations")
    removed = torch.tensor(list(combinations(range(m), m - pattern.n)), device=part.device)
    n_groups = part.shape[1] // m
    groups = part.reshape(len(part), n_groups, m)
    corner = inverse.reshape(n_groups, m, n_groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # [groups, candidates, removed, removed], shared by all rows.
    blocks = corner[:, removed.unsqueeze(2), removed.unsqueeze(1)]
    factor, info = torch.linalg.cholesky_ex(blocks.double())
    _refuse_singular(info)
    quadratic = torch.cholesky_inverse(factor).float()
    best = torch.full(groups.shape[:2], torch.inf, device=part.device)
    choice = torch.zeros(groups.shape[:2], dtype=torch.long, device=part.device)
    for index, positions in enumerate(removed):
        w = groups[:, :, positions]
        loss = torch.einsum("rga,gab,rgb->rg", w, quadratic[:, index], w)
        better = loss < best
        best = torch.where(better, loss, best)
        choice.masked_fill_(better, index)
    table = torch.ones(len(removed), m, dtype=torch.bool, device=part.device).scatter_(1, removed, False)
    return table[choice].reshape(part.shape)
