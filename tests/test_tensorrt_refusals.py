"""What the TensorRT session refuses, and what it says of kernels; on the stand-in."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.errors import DataError, ModelError, SparsifyError, UsageError
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import Profile, write_header
from sparsify.exporters.tensorrt_proof import LinearProof, Proof
from sparsify.files import sha256_file
from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_interface import Limits
from sparsify.runtimes.tensorrt_session import TensorRtSession
from tests import trt_double
from tests.engines import VOCAB, build, isolate, make, open_engine, random_ids

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make("llama", tmp_path_factory)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("batch", "length", "n", "message"),
    [
        (4, 5, 1, "batch 4: the engine takes 3; build it with batch=4"),
        (1, 25, 1, "prompt 25: the engine takes 24; build it with prompt=25"),
        (1, 20, 141, "prompt and new tokens 161: the engine takes 160; build it with total=161"),
    ],
)
def test_a_request_beyond_the_profiles(
    llama: tuple[Path, Path], tmp_path: Path, batch: int, length: int, n: int, message: str
) -> None:
    build(tmp_path / "engine", llama[1])
    ids = random_ids(batch, length)
    with open_engine(tmp_path / "engine") as session:
        assert session.limits == Limits(1, 3, 1, 24, 159)
        with pytest.raises(UsageError, match=message):
            session.generate(ids, n)
        if n == 1:
            with pytest.raises(UsageError, match=message):
                session.logits(ids)
        assert session.generate(random_ids(1, 20), 140).shape == (1, 140)


def test_bad_requests(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    with open_engine(tmp_path / "engine") as session:
        with pytest.raises(DataError, match="vocabulary"):
            session.logits(np.array([[VOCAB]]))
        with pytest.raises(DataError, match="at least one 1"):
            session.logits(random_ids(1, 3), np.zeros((1, 3), dtype=np.int64))
        with pytest.raises(DataError, match="n is 0"):
            session.generate(random_ids(1, 3), 0)
    with pytest.raises(RuntimeError, match="closed"):
        session.logits(random_ids(1, 3))


def test_an_engine_that_was_not_built_here(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UsageError, match="--trust-engine"):
        open_engine(tmp_path / "engine")
    with open_engine(tmp_path / "engine", trust_engine=True) as session:
        assert session.name == "tensorrt 11.4.0.106 float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tensorrt-rtx"}, "is an engine for tensorrt-rtx"),
        ({"version": "10.16.1"}, "was built with tensorrt 10.16.1"),
        ({"compute_capabilities": ("9.0",)}, "was built for compute capability 9.0"),
        ({"source_sha256": {"model.onnx": "0" * 64}}, "was built from another model.onnx"),
        ({"plan_bytes": 10_000_000}, "truncated"),
        ({"plan_sha256": "0" * 64}, "differs from what its header describes"),
        ({"profiles": ()}, "has 2 profiles, its header names none"),
        ({"profiles": (Profile("decode", {}), Profile("decode", {}))}, "want prefill and decode"),
    ],
)
def test_a_header_that_does_not_fit(
    llama: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = build(tmp_path / "engine", llama[1])
    write_header(tmp_path / "engine/model.engine", replace(header, **changes))
    if "profiles" not in changes:
        # Refused before TensorRT sees a byte.
        monkeypatch.setattr(trt_double.Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(ModelError, match=message) as caught:
        open_engine(tmp_path / "engine")
    assert "\n" not in str(caught.value)


def test_another_onnx_file_beside_the_engine(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    with (tmp_path / "engine/model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"was built from another model\.onnx"):
        open_engine(tmp_path / "engine")


def test_an_engine_travels_without_its_onnx_file(llama: tuple[Path, Path], tmp_path: Path) -> None:
    header = build(tmp_path / "engine", llama[1])
    # A name that leads out of the folder is not followed.
    outside = {"../secret": hashlib.sha256(b"").hexdigest()}
    write_header(tmp_path / "engine/model.engine", replace(header, source_sha256={"gone.onnx": "0" * 64, **outside}))
    (tmp_path / "secret").write_bytes(b"x")
    with open_engine(tmp_path / "engine") as session:
        assert session.generate(random_ids(1, 3), 2).shape == (1, 2)


def rebuild(folder: Path, text: bytes) -> None:
    """Give the folder another engine file that its header and the user vouch for."""
    engine = folder / "model.engine"
    engine.write_bytes(text)
    header = json.loads((folder / "model.engine.json").read_text())
    header |= {"plan_bytes": len(text), "plan_sha256": sha256_file(engine)}
    (folder / "model.engine.json").write_text(json.dumps(header))


def test_damaged_files(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    good = {name: (tmp_path / "engine" / name).read_bytes() for name in ("model.engine", "model.engine.json")}
    random = np.random.default_rng(0)
    refused = lines = 0
    for _ in range(150):
        for name, content in good.items():
            (tmp_path / "engine" / name).write_bytes(content)
        name = "model.engine" if random.random() < 0.3 else "model.engine.json"
        damaged = bytearray(good[name])
        if random.random() < 0.5:
            damaged = damaged[: random.integers(len(damaged))]
        else:
            damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        (tmp_path / "engine" / name).write_bytes(bytes(damaged))
        try:
            open_engine(tmp_path / "engine", trust_engine=True)
        except SparsifyError as error:
            refused += 1
            lines = max(lines, len(str(error).splitlines()))
    # A flipped bit in a name or an option harms nothing.
    assert refused > 100
    assert lines == 1


def test_bytes_that_tensorrt_refuses(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    rebuild(tmp_path / "engine", b"no engine")
    with pytest.raises(ModelError, match=r"refuses the engine: .*magic tag"):
        open_engine(tmp_path / "engine", trust_engine=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda graph: graph.output.pop(0), "lacks logits"),
        (lambda graph: graph.output.pop(1), r"lacks present\.0\.key"),
        (lambda graph: graph.input.append(graph.input.pop(0)), ""),
    ],
)
def test_another_graph(llama: tuple[Path, Path], tmp_path: Path, edit: Any, message: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama[1], source)
    model = onnx.load(source / "model.onnx")
    edit(model.graph)
    onnx.save(model, source / "model.onnx")
    build(tmp_path / "engine", source)
    if not message:  # the order of inputs means nothing
        with open_engine(tmp_path / "engine") as session:
            assert session.generate(random_ids(1, 3), 3).shape == (1, 3)
        return
    with pytest.raises(ModelError, match=message):
        open_engine(tmp_path / "engine")


def test_profiles_of_another_builder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    header = build(folder, llama[1])
    made = [{name: list(bounds) for name, bounds in profile.shapes.items()} for profile in header.profiles]
    _, best, high = made[0]["past_key_values.0.key"]
    made[0]["past_key_values.0.key"] = [(1, 2, 1, 8), best, high]
    rebuild(folder, trt_double.plan(folder / "model.onnx", made))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="an empty cache"):
        open_engine(folder, trust_engine=True)


def test_no_memory_left(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "engine", llama[1], no_memory="createExecutionContext: Cuda Runtime (out of memory)")
    with pytest.raises(SparsifyError, match="out of GPU memory; free the GPU, or build with smaller batch="):
        open_engine(tmp_path / "engine")

    def full(self: Device, count: int, dtype: torch.dtype) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(Device, "zeros", full)
    build(tmp_path / "other", llama[1])
    with pytest.raises(SparsifyError, match=r"out of GPU memory; .*20\.00 GiB\.$"):
        open_engine(tmp_path / "other")


def row(linear: str, *, eligible: bool = True, sparse: bool = False, why: str = "") -> LinearProof:
    return LinearProof(linear, f"node_{linear}", eligible, {}, sparse, why)


def test_engaged(llama: tuple[Path, Path], tmp_path: Path) -> None:
    tactic = "sm80_xmma_sparse_gemm_f16f16_f16f16_f16_tn_n"
    layers = [
        {"Name": "node_a + node_b [profile 1]", "TacticName": tactic},
        {"Name": "node_a + node_b", "TacticName": "sm90_xmma_gemm_f16f16"},
        {"Name": "node_c", "TacticName": "sm90_xmma_gemm_f16f16"},
        {"Name": "node_e", "TacticName": "__myelin_CASK_STUB"},
        {"Name": "node_g", "TacticName": tactic},
    ]
    rows = (
        row("a", sparse=True),
        row("b"),  # the build did not see it, the engine names it
        row("c", sparse=True),
        row("d", sparse=True),
        row("e", why="inside a block"),
        row("f", eligible=False, why="no 2:4 zeros"),
        row("g", eligible=False, why="no 2:4 zeros"),
    )
    folder = tmp_path / "engine"
    header = build(folder, llama[1], layers=layers)
    plans = {"model.engine": header.plan_sha256}
    proof = Proof("sparse", "sparse kernels run 3 of 6 linears", (), rows, plans)
    (folder / "tensorrt.json").write_text(json.dumps(proof.to_json()))
    with open_engine(folder) as session:
        assert session.engaged() == {
            "a": f"sparse in decode, dense in prefill ({tactic})",
            "b": f"sparse in decode, dense in prefill ({tactic})",
            "c": "dense",
            "d": "unknown (the build reported a sparse kernel, the loaded engine names none)",
            "e": "unknown (inside a block)",
            "f": "dense",
            "g": "unknown (kernel is shared)",
        }
    dense = Proof("dense", "TensorRT kept dense kernels", (), (row("e"),), plans)
    (folder / "tensorrt.json").write_text(json.dumps(dense.to_json()))
    with open_engine(folder) as session:
        assert session.engaged() == {"e": "dense"}
    # A twin was not allowed sparse kernels, whatever the proof of both says of the other engine.
    shutil.copy(folder / "model.engine", folder / "dense.engine")
    write_header(folder / "dense.engine", replace(header, sparse=False))
    (folder / "tensorrt.json").write_text(json.dumps(proof.to_json()))
    with open_engine(folder, engine="dense.engine") as session:
        assert session.engaged()["d"] == "dense"
    other = replace(proof, plans={"model.engine": "0" * 64})
    for text in (None, "{}", "[", json.dumps({**proof.to_json(), "linears": 3}), json.dumps(other.to_json())):
        (folder / "tensorrt.json").unlink()
        if text is not None:
            (folder / "tensorrt.json").write_text(text)
        with open_engine(folder) as session:
            (name, kernel), *rest = session.engaged().items()
            assert (name, rest) == ("model.engine", [])
            assert kernel.startswith("unknown (")
            assert "tensorrt.json" in kernel
        (folder / "tensorrt.json").touch()


def test_no_such_device(llama: tuple[Path, Path], tmp_path: Path) -> None:
    build(tmp_path / "engine", llama[1])
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="device 'cuda'"):
        TensorRtSession(tmp_path / "engine", api=TensorRt(trt_double, "tensorrt"))
