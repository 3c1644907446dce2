"""SparseGPT: remove one column after the other and let the columns to its right absorb the error.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
algorithm 1.
"""

from __future__ import annotations

import torch

from sparsify.errors import NumericsError
from sparsify.masks import keep_mask
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.types import NofM, Pattern, Unstructured

BLOCK = 128
# Columns whose updates reach only each other before they are passed on as one matrix product.
_PANEL = 16


def sparsegpt(
    weight: torch.Tensor, gram: Gram, pattern: Pattern, *, keep: torch.Tensor | None = None, group: str = "layer"
) -> Solution:
    """SparseGPT on one linear.

    Columns are passed from left to right. A removed weight's error w / U_jj is spread over the columns to its right
    by row j of U, where Uᵀ U = G⁻¹; columns already passed stay as they are, which is what separates this from the
    optimum for the same mask (``mrp``, ``refit``). The mask of a block of columns is chosen when the block is reached,
    from the updated weights, by w² / U_jj².

    Working set: the Gram matrix and U (``Gram``); beside ``weight``, 1 float32 weight (the result), a mask, and a block
    of columns a few times.

    Args:
        weight: [out, in].
        gram: inputs, with damping.
        pattern: what to keep; unstructured counts are exact over the whole linear (or each row), not per block.
        keep: a given mask, [out, in] bool; only the weights are then solved for.
        group: comparison group where the pattern leaves it open.

    Raises:
        NumericsError: G is singular in spite of damping, or a NaN among the weights.
        UsageError: M does not divide the width.
    """
    upper = gram.inverse_upper
    pivots = upper.diagonal().float()
    n_out, n_in = weight.shape
    work = gram.live(weight)
    mask = torch.ones_like(work, dtype=torch.bool) if keep is None else keep
    block, panel = BLOCK, _PANEL
    if isinstance(pattern, NofM):
        block, panel = (max(size // pattern.m, 1) * pattern.m for size in (BLOCK, _PANEL))
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        # Transposed, so that a column of the weight is contiguous.
        columns, kept = work[:, start:end].t().contiguous(), mask[:, start:end].t().contiguous()
        scale, passed_on = pivots[start:end, None], upper[start:end].float()
        if keep is None and isinstance(pattern, Unstructured):
            score = (columns / scale).square_()
            kept = block_share(score, pattern, pattern.group or group, start, end)
        errors = torch.empty(end - start, n_out, device=work.device)
        for a in range(0, end - start, panel):
            b = min(a + panel, end - start)
            for j in range(a, b):
                if keep is None and isinstance(pattern, NofM) and j % pattern.m == 0:
                    score = (columns[j : j + pattern.m] / scale[j : j + pattern.m]).square_()
                    kept[j : j + pattern.m] = keep_mask(score.t(), pattern).t()
                error = errors[j]
                torch.mul(columns[j], ~kept[j], out=error)
                error /= scale[j]
                if j + 1 < b:
                    columns[j + 1 : b].addr_(passed_on[j, start + j + 1 : start + b], error, alpha=-1)
            if b < end - start:
                among = passed_on[a:b, start + b : end]
                columns[b:].addmm_(among.t(), errors[a:b], alpha=-1)
        if end < n_in:
            work[:, end:].addmm_(errors.t(), passed_on[:, end:], alpha=-1)
        work[:, start:end] = columns.masked_fill_(~kept, 0).t()
        if keep is None:
            mask[:, start:end] = kept.t()
    return Solution(work, mask)


def block_share(score: torch.Tensor, pattern: Unstructured, group: str, start: int, end: int) -> torch.Tensor:
    """Mask [columns, out] of the columns start:end, whose counts add up exactly over all blocks.

    Raises:
        NumericsError: a NaN in the score.
    """
    if torch.isnan(score).any():
        raise NumericsError("the score holds NaN; check the weights and the calibration activations")
    per_unit = score.shape[1] if group == "layer" else 1
    n_remove = int(pattern.sparsity * per_unit * end) - int(pattern.sparsity * per_unit * start)
    groups = score.t().reshape(1, -1) if group == "layer" else score.t()
    order = groups.argsort(dim=1, stable=True)[:, :n_remove]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False)
    return mask.reshape(score.shape[1], -1).t()
