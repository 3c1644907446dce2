"""ONNX Runtime's providers: those that are absent or do not start, what runs where, and TensorRT's options."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsify import manifest
from sparsify.errors import ModelError, OutputError, UsageError
from sparsify.runtimes.onnxruntime_graph import read_graph
from sparsify.runtimes.onnxruntime_providers import cuda_options, divide, is_two_four, profile, tensorrt_options
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.onnxruntime_settings import CPU, CUDA, TENSORRT, OrtSettings
from sparsify.types import PrunedLinear
from tests.onnxruntime_artifacts import VOCAB, fixture, one_line, random_ids

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

standard, genai = fixture("standard"), fixture("genai")


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": "rocm"}, {"threads": 0}, {"inter_op_threads": 0}, {"device": -1}, {"gpu_memory_bytes": 0},
        {"workspace_bytes": 0}, {"max_length": 1}, {"max_batch": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong: dict[str, Any], genai: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        OnnxRuntimeSession(genai, OrtSettings(**wrong))


def _without(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """An ONNX Runtime that says it has ``more``, of which none starts."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*more, CPU])
    real = ort.InferenceSession

    def session(source: Any, options: Any, providers: Any, **more: Any) -> Any:
        return real(source, options, providers=[CPU], **more)

    monkeypatch.setattr(ort, "InferenceSession", session)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_in_the_build(provider: str, standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch)
    with pytest.raises(UsageError, match="pip install onnxruntime-gpu") as caught:
        OnnxRuntimeSession(standard, OrtSettings(provider))
    one_line(caught)
    with OnnxRuntimeSession(standard, OrtSettings(provider, allow_fallback=True)) as session:
        assert session.name == f"onnxruntime {CPU}"
        assert len(session.notices) == (1 if provider == "cuda" else 2)


def test_a_provider_that_does_not_start(genai: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, CUDA)
    for provider in ("cuda", "auto"):
        with pytest.raises(UsageError, match=f"{CUDA} did not start.*choose provider cpu") as caught:
            OnnxRuntimeSession(genai, OrtSettings(provider))
        one_line(caught)
        with OnnxRuntimeSession(genai, OrtSettings(provider, allow_fallback=True)) as session:
            assert session.name == f"onnxruntime {CPU}"
            assert "did not start" in session.notices[0]
            assert session.logits(random_ids(1, 4)).shape == (1, 4, VOCAB)


def test_auto_is_the_cpu_where_the_build_has_nothing_else(genai: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch)
    with OnnxRuntimeSession(genai, OrtSettings("auto")) as session:
        assert (session.name, session.notices) == (f"onnxruntime {CPU}", ())


def test_tensorrt_refuses_layout_genai(genai: Path) -> None:
    with pytest.raises(UsageError, match="cannot read layout genai; export with layout standard"):
        OnnxRuntimeSession(genai, OrtSettings("tensorrt"))


def test_shapes_on_the_cpu_are_no_fallback_and_products_are(standard: Path, genai: Path) -> None:
    for folder in (standard, genai):
        graph = read_graph(folder / "model.onnx")
        first = graph.linears[0]
        product = first.node
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        shapes = [(CPU, node.name, node.op_type) for node in nodes if node.op_type in ("Shape", "Squeeze", "ReduceSum")]
        assert shapes
        assert divide(graph, [*shapes, (CUDA, product, "MatMul")])[1] == []
        assigned, strays = divide(
            graph, [*shapes, (CPU, product, "MatMul"), (CPU, "fused by ONNX Runtime", "FusedMatMul")]
        )
        assert strays == ["MatMul", "FusedMatMul"]
        report = graph.engaged(assigned, CUDA)
        assert {report.pop(name) for name in first.names} == {"dense (on the CPU)"}
        assert set(report.values()) == {"dense"}


def test_tensorrt_tactics_are_not_guessed(standard: Path) -> None:
    graph = read_graph(standard / "model.onnx")
    report = graph.engaged(
        {linear.node: TENSORRT for linear in graph.linears[1:]} | {graph.linears[0].node: CUDA}, TENSORRT
    )
    assert report.pop(graph.linears[0].names[0]) == "dense"
    assert set(report.values()) == {"unknown (TensorRT EP)"}


def test_tensorrt_options(standard: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "onnx", tmp_path / "cache"
    shutil.copytree(standard, out)
    graph = read_graph(out / "model.onnx")
    settings = OrtSettings("tensorrt", max_length=48, max_batch=3, workspace_bytes=1 << 30, device=1)
    options = tensorrt_options(graph, settings, cache)
    assert "trt_sparsity_enable" not in options
    assert "trt_fp16_enable" not in options
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(cache)
    assert cache.stat().st_mode & 0o077 == 0
    assert options["trt_max_workspace_size"] == str(1 << 30)
    assert options["device_id"] == "1"
    shapes = {
        which: dict(entry.split(":") for entry in options[f"trt_profile_{which}_shapes"].split(","))
        for which in ("min", "opt", "max")
    }
    names = {value.name for value in onnx.load(out / "model.onnx", load_external_data=False).graph.input}
    assert all(shapes[which].keys() == names for which in shapes)
    assert shapes["min"]["past_key_values.1.value"] == "1x2x0x16"
    assert shapes["max"]["past_key_values.1.value"] == "3x2x47x16"
    assert (shapes["min"]["input_ids"], shapes["max"]["input_ids"]) == ("1x1", "3x48")
    assert (shapes["opt"]["attention_mask"], shapes["opt"]["past_key_values.0.key"]) == ("1x25", "1x2x24x16")
    rows = [PrunedLinear(name, (4, 4), pattern, "row", 8, 0.1, 0) for name, pattern in (("a", "0.5"), ("b", "2:4"))]
    for linears in (rows[:1], rows):
        body = {"kind": "onnx", "source": {"name": "m"}, "recipe": {}, "versions": {}}
        manifest.write(
            out, {**body, "coverage": manifest.coverage(32, 32, linears), "linears": manifest.linear_records(linears)}
        )
        assert is_two_four(out) == (len(linears) == 2)
    sparse = tensorrt_options(replace(graph, precision="float16"), settings, cache)
    assert sparse["trt_sparsity_enable"] == sparse["trt_fp16_enable"] == "1"
    assert sparse["trt_engine_cache_prefix"] != options["trt_engine_cache_prefix"]
    cache.chmod(0o777)
    with pytest.raises(OutputError, match="others can write"):
        tensorrt_options(graph, settings, cache)


def test_the_engine_cache_tells_models_apart_by_their_weights(standard: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(standard, out)
    first = tensorrt_options(read_graph(out / "model.onnx"), OrtSettings(), tmp_path / "cache")
    model = onnx.load(out / "model.onnx")
    weight = next(t for t in model.graph.initializer if "down_proj" in t.name)
    weight.raw_data = weight.raw_data[:-1] + bytes([weight.raw_data[-1] ^ 1])
    onnx.save(model, out / "model.onnx")
    second = tensorrt_options(read_graph(out / "model.onnx"), OrtSettings(), tmp_path / "cache")
    assert first["trt_engine_cache_prefix"] != second["trt_engine_cache_prefix"]


def test_a_profile_needs_axes_it_knows(standard: Path) -> None:
    graph = replace(read_graph(standard / "model.onnx"), inputs={"input_ids": ("n", 3)})
    with pytest.raises(ModelError, match="axis 'n'"):
        profile(graph, OrtSettings())


def test_cuda_options() -> None:
    assert cuda_options(OrtSettings(device=2, gpu_memory_bytes=5)) == {
        "device_id": "2", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0", "gpu_mem_limit": "5",
    }  # fmt: skip
