"""Single graphs in ONNX Runtime: types of values, what is no decoder, memory that is not there, foreign operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsify.errors import ModelError
from sparsify.runtimes.onnxruntime_cache import as_float32
from sparsify.runtimes.onnxruntime_errors import load_error, run_error
from sparsify.runtimes.onnxruntime_graph import Graph, Linear, read_graph
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.onnxruntime_settings import OrtSettings

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ONE = OrtSettings(threads=1)


def _graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], path: Path) -> None:
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)


def test_a_graph_that_is_no_decoder(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", 1, ["n", 2]), value("y", 1, ["n", 2])
    _graph([onnx.helper.make_node("Relu", ["x"], ["y"])], [x], [y], tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="not a decoder with a cache: lacks attention_mask, input_ids, logits"):
        OnnxRuntimeSession(tmp_path, ONE)


@pytest.mark.parametrize("element", [1, 10, 16])
def test_logits_of_any_float_type_come_as_float32(element: int, tmp_path: Path) -> None:
    """And the cache of a step goes into the next in its own type, which numpy need not have."""
    value = onnx.helper.make_tensor_value_info
    shape = [2, "past", 2]
    inputs = [value("input_ids", 7, ["batch", "sequence"]), value("attention_mask", 7, ["batch", "total"])]
    inputs += [value(f"past_key_values.0.{kind}", element, ["batch", *shape]) for kind in ("key", "value")]
    outputs = [value("logits", element, ["batch", "sequence", 8])]
    outputs += [value(f"present.0.{kind}", element, ["batch", 2, "total", 2]) for kind in ("key", "value")]
    node = onnx.helper.make_node
    nodes = [
        node("Constant", [], ["depth"], value_int=8),
        node("Constant", [], ["values"], value_floats=[0.0, -2.5]),
        node("OneHot", ["input_ids", "depth", "values"], ["hot"]),
        node("Cast", ["hot"], ["logits"], to=element),
        *(node("Identity", [f"past_key_values.0.{kind}"], [f"present.0.{kind}"]) for kind in ("key", "value")),
    ]
    _graph(nodes, inputs, outputs, tmp_path / "model.onnx")
    ids = np.array([[3, 5]])
    with OnnxRuntimeSession(tmp_path, ONE) as session:
        want = np.zeros((1, 2, 8), dtype=np.float32)
        want[0, [0, 1], [3, 5]] = -2.5
        mask = np.ones((1, 2), dtype=np.int64)
        logits, past = session.run(ids, mask, mask, session.empty_past(1))
        np.testing.assert_array_equal(logits, want)
        assert {v.element_type() for v in past.values} == {element}
        np.testing.assert_array_equal(session.logits(ids), want)
        assert session.logits(ids).dtype == np.float32


def test_bfloat16_keeps_what_is_no_number() -> None:
    bits = np.array([[0x7FC0, 0xFF80, 0x8000, 0x3F81]], dtype=np.uint16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    got = as_float32(value)
    assert np.isnan(got[0, 0])
    assert got[0, 1] == -np.inf
    assert np.signbit(got[0, 2])
    assert got[0, 3] == 1.0078125


def test_out_of_memory_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Expand", ["x", "s"], ["y"])
    _graph([node], [value("x", 1, ["n"]), value("s", 7, [2])], [value("y", 1, ["a", "b"])], path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options)
    quiet = ort.RunOptions()
    quiet.log_severity_level = 4
    with pytest.raises(Exception, match="Failed to allocate") as caught:
        session.run(None, {"x": np.ones(1, np.float32), "s": np.array([1 << 20, 1 << 30])}, quiet)
    for error in (caught.value, MemoryError("std::bad_alloc"), RuntimeError("CUDA failure 2: out of memory")):
        assert "run fewer or shorter sequences" in str(run_error(path, (3, 5), error))
        assert "smaller precision" in str(load_error(path, error))
    other = run_error(path, (3, 5), RuntimeError("a\nb"))
    assert isinstance(other, ModelError)
    assert str(other) == f"{path}: ONNX Runtime failed on 3 x 5 tokens: a b"


def test_a_weight_by_a_foreign_operator_is_named(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "a.attn.qkv_proj.weight")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("FusedMatMul", ["x", tensor.name], ["y"], domain="com.microsoft", name="n")
    _graph([node], [value("x", 1, ["n", 2])], [value("y", 1, ["n", 2])], tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "model.onnx")
    graph: Graph = read_graph(tmp_path / "model.onnx")
    # Only the builder's own names are taken apart.
    assert graph.linears == (Linear(("a.attn.qkv_proj",), "n", "com.microsoft::FusedMatMul"),)
