"""Packing the weights of an ONNX file in place, and unpacking a packed one into a dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError, OutputError, UsageError, VerificationError
from sparsify.exporters.onnx_functions import (
    DOMAIN,
    MAX_OPSET,
    MIN_OPSET,
    PREFIX,
    UINT4_IR_VERSION,
    UINT4_OPSET,
    load_peak_bytes,
    scaffold,
)
from sparsify.exporters.onnx_graph import first_line
from sparsify.exporters.onnx_packed_codec import bit_type, count_entries, encode
from sparsify.exporters.onnx_packed_files import (
    DataWriter,
    inner_nodes,
    inner_tensors,
    is_external,
    load_proto,
    location,
    raw_bytes,
)
from sparsify.exporters.onnx_packed_layout import ITEM_BYTES, Layout, part_names
from sparsify.exporters.onnx_packed_reader import RECORD, PackedWeights, checksum, is_packed, opset_of, record_text
from sparsify.files import write_atomic
from sparsify.types import NofM

# Functions in a model came with this version of the file format.
_MIN_IR_VERSION = 8


@dataclass(frozen=True)
class PackAs:
    """How an initializer is to be packed.

    Attributes:
        pattern: N:M that every group keeps at most; None packs any pattern.
        axis: along which the inputs lie: last for [out, in], last but one for [in, out]. Not used without a pattern.
    """

    pattern: NofM | None
    axis: int


@dataclass(frozen=True)
class PackReport:
    """What ``pack_onnx`` did.

    Attributes:
        packed: names of the initializers that are packed now.
        dense: initializers that were asked for and stay dense -> why.
        packed_bytes: of the packed initializers' values, masks and gaps.
        dense_bytes: of the same initializers before.
        load_peak_bytes: predicted peak while plain ONNX Runtime loads the file, weights only.
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str]
    packed_bytes: int
    dense_bytes: int
    load_peak_bytes: int


def pack_onnx(model_path: Path, weights: Mapping[str, PackAs]) -> PackReport:
    """Pack initializers of an ONNX file in place; plain ONNX Runtime rebuilds them, bit for bit, at session creation.

    The new data file ``<model>.packed.data`` appears first, then the model file that names it, and the old data files
    go last: at any instant the model file names whole data. Memory: the model file, one weight, its packed form and
    some MiB. Nothing is written where no initializer gains.

    Args:
        model_path: the ``.onnx`` file; opset 18 to 24.
        weights: initializer name -> pattern and axis; float32, float16 or bfloat16 with two or three axes.

    Raises:
        MissingExtraError: the onnx package is absent.
        UsageError: an axis that the initializer does not have.
        ModelError: the file or its external data are missing or damaged, it is packed already, lacks an initializer,
            or has another opset.
        VerificationError: a group keeps more than its pattern, or ONNX's checks refuse the result; they are made where
            onnx knows every operator, which it does not in graphs with operators of ONNX Runtime.
        OutputError: the folder cannot be written.
    """
    model = load_proto(model_path)
    _check_packable(model_path, model)
    layouts, dense = _plan(model_path, model, weights)
    others = [tensor for tensor in model.graph.initializer if tensor.name not in layouts]
    other_bytes = sum(raw_bytes(model_path, tensor).nbytes for tensor in others)
    report = PackReport(
        tuple(layouts),
        dense,
        sum(x.packed_bytes for x in layouts.values()),
        sum(x.dense_bytes for x in layouts.values()),
        load_peak_bytes(layouts, other_bytes),
    )
    if not layouts:
        return report
    tensors = [*model.graph.initializer, *inner_tensors(model)]
    before = {location(tensor) for tensor in tensors if is_external(tensor)}
    data_path = _data_path(model_path, f"{model_path.name}.packed.data", before)
    write_atomic(data_path, lambda temporary: _pack(model_path, model, layouts, temporary, data_path.name))
    _write_model(model_path, model, data_path)
    for name in before - {model_path.name}:
        (model_path.parent / name).unlink(missing_ok=True)
    return report


def unpack_onnx(model_path: Path, out_dir: Path) -> None:
    """Write a packed model as a dense one: ``<model>`` and ``<model>.data`` in ``out_dir``.

    The explicit step for models that ONNX Runtime should not fold, and for readers that take no functions, as TensorRT.
    Each weight is checked before it is unpacked; memory: the model file, one packed weight and the same one dense.

    Args:
        model_path: the packed ``.onnx`` file.
        out_dir: existing folder without a file of that name.

    Raises:
        MissingExtraError: the onnx package is absent.
        ModelError: not packed, damaged, or not as this version writes it; nothing appears in ``out_dir`` then.
        VerificationError: ONNX's checks refuse the result, as for ``pack_onnx``.
        OutputError: ``out_dir`` is no folder, holds such a model already, or cannot be written.
    """
    if not out_dir.is_dir():
        raise OutputError(f"{out_dir}: is not a folder")
    path = out_dir / model_path.name
    data_path = path.with_name(f"{path.name}.data")
    for taken in (path, data_path):
        if taken.exists():
            raise OutputError(f"{taken}: exists; choose another folder to unpack into")
    weights = PackedWeights(model_path)
    model = weights.dense_model()

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer = DataWriter(file, data_path.name)
            for tensor in model.graph.initializer:
                if tensor.name in weights.layouts:
                    writer.put(tensor, weights.read_bits(tensor.name))
                else:
                    writer.move(model_path, tensor)
            _move_inner(model_path, model, writer)

    write_atomic(data_path, fill)
    _write_model(path, model, data_path)


def _check_packable(path: Path, model: Any) -> None:
    if is_packed(model):
        raise ModelError(f"{path}: holds packed weights already")
    opset = opset_of(model)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelError(f"{path}: opset {opset}; export it with opset {MIN_OPSET} to {MAX_OPSET} to pack it")
    names = {name for node in model.graph.node for name in node.output} | {x.name for x in model.graph.initializer}
    if any(name.startswith(PREFIX) for name in names) or any(x.domain == DOMAIN for x in model.opset_import):
        raise ModelError(f"{path}: uses names of its own that begin with {PREFIX}")


def _plan(path: Path, model: Any, weights: Mapping[str, PackAs]) -> tuple[dict[str, Layout], dict[str, str]]:
    """The layouts of what will be packed, and why the rest is not."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    layouts: dict[str, Layout] = {}
    dense: dict[str, str] = {}
    for name, wanted in weights.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelError(f"{path}: has no initializer {name!r}")
        shape = tuple(tensor.dims)
        if tensor.data_type not in ITEM_BYTES:
            dense[name] = f"is of ONNX data type {tensor.data_type}, not float32, float16 or bfloat16"
        elif name in ends:
            dense[name] = "is an input or output of the graph as well"
        else:
            layout = _layout(path, tensor, shape, wanted, opset_of(model))
            if layout.obstacle is not None:
                dense[name] = layout.obstacle
            elif tensors.keys() & set(part_names(name, layout)):
                dense[name] = "has a neighbour of the name that its values or mask would take"
            else:
                layouts[name] = layout
    return layouts, dense


def _layout(path: Path, tensor: Any, shape: tuple[int, ...], wanted: PackAs, opset: int) -> Layout:
    if wanted.pattern is None:
        bits = _bits(path, tensor)
        choices = [
            Layout(shape, tensor.data_type, None, 0, count_entries(bits, gap_bits), gap_bits)
            for gap_bits in ((4, 8) if opset >= UINT4_OPSET else (8,))
        ]
        return min(choices, key=lambda layout: layout.packed_bytes)
    if not 0 <= wanted.axis < len(shape):
        raise UsageError(f"initializer {tensor.name}: axis {wanted.axis} of {list(shape)}; give the axis of the inputs")
    n_values = prod(shape) // wanted.pattern.m * wanted.pattern.n
    return Layout(shape, tensor.data_type, wanted.pattern, wanted.axis, n_values)


def _bits(path: Path, tensor: Any) -> Any:
    """Bit patterns of a float tensor in its shape."""
    data = raw_bytes(path, tensor)
    dtype = bit_type(tensor.data_type)
    expected = dtype.itemsize * prod(tensor.dims)
    if data.nbytes != expected:
        raise ModelError(f"{path}: initializer {tensor.name} holds {data.nbytes} bytes, want {expected}")
    return data.view(dtype).reshape(tuple(tensor.dims))


def _data_path(model_path: Path, name: str, before: set[str]) -> Path:
    if name in before:
        raise ModelError(
            f"{model_path}: its external data file is called {name}, as the packed one would be; rename it"
        )
    return model_path.with_name(name)


def _pack(path: Path, model: Any, layouts: dict[str, Layout], temporary: Path, data_name: str) -> None:
    """Write the data file of the packed model to ``temporary`` and turn ``model`` into the packed model."""
    from onnx import TensorProto

    graph = model.graph
    kept, checksums = [], {}
    with temporary.open("wb") as file:
        writer = DataWriter(file, data_name)
        for tensor in graph.initializer:
            layout = layouts.get(tensor.name)
            if layout is None:
                writer.move(path, tensor)
                kept.append(tensor)
                continue
            values, places = encode(_bits(path, tensor), layout, tensor.name)
            checksums[tensor.name] = (checksum(values, tensor.name, layout), checksum(places, tensor.name, layout))
            values_name, places_name = part_names(tensor.name, layout)
            for name, data_type, shape, data in (
                (values_name, layout.data_type, layout.values_shape, values),
                (places_name, layout.places_type, layout.places_shape, places),
            ):
                part = TensorProto(name=name, data_type=data_type, dims=shape)
                writer.put(part, data)
                kept.append(part)
        _move_inner(path, model, writer)
    opset = opset_of(model)
    made = scaffold(layouts, opset)
    _replace(graph.initializer, [*kept, *made.initializers])
    _replace(graph.node, [*made.nodes, *graph.node])
    infos = [info for info in graph.value_info if info.name not in layouts]
    _replace(graph.value_info, [*infos, *made.value_infos])
    model.functions.extend(made.functions)
    model.opset_import.add(domain=DOMAIN, version=1)
    model.metadata_props.add(key=RECORD, value=record_text(layouts, checksums))
    narrow = any(layout.gap_bits == 4 for layout in layouts.values())
    model.ir_version = max(model.ir_version, UINT4_IR_VERSION if narrow else _MIN_IR_VERSION)


def _replace(items: Any, new: list[Any]) -> None:
    new = list(new)
    del items[:]
    items.extend(new)


def _move_inner(path: Path, model: Any, writer: DataWriter) -> None:
    for tensor in inner_tensors(model):
        if is_external(tensor):
            writer.move(path, tensor)


def _is_known(model: Any) -> bool:
    """Whether onnx has a schema for every operator; it refuses models with others, packed or not."""
    import onnx

    own = {(function.domain, function.name) for function in model.functions}
    operators = {(node.domain, node.op_type) for node in inner_nodes(model)}
    return all(onnx.defs.has(op_type, domain) for domain, op_type in operators - own)


def _write_model(path: Path, model: Any, data_path: Path) -> None:
    """Write the model file beside its data; if that fails, or ONNX's checks refuse it, its data go again."""
    import onnx

    def write(temporary: Path) -> None:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        if not _is_known(model):
            return
        try:
            onnx.checker.check_model(str(temporary))
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                inferred = str(Path(scratch) / path.name)
                onnx.shape_inference.infer_shapes_path(str(temporary), inferred, check_type=True, strict_mode=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise VerificationError(f"{path}: refused by ONNX's own checks: {first_line(error)}") from error

    try:
        if data_path.stat().st_size == 0:
            data_path.unlink()
        write_atomic(path, write)
    except BaseException:
        data_path.unlink(missing_ok=True)
        raise
