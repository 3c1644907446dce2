"""What only TensorRT on a GPU can show: log and inspector are understood, refit works, and sessions are right."""

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from sparsify.bench.engine_parity import check_engine
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.tensorrt_api import find_gpu, load_tensorrt
from sparsify.exporters.tensorrt_engine import ENGINE, TWIN, build_engine
from sparsify.exporters.tensorrt_evidence import logged_layers, parse_log
from sparsify.exporters.tensorrt_header import check, read_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_refit import refit_engine
from sparsify.exporters.tensorrt_trust import load_plan
from sparsify.runtimes.tensorrt_session import TensorRtSession
from sparsify.runtimes.torch_session import TorchSession
from tests.tensorrt_models import SIZES, checkpoint

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_gpu() is None, reason="no CUDA device")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two fp16 exports of one architecture, large enough to gain, with different 2:4 masks."""
    pytest.importorskip("tensorrt")
    pytest.importorskip("onnxscript")
    config = LlamaConfig(**{**SIZES, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096})
    paths = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        export_onnx(checkpoint(folder / "checkpoint", config, seed), folder, precision="fp16")
        paths.append(folder / "model.onnx")
    return paths[0], paths[1]


def test_build_proof_and_refit(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    out.mkdir()
    cache = tmp_path / "timings"
    options = EngineOptions.parse(["batch=8", "prompt=512", "total=1024", f"timing-cache={cache}", "refit=on"])
    built = build_engine(models[0], out, options)
    lines = (out / "build.log").read_text().splitlines()
    # The proof rests on the log's words and the engine's layers: a TensorRT that words them anew must be noticed.
    assert parse_log(lines), "the build log has no sparsity report that is understood"
    assert built.proof.status in ("sparse", "dense"), built.proof
    named = {node for layer in logged_layers(lines) for node in layer.nodes}
    assert all(row.node in named for row in built.proof.linears)
    assert not any(report.n_chosen for report in parse_log((out / "dense.log").read_text().splitlines()))
    assert cache.stat().st_size > 1000
    api, gpu = load_tensorrt("tensorrt"), find_gpu()
    assert gpu is not None
    refitted = refit_engine(built.engine, models[1])
    header = read_header(built.engine)
    assert header == refitted
    check(built.engine, header, kind=api.kind, version=api.version, compute_capability=gpu.compute_capability)
    assert load_plan(built.engine, header)
    for engine, folder in ((ENGINE, models[1].parent), (TWIN, models[0].parent)):
        _compare(out, folder, engine)


def _compare(out: Path, folder: Path, engine: str, graphs: tuple[bool, ...] = (True, False)) -> None:
    """An engine in ``out`` against the checkpoint in ``folder``, with CUDA graphs and without."""
    for cuda_graphs in graphs:
        with (
            TensorRtSession(out, engine=engine, cuda_graphs=cuda_graphs) as session,
            TorchSession(folder / "checkpoint", device="cuda") as reference,
        ):
            found = check_engine(reference, session, vocab_size=SIZES["vocab_size"], precision="float16")
            # Long enough for graphs of several buckets to be captured and replayed.
            ids = np.random.default_rng(1).integers(3, SIZES["vocab_size"], size=(2, 7), dtype=np.int64)
            made = session.generate(ids, 200)
            np.testing.assert_array_equal(session.generate(ids, 200), made)
            logits = reference.logits(np.concatenate([ids, made], axis=1))[:, 6:-1]
            chosen = np.take_along_axis(logits, made[..., None], axis=-1)[..., 0]
            assert (logits.max(axis=-1) - chosen).max() <= 2 * found.allowed
            assert session.engaged().keys() == {f"model.layers.0.{name}" for name in LINEARS} | {"lm_head"}


def test_an_engine_for_several_versions(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    options = EngineOptions.parse(["batch=2", "prompt=32", "total=256", "version-compatible=on"])
    build_engine(models[0], tmp_path, options, twin=False)
    _compare(tmp_path, models[0].parent, ENGINE)


def test_weights_in_host_memory(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    options = EngineOptions.parse(["batch=2", "prompt=32", "total=256", "weight-streaming=on"])
    build_engine(models[0], tmp_path, options, twin=False)
    _compare(tmp_path, models[0].parent, ENGINE, graphs=(False,))
    with TensorRtSession(tmp_path, weight_budget=0, cuda_graphs=False) as session:
        assert "in host memory" in session.name
        assert session.generate(np.ones((1, 4), np.int64), 4).shape == (1, 4)
