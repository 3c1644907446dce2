"""How a packed weight lies in an ONNX file: shapes, types and sizes of its parts, and whether it can be packed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparsify.types import NofM

# ONNX Runtime folds no node whose output is larger than this (optimization.constant_folding_max_output_size_in_bytes).
FOLD_LIMIT_BYTES = 1 << 30
# onnx.TensorProto data types of weights: bytes of one.
ITEM_BYTES = {1: 4, 10: 2, 16: 2}
FLOAT, FLOAT16, BFLOAT16 = ITEM_BYTES
UINT8, UINT4 = 2, 21


@dataclass(frozen=True)
class Layout:
    """How one weight is packed.

    Attributes:
        shape: of the dense initializer.
        data_type: onnx.TensorProto data type (``FLOAT``, ``FLOAT16`` or ``BFLOAT16``).
        pattern: N:M with M 2, 4 or 8, or None for any pattern.
        axis: along which the inputs, and so the groups, lie; not used where ``pattern`` is None, and 0 then.
        n_values: values stored.
        gap_bits: 4 or 8, of one distance where ``pattern`` is None; else 0.
    """

    shape: tuple[int, ...]
    data_type: int
    pattern: NofM | None
    axis: int
    n_values: int
    gap_bits: int = 0

    @property
    def per_byte(self) -> int:
        """Values that belong to one byte of the mask; 0 without a mask."""
        return 0 if self.pattern is None else 8 // self.pattern.m * self.pattern.n

    @property
    def function(self) -> str:
        """Name of the function that unpacks it."""
        return f"Unpack{self.per_byte}of8" if self.pattern else "UnpackGaps"

    @property
    def places_type(self) -> int:
        """onnx.TensorProto data type of the mask or the gaps."""
        return UINT4 if self.gap_bits == 4 else UINT8

    @property
    def places_shape(self) -> tuple[int, ...]:
        """Shape of the mask (bytes along ``axis``) or the gaps."""
        if self.pattern is None:
            return (self.n_values,)
        return (*self.shape[: self.axis], self.shape[self.axis] // 8, *self.shape[self.axis + 1 :])

    @property
    def places_bytes(self) -> int:
        """Bytes of the mask or the gaps."""
        return -(-self.n_values // 2) if self.gap_bits == 4 else prod(self.places_shape)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        if self.pattern is None:
            return (self.n_values,)
        units = self.shape[self.axis] // 8
        return (*self.shape[: self.axis], units * self.per_byte, *self.shape[self.axis + 1 :])

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return prod(self.shape) * ITEM_BYTES[self.data_type]

    @property
    def packed_bytes(self) -> int:
        """Bytes of values and mask or gaps."""
        return self.n_values * ITEM_BYTES[self.data_type] + self.places_bytes

    @property
    def folded_bytes(self) -> int:
        """Bytes that ONNX Runtime computes, and keeps until all weights are folded, the dense weight included.

        N:M: mask as int32, the same with its place in the table, positions looked up, positions joined, the weight.
        Any pattern: gaps as int32, positions, the flat weight, and the weight in its shape.
        """
        if self.pattern is None:
            return 2 * 4 * self.n_values + 2 * self.dense_bytes
        return 2 * 4 * self.places_bytes + 2 * 4 * self.n_values + self.dense_bytes

    @property
    def obstacle(self) -> str | None:
        """Why this weight cannot or should not be packed, or None."""
        n = prod(self.shape)
        if len(self.shape) not in (2, 3) or n == 0:
            return f"has shape {list(self.shape)}, not two or three axes with weights"
        if self.pattern is not None and (self.pattern.m not in (2, 4, 8) or self.shape[self.axis] % 8):
            return f"{self.pattern} along an axis of {self.shape[self.axis]}: want M of 2, 4 or 8 and a multiple of 8"
        if self.pattern is not None and self.axis < len(self.shape) - 2:
            return f"{self.pattern} along axis {self.axis} of {list(self.shape)}: want one of the last two"
        if self.dense_bytes > FOLD_LIMIT_BYTES or 4 * self.n_values > FOLD_LIMIT_BYTES:
            return f"needs more than {FOLD_LIMIT_BYTES} bytes in one step, which ONNX Runtime would not fold"
        if self.packed_bytes >= self.dense_bytes:
            return f"would take {self.packed_bytes} bytes packed and takes {self.dense_bytes}"
        return None


def part_names(name: str, layout: Layout) -> tuple[str, str]:
    """The initializers that hold the values, and the mask or gaps, of the packed weight ``name``."""
    return f"{name}.values", f"{name}.{'mask' if layout.pattern else 'gaps'}"
