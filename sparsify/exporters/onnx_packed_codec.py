"""Values, bits and gaps of a dense weight (see ``onnx_packed_layout``), and back, in numpy.

Works on bit patterns (unsigned integers), so -0.0 is a value like another and every float type is treated alike.

N:M: bit j of a byte of the mask is weight 8b + j along the axis; values lie in ``per_byte`` blocks along the axis, and
block k holds the k-th kept weight of every byte. Any pattern: values in the order of the flattened weight, each with
its distance from the one before (the first: from the start), as uint8 or as two uint4 a byte, the first one low. A
distance is at least 1 but for the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import ModelError, VerificationError
from sparsify.exporters.onnx_packed_layout import ITEM_BYTES, Layout
from sparsify.types import NofM

Bits = NDArray[np.unsignedinteger[Any]]
Places = NDArray[np.uint8]

# Weights worked on at once; temporaries take a few bytes each.
_BLOCK = 1 << 22


def bit_type(data_type: int) -> np.dtype[Any]:
    """The unsigned integer type that holds the bits of one weight."""
    return np.dtype(f"<u{ITEM_BYTES[data_type]}")


def _units(array: NDArray[Any], axis: int, per_unit: int, *, blocks: bool = False) -> NDArray[Any]:
    """A view [lead, units, per_unit, rest] of ``array``, or [lead, per_unit, units, rest] where it lies in blocks."""
    lead, rest = prod(array.shape[:axis]), prod(array.shape[axis + 1 :])
    units = array.shape[axis] // per_unit if per_unit else 0
    return array.reshape((lead, per_unit, units, rest) if blocks else (lead, units, per_unit, rest))


def _slices(lead: int, units: int, rest: int) -> Iterator[tuple[slice, slice]]:
    """Slices (of lead, of units) that cover everything with about ``_BLOCK`` weights each."""
    step = max(1, _BLOCK // max(1, 8 * rest))
    if step < units:
        for i in range(lead):
            for start in range(0, units, step):
                yield slice(i, i + 1), slice(start, start + step)
    else:
        rows = max(1, step // max(1, units))
        for start in range(0, lead, rows):
            yield slice(start, start + rows), slice(0, units)


def _fill(keep: NDArray[np.bool_], pattern: NofM) -> bool:
    """Mark zeros, first ones first, until every group of [lead, units, 8, rest] keeps n; False where one keeps more."""
    lead, units, _, rest = keep.shape
    groups = keep.reshape(lead, units, 8 // pattern.m, pattern.m, rest)
    kept = groups.sum(axis=3, dtype=np.uint8)
    if bool((kept > pattern.n).any()):
        return False
    for place in range(pattern.m):
        if bool((kept == pattern.n).all()):
            break
        add = ~groups[:, :, :, place] & (kept < pattern.n)
        groups[:, :, :, place] |= add
        kept += add
    return True


def _entries(weight: Bits, gap_bits: int) -> Iterator[tuple[NDArray[np.int64], Bits]]:
    """Gaps and values of the flattened weight, block by block, those that bridge long distances included."""
    reach = (1 << gap_bits) - 1
    flat, last = weight.reshape(-1), 0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        found = np.flatnonzero(block)
        if not found.size:
            continue
        gaps = np.diff(found, prepend=last - start)
        values = block[found]
        last = start + int(found[-1])
        bridges = np.maximum(gaps - 1, 0) // reach
        if bool(bridges.any()):
            # Each value comes behind its bridges, which go as far as they can.
            ends = np.cumsum(bridges + 1) - 1
            long_gaps = np.full(int(ends[-1]) + 1, reach, np.int64)
            long_gaps[ends] = gaps - bridges * reach
            long_values = np.zeros(long_gaps.size, values.dtype)
            long_values[ends] = values
            gaps, values = long_gaps, long_values
        yield gaps, values


def count_entries(weight: Bits, gap_bits: int) -> int:
    """Values that ``UnpackGaps`` needs for ``weight`` with distances of so many bits."""
    return sum(gaps.size for gaps, _ in _entries(weight, gap_bits))


def encode(weight: Bits, layout: Layout, name: str) -> tuple[Bits, Places]:
    """Values, and mask or gaps, of ``weight`` (C-contiguous bit patterns in ``layout.shape``).

    Raises:
        VerificationError: a group keeps more than the pattern allows.
    """
    values = np.zeros(layout.values_shape, weight.dtype)
    if layout.pattern is None:
        distances, end = np.zeros(layout.n_values + layout.n_values % 2, np.uint8), 0
        for gaps, found in _entries(weight, layout.gap_bits):
            values[end : end + gaps.size] = found
            distances[end : end + gaps.size] = gaps
            end += gaps.size
        if layout.gap_bits == 4:
            return values, (distances[::2] | distances[1::2] << 4).astype(np.uint8)
        return values, distances[: layout.n_values]
    mask = np.zeros(layout.places_shape, np.uint8)
    dense, packed = _units(weight, layout.axis, 8), _units(values, layout.axis, layout.per_byte, blocks=True)
    bytes_ = _units(mask, layout.axis, 1)
    for lead, units in _slices(dense.shape[0], dense.shape[1], dense.shape[3]):
        block = dense[lead, units]
        keep = block != 0
        if not _fill(keep, layout.pattern):
            raise VerificationError(
                f"initializer {name}: keeps more than {layout.pattern} in a group along axis {layout.axis}; "
                "pack it as unstructured or prune it again"
            )
        bytes_[lead, units] = np.packbits(keep, axis=2, bitorder="little")
        ranks = keep.cumsum(axis=2, dtype=np.uint8)
        for k in range(layout.per_byte):
            chosen = np.where(keep & (ranks == k + 1), block, 0)
            packed[lead, k, units] = np.bitwise_or.reduce(chosen, axis=2)
    return values, mask


def _check_mask(mask: Places, pattern: NofM) -> str | None:
    """What stands against ``mask`` belonging to ``pattern``, or None."""
    groups = ((np.arange(256)[:, None] >> np.arange(8)) & 1).reshape(256, 8 // pattern.m, pattern.m).sum(axis=2)
    allowed = (groups == pattern.n).all(axis=1)
    return None if bool(allowed[mask].all()) else f"its mask does not keep {pattern} in every group"


def _decode_gaps(values: Bits, places: Places, layout: Layout, flat: Bits) -> str | None:
    """Put ``values`` into the zeros ``flat``; returns what stands against the gaps, or None."""
    last = 0
    for start in range(0, layout.n_values, _BLOCK):
        stop = min(start + _BLOCK, layout.n_values)
        if layout.gap_bits == 4:
            pairs = places[start // 2 : -(-stop // 2)]
            gaps = np.stack((pairs & 15, pairs >> 4), axis=1).reshape(-1)[: stop - start]
        else:
            gaps = places[start:stop]
        if bool((gaps[0 if start else 1 :] == 0).any()):
            return "two of its values have the same place"
        positions = last + gaps.cumsum(dtype=np.int64)
        last = int(positions[-1])
        if last >= flat.size:
            return "its values go beyond its end"
        flat[positions] = values[start:stop]
    return None


def decode(values: Bits, places: Places, layout: Layout, name: str) -> Bits:
    """The dense weight's bit patterns in ``layout.shape``.

    Raises:
        ModelError: mask or gaps do not belong to the layout.
    """
    weight = np.zeros(layout.shape, values.dtype)
    if layout.pattern is None:
        fault = _decode_gaps(values, places, layout, weight.reshape(-1))
    else:
        fault = _check_mask(places, layout.pattern)
    if fault is not None:
        raise ModelError(f"packed weight {name}: {fault}; export the model again")
    if layout.pattern is None:
        return weight
    dense, packed = _units(weight, layout.axis, 8), _units(values, layout.axis, layout.per_byte, blocks=True)
    bytes_ = _units(places, layout.axis, 1)
    for lead, units in _slices(dense.shape[0], dense.shape[1], dense.shape[3]):
        keep = np.unpackbits(bytes_[lead, units], axis=2, bitorder="little").view(np.bool_)
        ranks = keep.cumsum(axis=2, dtype=np.uint8)
        block = dense[lead, units]
        for k in range(layout.per_byte):
            np.copyto(block, packed[lead, k, units][:, :, None], where=keep & (ranks == k + 1))
    return weight
