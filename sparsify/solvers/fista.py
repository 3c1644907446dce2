"""FISTAPruner: a convex l1 model solved by accelerated proximal gradients, whose weight is found by bisection.

Zhao et al., "A Convex-optimization-based Layer-wise Post-training Pruner for Large Language Models", arXiv 2408.03728
(EMNLP 2025), eq. 3 to 8 and algorithm 1. The gradient follows from eq. 3; the printed eq. 4a multiplies by another
matrix, which is not the gradient unless dense and pruned inputs agree.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from sparsify.chunks import chunks
from sparsify.masks import keep_largest
from sparsify.solvers.quadratic import Gram, Solution, value
from sparsify.types import Pattern

# λ relative to the smallest λ whose solution is zero: where the bisection starts, and its ends.
_KAPPA, _KAPPA_LOW, _KAPPA_HIGH = 1e-4, 1e-8, 1.0
# The same in the paper's units.
_LAMBDA, _LAMBDA_LOW, _LAMBDA_HIGH = 1e-5, 0.0, 1e6


@dataclass(frozen=True)
class Round:
    """One outer round: ``penalty`` (λ), share of the error due to rounding, zeros before rounding, error after it."""

    penalty: float
    ratio: float
    sparsity: float
    objective: float


def fista(
    weight: torch.Tensor,
    gram: Gram,
    pattern: Pattern,
    start: torch.Tensor,
    *,
    n_iter: int = 20,
    patience: int = 3,
    threshold: float = 0.3,
    improvement: float = 1e-3,
    scaled: bool = True,
    group: str = "layer",
    rounds: list[Round] | None = None,
) -> Solution:
    """Minimise 1/2 tr((V − W) G (V − W)ᵀ) + λ Σ|V_ij|, round to the pattern, and adjust λ; keep the best rounding seen.

    A round runs ``n_iter`` FISTA steps from the best weights so far, at a fixed λ. If more than ``threshold`` of the
    error after rounding is due to rounding, λ is raised, else lowered, by bisection. The result is never worse than
    the rounded ``start``. With dense targets, W is the unconstrained optimum for them (``targets.retarget``), which
    gives the paper's eq. 3 up to a constant.

    Working set: the Gram matrix and, if ``scaled``, the scaled one (and a factor once, where damping is not settled);
    beside ``weight`` and ``start``, 3 float32 weights (target, best and latest), a mask and 6 chunks of rows.

    Args:
        weight: [out, in], what the product with the inputs should equal.
        gram: inputs, with damping.
        pattern: what to keep.
        start: [out, in], the warm start: another method's result, or the dense weight.
        n_iter: FISTA steps a round (the paper's K); 0 returns the rounded start.
        patience: rounds without improvement after which it ends (the paper's T); 0 returns the rounded start.
        threshold: the paper's ξ.
        improvement: relative gain below which it ends.
        scaled: solve in variables V_ij ||X_j||, so that steps fit every input and rounding is Wanda's, with λ relative
            to the data and bisected on a log scale. Otherwise the paper's own variables, units and interval.
        group: comparison group where the pattern leaves it open.
        rounds: receives what every round did.

    Returns:
        the solution; ``n_iter`` counts rounds.
    """
    scale = gram.scaled[0] if scaled else torch.ones_like(gram.matrix[0])
    best = _rounded(gram.live(start).mul_(scale), pattern, group)
    del start
    with nullcontext(gram.scaled[1]) if scaled else gram.loaded() as matrix:

        def error_of(v: torch.Tensor) -> float:
            delta = (v[rows] - gram.live(weight[rows]).mul_(scale) for rows in chunks(*v.shape))
            return sum(value(part, matrix) for part in delta)

        target = torch.empty_like(best)
        for rows in chunks(*weight.shape):
            target[rows] = gram.live(weight[rows]).mul_(scale) @ matrix
        step = lipschitz(matrix)
        lowest = error_of(best)
        largest = max(float(target.max()), -float(target.min())) if target.numel() else 0.0
        low, high, penalty = (
            (_KAPPA_LOW, _KAPPA_HIGH, _KAPPA) if scaled else (_LAMBDA_LOW, _LAMBDA_HIGH, _LAMBDA)
        )  # fmt: skip
        fruitless = done = 0
        # A warm start without error leaves nothing to do, and the ratio below would be 0/0.
        while n_iter and fruitless < patience and lowest > 0 and high > low:
            done += 1
            at = penalty * largest if scaled else penalty
            found = proximal_gradient(target, matrix, best, at, step, n_iter)
            # Where inputs are singular, an error of nothing comes out of float32 products as a little less.
            before = max(error_of(found), 0.0)
            share = 1 - int(found.count_nonzero()) / found.numel() if rounds is not None else 0.0
            found = _rounded(found, pattern, group)
            error = max(error_of(found), 0.0)
            # Norms, not squares, as in the paper; negative when the start of a short run was not yet reached.
            by_rounding = math.sqrt(error) - math.sqrt(before)
            ratio = by_rounding / math.sqrt(error) if error > 0 else 0.0
            if rounds is not None:
                rounds.append(Round(at, ratio, share, error))
            gain = (lowest - error) / lowest
            if error < lowest:
                best, lowest = found, error
                fruitless = 0
                if gain < improvement:
                    break
            else:
                fruitless += 1
            low, high = (penalty, high) if ratio > threshold else (low, penalty)
            penalty = math.sqrt(low * high) if scaled else (low + high) / 2
            # Beside the next, one that was not the best would be a weight too many.
            del found
    keep = keep_largest(best, pattern, default_group=group)
    return Solution(best.div_(scale), keep, done, "converged")


def lipschitz(gram: torch.Tensor, *, n_iter: int = 50) -> float:
    """An upper bound of the largest eigenvalue of ``gram`` that is close to it.

    Power iteration converges from below, slowly where the spectrum is dense at its top, so twice the norm of its
    residual is added, and 2 % of the sum. The start is fixed; only an eigenvector (almost) orthogonal to it could be
    missed.
    """
    vector = torch.ones(gram.shape[0], dtype=gram.dtype, device=gram.device)
    vector += torch.linspace(-0.5, 0.5, len(vector), dtype=gram.dtype, device=gram.device)
    size = 0.0
    for _ in range(n_iter):
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(gram.dtype).tiny)
        image = gram @ vector
        rayleigh = image @ vector
        size = float(rayleigh + 2 * torch.linalg.vector_norm(image - rayleigh * vector))
        vector = image
    return 1.02 * size


def proximal_gradient(
    target: torch.Tensor, matrix: torch.Tensor, start: torch.Tensor, penalty: float, step: float, n_iter: int
) -> torch.Tensor:
    """``n_iter`` steps of FISTA on 1/2 <V A, V> − <V, B> + λ Σ|V_ij|; the last proximal point, which is sparse.

    F(V_k) − F* <= 2 L ||V_0 − V*||² / (k + 1)²; single steps may go up.

    Args:
        target: B, [out, in].
        matrix: A, [in, in], positive semidefinite.
        start: V_0, [out, in].
        penalty: λ, in units of B.
        step: L, no less than the largest eigenvalue of A.
        n_iter: steps.

    Reference: Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009); eq. 4 and 5 of the paper.
    """
    result = start.clone()
    if step <= 0:
        return result
    shrink = torch.nn.Softshrink(penalty / step)
    # Rows know nothing of each other.
    for rows in chunks(*start.shape):
        current = ahead = start[rows]
        t = 1.0
        for _ in range(n_iter):
            following = shrink(ahead - (ahead @ matrix - target[rows]) / step)
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            ahead = torch.lerp(current, following, 1 + (t - 1) / t_next)
            current, t = following, t_next
        result[rows] = current
    return result


def _rounded(weight: torch.Tensor, pattern: Pattern, group: str) -> torch.Tensor:
    """``weight`` on its largest, in the same storage."""
    keep = keep_largest(weight, pattern, default_group=group)
    for rows in chunks(*weight.shape):
        weight[rows].mul_(keep[rows])
    return weight
