"""The ONNX file an engine is built from: checked and hashed before TensorRT reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.exporters.onnx_graph import operator_domains
from sparsify.exporters.onnx_reader import OnnxWeights
from sparsify.exporters.tensorrt_layout import LinearLayout, check_layout
from sparsify.files import sha256_file

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
    weights = OnnxWeights(path)
    domains = operator_domains(path)
    foreign = [f"{domain}::{op}" for domain, ops in domains.items() if domain not in ("", "ai.onnx") for op in ops]
    if foreign:
        some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ModelError(f"{path}: TensorRT does not know {some}; export the model with --layout standard")
    files = {path.name}
    sizes: dict[str, int] = {}
    for tensor in _tensors(weights):
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


def _tensors(weights: OnnxWeights) -> Iterator[Any]:
    """Every tensor of the graph, those in attributes and subgraphs too."""
    yield from weights.tensors.values()
    pending = list(weights.nodes)
    while pending:
        for attribute in pending.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                pending.extend(graph.node)


def _external(path: Path, tensor: Any) -> str:
    """The name of the file that holds a tensor, which lies beside the ONNX file and is long enough."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = str(where.get("location", ""))
    if not location or Path(location).name != location:
        raise ModelError(f"{path}: initializer {tensor.name} names the external file {location!r}, not one beside it")
    try:
        end = int(where.get("offset", 0)) + int(where.get("length", 0))
        size = (path.parent / location).stat().st_size
    except OSError as error:
        raise ModelError(f"{path.parent / location}: external data: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: initializer {tensor.name} has a malformed place in its external file") from error
    if size < end:
        raise ModelError(f"{path.parent / location}: truncated: {size} bytes, {path.name} wants {end}")
    return location
