"""What an ONNX file says of itself before it is run: its operators, its linears, and where its weights lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import MissingExtraError, ModelError
from sparsify.exporters.onnx_functions import DOMAIN
from sparsify.runtimes.onnxruntime_settings import CPU, TENSORRT

# A weight reaches its product through these without its values being computed with.
_MOVES = {
    *("Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand"),
    *("Gather", "GatherND", "Slice", "Split"),
}
# Contrib operators whose matrices are tables (rotary angles, embeddings), not weights of a product.
_TABLES = {"GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding", "GatherBlockQuantized"}
_SUFFIX = re.compile(r"(\.weight)?(\.transposed)?$")
# How onnxruntime-genai's builder names the weight of a product.
_BUILT = re.compile(r"(.+)\.MatMul(NBits)?\.\w+$")
# onnx.TensorProto.DataType
_PRECISIONS = {1: "float32", 10: "float16", 16: "bfloat16"}
_FLOATS = {*_PRECISIONS, 11}
# What computes in any graph, whatever its types are called.
_HEAVY = re.compile(r"MatMul|Gemm|Attention|Softmax|Norm|MoE|Conv")


@dataclass(frozen=True)
class Linear:
    """A product with a weight.

    Attributes:
        names: linears of the checkpoint that this one is; several where they are fused.
        node: the node that multiplies.
        kernel: ``dense``, or what the graph itself asks for (``com.microsoft::MatMulNBits bits=8``).
    """

    names: tuple[str, ...]
    node: str
    kernel: str


@dataclass(frozen=True)
class Graph:
    """Of an ONNX file.

    Attributes:
        path: the file.
        linears: products with a weight, in graph order.
        grouped: whether it has com.microsoft's GroupQueryAttention, which takes padding on the right only.
        packed: whether weights are stored as functions of the domain of packed weights.
        precision: of the key/value cache: ``float32``, ``float16`` or ``bfloat16``; empty where it has none of these.
        floats: nodes that are known to give floating-point values.
        data: external data files, beside ``path``.
        inputs: name -> axes: a size, or the name of what it may be.
    """

    path: Path
    linears: tuple[Linear, ...]
    grouped: bool
    packed: bool
    precision: str
    floats: frozenset[str]
    data: tuple[Path, ...]
    inputs: Mapping[str, tuple[int | str, ...]]

    def computes(self, node: str, op_type: str) -> bool:
        """Whether a node works on activations, rather than on the few integers of shapes and masks."""
        return node in self.floats or bool(_HEAVY.search(op_type))

    def engaged(self, providers: Mapping[str, str], usual: str) -> dict[str, str]:
        """Per linear what runs it.

        Args:
            providers: node name -> execution provider.
            usual: of nodes that are not in ``providers``, because ONNX Runtime renamed them.
        """
        report = {}
        for linear in self.linears:
            provider = providers.get(linear.node, usual)
            kernel = "unknown (TensorRT EP)" if provider == TENSORRT else linear.kernel
            if provider == CPU and usual != CPU:
                kernel = f"{kernel} (on the CPU)"
            report.update(dict.fromkeys(linear.names, kernel))
        return report


def read_graph(path: Path) -> Graph:
    """The graph of ``path``; weights outside the file are not read, only their files' sizes.

    Raises:
        MissingExtraError: onnx is absent.
        ModelError: the file or its external data is missing, truncated, elsewhere than beside it, or not ONNX.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError('onnx is missing; pip install "sparsify-toolkit[onnx]"') from error
    if not path.is_file():
        raise ModelError(f"{path}: no such file; export the model first")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's error type differs between its implementations
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: truncated or not an ONNX file ({line}); export the model again") from error
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    return Graph(
        path,
        tuple(_linears(graph)),
        any(node.op_type == "GroupQueryAttention" for node in graph.node),
        any(function.domain == DOMAIN for function in model.functions),
        next(
            (_PRECISIONS.get(v.type.tensor_type.elem_type, "") for v in graph.input if v.name.startswith("past_")), ""
        ),
        frozenset(node.name for node in graph.node if any(types.get(name) in _FLOATS for name in node.output)),
        _external_files(path, graph.initializer),
        {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.input},
    )


def _external_files(path: Path, tensors: Iterable[Any]) -> tuple[Path, ...]:
    sizes: dict[Path, int] = {}
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        # A location from the file must not lead out of the artifact's folder.
        if location in ("", ".", "..") or Path(location).name != location:
            raise ModelError(f"{path}: {tensor.name} names the external file {location!r}, not a file beside it")
        data = path.parent / location
        if data not in sizes:
            if not data.is_file():
                raise ModelError(f"{data}: no such file, and {path.name} keeps its weights there; export again")
            sizes[data] = data.stat().st_size
        try:
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
        except ValueError:
            raise ModelError(f"{path}: {tensor.name}: offset or length is no number; export again") from None
        if end > sizes[data]:
            raise ModelError(
                f"{data}: {sizes[data]:,} bytes, and {tensor.name} ends at {end:,}; it is truncated, export again"
            )
    return tuple(sizes)


def _linears(graph: Any) -> Iterable[Linear]:
    carries = {tensor.name: tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    # Rows gathered from a matrix are an embedding look-up, not a weight; experts are gathered from 3-D stacks.
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    for node in graph.node:
        weights = [carries[name] for name in node.input if name in carries]
        if node.domain == DOMAIN:  # gives a weight under its own name
            carries.update({name: name for name in node.output})
            tables.update(name for name in node.output if ranks.get(name) == 2)
        elif node.op_type == "MatMulNBits" and len(node.input) > 1:
            bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
            yield Linear(_names(node.input[1]), node.name, f"{node.domain}::MatMulNBits bits={bits}")
        elif node.domain not in ("", "ai.onnx"):
            for weight in weights if node.op_type not in _TABLES else ():
                yield Linear(_names(weight), node.name, f"{node.domain}::{node.op_type}")
        elif node.op_type in ("MatMul", "Gemm"):
            for weight in weights:
                yield Linear(_names(weight), node.name, "dense")
        elif node.op_type in _MOVES and node.input and node.input[0] in carries:
            if "Gather" in node.op_type and carries[node.input[0]] in tables:
                continue
            carries.update(dict.fromkeys(node.output, carries[node.input[0]]))


def _names(initializer: str) -> tuple[str, ...]:
    """The checkpoint's linears behind an initializer: the builder calls self_attn ``attn``, and fuses q, k and v."""
    built = _BUILT.match(initializer)
    if built is None:
        return (_SUFFIX.sub("", initializer),)
    name = built[1].replace(".attn.", ".self_attn.")
    stem, fused, _ = name.partition(".qkv_proj")
    return tuple(f"{stem}.{part}_proj" for part in "qkv") if fused else (name,)
