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

    Working set: the Gram matrix and U (``Gram``); beside ``weight``, 2 float32 weights (the columns at work, and the
    result), 2 masks, and a block of columns a few times.

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
    # Transposed, so that a column of the weight is contiguous.
    work = torch.empty(n_in, n_out, device=weight.device).copy_(weight.detach().t())
    work.masked_fill_(gram.dead[:, None], 0)
    mask = torch.ones(n_in, n_out, dtype=torch.bool, device=work.device) if keep is None else keep.t().contiguous()
    block = BLOCK
    if isinstance(pattern, NofM):
        block = max(BLOCK // pattern.m, 1) * pattern.m
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        passed_on = upper[start:end].float()
        if keep is None and isinstance(pattern, Unstructured):
            score = (work[start:end] / pivots[start:end, None]).square_()
            mask[start:end] = block_share(score, pattern, pattern.group or group, start, end)
        errors = torch.empty(end - start, n_out, device=work.device)
        chosen = isinstance(pattern, NofM) and keep is None
        panel = max(_PANEL // pattern.m, 1) * pattern.m if isinstance(pattern, NofM) else _PANEL
        for a in range(start, end, panel):
            b = min(a + panel, end)
            for j in range(a, b):
                if chosen and isinstance(pattern, NofM) and j % pattern.m == 0:
                    scale = pivots[j : j + pattern.m, None]
                    score = (work[j : j + pattern.m] / scale).square_()
                    mask[j : j + pattern.m] = keep_mask(score.t(), pattern).t()
                error = errors[j - start]
                torch.mul(work[j], ~mask[j], out=error)
                error /= pivots[j]
                if j + 1 < b:
                    work[j + 1 : b].addr_(passed_on[j - start, j + 1 : b], error, alpha=-1)
            if b < end:
                among = passed_on[a - start : b - start, b:end]
                work[b:end].addmm_(among.t(), errors[a - start : b - start], alpha=-1)
        if end < n_in:
            work[end:].addmm_(passed_on[:, end:].t(), errors, alpha=-1)
        work[start:end].masked_fill_(~mask[start:end], 0)
    return Solution(work.t().contiguous(), mask.t().contiguous())


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
