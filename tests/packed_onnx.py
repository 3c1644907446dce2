"""ONNX files with weights of random bits and zeros in patterns, to be packed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from sparsify.exporters.onnx_packed import PackAs
from sparsify.types import NofM

onnx = pytest.importorskip("onnx")
Bits = NDArray[Any]
# onnx.TensorProto data types -> type of the bit patterns
TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u4"), 10: np.dtype("u2"), 16: np.dtype("u2")}
PATTERNS = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(1, 8), NofM(1, 2)]
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bits(shape: tuple[int, ...], data_type: int, seed: int) -> Bits:
    """Finite floats, no +0.0, some -0.0."""
    rng = np.random.default_rng(seed)
    dtype = TYPES[data_type]
    sign = np.uint64(1) << np.uint64(8 * dtype.itemsize - 1)
    bits = rng.integers(1, int(sign) // 2, shape, dtype=np.uint64) | (rng.integers(0, 2, shape, dtype=np.uint64) * sign)
    bits[rng.random(shape) < 0.05] = sign
    return bits.astype(dtype)


def keep_random(shape: tuple[int, ...], pattern: NofM, axis: int, seed: int) -> NDArray[np.bool_]:
    order = np.random.default_rng(seed).random((*shape[:axis], *shape[axis + 1 :], shape[axis] // pattern.m, pattern.m))
    keep = order.argsort(axis=-1) < pattern.n
    return np.ascontiguousarray(np.moveaxis(keep.reshape(*order.shape[:-2], shape[axis]), -1, axis))


def write_model(folder: Path, weights: dict[str, tuple[int, Bits]], *, opset: int = 23, external: bool = True) -> Path:
    """A model whose output ``y_NAME`` is the weight in the shape [size] that its input says."""
    helper = onnx.helper
    initializers = [
        helper.make_tensor(name, data_type, bits.shape, bits.tobytes(), raw=True)
        for name, (data_type, bits) in weights.items()
    ]
    nodes = [helper.make_node("Reshape", [name, "size"], [f"y_{name}"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"y_{name}", t, ["k"]) for name, (t, _) in weights.items()]
    size = [helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])]
    graph = helper.make_graph(nodes, "g", size, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=64)
    return path


def several() -> dict[str, tuple[int, Bits]]:
    """Two of one layout, one along the other axis, experts, any pattern, and one that will not be packed."""
    weights = {name: (1, random_bits((32, 64), 1, seed)) for seed, name in enumerate("abcde")}
    for name, axis in (("a", 1), ("b", 1), ("c", 0)):
        weights[name][1][~keep_random((32, 64), NofM(2, 4), axis, 1)] = 0
    weights["d"][1][np.random.default_rng(0).random((32, 64)) < 0.6] = 0
    weights["f"] = (10, random_bits((3, 16, 24), 10, 9))
    weights["f"][1][~keep_random((3, 16, 24), NofM(2, 4), 1, 2)] = 0
    return weights


WANTED = {
    **{name: PackAs(NofM(2, 4), 1) for name in "abf"},
    "c": PackAs(NofM(2, 4), 0),
    "d": PackAs(None, 0),
    "e": PackAs(None, 0),
}
