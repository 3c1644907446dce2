"""The key/value cache as ONNX Runtime's own tensors: it stays on the device, and is never copied through numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# onnx.TensorProto.DataType of the floats a cache may have.
ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_BFLOAT16 = 16


@dataclass(frozen=True)
class CacheTensor:
    """One key or value tensor, [batch, heads, tokens, dim].

    Attributes:
        past: name of the input.
        present: name of the output.
        heads: key/value heads.
        dim: of a head.
        element: ``onnx.TensorProto.DataType``.
    """

    past: str
    present: str
    heads: int
    dim: int
    element: int


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A step gives a new one, and the one it was given must not be used again.

    Attributes:
        values: an OrtValue for each cache tensor.
        batch: sequences.
        length: tokens of each sequence, padding included.
        capacity: tokens that ``values`` have room for where steps write into them; None where steps make new ones.
    """

    values: tuple[Any, ...]
    batch: int
    length: int
    capacity: int | None


def allocate(
    tensors: Sequence[CacheTensor], batch: int, capacity: int | None, device: str, device_id: int
) -> tuple[Any, ...]:
    """OrtValues on ``device`` for a cache of no tokens, with room for ``capacity`` (None: none)."""
    from onnxruntime import OrtValue

    return tuple(
        OrtValue.ortvalue_from_shape_and_type((batch, t.heads, capacity or 0, t.dim), t.element, device, device_id)
        for t in tensors
    )


def bind(
    binding: Any, tensors: Sequence[CacheTensor], cache: Cache, *, keep: bool, device: str, device_id: int
) -> None:
    """Bind ``cache`` as past; with ``keep`` also as, or beside new, present."""
    for tensor, value in zip(tensors, cache.values, strict=True):
        binding.bind_ortvalue_input(tensor.past, value)
        if keep and cache.capacity is not None:
            binding.bind_ortvalue_output(tensor.present, value)
        elif keep:
            binding.bind_output(tensor.present, device, device_id)


def as_float32(value: Any) -> NDArray[np.float32]:
    """A tensor in CPU memory as float32: the tensor's own memory where it is float32, else converted."""
    if value.element_type() != _BFLOAT16:
        array: NDArray[np.float32] = value.numpy().astype(np.float32, copy=False)
        return array
    # numpy has no bfloat16, and onnxruntime refuses to hand it out; it is the upper half of a float32.
    buffer = (ctypes.c_uint16 * (value.tensor_size_in_bytes() // 2)).from_address(value.data_ptr())
    bits = np.frombuffer(buffer, dtype=np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(value.shape())
