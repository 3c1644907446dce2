"""Folders that ONNX Runtime's session refuses: another model's, of the future, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparsify.errors import ModelError, SparsifyError
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from tests.onnxruntime_artifacts import CONTEXT, ONE, fixture, make, one_line, random_ids

onnx = pytest.importorskip("onnx")

genai = fixture("genai")


@pytest.fixture(params=["standard", "genai"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "onnx")
    return tmp_path / "onnx"


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
    one_line(caught)


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
        np.testing.assert_array_equal(got.logits(random_ids(1, 5)), want.logits(random_ids(1, 5)))
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
    one_line(caught)
    model.ir_version = 99
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"\(IR\) 99 is newer than the \d+") as caught:
        OnnxRuntimeSession(copy, ONE)
    one_line(caught)


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
        one_line(caught)


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
