"""Where weights lie among the quantised ones of an ONNX file.

Rounding changes the bits, so a weight is found by lying within one step of the checkpoint's, with every removed weight
exactly zero. The step is that of the checkpoint's own values: a file with a wrong scale does not widen its own test.
"""

import math
import re

import numpy as np
from numpy.typing import NDArray

from sparsify.exporters.onnx_places import MOST_PIECES, WeightLocation
from sparsify.exporters.onnx_reader import OnnxWeights, Quantized

# Symmetric rounding moves a weight by half a step, and clips the extreme of the wrong sign by a whole one. Weights and
# scales that go through float16 are each off by up to 128 x 2^-11 of a step more.
_STEPS = 1.15
# Rows of zeros look like each other: where a linear has no other, more starts than this are not tried.
_MOST_STARTS = 16


class QuantizedFinder:
    """Looks for weights among the quantised ones of the same decoder block, which are held until the next block."""

    def __init__(self, weights: OnnxWeights) -> None:
        self._weights = weights
        self._layer = ""
        self._opened: dict[str, NDArray[np.float32]] = {}

    def places(self, linear: str, weight: NDArray[np.float32]) -> tuple[WeightLocation, ...]:
        """The pieces that hold the rows of ``weight`` [out, in] one behind the other; () if there are none."""
        if weight.ndim != 2:
            return ()
        if self._layer != _layer(linear) or not self._opened:
            self._layer = _layer(linear)
            names = [name for name in self._weights.quantized if _layer(name) == self._layer]
            self._opened = {name: self._weights.dequantized(name) for name in names}
        pieces: list[WeightLocation] = []
        done = 0
        while done < len(weight) and len(pieces) < MOST_PIECES:
            found = (self._longest(name, weight[done:]) for name in self._opened)
            run, place = max(found, key=lambda pair: pair[0], default=(0, None))
            if place is None:
                return ()
            pieces.append(place)
            done += run
        return tuple(pieces) if done == len(weight) else ()

    def _longest(self, name: str, weight: NDArray[np.float32]) -> tuple[int, WeightLocation | None]:
        """The longest run of rows of ``weight``, from its first, in the codes of initializer ``name``."""
        values, quantized = self._opened[name], self._weights.quantized[name]
        best: tuple[int, WeightLocation | None] = (0, None)
        if values.shape[1] != weight.shape[1]:
            return best
        steps = _steps(weight, quantized)
        # The first row that says something: every row of zeros is near every other.
        anchor = int(weight.any(axis=1).argmax())
        starts = np.flatnonzero(_near(weight[anchor], values, steps[anchor])) - anchor
        for start in (int(s) for s in starts[starts >= 0][:_MOST_STARTS]):
            count = min(len(weight), len(values) - start)
            near = _near(weight[:count], values[start : start + count], steps[:count])
            run = count if near.all() else int(near.argmin())
            if run > best[0]:
                whole = run == len(values)
                best = run, WeightLocation(name, False, None, None if whole else (start, start + run))
        return best


def _layer(name: str) -> str:
    """The number of the decoder block in a name, or nothing for what lies outside the blocks."""
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else ""


def _steps(weight: NDArray[np.float32], quantized: Quantized) -> NDArray[np.float32]:
    """The widest step [out, in] that rounding ``weight`` in its blocks needs; 0 where a block is all zero."""
    block, (out, inner) = quantized.block_size, weight.shape
    padded = np.zeros((out, math.ceil(inner / block) * block), dtype=np.float32)
    padded[:, :inner] = np.abs(weight)
    largest = padded.reshape(out, -1, block).max(axis=2) / np.float32(2 ** (quantized.bits - 1) - 1)
    return np.repeat(largest, block, axis=1)[:, :inner]


def _near(weight: NDArray[np.float32], values: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Per row of ``values``, whether it is within a step of the weight everywhere, and zero where the weight is."""
    near = (np.abs(values - weight) <= _STEPS * steps) & ((weight != 0) | (values == 0))
    rows: NDArray[np.bool_] = np.all(near, axis=1)
    return rows
