"""onnxruntime-genai as a session beside ONNX Runtime: tokens, streams, refusals, and which of the two opens what."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsify.errors import DataError, MissingExtraError, ModelError, UsageError
from sparsify.runtimes import Runtime, open_session
from sparsify.runtimes.genai_session import GenaiSession
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.torch_session import TorchSession
from tests.onnxruntime_artifacts import CONTEXT, LINEARS, ONE, VOCAB, fixture, make, one_line, random_ids, some_masks

standard, genai = fixture("standard"), fixture("genai")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TorchSession:
    return TorchSession(make("checkpoint", tmp_path_factory))


@pytest.mark.parametrize("kind", [OnnxRuntimeSession, GenaiSession])
def test_any_padding_gives_the_logits_of_the_tokens_alone(kind: Any, genai: Path, reference: TorchSession) -> None:
    ids, mask = random_ids(4, 12), some_masks()
    with kind(genai) as session:
        logits = session.logits(ids, mask)
        for row in range(4):
            alone = reference.logits(ids[row : row + 1, mask[row] == 1])[0]
            np.testing.assert_allclose(logits[row, mask[row] == 1], alone, atol=1e-4)


def test_engaged_names_the_linears_of_the_checkpoint(
    standard: Path, genai: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with OnnxRuntimeSession(standard, ONE) as session:
        assert session.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "dense")
    with OnnxRuntimeSession(genai, ONE) as session, GenaiSession(genai) as other:
        assert session.engaged() == other.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "dense")
    with OnnxRuntimeSession(make("int8", tmp_path_factory), ONE) as session:
        assert session.engaged() == dict.fromkeys(LINEARS | {"lm_head"}, "com.microsoft::MatMulNBits bits=8")


def test_genai_generates_past_the_end_of_sequence(genai: Path, reference: TorchSession) -> None:
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(3, VOCAB, (3, 12), dtype=np.int64)
        want = reference.generate(ids, 30)
        if (want[:, :20] == 2).any():
            break
    assert (want[:, :20] == 2).any()
    with GenaiSession(genai, threads=1) as session:
        np.testing.assert_array_equal(session.generate(ids, 30), want)
        with pytest.raises(DataError, match="tokens are more than"):
            session.generate(ids, CONTEXT)
        assert session.generate(random_ids(1, CONTEXT), 1).shape == (1, 1)


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
        one_line(caught)

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
