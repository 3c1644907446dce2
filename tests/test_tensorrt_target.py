"""Target ``tensorrt`` from a pruned checkpoint to an artifact, built by TensorRT-RTX, which needs no GPU."""

import json
from pathlib import Path

import pytest
import transformers

from sparsify import manifest
from sparsify.errors import UsageError, VerificationError
from sparsify.exporters.tensorrt_api import find_gpu
from sparsify.exporters.tensorrt_header import read_header
from sparsify.pipeline import export
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.refit import refit
from sparsify.source import Source
from sparsify.targets import Options
from sparsify.verify import verify
from tests.conftest import Run, refuse, save_random_model

pytest.importorskip("tensorrt_rtx_bindings")
ENGINE = ("runtime=tensorrt-rtx", "batch=2", "prompt=8", "total=16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=96,
        intermediate_size=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_random_model(tmp_path_factory.mktemp("model") / "llama", config)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    return prune(Source("llama", model, "folder"), Recipe("2:4", "magnitude"), out)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    export(checkpoint, "tensorrt", out, options=Options(engine=ENGINE))
    return out


def test_the_artifact_says_what_was_built_and_what_is_proven(artifact: Path) -> None:
    body = manifest.read(artifact)
    assert body["kind"] == "tensorrt"
    assert (body["onnx"]["layout"], body["onnx"]["precision"], body["onnx"]["provider"]) == (
        "standard", "fp16", "tensorrt",
    )  # fmt: skip
    assert body["parity"]["float32_twin"]
    assert body["tensorrt"]["kind"] == "tensorrt-rtx"
    # RTX chooses kernels on the device: whatever was asked, nothing is claimed.
    assert body["tensorrt"]["status"] == "unknown"
    assert body["tensorrt"]["options"]["batch"] == 2
    if find_gpu() is None:
        assert "no CUDA device" in body["tensorrt"]["parity"]["not_run"]
    for name in ("model.engine", "model.engine.json", "dense.engine", "build.log", "dense.log", "tensorrt.json"):
        assert name in body["files"]
    assert read_header(artifact / "model.engine").sparse
    assert not read_header(artifact / "dense.engine").sparse
    assert verify(artifact)[1] == []


def test_sparse_kernels_that_cannot_be_proven_fail_where_they_are_required(
    checkpoint: Path, tmp_path: Path, cli: Run
) -> None:
    options = [x for pair in ENGINE for x in ("--engine", pair)]
    done = cli("export", checkpoint, "-t", "tensorrt", *options, "--require-sparse", "-o", tmp_path / "out")
    refuse(done, 8, "--require-sparse", "TensorRT-RTX")
    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_failed_build_stays(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(onnx_path: Path, out: Path, *rest: object, **options: object) -> None:
        (out / "build.log").write_text("0.1 ERROR no kernel for layer 7\n")
        raise VerificationError(f"{onnx_path}: no kernel for layer 7")

    monkeypatch.setattr("sparsify.exporters.tensorrt_engine.build_engine", fail)
    with pytest.raises(VerificationError, match=r"no kernel for layer 7; the log is .*out\.build\.log$"):
        export(checkpoint, "tensorrt", tmp_path / "out", options=Options(engine=ENGINE))
    assert [path.name for path in tmp_path.iterdir()] == ["out.build.log"]
    assert "layer 7" in (tmp_path / "out.build.log").read_text()


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_the_engine_is_delivered_unmeasured(model: Path, tmp_path: Path, cli: Run) -> None:
    options = [x for pair in ENGINE for x in ("--engine", pair)]
    done = cli(
        *("prune-and-export", model, "--method", "magnitude", "--target", "tensorrt", *options),
        *("--eval-text", "none", "--out", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["artifacts"]
    assert row["runtime"] == "not run here: TensorRT needs a CUDA device that torch can use"
    assert row["perplexity"] is None


def test_refit_refuses_engines_that_cannot_take_new_weights(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was built without --engine refit=on"):
        refit(artifact, checkpoint, tmp_path / "out")
    with pytest.raises(UsageError, match="is of kind checkpoint; refit is for what --target tensorrt wrote"):
        refit(checkpoint, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_the_build_are_refused_before_any_work(checkpoint: Path, tmp_path: Path, cli: Run) -> None:
    for pair, words in (("level=9", "level=9"), ("total=4", "total=4"), ("speed=high", "speed=high")):
        refuse(cli("export", checkpoint, "-t", "tensorrt", "--engine", pair, "-o", tmp_path / "out"), 2, words)
    refuse(cli("export", checkpoint, "-t", "onnx", "--engine", "batch=1", "-o", tmp_path / "out"), 2, "--engine")
