"""What a user chooses about a TensorRT session, and what it does where memory, graphs or trust end; on the stand-in."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import ModelError, SparsifyError, UsageError
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import write_header
from sparsify.runtimes import Runtime, open_session
from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_session import TensorRtSession
from tests import trt_versions
from tests.conftest import Run, refuse
from tests.engines import VOCAB, build, isolate, make, open_engine, random_ids

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make("llama", tmp_path_factory)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


def test_weight_budget(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    with pytest.raises(UsageError, match="weight-streaming=on"):
        open_engine(tmp_path / "engine", weight_budget=1000)
    build(tmp_path / "streams", llama[1], streamable=5000)
    with pytest.raises(UsageError, match="want 0 to 5000"):
        open_engine(tmp_path / "streams", weight_budget=5001)
    for budget, name in ((4000, "0 MB of weights in host memory"), (5000, "float32")):
        with open_engine(tmp_path / "streams", weight_budget=budget) as session:
            assert session._opened()[0].native.weight_streaming_budget_v2 == budget
            assert session.name.endswith(name)
    build(tmp_path / "deaf", llama[1], streamable=5000, budgets=[5000])
    with pytest.raises(UsageError, match="4000 bytes is refused; the engine keeps 5000"):
        open_engine(tmp_path / "deaf", weight_budget=4000)


@pytest.mark.parametrize(("free", "budget"), [(0, 0), ((512 << 20) + 4096 + 1500, 1500), (1 << 40, 3 << 30)])
def test_the_weight_budget_is_what_there_is_room_for(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, budget: int
) -> None:
    monkeypatch.setattr(Device, "free_bytes", lambda self: free)
    build(tmp_path / "engine", llama[1], streamable=3 << 30)
    with open_engine(tmp_path / "engine") as session:
        assert session._opened()[0].native.weight_streaming_budget_v2 == budget
        assert ("in host memory" in session.name) == (budget < 3 << 30)


def test_an_engine_for_several_versions(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    header = build(folder, llama[1], host_code=True)
    # It brings code for the CPU, which a header that does not say so must not let in.
    with pytest.raises(ModelError, match="host code is not allowed"):
        open_engine(folder)
    write_header(folder / "model.engine", replace(header, version_compatible=True))
    with open_engine(folder) as session:
        assert session.generate(random_ids(1, 3), 2).shape == (1, 2)


def test_a_profile_that_cannot_be_set(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    with (
        open_engine(tmp_path / "engine") as session,
        pytest.raises(ModelError, match=r"profile 7 cannot be used: .*profile 7"),
    ):
        session._opened()[0].context(7, fixed=False)


def test_a_step_that_cannot_be_captured(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trt_versions.rtx()
    header = build(tmp_path / "engine", llama[1], capturable=False)
    write_header(tmp_path / "engine/model.engine", replace(header, kind="tensorrt-rtx", version=module.__version__))
    api = TensorRt(module, "tensorrt-rtx")
    with (
        TensorRtSession(tmp_path / "engine", device="cpu", api=api) as session,
        pytest.raises(SparsifyError, match="--no-cuda-graphs"),
    ):
        session.generate(random_ids(1, 4), 5)
    with TensorRtSession(tmp_path / "engine", device="cpu", api=api, cuda_graphs=False) as session:
        assert session.generate(random_ids(1, 4), 5).shape == (1, 5)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: operation not permitted\nmore"), ModelError("a step")])
def test_capture_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def work() -> None:
        raise error

    device = Device("cpu")
    device._stream = object()  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    with pytest.raises(SparsifyError, match=r"x\.engine: decoding: cannot be captured .*--no-cuda-graphs") as caught:
        device.capture(work, "x.engine: decoding")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_memory_that_runs_out_in_a_generation(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(self: object, batch: int, length: int) -> None:
        raise kind("CUDA error: out of memory\nmore")

    build(tmp_path / "engine", llama[1])
    monkeypatch.setattr("sparsify.runtimes.tensorrt_decode.Bucketed.step", full)
    with open_engine(tmp_path / "engine") as session:
        with pytest.raises(SparsifyError, match="out of GPU memory") as caught:
            session.generate(random_ids(1, 4), 5)
        assert "\n" not in str(caught.value)
        assert session.logits(random_ids(1, 4)).shape == (1, 4, VOCAB)


def test_runtime_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Run) -> None:
    (tmp_path / "model.engine").touch()
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "sparsify.runtimes.tensorrt_session.TensorRtSession", lambda path, **options: given.update(options)
    )
    open_session(tmp_path, Runtime(cuda_graphs=False, weight_budget=4 << 30))
    assert given == {"trust_engine": False, "cuda_graphs": False, "weight_budget": 4 << 30}
    for runtime, option in (
        (Runtime("torch", cuda_graphs=False), "cuda-graphs"),
        (Runtime("torch", weight_budget=1), "weight-budget"),
    ):
        with pytest.raises(UsageError, match=f"--{option} is for tensorrt"):
            open_session(tmp_path, runtime)
    refuse(cli("eval", tmp_path, "--weight-budget", "4GB"), 2, "--weight-budget 4GB", "GiB")
