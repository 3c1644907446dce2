"""The ONNX benchmark of GPUs without one: arguments, comparisons that tell right from wrong, and times."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_machine.record import NOT_RUN
from numpy.typing import NDArray
from onnx_gpu.__main__ import parse
from onnx_gpu.compare import CASES, NEW, check_session, references
from onnx_gpu.pack import unit
from onnx_gpu.tasks import TASKS
from onnx_gpu.timing import time_sessions

from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import read_header, write_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.runtimes import tensorrt_session
from sparsify.runtimes.torch_session import TorchSession
from tests import trt_double
from tests.engines import VOCAB, build, make
from tests.fakes import FakeSession


def test_arguments() -> None:
    options = parse(["run", "--out", "x.json"])
    assert options.precisions == ["fp16", "bf16"]
    assert options.parts == ["export", "build", "engine", "onnxruntime", "genai"]
    assert options.budget_s < 600
    assert set(options.parts) < TASKS.keys()
    with pytest.raises(SystemExit):
        parse(["run", "--out", "x.json", "--parts", "nothing"])
    own = Path("sparsify_toolkit-0.1-py3-none-any.whl")
    assert unit(own, own) == "sparsify"
    assert unit(Path("onnxruntime_gpu-1.31.1-cp312.whl"), own) == "onnxruntime_gpu"
    assert unit(Path("onnx-1.23.2-cp312.whl"), own) == "packages"


class Wrong(TorchSession):
    """Attends to padding, and generates the second best token once."""

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        return super().logits(ids)

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        made = super().generate(ids, n)
        made[1, n // 2] = super().logits(np.concatenate([ids, made[:, : n // 2]], axis=1))[1, -1].argsort()[-2]
        return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make("llama", tmp_path_factory)


def test_comparison_tells_right_from_wrong(llama: tuple[Path, Path]) -> None:
    wanted = references(llama[0], "float32", "cpu")
    assert wanted.tokens.shape == (3, NEW)
    with TorchSession(llama[0]) as right, Wrong(llama[0]) as wrong:
        assert [row["ok"] for row in check_session("right", right, wanted)] == [True] * 4
        rows = {row["case"]: row for row in check_session("wrong", wrong, wanted)}
    assert [row["ok"] for row in rows.values()] == [True, False, True, False]
    assert "allowed is" in rows["wrong, left padding"]["why"]
    assert "below the best" in rows["wrong, generation"]["why"]
    nan = FakeSession(lambda ids: np.full((*ids.shape, VOCAB), np.nan, dtype=np.float32))
    failed = list(check_session("nan", nan, wanted, CASES[:1]))
    assert [row["ok"] for row in failed] == [False, False]
    assert "AssertionError" in failed[1]["why"]


def test_a_session_that_fails_does_not_stop_the_others(llama: tuple[Path, Path]) -> None:
    arguments = {
        "lengths": [4], "batches": [1, 2], "new_tokens": 6, "repeats": 2, "sizes": {"vocabulary": VOCAB},
    }  # fmt: skip
    with TorchSession(llama[0]) as works:
        fails = FakeSession(lambda ids: np.zeros((*ids.shape, VOCAB), dtype=np.float32))
        rows = list(time_sessions({"fails": fails, "works": works}, arguments))
    assert [row["ok"] for row in rows if "ok" in row] == [False] * 3
    timed = [row for row in rows if "timed" in row]
    assert [(row["timed"], row["batch"], row["session"]) for row in timed] == [
        ("prefill", 1, "works"),
        ("decode", 1, "works"),
        ("decode", 2, "works"),
    ]
    assert all(len(row["first_token_s"]) == 2 for row in timed)


def test_engines_are_checked_and_timed(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trt_double, "MEMORY", None)
    folder = tmp_path / "fp32/standard"
    build(folder, llama[1], EngineOptions(batch=3, prompt=24, total=64))
    shutil.copy(folder / "model.engine", folder / "dense.engine")
    write_header(folder / "dense.engine", read_header(folder / "model.engine"))
    shutil.copytree(llama[0], tmp_path / "model/plain")
    double = functools.partial(tensorrt_session.TensorRtSession, device="cpu", api=TensorRt(trt_double, "tensorrt"))
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", double)
    arguments: dict[str, Any] = {
        "root": str(tmp_path), "precision": "fp32", "device": "cpu", "lengths": [8, 16], "batches": [1, 2],
        "new_tokens": 16, "repeats": 1, "sizes": {"vocabulary": VOCAB},
    }  # fmt: skip
    rows = list(TASKS["engine"](arguments))
    json.dumps(rows)
    checked = [row for row in rows if "ok" in row]
    assert len(checked) == 4 * 4
    assert all(row["ok"] for row in checked), [row["why"] for row in checked]
    sessions = {row["session"] for row in rows if "open_s" in row}
    assert sessions == {f"{kind}, {way}" for kind in ("sparse", "dense") for way in ("CUDA graphs", "growing cache")}
    timed = [row for row in rows if "timed" in row]
    assert len(timed) == 4 * (2 + 2)
    assert sum("engaged" in row for row in rows) == 2
    (folder / "dense.engine").unlink()
    rows = list(TASKS["engine"](arguments))
    assert [row["ok"] for row in rows if str(row.get("case", "")).startswith("dense")] == [False, False]
    assert len([row for row in rows if "timed" in row]) == 2 * (2 + 2)


def test_an_artifacts_engine_is_timed_against_its_twin(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trt_double, "MEMORY", None)
    folder = tmp_path / "artifact"
    build(folder, llama[1], EngineOptions(batch=2, prompt=8, total=32))
    double = functools.partial(tensorrt_session.TensorRtSession, device="cpu", api=TensorRt(trt_double, "tensorrt"))
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", double)
    options = parse(["twin", "--artifact", str(folder), "--out", str(tmp_path / "twin.json"), "--repeats", "1"])
    options.device = "cpu"
    assert options.run(options) == NOT_RUN
    assert "dense.engine" in json.loads((tmp_path / "twin.json").read_text())["not_run"][0]["why"]
    shutil.copy(folder / "model.engine", folder / "dense.engine")
    write_header(folder / "dense.engine", read_header(folder / "model.engine"))
    status = options.run(options)
    body = json.loads((tmp_path / "twin.json").read_text())
    assert body["failed"] == []
    # Decoding two tokens takes microseconds here, and noise may exceed it; that is said.
    assert status == (NOT_RUN if body["not_run"] else 0)
    timed = [row for row in body["rows"] if "timed" in row]
    assert {(row["timed"], row["batch"], row["length"]) for row in timed} == {
        ("prefill", 1, 8), ("decode", 1, 8), ("decode", 2, 8),
    }  # fmt: skip
    assert all(row.get("new_tokens", 23) == 23 for row in timed)
    assert "prefill, batch 1, 8 tokens: sparse" in capsys.readouterr().out
