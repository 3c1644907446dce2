"""Which linears TensorRT can run sparse: the check on the ONNX graph against counting, and options of a build."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig

from sparsify.errors import UsageError
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.tensorrt_layout import check_layout, is_two_four
from sparsify.exporters.tensorrt_options import EngineOptions
from tests.tensorrt_models import (
    F16,
    F32,
    INT8,
    SIZES,
    checkpoint,
    exported,
    graph,
    node,
    two_four,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1), st.sampled_from("fhbx"))
@settings(max_examples=60, deadline=None)
def test_two_four_agrees_with_counting(seed: int, groups: int, width: int, axis: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    dtype = {"f": np.float32, "h": np.float16, "b": ml_dtypes.bfloat16, "x": np.int8}[kind]
    values = rng.choice([0, 0, 1, 2], (4 * groups, width)).astype(np.float32)
    if kind != "x":
        values[rng.random(values.shape) < 0.1] *= -1  # also makes -0.0
    stored = values.astype(dtype) if axis == 0 else values.astype(dtype).T
    expected = all(
        np.count_nonzero(values[start : start + 4, column]) <= 2
        for start in range(0, 4 * groups, 4)
        for column in range(width)
    )
    assert is_two_four(stored, axis) == expected


def test_two_four_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.exporters.tensorrt_layout._CHUNK", 8)
    weight = two_four(64, 3)
    assert is_two_four(weight, 0)
    weight[-4:] = 1
    assert not is_two_four(weight, 0)
    assert not is_two_four(weight[:6], 0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_linear_of_a_pruned_model_is_eligible(precision: str) -> None:
    rows = check_layout(exported(precision))
    assert len(rows) == 8
    for row in rows:
        assert row.eligible, row
        assert row.dtype == {"fp16": "float16", "bf16": "bfloat16"}[precision]
        assert row.why.startswith("small")
    assert {(row.reduction, row.out) for row in rows} == {(64, 64), (64, 32), (64, 128), (128, 64), (64, 96)}


def test_float32_has_no_sparse_kernels() -> None:
    for row in check_layout(exported("fp32")):
        assert not row.eligible
        assert "float32" in row.why


def test_a_linear_that_is_not_two_four_is_named(tmp_path: Path) -> None:
    model = onnx.load(exported("fp16"))
    tensor = next(t for t in model.graph.initializer if "down_proj" in t.name)
    dense = np.ones(tuple(tensor.dims), np.float16)
    tensor.raw_data = dense.tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    rows = {row.weight: row for row in check_layout(tmp_path / "model.onnx")}
    refused = [row for row in rows.values() if not row.eligible]
    assert [row.weight for row in refused] == [tensor.name]
    assert refused[0].why == "not 2:4 along the inputs"


LAYOUTS: dict[str, tuple[Any, int, Any, str]] = {
    # what it is: (weight, its type, nodes, what the reason holds; empty where it is eligible)
    "matmul": (two_four(64, 16), F16, lambda: [node("MatMul", ["x", "w"], "y")], ""),
    "gemm": (two_four(64, 16), F16, lambda: [node("Gemm", ["x", "w"], "y")], ""),
    "gemm transposed": (two_four(64, 16).T, F16, lambda: [node("Gemm", ["x", "w"], "y", transB=1)], ""),
    "gemm along the outputs": (two_four(64, 64).T, F16, lambda: [node("Gemm", ["x", "w"], "y")], "not 2:4"),
    "folded transpose": (
        two_four(64, 16).T,
        F16,
        lambda: [
            node("Transpose", ["w"], "t", perm=[1, 0]),
            node("Identity", ["t"], "i"),
            node("MatMul", ["x", "i"], "y"),
        ],
        "",
    ),
    "cast": (
        two_four(64, 16, np.float32),
        F32,
        lambda: [node("Cast", ["w"], "c", to=F16), node("MatMul", ["x", "c"], "y")],
        "",
    ),
    "dense": (np.ones((64, 16), np.float16), F16, lambda: [node("MatMul", ["x", "w"], "y")], "not 2:4"),
    "reduction misaligned": (two_four(48, 16), F16, lambda: [node("MatMul", ["x", "w"], "y")], "misaligned"),
    "outputs misaligned": (two_four(64, 12), F16, lambda: [node("MatMul", ["x", "w"], "y")], "misaligned"),
    "picked expert": (
        np.stack([two_four(64, 16)] * 2),
        F16,
        lambda: [node("Gather", ["w", "x"], "g", axis=0), node("MatMul", ["x", "g"], "y")],
        "at run time",
    ),
    "int8 with scales": (
        two_four(64, 16, np.int8),
        INT8,
        lambda: [node("DequantizeLinear", ["w", "s"], "d"), node("MatMul", ["x", "d"], "y")],
        "",
    ),
    "float32 quantised in the graph": (
        two_four(64, 16, np.float32),
        F32,
        lambda: [
            node("QuantizeLinear", ["w", "s32", "z"], "q"),
            node("DequantizeLinear", ["q", "s"], "d"),
            node("MatMul", ["x", "d"], "y"),
        ],
        "",
    ),
    "convolution": (
        two_four(64, 16).T.reshape(16, 64, 1, 1),
        F16,
        lambda: [node("Conv", ["x", "w"], "y")],
        "",
    ),
    "convolution in groups": (
        two_four(64, 16).T.reshape(16, 64, 1, 1),
        F16,
        lambda: [node("Conv", ["x", "w"], "y", group=2)],
        "in groups",
    ),
}


@pytest.mark.parametrize("case", list(LAYOUTS))
def test_layouts(case: str, tmp_path: Path) -> None:
    weight, data_type, nodes, why = LAYOUTS[case]
    helper = onnx.helper
    extra = [
        helper.make_tensor("s", F16, [], [0.5]),
        helper.make_tensor("s32", F32, [], [0.5]),
        helper.make_tensor("z", INT8, [], [0]),
    ]
    onnx.save(graph(np.ascontiguousarray(weight), nodes(), data_type=data_type, extra=extra), tmp_path / "m.onnx")
    (row,) = check_layout(tmp_path / "m.onnx")
    assert row.node == "n_y"
    assert row.eligible == (not why), row
    assert (why or "small") in row.why
    if not why:
        assert (row.weight, row.reduction, row.out) == ("w", 64, 16)


def test_products_of_activations_are_left_out(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "x"], "y")]
    onnx.save(graph(two_four(64, 64), nodes, data_type=F16), tmp_path / "m.onnx")
    assert [row.node for row in check_layout(tmp_path / "m.onnx")] == ["n_a"]


def test_experts_are_reported(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    export_onnx(checkpoint(tmp_path / "moe", config), tmp_path, precision="fp16")
    rows = check_layout(tmp_path / "model.onnx")
    assert sum("at run time" in row.why for row in rows) >= 2
    assert sum(row.eligible for row in rows) >= 5


def test_options_are_parsed() -> None:
    options = EngineOptions.parse(
        ["workspace=4GiB", "level=5", "sparse=off", "targets=8.0,8.6", "hardware=ampere-plus", "timing-cache=a/b"]
    )
    assert options == EngineOptions(
        workspace_bytes=4 << 30,
        level=5,
        sparse=False,
        targets=("8.0", "8.6"),
        hardware="ampere-plus",
        timing_cache=Path("a/b"),
    )
    assert EngineOptions.parse([]) == EngineOptions()
    assert json.loads(json.dumps(options.to_json()))["timing_cache"] == "a/b"


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("workspace", "KEY=VALUE"),
        ("speed=on", "one of runtime"),
        ("workspace=4", ""),
        ("workspace=4GB", "GiB"),
        ("workspace=0", "want a size"),
        ("level=6", "0 to 5"),
        ("level=-1", "whole number"),
        ("sparse=yes", "on or off"),
        ("batch=0", "at least 1"),
        ("total=512", "more than prompt"),
        ("hardware=turing", "ampere-plus"),
        ("targets=sm80", "8.6"),
        ("runtime=trt", "tensorrt-rtx"),
        ("timing-cache=", "want a file"),
        ("tactic-sources=,", "names"),
    ],
)
def test_options_that_mean_nothing(entry: str, part: str) -> None:
    if not part:
        assert EngineOptions.parse([entry]).workspace_bytes == 4
        return
    with pytest.raises(UsageError, match=part) as caught:
        EngineOptions.parse([entry])
    assert "\n" not in str(caught.value)


def test_an_option_given_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        EngineOptions.parse(["level=1", "level=2"])
