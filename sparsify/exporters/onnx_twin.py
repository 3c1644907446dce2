"""A float32 twin of an exported graph: the same nodes and weights, computed in float32 on any CPU.

Graphs in bfloat16 run on no CPU here, and those in float16 or with quantised activations differ from PyTorch by their
rounding, which hides small faults. The twin has every 16-bit float widened, exactly, and the activations of quantised
products left unrounded, so that what remains different from PyTorch is a fault of the graph.
"""

from pathlib import Path
from typing import Any

from sparsify.exporters.onnx_reader import BFLOAT16, FLOAT, FLOAT16
from sparsify.files import writing

_NARROW = {FLOAT16, BFLOAT16}
# accuracy_level of MatMulNBits: compute in float32.
_EXACT = 1


def write_float32_twin(model_path: Path, folder: Path) -> Path:
    """Write the twin of ``model_path`` into ``folder``, or give ``model_path`` itself where nothing would change.

    Weights are widened and written one at a time.

    Raises:
        OutputError: ``folder`` cannot be written.
    """
    import onnx_ir

    model = onnx_ir.load(model_path)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    changed = sum(_widen(graph) for graph in graphs)
    if not changed:
        return model_path
    twin = folder / "model.onnx"
    with writing(twin):
        onnx_ir.save(model, twin, external_data="model.onnx.data")
    return twin


def _widen(graph: Any) -> int:
    """Widen values, constants and casts of a graph and its subgraphs in place; returns how many."""
    import onnx_ir

    changed = 0
    for value in graph.initializers.values():
        if value.const_value.dtype in _NARROW:
            value.const_value = _lazy(value.const_value)
            changed += 1
    nodes = list(onnx_ir.traversal.RecursiveGraphIterator(graph))
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for value in values:
        if value.dtype is not None and value.dtype in _NARROW:
            value.dtype = onnx_ir.DataType.FLOAT
            changed += 1
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype in _NARROW:
                node.attributes[name] = onnx_ir.AttrTensor(name, _wide(attribute.value))
                changed += 1
            elif node.op_type == "Cast" and name == "to" and attribute.value in _NARROW:
                node.attributes[name] = onnx_ir.AttrInt64(name, FLOAT)
                changed += 1
            elif name == "accuracy_level" and attribute.value != _EXACT:
                node.attributes[name] = onnx_ir.AttrInt64(name, _EXACT)
                changed += 1
    return changed


def _lazy(tensor: Any) -> Any:
    import onnx_ir

    return onnx_ir.LazyTensor(lambda: _wide(tensor), dtype=onnx_ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name)


def _wide(tensor: Any) -> Any:
    import numpy as np
    import onnx_ir

    return onnx_ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
