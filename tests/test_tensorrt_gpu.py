"""What only TensorRT on a GPU can show: that its log and inspector are understood, timing cache, refit."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.tensorrt_api import find_gpu, load_tensorrt
from sparsify.exporters.tensorrt_engine import build_engine
from sparsify.exporters.tensorrt_evidence import logged_layers, parse_log
from sparsify.exporters.tensorrt_header import check, read_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_refit import refit_engine
from sparsify.exporters.tensorrt_trust import load_plan
from tests.tensorrt_models import SIZES, checkpoint

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
