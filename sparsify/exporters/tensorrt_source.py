"""The ONNX file an engine is built from: checked and hashed before TensorRT reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.exporters.onnx_graph import operator_domains
from sparsify.exporters.onnx_reader import OnnxWeights
from sparsify.exporters.tensorrt_layout import LinearLayout, check_layout
from sparsify.files import sha256_file

# onnx.TensorProto.DataType -> bits of a value; texts and undefined ones have no fixed size.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}
# onnx.TensorProto.DataType of ordinary float weights.
_NAMES = {1: "float32", 10: "float16", 16: "bfloat16", 11: "float64"}


@dataclass(frozen=True)
class Source:
    """An ONNX file that TensorRT may be given.

    Attributes:
        path: the file.
        sha256: name -> SHA-256 of the file and of its external data.
        precision: the float type that most weights have, as ``float16``.
        quantized: whether it carries quantisation scales.
        layout: its linears.
    """

    path: Path
    sha256: dict[str, str]
    precision: str
    quantized: bool
    layout: tuple[LinearLayout, ...]


def read_source(path: Path) -> Source:
    """Check an ONNX file: standard operators only, external data beside it and long enough.

    Raises:
        ModelError: what is wrong, in one line.
        MissingExtraError: onnx is absent.
    """
    OnnxWeights(path)
    import onnx

    domains = operator_domains(path)
    foreign = [f"{domain}::{op}" for domain, ops in domains.items() if domain not in ("", "ai.onnx") for op in ops]
    if foreign:
        some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ModelError(f"{path}: TensorRT does not know {some}; export the model with --layout standard")
    files = {path.name}
    sizes: dict[str, int] = {}
    for tensor in _tensors(onnx.load(path, load_external_data=False)):
        if tensor.data_location == tensor.EXTERNAL:
            files.add(_external(path, tensor))
        name = _NAMES.get(tensor.data_type)
        if name is not None:
            sizes[name] = sizes.get(name, 0) + math.prod(tensor.dims)
    operators = set(domains.get("", [])) | set(domains.get("ai.onnx", []))
    return Source(
        path=path,
        sha256={name: sha256_file(path.parent / name) for name in sorted(files)},
        precision=max(sizes, key=lambda name: sizes[name], default="float32"),
        quantized=bool(operators & {"QuantizeLinear", "DequantizeLinear"}),
        layout=check_layout(path),
    )


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model: initializers, sparse ones, those in attributes, subgraphs and local functions too."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from _parts(graph.sparse_initializer)
            nodes.extend(graph.node)
        else:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                yield from _parts((attribute.sparse_tensor, *attribute.sparse_tensors))
                graphs += [attribute.g, *attribute.graphs]


def _parts(sparse: Iterable[Any]) -> Iterator[Any]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _external(path: Path, tensor: Any) -> str:
    """The name of the file that holds a tensor, which lies beside the ONNX file and is long enough."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = str(where.get("location", ""))
    what = f"{path}: initializer {tensor.name}"
    if location in ("", ".", "..") or Path(location).name != location:
        raise ModelError(f"{what} names the external file {location!r}, not one beside it")
    file = path.parent / location
    bits = _BITS.get(tensor.data_type)
    try:
        needed = -(-math.prod(tensor.dims) * (bits or 0) // 8)
        offset, length = int(where.get("offset", 0)), int(where.get("length", needed))
        if bits is None or min((offset, *tensor.dims)) < 0 or length < needed:
            raise ValueError
    except ValueError as error:
        raise ModelError(f"{what} has a malformed size or place in its external file; export it again") from error
    try:
        if not file.is_file():
            raise ModelError(f"{file}: external data: is absent or no file")
        size = file.stat().st_size
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: external data: {error}") from error
    if size < offset + length:
        raise ModelError(f"{file}: truncated: {size} bytes, {path.name} wants {offset + length}")
    return location
