"""Which linear layers of an ONNX graph can use TensorRT's sparse kernels at all; needs no TensorRT.

TensorRT asks that a weight is a constant, that of every four consecutive weights along the reduction at least two are
zero, and that the data type has sparse kernels. Sizes decide whether a sparse kernel also wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.exporters.onnx_reader import FLOAT8, INT8, UINT8, OnnxWeights

# Nodes through which TensorRT folds a constant; Transpose, which it also folds, turns the axes.
_TRANSPARENT = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear")
# onnx.TensorProto.DataType that sparse kernels exist for -> the reduction of one sparse tensor-core instruction
# (16x8x32 and 16x8x64 in the kernels' names), which the reduction has to fill.
_DEPTH = {10: 32, 16: 32, INT8: 64, FLOAT8: 64}
_NAMES = {1: "float32", INT8: "int8", 10: "float16", 16: "bfloat16", FLOAT8: "float8_e4m3fn"}
# Kernels store eight results at once.
_OUT_MULTIPLE = 8
# NVIDIA's staff name this as the size from which sparse kernels win (NVIDIA/TensorRT #3849, #4065).
WORTHWHILE = 256
# Rows of a weight that are checked at a time: bounds the memory for the check to a few MB.
_CHUNK = 4096


@dataclass(frozen=True)
class LinearLayout:
    """One layer with a weight.

    Attributes:
        node: name of the ONNX node; TensorRT's layers carry it.
        operator: MatMul, Gemm or Conv.
        weight: name of the initializer, or of the input where it is no constant.
        dtype: of the initializer, as ``float16``; empty where the weight is no constant.
        reduction: number of inputs that are summed over (per position of the kernel, for Conv).
        out: number of outputs.
        eligible: whether TensorRT can use sparse kernels for it.
        worthwhile: whether it is large enough for a sparse kernel to win, as far as is known.
        why: what stands against it, in one phrase; empty where it is eligible and worthwhile.
    """

    node: str
    operator: str
    weight: str
    dtype: str
    reduction: int
    out: int
    eligible: bool
    worthwhile: bool
    why: str


def is_two_four(weight: NDArray[Any], axis: int) -> bool:
    """Whether of every four consecutive values along ``axis`` at least two are zero; -0.0 is zero, NaN is not."""
    length = weight.shape[axis]
    if length % 4:
        return False
    moved = np.moveaxis(weight, axis, 0)
    for start in range(0, length, _CHUNK):
        part = moved[start : start + _CHUNK]
        # Bits rather than values: numpy compares bfloat16 one by one. Doubling drops the sign of zero.
        filled = (
            (part.view(f"u{part.dtype.itemsize}") << 1) != 0 if part.dtype.kind in "fV" else part != part.dtype.type(0)
        )
        kept = filled.reshape(-1, 4, *filled.shape[1:]).sum(axis=1, dtype=np.uint8)
        if (kept > 2).any():
            return False
    return True


@dataclass(frozen=True)
class _Constant:
    """A weight behind folded operators: its initializer, whether its axes are turned, and the type it multiplies in."""

    initializer: str
    transposed: bool
    data_type: int


def _trace(name: str, weights: OnnxWeights, producers: dict[str, Any]) -> _Constant | None:
    """The initializer behind a value, through operators that TensorRT folds; None where it is computed."""
    transposed, data_type, quantized = False, None, False
    for _ in range(len(producers) + 1):
        if name in weights.tensors:
            return _Constant(name, transposed, data_type or weights.tensors[name].data_type)
        node = producers.get(name)
        if node is None or not node.input:
            return None
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Transpose":
            if "perm" in attributes and list(attributes["perm"].ints) != [1, 0]:
                return None
            transposed = not transposed
        elif node.op_type not in _TRANSPARENT:
            return None
        # The last operator before the product decides; a quantised weight multiplies in its 8-bit type.
        if node.op_type == "Cast" and data_type is None and not quantized:
            data_type = attributes["to"].i if "to" in attributes else None
        quantized = quantized or node.op_type == "DequantizeLinear"
        if node.op_type == "QuantizeLinear" and data_type is None:
            zero = weights.tensors.get(node.input[2]) if len(node.input) > 2 else None
            data_type = zero.data_type if zero is not None else UINT8
        name = node.input[0]
    return None


def _linears(weights: OnnxWeights) -> Iterator[tuple[Any, str, int | None]]:
    """(node, name of its weight, axis of the reduction in it as the node sees it) of every layer with a weight."""
    for node in weights.nodes:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "MatMul" and len(node.input) == 2:
            yield node, node.input[1], 0
        elif node.op_type == "Gemm" and len(node.input) >= 2:
            yield node, node.input[1], 1 if "transB" in attributes and attributes["transB"].i else 0
        elif node.op_type == "Conv" and len(node.input) >= 2:
            yield node, node.input[1], 1


def check_layout(model_path: Path) -> tuple[LinearLayout, ...]:
    """Every MatMul, Gemm and Conv of the graph that has a weight, in the order of the graph.

    A product of two activations, as in attention, has none and is left out. External data is memory-mapped and read
    once; the memory that is needed beside does not grow with the weights.

    Args:
        model_path: the ONNX file; external data lies beside it.

    Raises:
        ModelError: the file or its data is missing or truncated, or a weight cannot be read.
        MissingExtraError: onnx is absent.
    """
    weights = OnnxWeights(model_path)
    producers = {output: node for node in weights.nodes for output in node.output}
    rows = []
    for node, name, axis in _linears(weights):
        constant = _trace(name, weights, producers)
        if constant is None:
            if node.op_type != "MatMul":
                rows.append(_refused(node, name, "the weight is computed, not a constant"))
            elif _comes_from_weights(name, weights.tensors, producers):
                rows.append(_refused(node, name, "the weight is picked or computed from constants at run time"))
            continue
        tensor = weights.tensors[constant.initializer]
        rank = len(tensor.dims)
        if rank != 2 and node.op_type != "Conv":
            rows.append(_refused(node, constant.initializer, f"the weight has {rank} axes, not 2"))
            continue
        axis = 1 - axis if constant.transposed and axis is not None else axis
        rows.append(_judge(node, constant, weights, axis))
    return tuple(rows)


def _comes_from_weights(name: str, initializers: Any, producers: dict[str, Any]) -> bool:
    """Whether a value is taken from a constant of two or more axes, as an expert's weight is."""
    for _ in range(len(producers) + 1):
        node = producers.get(name)
        if node is None or not node.input:
            return False
        first = node.input[0]
        if node.op_type in ("Gather", "GatherND", "Slice", "Split") and first in initializers:
            return len(initializers[first].dims) > 1
        name = first
    return False


def _refused(node: Any, weight: str, why: str) -> LinearLayout:
    return LinearLayout(node.name, node.op_type, weight, "", 0, 0, eligible=False, worthwhile=False, why=why)


def _judge(node: Any, constant: _Constant, weights: OnnxWeights, axis: int | None) -> LinearLayout:
    name = constant.initializer
    dims = tuple(weights.tensors[name].dims)
    if axis is None or len(dims) < 2:
        return _refused(node, name, f"the weight has {len(dims)} axes")
    reduction, out = dims[axis], dims[0 if node.op_type == "Conv" else 1 - axis]
    dtype = _NAMES.get(constant.data_type, f"data type {constant.data_type}")
    depth = _DEPTH.get(constant.data_type)
    why = ""
    if depth is None:
        why = f"{dtype} has no sparse kernels; export with fp16 or bf16, or int8 with scales"
    elif any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute):
        why = "a convolution in groups"
    elif reduction % depth or out % _OUT_MULTIPLE:
        why = f"misaligned: {reduction} inputs and {out} outputs, want multiples of {depth} and {_OUT_MULTIPLE}"
    elif not is_two_four(weights.read(name), axis):
        why = "not 2:4 along the inputs"
    eligible = not why
    worthwhile = eligible and min(reduction, out) > WORTHWHILE
    if eligible and not worthwhile:
        why = f"small: {reduction} inputs and {out} outputs; sparse kernels win above {WORTHWHILE}"
    return LinearLayout(node.name, node.op_type, name, dtype, reduction, out, eligible, worthwhile, why)


def summary(rows: tuple[LinearLayout, ...]) -> str:
    """One line on what sparse kernels could gain."""
    eligible = [row for row in rows if row.eligible]
    worthwhile = sum(row.worthwhile for row in rows)
    reasons = {row.why for row in rows if not row.eligible}
    text = f"{len(eligible)} of {len(rows)} linears can use sparse kernels, {worthwhile} are large enough to gain"
    return f"{text}; not the others: {'; '.join(sorted(reasons)[:3])}" if reasons else text
