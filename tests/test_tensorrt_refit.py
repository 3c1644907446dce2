"""New weights in built engines, against a stand-in for TensorRT with a GPU: proof, pattern and trust stay true."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from sparsify.errors import ModelError, UsageError, VerificationError
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.tensorrt_engine import PROOF, build_engine
from sparsify.exporters.tensorrt_header import read_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_proof import read_proof
from sparsify.exporters.tensorrt_refit import refit_engine
from sparsify.exporters.tensorrt_trust import load_plan, was_built_here
from tests.fake_tensorrt import Behaviour
from tests.tensorrt_models import SIZES, SMALL, checkpoint, exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


def test_refit(fake: Behaviour, out: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    export_onnx(checkpoint(tmp_path / "other", LlamaConfig(**SIZES), seed=1), tmp_path / "onnx", precision="fp16")
    other = tmp_path / "onnx" / "model.onnx"
    built = build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, "refit=on"]), twin=False)
    before = built.engine.read_bytes()
    header = refit_engine(built.engine, other)
    assert header == read_header(built.engine)
    assert header.source_sha256 != built.header.source_sha256
    assert built.engine.read_bytes() != before
    assert load_plan(built.engine, header)
    # The proof moves on to the new engine.
    assert read_proof(out / PROOF, header.plan_sha256).linears == built.proof.linears
    # Weights that are not 2:4 where a sparse kernel runs.
    model = onnx.load(other)
    tensor = next(t for t in model.graph.initializer if "up_proj" in t.name)
    tensor.raw_data = np.ones(tuple(tensor.dims), np.float16).tobytes()
    onnx.save(model, other)
    after = built.engine.read_bytes()
    with pytest.raises(VerificationError, match=r"up_proj: not 2:4"):
        refit_engine(built.engine, other)
    fake.refit_accepts = False
    with pytest.raises(VerificationError, match="do not fit"):
        refit_engine(built.engine, exported("fp16"))
    assert built.engine.read_bytes() == after
    build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), twin=False)
    with pytest.raises(UsageError, match="refit=on"):
        refit_engine(built.engine, other)


def test_a_proof_without_linears_guards_nothing_less(fake: Behaviour, out: Path) -> None:
    built = build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, "refit=on"]), twin=False)
    value = json.loads((out / PROOF).read_text())
    before = built.engine.read_bytes()
    for n_left in (0, len(value["linears"]) - 1):
        (out / PROOF).write_text(json.dumps({**value, "linears": value["linears"][:n_left]}))
        with pytest.raises(VerificationError, match="is not in both this model and the engine's"):
            refit_engine(built.engine, exported("fp16"))
    (out / PROOF).write_text(json.dumps({**value, "plans": {}}))
    with pytest.raises(ModelError, match="about other engines"):
        refit_engine(built.engine, exported("fp16"))
    assert built.engine.read_bytes() == before


def test_refit_does_not_make_an_engine_ones_own(fake: Behaviour, out: Path, cache: Path) -> None:
    built = build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, "refit=on"]), twin=False)
    (cache / "engines" / built.header.plan_sha256).unlink()
    with pytest.raises(UsageError, match="--trust-engine"):
        refit_engine(built.engine, exported("fp16"))
    header = refit_engine(built.engine, exported("fp16"), trust_engine=True)
    assert not was_built_here(header.plan_sha256)


def test_refit_is_refused_before_any_work_without_a_gpu(
    fake: Behaviour, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, "refit=on"]), twin=False)
    monkeypatch.setattr("sparsify.exporters.tensorrt_refit.find_gpu", lambda: None)
    with pytest.raises(UsageError, match="needs a CUDA device to refit"):
        refit_engine(built.engine, out / "absent.onnx")
