"""ONNX Runtime and onnxruntime-genai as sessions: both layouts, packed weights, the cache, providers and damage."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen2Config

from sparsify import manifest
from sparsify.bench.parity import check_parity
from sparsify.errors import DataError, MissingExtraError, ModelError, OutputError, SparsifyError, UsageError
from sparsify.exporters.onnx_forms import Form
from sparsify.exporters.onnx_genai import export_genai
from sparsify.exporters.onnx_packed import PackAs, pack_onnx
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.runtimes import Runtime, open_session
from sparsify.runtimes.genai_session import GenaiSession
from sparsify.runtimes.onnxruntime_graph import read_graph
from sparsify.runtimes.onnxruntime_providers import cuda_options, divide, is_two_four, profile, tensorrt_options
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.onnxruntime_settings import CPU, CUDA, TENSORRT, OrtSettings
from sparsify.runtimes.session import positions
from sparsify.runtimes.torch_session import TorchSession
from sparsify.types import NofM, PrunedLinear

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

VOCAB, CONTEXT = 96, 64
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE = OrtSettings(threads=1)
# What of the checkpoint is a linear; the tied output layer goes by another name in each graph.
PARTS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
LINEARS = {f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
        if name.endswith("proj.weight"):
            groups = parameter.data.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
    model.save_pretrained(folder)
    return folder


def _made(checkpoint: Path, out: Path, precision: str | None) -> Path:
    out.mkdir()
    if precision is None:
        export_onnx(checkpoint, out)
    else:
        export_genai(checkpoint, out, Form("genai", precision, "cpu"))
    return out


@pytest.fixture(scope="module")
def standard(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(checkpoint, tmp_path_factory.mktemp("standard") / "onnx", None)


@pytest.fixture(scope="module")
def genai(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(checkpoint, tmp_path_factory.mktemp("genai") / "onnx", "fp32")


@pytest.fixture(scope="module")
def int8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(checkpoint, tmp_path_factory.mktemp("int8") / "onnx", "int8")


@pytest.fixture(scope="module", params=["standard", "genai"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense artifact, the same with its linears packed)."""
    dense: Path = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("packed") / "onnx"
    shutil.copytree(dense, out)
    names = [t.name for t in onnx.load(dense / "model.onnx", load_external_data=False).graph.initializer]
    report = pack_onnx(
        out / "model.onnx", {name: PackAs(NofM(2, 4), 0) for name in names if "_proj" in name and "weight" in name}
    )
    assert len(report.packed) in (10, 14), report
    return dense, out


@pytest.fixture(params=["standard", "genai"])
def artifact(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "onnx")
    return tmp_path / "onnx"


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> TorchSession:
    return TorchSession(checkpoint)


def _ids(*shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(3, VOCAB, shape, dtype=np.int64)


def _masks() -> NDArray[np.int64]:
    """Left padding, a hole, right padding, none."""
    mask = np.ones((4, 12), dtype=np.int64)
    mask[0, :4], mask[1, 5:7], mask[2, -3:] = 0, 0, 0
    return mask


def _one_line(error: pytest.ExceptionInfo[SparsifyError]) -> None:
    assert "\n" not in str(error.value)


def test_parity(artifact: Path, reference: TorchSession) -> None:
    with OnnxRuntimeSession(artifact, ONE) as session:
        assert check_parity(reference, session, vocab_size=VOCAB).max_abs_diff < 1e-4
        assert session.context == CONTEXT
        assert session.notices == ()
        assert session.options() == {CPU: {}}


@pytest.mark.parametrize("kind", [OnnxRuntimeSession, GenaiSession])
def test_any_padding_gives_the_logits_of_the_tokens_alone(kind: Any, genai: Path, reference: TorchSession) -> None:
    ids, mask = _ids(4, 12), _masks()
    with kind(genai) as session:
        logits = session.logits(ids, mask)
        for row in range(4):
            alone = reference.logits(ids[row : row + 1, mask[row] == 1])[0]
            np.testing.assert_allclose(logits[row, mask[row] == 1], alone, atol=1e-4)


def test_a_step_of_layout_genai_refuses_what_it_would_compute_wrongly(genai: Path) -> None:
    ids, mask = _ids(4, 12), _masks()
    with OnnxRuntimeSession(genai, ONE) as session:
        for row in (0, 1):
            some = mask[row : row + 1]
            with pytest.raises(DataError, match="padding on the right only"):
                session.run(ids[:1], some, positions(some), session.empty_past(1))
        right = mask[2:3]
        _, past = session.run(ids[:1], right, positions(right), session.empty_past(1))
        after = np.concatenate((right, np.ones((1, 1), np.int64)), axis=1)
        with pytest.raises(DataError, match="padding on the right only"):
            session.run(ids[:1, :1], after, positions(after)[:, -1:], past)


def test_layout_standard_takes_padding_on_both_sides_in_a_step(standard: Path, reference: TorchSession) -> None:
    ids, mask = _ids(4, 12), _masks()
    with OnnxRuntimeSession(standard, ONE) as session:
        logits, _ = session.run(ids, mask, positions(mask), session.empty_past(4))
    for row in (0, 2, 3):
        alone = reference.logits(ids[row : row + 1, mask[row] == 1])[0]
        np.testing.assert_allclose(logits[row, mask[row] == 1], alone, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_to_the_end_of_the_context(artifact: Path, reference: TorchSession, batch: int) -> None:
    ids = _ids(batch, 20)
    want = reference.generate(ids, CONTEXT - 19)
    with OnnxRuntimeSession(artifact, ONE) as session:
        np.testing.assert_array_equal(session.generate(ids, CONTEXT - 19), want)
        with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens are more than the {CONTEXT}"):
            session.generate(ids, CONTEXT - 18)
        with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens are more than the {CONTEXT}"):
            session.logits(_ids(1, CONTEXT + 1))


def test_shared_and_growing_caches_agree_bit_for_bit(genai: Path) -> None:
    ids, ones = _ids(2, 10), np.ones((2, 10), dtype=np.int64)
    with OnnxRuntimeSession(genai, ONE) as session:
        caches = [session.empty_past(2), session.empty_past(2, 10)]
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 10))):
            mask = ones[:, :stop]
            results = []
            for i, cache in enumerate(caches):
                logits, caches[i] = session.run(ids[:, start:stop], mask, positions(mask)[:, start:], cache)
                results.append(logits)
            np.testing.assert_array_equal(results[0], results[1])
        shared = caches[1]
        assert (shared.capacity, shared.length) == (10, 10)
        more = np.ones((2, 11), dtype=np.int64)
        with pytest.raises(DataError, match="11 tokens are more than the cache's 10"):
            session.run(ids[:, :1], more, positions(more)[:, -1:], shared)


def test_shared_buffers_are_not_copied(genai: Path) -> None:
    ids, mask = _ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(genai, ONE) as session:
        empty = session.empty_past(1, 8)
        _, past = session.run(ids, mask, positions(mask), empty)
        assert [v.data_ptr() for v in past.values] == [v.data_ptr() for v in empty.values]


def test_layout_standard_hands_its_present_on_as_past(standard: Path) -> None:
    ids, mask = _ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(standard, ONE) as session:
        _, past = session.run(ids, mask, positions(mask), session.empty_past(1, 8))
        assert past.capacity is None
        assert {tuple(value.shape()) for value in past.values} == {(1, 2, 4, 16)}


def test_steps_of_the_wrong_shape(artifact: Path) -> None:
    ids, mask = _ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(artifact, ONE) as session:
        bads: list[Any] = [mask[:, :3], mask.astype(np.int32), np.ones((2, 4), dtype=np.int64)]
        for bad in bads:
            with pytest.raises(DataError, match="attention mask"):
                session.run(ids, bad, positions(mask), session.empty_past(1))


def test_logits_outlive_the_session(artifact: Path) -> None:
    session = OnnxRuntimeSession(artifact, ONE)
    first = session.logits(_ids(1, 8))
    kept = first.copy()
    session.logits(_ids(2, 8) - 1)
    session.__exit__()
    np.testing.assert_array_equal(first, kept)


def test_settings_do_not_change_the_result(artifact: Path) -> None:
    ids = _ids(2, 9)
    with OnnxRuntimeSession(artifact, ONE) as session:
        want = session.logits(ids)
    for settings in (replace(ONE, arena=False), OrtSettings(threads=2, spinning=False, inter_op_threads=2)):
        with OnnxRuntimeSession(artifact, settings) as session:
            np.testing.assert_allclose(session.logits(ids), want, atol=1e-5)


def test_packed_weights_are_the_dense_ones(packed: tuple[Path, Path]) -> None:
    dense, small = packed
    ids = _ids(2, 9)
    with OnnxRuntimeSession(dense, ONE) as want, OnnxRuntimeSession(small, ONE) as got:
        gc.collect()  # the arrays that the weights came in
        junk = [np.full((64, 128), np.nan, np.float32) for _ in range(100)]
        assert len(junk) == 100
        np.testing.assert_array_equal(got.logits(ids), want.logits(ids))
        np.testing.assert_array_equal(got.generate(ids, 5), want.generate(ids, 5))
        assert got.engaged() == want.engaged()


def test_engaged_names_the_linears_of_the_checkpoint(standard: Path, genai: Path, int8: Path) -> None:
    with OnnxRuntimeSession(standard, ONE) as session:
        assert session.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "dense")
    with OnnxRuntimeSession(genai, ONE) as session, GenaiSession(genai) as other:
        assert session.engaged() == other.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "dense")
    with OnnxRuntimeSession(int8, ONE) as session:
        assert session.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "com.microsoft::MatMulNBits bits=8")


def test_genai_generates_and_streams_past_the_end_of_sequence(genai: Path, reference: TorchSession) -> None:
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(3, VOCAB, (3, 12), dtype=np.int64)
        want = reference.generate(ids, 30)
        if (want[:, :20] == 2).any():
            break
    assert (want[:, :20] == 2).any()
    with GenaiSession(genai, threads=1) as session:
        np.testing.assert_array_equal(session.generate(ids, 30), want)
        stream = session.stream(ids[:1], 30)
        assert [next(stream), next(stream)] == want[0, :2].tolist()
        with pytest.raises(DataError, match="one sequence, got 3"):
            next(session.stream(ids, 1))
        with pytest.raises(DataError, match="tokens are more than"):
            session.generate(ids, CONTEXT)
        assert session.generate(_ids(1, CONTEXT), 1).shape == (1, 1)


def test_genai_refuses_what_it_cannot_open(genai: Path, standard: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no genai_config\.json"):
        GenaiSession(standard)
    with pytest.raises(UsageError, match="'rocm' is not for"):
        GenaiSession(genai, provider="rocm")
    with pytest.raises(UsageError, match="threads 0"):
        GenaiSession(genai, threads=0)
    out = tmp_path / "onnx"
    shutil.copytree(genai, out)
    config = json.loads((out / "genai_config.json").read_text())

    def refused(change: Any, message: str) -> None:
        changed = json.loads(json.dumps(config))
        change(changed)
        (out / "genai_config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message) as caught:
            GenaiSession(out)
        _one_line(caught)

    refused(lambda c: c.pop("model"), "key model")
    refused(lambda c: c["model"].pop("vocab_size"), "key vocab_size is None")
    refused(lambda c: c["model"].update(context_length="8"), "key context_length is '8'")
    refused(lambda c: c["model"]["decoder"].update(filename="../model.onnx"), "not a file beside it")
    refused(lambda c: c["model"]["decoder"].update(filename="other.onnx"), r"other\.onnx: no such file")
    (out / "genai_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        GenaiSession(out)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime_genai"])
def test_missing_packages(package: str, genai: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="pip install"):
        (OnnxRuntimeSession if package == "onnxruntime" else GenaiSession)(genai)


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
    _one_line(caught)
    with OnnxRuntimeSession(standard, OrtSettings(provider, allow_fallback=True)) as session:
        assert session.name == f"onnxruntime {CPU}"
        assert len(session.notices) == (1 if provider == "cuda" else 2)


def test_a_provider_that_does_not_start(genai: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, CUDA)
    for provider in ("cuda", "auto"):
        with pytest.raises(UsageError, match=f"{CUDA} did not start.*choose provider cpu") as caught:
            OnnxRuntimeSession(genai, OrtSettings(provider))
        _one_line(caught)
        with OnnxRuntimeSession(genai, OrtSettings(provider, allow_fallback=True)) as session:
            assert session.name == f"onnxruntime {CPU}"
            assert "did not start" in session.notices[0]
            assert session.logits(_ids(1, 4)).shape == (1, 4, VOCAB)


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 97, "vocab_size 96 in the graph, 97 in config.json"),
        ("num_hidden_layers", 3, "layers 2 in the graph, 3 in config.json"),
    ],
)
def test_onnx_of_another_model(copy: Path, key: str, value: int, message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=message) as caught:
        OnnxRuntimeSession(copy, ONE)
    _one_line(caught)


def test_a_config_beside_it_that_is_none(copy: Path) -> None:
    for text in ("[]", "{", "\udcff"):
        (copy / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ModelError, match=r"config\.json"):
            OnnxRuntimeSession(copy, ONE)


def test_the_width_of_heads_comes_from_genai_config_where_there_is_no_other(genai: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(genai, out)
    (out / "config.json").unlink()
    with OnnxRuntimeSession(genai, ONE) as want, OnnxRuntimeSession(out, ONE) as got:
        np.testing.assert_array_equal(got.logits(_ids(1, 5)), want.logits(_ids(1, 5)))
        assert got.context == CONTEXT
    (out / "genai_config.json").unlink()
    with pytest.raises(ModelError, match=r"put the config\.json of the model beside it"):
        OnnxRuntimeSession(out, ONE)


def test_an_opset_and_a_version_from_the_future(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for entry in model.opset_import:
        entry.version = 99 if entry.domain == "" else entry.version
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ModelError, match=r"opset 99 is newer than ONNX Runtime .* reads; pip install --upgrade"
    ) as caught:
        OnnxRuntimeSession(copy, ONE)
    _one_line(caught)
    model.ir_version = 99
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"\(IR\) 99 is newer than the \d+") as caught:
        OnnxRuntimeSession(copy, ONE)
    _one_line(caught)


def test_damaged_external_data(genai: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(genai, out)
    data = out / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"model\.onnx\.data: [\d,]+ bytes, and .* ends at .* truncated"):
        OnnxRuntimeSession(out, ONE)
    data.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data: no such file"):
        OnnxRuntimeSession(out, ONE)
    data.write_bytes(whole)
    original = onnx.load(out / "model.onnx", load_external_data=False)
    for key, value in (("location", "../model.onnx.data"), ("location", ""), ("offset", "x"), ("length", "9" * 30)):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value
        (out / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match=r"model\.onnx") as caught:
            OnnxRuntimeSession(out, ONE)
        _one_line(caught)


def test_files_cut_short_or_changed_never_crash(copy: Path) -> None:
    whole = (copy / "model.onnx").read_bytes()
    random = np.random.default_rng(0)
    messages = []
    for _ in range(40):
        damaged = bytearray(whole[: random.integers(0, len(whole))] if random.random() < 0.5 else whole)
        for place in random.integers(0, max(len(damaged), 1), 8):
            if place < min(len(damaged), 60_000):
                damaged[place] = random.integers(0, 256)
        (copy / "model.onnx").write_bytes(bytes(damaged))
        try:
            with OnnxRuntimeSession(copy, ONE):
                pass
        except SparsifyError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)


def test_runtime_opens_what_is_asked_for(genai: Path, standard: Path, tmp_path: Path) -> None:
    assert Runtime().resolve(genai) == "onnxruntime"
    with open_session(genai, Runtime(provider="cpu", threads=1)) as session:
        assert isinstance(session, OnnxRuntimeSession)
    with open_session(genai, Runtime("onnxruntime-genai", threads=1, max_length=9)) as session:
        assert isinstance(session, GenaiSession)
    (tmp_path / "model.engine").touch()
    (tmp_path / "model.onnx").touch()
    assert Runtime().resolve(tmp_path) == "tensorrt"
    assert Runtime(trust_engine=True).resolve(tmp_path) == "tensorrt"
    for runtime, option in (
        (Runtime("onnxruntime", dtype="float16"), "--dtype"),
        (Runtime("onnxruntime-genai", allow_fallback=True), "--allow-fallback"),
        (Runtime("torch", provider="cuda"), "--provider"),
        (Runtime("torch", threads=2), "--threads"),
        (Runtime("onnxruntime", trust_engine=True), "--trust-engine"),
        (Runtime("onnxruntime", kernel="packed"), "--kernel"),
        (Runtime("vllm", python="x"), "--python"),
    ):
        with pytest.raises(UsageError, match=option):
            runtime.resolve(standard)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu(provider: str, artifact: Path, reference: TorchSession, request: pytest.FixtureRequest) -> None:
    name = {"cuda": CUDA, "tensorrt": TENSORRT}[provider]
    if name not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip(f"no CUDA device, or an ONNX Runtime without {name}")
    if provider == "tensorrt" and read_graph(artifact / "model.onnx").grouped:
        pytest.skip("TensorRT does not read layout genai")
    with OnnxRuntimeSession(artifact, OrtSettings(provider, max_length=CONTEXT)) as session:
        assert check_parity(reference, session, vocab_size=VOCAB).max_abs_diff < 1e-3
        ids = _ids(2, 12)
        np.testing.assert_array_equal(session.generate(ids, 20), reference.generate(ids, 20))
        asked = cuda_options(OrtSettings(provider))
        assert session.options()[CUDA].items() >= asked.items()
