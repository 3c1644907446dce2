"""Sparsity per linear under one budget: the same number of weights removed, from where it costs least.

Pure functions of what was measured on the dense model; the driver measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

# Sparsity is kept below 1 by one part in this, and measured at multiples of it.
_GRAIN = 10_000


@dataclass(frozen=True)
class Curve:
    """Measured error of one linear: ``errors`` at ``sparsities`` (ascending), and its number of weights."""

    n_weights: int
    sparsities: tuple[float, ...]
    errors: tuple[float, ...]


def outliers(scores: Sequence[torch.Tensor], multiple: float) -> float:
    """The share of the scores of a block's linears that exceed ``multiple`` times the mean over all of them."""
    n = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / n
    return sum(int((score > multiple * mean).sum()) for score in scores) / n


def owl(ratios: Mapping[int, float], sparsity: Fraction, spread: float) -> dict[int, float]:
    """Sparsity of each block, before ``fitted``: less where the share of outliers is higher.

    The kept share of a block is 1 − s plus its outlier share, scaled over all blocks to a range of 2 · ``spread``.

    Args:
        ratios: block -> share of outliers.
        sparsity: s, over all blocks.
        spread: λ, half the range.

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175. The paper centres
    on the plain mean over blocks, which meets the budget only where all are of one size.
    """
    low, high = min(ratios.values()), max(ratios.values())
    scaled = {b: (r - low) / (high - low) * 2 * spread if high > low else 0.0 for b, r in ratios.items()}
    return {b: float(sparsity) - value for b, value in scaled.items()}


def least_error(curves: Mapping[str, Curve], sparsity: Fraction, spread: float) -> dict[str, float]:
    """Sparsity of each linear, before ``fitted``, that minimises the sum of errors for ``sparsity`` over all weights.

    Solves min Σ_l e_l(s_l) subject to Σ_l n_l s_l = s Σ_l n_l and |s_l − s| <= ``spread``. Each e_l is interpolated
    between its measurements in logarithms, with slopes that never fall, so that the optimum is where the marginal
    errors per weight of all linears agree; that common value is found by bisection.
    """
    grids = {name: _Marginal(curve, float(sparsity), spread) for name, curve in curves.items()}
    sizes = {name: curve.n_weights for name, curve in curves.items()}
    total = sum(sizes.values())
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        removed = sum(sizes[name] * grid.at(middle) for name, grid in grids.items())
        low, high = (middle, high) if removed < float(sparsity) * total else (low, middle)
    return {name: grid.at((low + high) / 2) for name, grid in grids.items()}


class _Marginal:
    """The sparsity of one linear at which removing a further weight costs exp(x), for any x."""

    _STEPS = 64

    def __init__(self, curve: Curve, sparsity: float, spread: float) -> None:
        low, high = max(sparsity - spread, 0.0), min(sparsity + spread, 1 - 1 / _GRAIN)
        self.grid = np.linspace(low, high, self._STEPS + 1)
        tiny = 1e-12
        logs = np.interp(self.grid, curve.sparsities, np.log(np.maximum(curve.errors, tiny)))
        slope = np.diff(np.exp(logs)) / np.diff(self.grid) / curve.n_weights
        # Non-decreasing slopes: the convex envelope up to the order of the steps.
        self.slopes = np.log(np.maximum(np.maximum.accumulate(slope), tiny * tiny))

    def at(self, log_price: float) -> float:
        return float(self.grid[int(np.searchsorted(self.slopes, log_price))])


def fitted(
    wanted: Mapping[str, float],
    sizes: Mapping[str, int],
    grains: Mapping[str, int],
    sparsity: Fraction,
    spread: float,
) -> dict[str, Fraction]:
    """``wanted`` shifted, kept within ``spread`` of ``sparsity``, and rounded to counts that a mask can have.

    Args:
        wanted: linear -> sparsity.
        sizes: linear -> weights.
        grains: linear -> a count it can lose is a multiple of this: 1, or its rows where each row loses the same.
        sparsity: of all together: floor(``sparsity`` · total) weights go, short of that by less than the least grain
            unless the linears of fine grains can lose no more; never above.
        spread: greatest deviation, but for what rounding moves.
    """
    total = sum(sizes.values())
    floor = max(float(sparsity) - spread, 0.0)
    ceiling = max(min(float(sparsity) + spread, 1 - 1 / _GRAIN), float(sparsity))
    low, high = -1.0, 1.0
    for _ in range(100):
        shift = (low + high) / 2
        mean = sum(sizes[k] * min(max(v + shift, floor), ceiling) for k, v in wanted.items()) / total
        low, high = (shift, high) if mean < sparsity else (low, shift)
    exact = {k: min(max(v + low, floor), ceiling) * sizes[k] for k, v in wanted.items()}
    counts = {k: int(value) // grains[k] * grains[k] for k, value in exact.items()}
    missing = int(sparsity * total) - sum(counts.values())
    # What rounding left over: a grain each, the coarsest first. What then is less than the coarsest needs goes to those
    # that fit, where it moves the sparsity the least.
    for key in sorted(exact, key=lambda k: (-grains[k], counts[k] - exact[k])):
        if grains[key] <= missing and counts[key] + grains[key] < sizes[key]:
            counts[key] += grains[key]
            missing -= grains[key]
    while fit := [k for k in exact if grains[k] <= missing and counts[k] + grains[k] < sizes[k]]:
        key = min(fit, key=lambda k: (counts[k] + grains[k] - exact[k]) / sizes[k])
        counts[key] += grains[key]
        missing -= grains[key]
    return {k: Fraction(count, sizes[k]) for k, count in counts.items()}


def grid(sparsity: Fraction, spread: float, n_points: int = 3) -> list[Fraction]:
    """Sparsities at which to measure errors for ``least_error``: evenly spaced, inside [0, 1)."""
    low, high = max(float(sparsity) - spread, 0.0), min(float(sparsity) + spread, 1 - 1 / _GRAIN)
    points: Sequence[float] = [low + (high - low) * i / (n_points - 1) for i in range(n_points)]
    return [Fraction(round(p * _GRAIN), _GRAIN) for p in points]
