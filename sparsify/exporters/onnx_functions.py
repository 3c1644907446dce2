"""Local ONNX functions that rebuild a dense weight from packed values, and the nodes that call them.

Everything here is made of standard operators of opset 18 to 24 whose output shapes follow from their inputs' shapes:
ONNX Runtime folds such calls into plain initializers when a session is created, and (1.32 at least) refuses to fold
operators as NonZero or Compress, whose output size depends on values. It keeps what it computes for every weight until
all are folded, so the functions are those with the fewest bytes of intermediate results.

Two kinds of function, in the domain ``sparsify``:

``Unpack{v}of8`` (v kept of every 8 along an axis: 4 for 2:4, 4:8 and 1:2)
    The positions of the kept weights come from a table of the bits of 256 bytes, one look-up for each of the v values
    of a byte, and the values are scattered into zeros. Tables (with the byte's place in them) and zeros are made once
    a model for each size.
``UnpackGaps`` (any pattern)
    Each value comes with its distance from the one before; running sums are the positions in the flattened weight, to
    which the values are scattered. A distance that the integer type cannot hold is bridged by values that are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.exporters.onnx_packed_layout import BFLOAT16, FLOAT, Layout, part_names

DOMAIN, PREFIX = "sparsify", "sparsify."
MIN_OPSET, MAX_OPSET = 18, 24
# UINT4 came with this opset, in this version of the file format.
UINT4_OPSET, UINT4_IR_VERSION = 21, 10
_INT32 = 6


@dataclass(frozen=True)
class Scaffold:
    """Everything that a packed model has beside values and masks; a pure function of the layouts and the opset.

    Attributes:
        nodes: NodeProto, in topological order; the last ones have the weights' names as outputs.
        initializers: TensorProto, small tables, all named ``sparsify.*``.
        functions: FunctionProto.
        value_infos: ValueInfoProto of the weights.
        shared_bytes: what is computed once a model when it is folded.
    """

    nodes: tuple[Any, ...]
    initializers: tuple[Any, ...]
    functions: tuple[Any, ...]
    value_infos: tuple[Any, ...]
    shared_bytes: int


def _positions(per_byte: int) -> NDArray[np.int32]:
    """[per_byte, 1, 256]: position in the byte of its k-th set bit; 0 for bytes that have another number of bits."""
    table = np.zeros((per_byte, 1, 256), np.int32)
    for byte in range(256):
        found = [bit for bit in range(8) if byte >> bit & 1]
        if len(found) == per_byte:
            table[:, 0, byte] = found
    return table


def _functions(kinds: set[int], opset: int) -> tuple[Any, ...]:
    from onnx import AttributeProto, helper

    imports = [helper.make_opsetid("", opset)]
    node = helper.make_node

    def function(name: str, inputs: list[str], outputs: list[str], nodes: list[Any], attributes: list[str]) -> Any:
        return helper.make_function(DOMAIN, name, inputs, outputs, nodes, imports, attributes)

    made = []
    for v in sorted(kinds - {0}):
        tables = [f"table_{k}" for k in range(v)]
        parts = [f"part_{k}" for k in range(v)]
        flat = [node("Reshape", [part, "flat"], [table]) for part, table in zip(parts, tables, strict=True)]
        made.append(
            function(
                f"Tables{v}of8",
                ["positions", "starts", "eighths"],
                tables,
                [
                    # starts are 256 a byte, positions 8 a byte.
                    node("Div", ["starts", "eighths"], ["columns"]),
                    node("Add", ["positions", "columns"], ["all"]),
                    node("Split", ["all"], parts, axis=0, num_outputs=v),
                    node("Constant", [], ["flat"], value_ints=[-1]),
                    *flat,
                ],
                [],
            )
        )
        join = node("Concat", parts, ["indices"])
        scatter = node("ScatterElements", ["zeros", "indices", "values"], ["weight"])
        for reader in (join, scatter):
            reader.attribute.append(helper.make_attribute_ref("axis", AttributeProto.INT))
        made.append(
            function(
                f"Unpack{v}of8",
                ["values", "mask", "zeros", "starts", *tables],
                ["weight"],
                [
                    node("Cast", ["mask"], ["bytes"], to=_INT32),
                    node("Add", ["bytes", "starts"], ["rows"]),
                    *[node("Gather", [table, "rows"], [part]) for table, part in zip(tables, parts, strict=True)],
                    join,
                    scatter,
                ],
                ["axis"],
            )
        )
    if 0 in kinds:
        made.append(
            function(
                "UnpackGaps",
                ["values", "gaps", "zeros", "shape"],
                ["weight"],
                [
                    node("Cast", ["gaps"], ["distances"], to=_INT32),
                    node("Constant", [], ["axis"], value_int=0),
                    node("CumSum", ["distances", "axis"], ["positions"]),
                    node("ScatterElements", ["zeros", "positions", "values"], ["flat"], axis=0),
                    node("Reshape", ["flat", "shape"], ["weight"]),
                ],
                [],
            )
        )
    return tuple(made)


def scaffold(layouts: Mapping[str, Layout], opset: int) -> Scaffold:
    """The nodes, tables and functions that unpack ``layouts`` (weight name -> layout) in a model of that opset."""
    from onnx import helper, numpy_helper

    nodes: list[Any] = []
    calls: list[Any] = []
    tables: dict[str, Any] = {}
    made: set[str] = set()
    shared_bytes = 0

    def table(name: str, values: Any) -> str:
        name = PREFIX + name
        if name not in tables:
            tables[name] = numpy_helper.from_array(values, name)
        return name

    def shape_table(shape: tuple[int, ...]) -> str:
        return table(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))

    def zeros(layout: Layout) -> str:
        nonlocal shared_bytes
        shape = layout.shape if layout.pattern else (prod(layout.shape),)
        name = f"{PREFIX}zeros.{layout.data_type}.{'x'.join(map(str, shape))}"
        if name not in made:
            made.add(name)
            # Below opset 20 ConstantOfShape makes no bfloat16.
            wide = layout.data_type == BFLOAT16
            value = helper.make_tensor("", FLOAT if wide else layout.data_type, [1], [0.0])
            filled = f"{name}.wide" if wide else name
            nodes.append(helper.make_node("ConstantOfShape", [shape_table(shape)], [filled], value=value))
            if wide:
                nodes.append(helper.make_node("Cast", [filled], [name], to=BFLOAT16))
            shared_bytes += layout.dense_bytes * (3 if wide else 1)
        return name

    def position_tables(layout: Layout) -> list[str]:
        nonlocal shared_bytes
        v, units = layout.per_byte, layout.shape[layout.axis] // 8
        names = [f"{PREFIX}positions.{v}of8.{units}.{k}" for k in range(v)]
        if names[0] not in made:
            made.add(names[0])
            inputs = [table(f"positions.{v}of8", _positions(v)), column(units), table("eighths", np.int32(32))]
            nodes.append(helper.make_node(f"Tables{v}of8", inputs, names, domain=DOMAIN))
            shared_bytes += 3 * v * units * 256 * 4
        return names

    def column(units: int) -> str:
        return table(f"starts.{units}.column", (256 * np.arange(units, dtype=np.int32))[:, None])

    for name, layout in layouts.items():
        inputs = [*part_names(name, layout), zeros(layout)]
        attributes = {}
        if layout.pattern is None:
            inputs.append(shape_table(layout.shape))
        else:
            units = layout.shape[layout.axis] // 8
            last = layout.axis == len(layout.shape) - 1
            row = table(f"starts.{units}", 256 * np.arange(units, dtype=np.int32)) if last else column(units)
            inputs += [row, *position_tables(layout)]
            attributes["axis"] = layout.axis
        calls.append(helper.make_node(layout.function, inputs, [name], domain=DOMAIN, **attributes))
    return Scaffold(
        (*nodes, *calls),
        tuple(tables.values()),
        _functions({layout.per_byte for layout in layouts.values()}, opset),
        tuple(helper.make_tensor_value_info(name, x.data_type, x.shape) for name, x in layouts.items()),
        shared_bytes,
    )


def load_peak_bytes(layouts: Mapping[str, Layout], other_bytes: int = 0) -> int:
    """Bytes that plain ONNX Runtime needs at most while it loads a packed model and folds it, weights only.

    The packed file's pages, everything computed for every weight, the tables and zeros shared by them, and the other
    initializers. What ONNX Runtime folds of those, and a provider that changes the weights' type when it loads them
    (float16 on the CPU), come on top.

    Args:
        layouts: weight name -> layout.
        other_bytes: of the initializers that are not packed.
    """
    folding = sum(x.folded_bytes + x.packed_bytes for x in layouts.values())
    return folding + scaffold(layouts, MIN_OPSET).shared_bytes + other_bytes
