"""FISTAPruner: a convex l1 model solved by accelerated proximal gradients, whose weight is found by bisection.

Zhao et al., "A Convex-optimization-based Layer-wise Post-training Pruner for Large Language Models", arXiv 2408.03728
(EMNLP 2025), eq. 3 to 8 and algorithm 1. The gradient follows from eq. 3; the printed eq. 4a multiplies by another
matrix, which is not the gradient unless dense and pruned inputs agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsify.masks import keep_mask
from sparsify.solvers.quadratic import Gram, Solution, lipschitz, value
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
    the rounded ``start``. With dense targets, W is the unconstrained optimum for them (``quadratic.retarget``), which
    gives the paper's eq. 3 up to a constant.

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
    scale, matrix = gram.scaled if scaled else (torch.ones_like(gram.damped[0]), gram.damped)
    dense = gram.live(weight).mul_(scale)
    target = dense @ matrix
    step = lipschitz(matrix)
    best = _rounded(gram.live(start).mul_(scale), pattern, group)
    lowest = value(best - dense, matrix)
    largest = float(target.abs().max()) if target.numel() else 0.0
    low, high, penalty = (
        (_KAPPA_LOW, _KAPPA_HIGH, _KAPPA) if scaled else (_LAMBDA_LOW, _LAMBDA_HIGH, _LAMBDA)
    )  # fmt: skip
    fruitless = done = 0
    # A warm start without error leaves nothing to do, and the ratio below would be 0/0.
    while n_iter and fruitless < patience and lowest > 0 and high > low:
        done += 1
        at = penalty * largest if scaled else penalty
        soft = proximal_gradient(target, matrix, best, at, step, n_iter)
        hard = _rounded(soft, pattern, group)
        # Where inputs are singular, an error of nothing comes out of float32 products as a little less.
        error, before = (max(value(v - dense, matrix), 0.0) for v in (hard, soft))
        # Norms, not squares, as in the paper; negative when the start of a short run was not yet reached.
        by_rounding = math.sqrt(error) - math.sqrt(before)
        ratio = by_rounding / math.sqrt(error) if error > 0 else 0.0
        if rounds is not None:
            rounds.append(Round(at, ratio, float((soft == 0).float().mean()), error))
        gain = (lowest - error) / lowest
        if error < lowest:
            best, lowest = hard, error
            fruitless = 0
            if gain < improvement:
                break
        else:
            fruitless += 1
        low, high = (penalty, high) if ratio > threshold else (low, penalty)
        penalty = math.sqrt(low * high) if scaled else (low + high) / 2
    keep = keep_mask(best.abs(), pattern, default_group=group)
    return Solution(best / scale, keep, done, "converged")


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
    shrink = torch.nn.Softshrink(penalty / step) if step > 0 else torch.nn.Identity()
    current = ahead = start
    t = 1.0
    for _ in range(n_iter):
        following = shrink(ahead - (ahead @ matrix - target) / step) if step > 0 else ahead
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = torch.lerp(current, following, 1 + (t - 1) / t_next)
        current, t = following, t_next
    return current


def _rounded(weight: torch.Tensor, pattern: Pattern, group: str) -> torch.Tensor:
    return weight * keep_mask(weight.abs(), pattern, default_group=group)
