"""The graph behind an ONNX export: names that mean something, and the checks a written file has to pass."""

import re
import tempfile
from pathlib import Path
from typing import Any

from sparsify.errors import VerificationError

_SYMBOL = re.compile(r"\bs\d+\b")


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause: the outer ones are the exporter's advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}" if lines else type(error).__name__


def _axis_names(value_name: str) -> dict[int, str]:
    if value_name == "attention_mask":
        return {0: "batch", 1: "total_sequence"}
    if value_name.startswith("past_key_values."):
        return {0: "batch", 2: "past_sequence"}
    if value_name.startswith("present."):
        return {0: "batch", 2: "total_sequence"}
    return {0: "batch", 1: "sequence"}


def rename_axes(graph: Any) -> None:
    """Give dynamic axes their meaning as name, in the inputs, the outputs and every value between."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in _axis_names(value.name).items():
            names[str(value.shape[axis])] = name
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}

    def renamed(dim: Any) -> Any:
        if isinstance(dim, int) or dim.value is None:
            return dim
        text = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), dim.value)
        if sorted(text.split(" + ")) == ["past_sequence", "sequence"]:
            text = "total_sequence"
        return onnx_ir.SymbolicDim(text)

    inner = (value for node in onnx_ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs)
    for value in (*graph.inputs, *inner, *graph.initializers.values()):
        if value.shape is not None:
            dims = [renamed(dim) for dim in value.shape]
            if id(value) in ends:
                for axis, name in _axis_names(value.name).items():
                    dims[axis] = onnx_ir.SymbolicDim(name)
            value.shape = onnx_ir.Shape(dims)


def rename_weights(graph: Any, model: Any) -> None:
    """Name initializers as the checkpoint does; a folded transpose of a parameter gets ``.transposed`` behind.

    Folded constants are views of the parameter's own memory (which is also why export holds the weights once).
    """
    owners = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    for initializer in list(graph.initializers.values()):
        array = initializer.const_value.numpy()
        name = owners.get(array.ctypes.data) if array.ndim > 1 else None
        if name is not None and array.size == model.get_parameter(name).numel():
            same = array.shape == tuple(model.get_parameter(name).shape) and array.flags.c_contiguous
            name = name if same else f"{name}.transposed"
        else:
            name = initializer.name.removeprefix("model.") if initializer.name.startswith("model.model.") else None
        if name and name not in graph.initializers:
            initializer.name = name


def operator_domains(model_path: Path) -> dict[str, list[str]]:
    """Operator types by domain, over the graph, its subgraphs and its functions (sorted; '' is the ONNX standard)."""
    import onnx

    model = onnx.load(model_path, load_external_data=False)
    found: dict[str, set[str]] = {}

    def walk(nodes: Any) -> None:
        for node in nodes:
            found.setdefault(node.domain, set()).add(node.op_type)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    walk(graph.node)

    walk(model.graph.node)
    for function in model.functions:
        walk(function.node)
    return {domain: sorted(found[domain]) for domain in sorted(found)}


def check_standard(path: Path) -> None:
    """Refuse a file with operators outside the standard, or that ONNX's checker or shape inference refuse."""
    domains = operator_domains(path)
    foreign = [f"{domain}::{op}" for domain, ops in domains.items() if domain not in ("", "ai.onnx") for op in ops]
    if foreign or not domains:
        raise VerificationError(f"{path}: operators outside the ONNX standard: {', '.join(foreign) or 'no operators'}")
    _check(path, path)


def check_contributed(path: Path) -> None:
    """Refuse a file with operators that ONNX Runtime's contributed ones do not explain, or that ONNX's checker refuses.

    The checker knows nothing of contributed operators, and passes over their domain; the one of them that ONNX Runtime
    keeps in the standard's domain is moved there in the copy that is checked.
    """
    import onnx

    domains = operator_domains(path)
    foreign = sorted(set(domains) - {"", "ai.onnx", "com.microsoft"})
    if foreign or not domains:
        raise VerificationError(f"{path}: operators of unknown domains: {', '.join(foreign) or 'no operators'}")
    model = onnx.load(path, load_external_data=False)
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    # The builder notes a wrong rank for its constants, which say themselves what they are.
    noted = [value for value in model.graph.value_info if value.name not in constants]
    del model.graph.value_info[:]
    model.graph.value_info.extend(noted)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as copy:
        copy.write(model.SerializeToString())
        copy.flush()
        _check(Path(copy.name), path)


def _check(file: Path, path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            inferred = Path(scratch) / file.name
            onnx.shape_inference.infer_shapes_path(str(file), str(inferred), check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"{path}: refused by ONNX's own checks: {first_line(error)}") from error
