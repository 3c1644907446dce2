"""The TensorRT session: its schemes for cache and buffers, on a stand-in that runs the ONNX file on the CPU."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.bench.engine_parity import check_engine
from sparsify.errors import DataError, UsageError, VerificationError
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import write_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.runtimes import tensorrt_decode, tensorrt_execution, tensorrt_interface
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.session import collect
from sparsify.runtimes.tensorrt_cache import ALIGNMENT_BYTES, Buffers
from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_interface import Interface, Limits
from sparsify.runtimes.tensorrt_session import TensorRtSession
from sparsify.runtimes.torch_session import TorchSession
from tests import trt_double, trt_versions
from tests.engines import CONFIGS, VOCAB, build, isolate, make, open_engine, random_ids

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make("llama", tmp_path_factory)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["bucketed", "growing"])
def test_generation_is_that_of_pytorch(
    family: tuple[Path, Path], tmp_path: Path, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Buckets of 8 to 128 and then the profile's 159; windows of 24 and less than the sequence.
    monkeypatch.setattr(tensorrt_decode, "SMALLEST_BUCKET", 8)
    build(tmp_path / "engine", family[1])
    with (
        open_engine(tmp_path / "engine", cuda_graphs=cuda_graphs) as session,
        TorchSession(family[0]) as reference,
    ):
        for batch, length, n, seed in [(1, 1, 100, 0), (3, 20, 40, 1), (2, 7, 1, 2), (2, 8, 2, 2), (1, 24, 136, 3)]:
            ids = random_ids(batch, length, seed)
            np.testing.assert_array_equal(session.generate(ids, n), reference.generate(ids, n))


def test_generation_is_that_of_onnx_runtime(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    ids = random_ids(2, 24)
    with open_engine(tmp_path / "engine") as session, OnnxRuntimeSession(llama[1]) as reference:
        np.testing.assert_array_equal(session.generate(ids, 60), reference.generate(ids, 60))


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["bucketed", "growing"])
def test_a_stream_gives_a_token_a_row_and_step(
    llama: tuple[Path, Path], tmp_path: Path, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_decode, "SMALLEST_BUCKET", 8)
    build(tmp_path / "engine", llama[1])
    with (
        open_engine(tmp_path / "engine", cuda_graphs=cuda_graphs) as session,
        TorchSession(llama[0]) as reference,
    ):
        for batch, n in [(1, 1), (1, 2), (1, 30), (3, 30)]:
            ids = random_ids(batch, 6)
            steps = list(session.stream(ids, n))
            assert [[len(tokens) for tokens in step] for step in steps] == [[1] * batch] * n
            np.testing.assert_array_equal(collect(steps, batch, n), reference.generate(ids, n))
        # One that is closed leaves the session as it was.
        want = session.generate(ids, 20)
        for n in (1, 2, 3):
            stream = session.stream(ids, 20)
            assert [next(stream) for _ in range(n)] == [want[:, i, None].tolist() for i in range(n)]
            stream.close()
            np.testing.assert_array_equal(session.generate(ids, 20), want)


def test_a_stream_does_not_go_on_with_what_another_call_left(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    ids = random_ids(2, 6)
    session = open_engine(tmp_path / "engine")
    calls: list[Callable[[], object]] = [
        lambda: session.generate(ids, 1),
        lambda: session.logits(ids),
        lambda: session.__exit__(),
    ]
    for call in calls:
        stream = session.stream(ids, 20)
        next(stream)
        call()
        with pytest.raises(RuntimeError, match="asked something else"):
            list(stream)
    for given, n, error, word in [
        (ids[:, :0], 1, DataError, "nothing to run"),
        (ids, 0, DataError, "n is 0"),
        (ids, 200, UsageError, "total=206"),
        (ids, 1, RuntimeError, "closed"),
    ]:
        stream = session.stream(given, n)
        with pytest.raises(error, match=word):
            next(stream)


def test_logits_with_padding(family: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", family[1])
    ids = random_ids(3, 20)
    left, right = np.ones_like(ids), np.ones_like(ids)
    left[1, :7], right[2, -5:] = 0, 0
    with open_engine(tmp_path / "engine") as session, TorchSession(family[0]) as reference:
        assert session.vocab_size == VOCAB
        for mask in (None, left, right):
            want, got = reference.logits(ids, mask), session.logits(ids, mask)
            assert got.dtype == np.float32
            seen = np.ones_like(ids) if mask is None else mask
            np.testing.assert_allclose(got[seen == 1], want[seen == 1], atol=2e-4)
        # What comes back is the caller's own.
        first = session.logits(ids)
        kept = first.copy()
        session.logits(ids[::-1].copy())
        np.testing.assert_array_equal(first, kept)


def test_half_precision_cache_and_narrow_integers(llama: tuple[Path, Path], tmp_path: Path) -> None:
    # As TensorRT 8 has them: 32-bit ids, and the cache in the dtype of the ONNX file.
    source = tmp_path / "half"
    shutil.copytree(llama[1], source)
    half_cache(source / "model.onnx")
    build(tmp_path / "engine", source, int32=True)
    ids = random_ids(2, 10)
    with OnnxRuntimeSession(source) as reference:
        want, logits = reference.generate(ids, 70), reference.logits(ids)
    for cuda_graphs in (True, False):
        with open_engine(tmp_path / "engine", cuda_graphs=cuda_graphs) as session:
            np.testing.assert_array_equal(session.generate(ids, 70), want)
            np.testing.assert_array_equal(session.logits(ids), logits)


def half_cache(path: Path) -> None:
    """Let a graph take and give its cache in float16."""
    model = onnx.load(path)
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for value in model.graph.input:
        if value.name.startswith("past_"):
            value.type.tensor_type.elem_type = half
            cast = onnx.helper.make_node("Cast", [value.name], [f"{value.name}.full"], to=full)
            for node in model.graph.node:
                node.input[:] = [f"{name}.full" if name == value.name else name for name in node.input]
            model.graph.node.insert(0, cast)
    for value in model.graph.output:
        if value.name.startswith("present"):
            value.type.tensor_type.elem_type = half
            for node in model.graph.node:
                node.output[:] = [f"{name}.full" if name == value.name else name for name in node.output]
                node.input[:] = [f"{name}.full" if name == value.name else name for name in node.input]
            model.graph.node.append(onnx.helper.make_node("Cast", [f"{value.name}.full"], [value.name], to=half))
    onnx.save(model, path)


def test_a_bucket_has_one_context_however_often_it_is_used(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    with open_engine(tmp_path / "engine") as session:
        engine = session._opened()[0].native
        session.generate(random_ids(1, 4), 30)
        assert engine.contexts == 2
        session.generate(random_ids(1, 4), 90)
        assert engine.contexts == 3
        session.generate(random_ids(1, 4), 90)
        assert engine.contexts == 3
        session.generate(random_ids(2, 4), 30)
        assert engine.contexts == 4
        # Leaving frees the engine at once, not when the garbage collector comes by.
        alive = weakref.ref(engine)
        del engine
    assert alive() is None


@pytest.mark.parametrize("version", ["8.6.1", "11.4.0.106"])
def test_few_contexts_are_enough(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(tensorrt_decode, "SMALLEST_BUCKET", 8)
    monkeypatch.setattr(tensorrt_decode, "MOST_GRAPHS", 2)
    old = version.startswith("8")
    header = build(tmp_path / "engine", llama[1])
    write_header(tmp_path / "engine/model.engine", replace(header, version=version))
    ids = random_ids(1, 4)
    with (
        open_engine(tmp_path / "engine", trt_versions.old() if old else trt_double) as session,
        TorchSession(llama[0]) as reference,
    ):
        want = reference.generate(ids, 60)
        for _ in range(2):
            np.testing.assert_array_equal(session.generate(ids, 60), want)
        assert isinstance(session._decoder, tensorrt_decode.Bucketed)
        assert len(session._decoder._buckets) == (1 if old else 2)


def test_tensorrt_rtx(llama: tuple[Path, Path], tmp_path: Path) -> None:
    module = trt_versions.rtx()
    header = build(tmp_path / "engine", llama[1])
    write_header(tmp_path / "engine/model.engine", replace(header, kind="tensorrt-rtx", version=module.__version__))
    ids = random_ids(1, 4)
    with TorchSession(llama[0]) as reference:
        want = reference.generate(ids, 90)
    for cuda_graphs, specialised in ((True, ["LAZY", "EAGER", "EAGER"]), (False, ["LAZY", "LAZY"])):
        api = TensorRt(module, "tensorrt-rtx")
        with TensorRtSession(tmp_path / "engine", device="cpu", api=api, cuda_graphs=cuda_graphs) as session:
            np.testing.assert_array_equal(session.generate(ids, 90), want)
            # A graph must not keep the kernels that run while better ones are compiled.
            assert session._opened()[0].native.specialised == specialised


@pytest.mark.parametrize("options", [None, EngineOptions(batch=1, prompt=4, total=7)], ids=["large", "small"])
def test_an_engine_is_compared_with_its_model(
    llama: tuple[Path, Path], tmp_path: Path, options: EngineOptions | None
) -> None:
    build(tmp_path / "engine", llama[1], options)
    with open_engine(tmp_path / "engine") as engine, TorchSession(llama[0]) as reference:
        found = check_engine(reference, engine, vocab_size=VOCAB, precision="float32")
        assert 0 < found.prefill < 1e-3 < found.allowed
        assert found.decode_gap < 1e-3
        assert (found.n_new, found.left_padding is None) == ((16, False) if options is None else (3, True))
        with pytest.raises(UsageError, match="vocabulary"):
            check_engine(reference, engine, vocab_size=VOCAB + 1, precision="float32")
        with pytest.raises(UsageError, match="precision"):
            check_engine(reference, engine, vocab_size=VOCAB, precision="int8")


@pytest.mark.parametrize("case", ["prefill", "left padding", "decoding", "nan"])
def test_an_engine_that_computes_something_else(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    logits, generate = TensorRtSession.logits, TensorRtSession.generate

    def off(self: TensorRtSession, ids: Any, mask: Any = None) -> Any:
        found = logits(self, ids, mask)
        if case == "nan":
            found[:] = np.nan
        elif case == "prefill" or mask is not None:
            found += 1
        return found

    if case == "decoding":
        monkeypatch.setattr(TensorRtSession, "generate", lambda self, ids, n: (generate(self, ids, n) + 1) % VOCAB)
    else:
        monkeypatch.setattr(TensorRtSession, "logits", off)
    build(tmp_path / "engine", llama[1])
    with (
        open_engine(tmp_path / "engine") as engine,
        TorchSession(llama[0]) as reference,
        pytest.raises(VerificationError, match=f"{'prefill' if case == 'nan' else case}: logits differ"),
    ):
        check_engine(reference, engine, vocab_size=VOCAB, precision="float32")


@pytest.mark.parametrize(
    ("config", "takes_positions", "free"),
    [
        ({"model_type": "llama"}, True, True),
        ({"model_type": "llama"}, False, False),
        ({}, True, False),
        ({"sliding_window": 4096}, True, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, True, True),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, True, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True, False),
        ({"layer_types": "full_attention"}, True, False),
        ({"attention_chunk_size": 8192}, True, False),
        ({"alibi": True}, True, False),
        ({"alibi": False}, True, True),
    ],
)
def test_order_of_the_cache(config: dict[str, Any], takes_positions: bool, free: bool) -> None:
    interface = Interface((), (), {}, {}, 1, takes_positions)
    assert tensorrt_decode.order_is_free(config, interface) is free


def test_the_model_that_slides_is_told_from_the_one_that_does_not(family: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", family[1])
    config = json.loads((family[1] / "config.json").read_text())
    with open_engine(tmp_path / "engine") as session:
        assert isinstance(session._decoder, tensorrt_decode.Bucketed)
        assert session._decoder._free_order is (config["model_type"] == "llama")


def test_addresses_are_aligned() -> None:
    names = tuple(f"past_key_values.{i}.{kind}" for i in range(3) for kind in ("key", "value"))
    # Keys and values of different widths, none of them a multiple of what TensorRT asks for.
    cache = {name: (3, 5 if name.endswith("key") else 7) for name in names}
    dtypes = {name: torch.float16 for name in (*names, "logits")} | {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
    }
    buffers = Buffers(Device("cpu"), Interface(names, (), cache, dtypes, 11, False), Limits(1, 3, 1, 9, 13))
    assert [group.places for group in buffers.groups] == [(0, 2, 4), (1, 3, 5)]
    for group in buffers.groups:
        for half in (0, 1):
            start = group.halves[half].data_ptr()
            view = group.view(half, 3, 14)
            assert view.shape == (3, 3, 3, 14, group.dim)
            for i, (_, address) in enumerate(group.addresses(half)):
                assert (address - start) % ALIGNMENT_BYTES == 0
                assert view[i].data_ptr() == address
                assert view[i].is_contiguous()
    assert buffers.device_bytes > 2 * 3 * 3 * 3 * 14 * 12 * 2


def test_names_exist_in_the_bindings() -> None:
    """Methods and attributes that the session calls, on the classes of TensorRT-RTX, which import without a GPU."""
    bindings = pytest.importorskip("tensorrt_rtx_bindings")
    owners = {
        "engine": bindings.ICudaEngine,
        "context": bindings.IExecutionContext,
        "trt": bindings,
        "config": bindings.IRuntimeConfig,
        "strategies": bindings.DynamicShapesKernelSpecializationStrategy,
    }
    # Only of versions before 10; the code asks first.
    older = {"create_execution_context_without_device_memory", "weight_streaming_budget"}
    used = set()
    for module in (tensorrt_execution, tensorrt_interface):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
                used.add((node.value.id, node.attr))
    missing = {(name, attribute) for name, attribute in used if not hasattr(owners[name], attribute)}
    assert {attribute for _, attribute in missing} == older
    assert len(used) > 15
