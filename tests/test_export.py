"""Exported checkpoints, manifests, verification, and the whole pipeline on a real trained model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparsify import manifest
from sparsify.checkpoint import CheckpointReader, portable_config
from sparsify.errors import OutputError, UsageError, VerificationError
from sparsify.exporters.hf import export_hf
from sparsify.pipeline import Evaluation, export, prune_and_export
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.verify import verify
from tests.conftest import interrupt


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe("2:4", "wanda", calibration="pydoc", windows=4, length=64)
    return prune(Source("stories", stories, "folder"), recipe, tmp_path_factory.mktemp("pruned") / "out")


def test_hf_has_the_same_tensors_and_opens_like_any_model(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    body = export(checkpoint, "hf", tmp_path / "hf")
    assert body["kind"] == "hf"
    before, after = CheckpointReader(checkpoint), CheckpointReader(tmp_path / "hf")
    assert [path.name for path in after.files] == ["model.safetensors"]
    originals = dict(before.read(before.tensors))
    for name, tensor in after.read(after.tensors):
        assert tensor.dtype == originals[name].dtype
        assert torch.equal(tensor, originals.pop(name))
    assert not originals
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    dense = transformers.AutoModelForCausalLM.from_pretrained(stories)
    assert not torch.equal(model(ids).logits, dense(ids).logits)


def test_hf_shards_stay_below_their_bound(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path, shard_bytes=200_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 4
    assert all(path.stat().st_size < 200_000 + 10_000 for path in shards)
    before, after = CheckpointReader(checkpoint), CheckpointReader(tmp_path)
    assert after.tensors.keys() == before.tensors.keys()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_portable_config_serves_old_and_new_readers() -> None:
    new = {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        "quantization_config": {"a": 1},
    }
    config = portable_config({**new, "dtype": "bfloat16"})
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert config["rope_parameters"] == new["rope_parameters"]
    assert config["torch_dtype"] == "bfloat16"
    neox = portable_config({"model_type": "gpt_neox"}, {"rope_theta": 1e4, "partial_rotary_factor": 0.25})
    assert (neox["rotary_emb_base"], neox["rotary_pct"], neox["rope_parameters"]["rope_theta"]) == (1e4, 0.25, 1e4)
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = portable_config({"rope_parameters": both})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert "quantization_config" not in config
    assert portable_config({"a": 1}) == {"a": 1}
    nested = portable_config({"text_config": {"rope_parameters": both}}, both)
    assert nested == {"text_config": gemma}


def test_verify_accepts_what_was_written_and_names_what_changed(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export(checkpoint, "hf", tmp_path / "hf")
    assert verify(tmp_path / "hf")[1] == []
    body = manifest.read(tmp_path / "hf")

    def tampered(edit: Callable[[dict[str, torch.Tensor]], Any]) -> list[str]:
        copy = Path(shutil.copytree(tmp_path / "hf", tmp_path / "copy", dirs_exist_ok=True))
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        # Somebody who edits weights and brings the hashes along is found by the pattern.
        manifest.write(copy, {k: v for k, v in body.items() if k not in ("format", "files")})
        return verify(copy)[1]

    name = "model.layers.3.mlp.up_proj"

    def move(tensors: dict[str, torch.Tensor]) -> None:
        row = tensors[f"{name}.weight"][0]
        zero, kept = int((row[:4] == 0).nonzero()[0]), int((row[4:8] != 0).nonzero()[0]) + 4
        row[zero], row[kept] = row[kept].item(), 0.0

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"][0, :4] = 1

    assert tampered(lambda tensors: None) == []
    assert tampered(move) == [f"{name}: its zeros do not form the pattern 2:4"]
    assert any("zeros, the manifest says" in problem for problem in tampered(fill))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"linears": None},
        {"linears": [{"name": 1}]},
        {"linears": [{"name": "a", "pattern": "2:4", "zeros": 1, "shape": [0, 4]}]},
        {"files": {"../x": {"sha256": "a"}}},
        {"files": {"/etc/passwd": {"sha256": "a"}}},
        {"files": {"a": 1}},
        {"kind": 3},
        {"recipe": []},
        {"coverage": {}},
        {"linears": []},
        {"source": {}},
        {"linears": [{"name": "a", "pattern": "2:4", "zeros": 1, "shape": [4, 4], "group": "4"}]},
    ],
)
def test_hostile_manifests_are_refused(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    body = {**json.loads((checkpoint / "sparsify.json").read_text()), **change}
    (tmp_path / "sparsify.json").write_text(json.dumps(body))
    with pytest.raises(VerificationError, match=r"sparsify\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00"])
def test_truncated_manifests_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sparsify.json").write_text(text)
    with pytest.raises(VerificationError, match=r"sparsify\.json"):
        verify(tmp_path)


def test_onnx_is_verified_linear_by_linear(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    body = export(checkpoint, "onnx", tmp_path / "onnx")
    assert body["parity"]["n_compared"] > 0
    assert len(body["onnx"]["weights"]) == len(body["linears"]) == 35
    assert verify(tmp_path / "onnx")[1] == []
    hostile = json.loads(json.dumps(body))
    for key, value in (("initializer", []), ("initializer", "nothing"), ("expert", "x"), ("rows", [1]), ("rows", "ab")):
        (place,) = body["onnx"]["weights"]["model.layers.0.mlp.up_proj"]
        hostile["onnx"]["weights"]["model.layers.0.mlp.up_proj"] = [{**place, key: value}]
        manifest.write(tmp_path / "onnx", {k: v for k, v in hostile.items() if k not in ("format", "files")})
        assert verify(tmp_path / "onnx")[1]
    for value in ([], "nothing", [1], [place, place]):
        hostile["onnx"]["weights"]["model.layers.0.mlp.up_proj"] = value
        manifest.write(tmp_path / "onnx", {k: v for k, v in hostile.items() if k not in ("format", "files")})
        assert verify(tmp_path / "onnx")[1]
    hostile["onnx"]["weights"]["model.layers.0.mlp.up_proj"] = place  # as earlier versions wrote it
    manifest.write(tmp_path / "onnx", {k: v for k, v in hostile.items() if k not in ("format", "files")})
    assert verify(tmp_path / "onnx")[1] == []
    body["onnx"]["weights"].pop("model.layers.0.mlp.up_proj")
    manifest.write(tmp_path / "onnx", {k: v for k, v in body.items() if k not in ("format", "files")})
    assert verify(tmp_path / "onnx")[1] == ["model.layers.0.mlp.up_proj: in the manifest, not in the model"]
    with pytest.raises(UsageError, match="kind onnx"):
        export(tmp_path / "onnx", "hf", tmp_path / "again")


def test_a_graph_that_computes_something_else_never_appears(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession

    run = OnnxRuntimeSession.run

    def off(self: Any, *args: Any) -> Any:
        logits, present = run(self, *args)
        return logits + 0.5, present

    monkeypatch.setattr(OnnxRuntimeSession, "run", off)
    with pytest.raises(VerificationError, match="differ"):
        export(checkpoint, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


REQUEST: dict[str, Any] = {
    "recipe": Recipe("2:4", "ria", calibration="pydoc", windows=4, length=64),
    "evaluation": Evaluation("pydoc", 4, 64),
}


def test_the_pipeline_reports_what_happened(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    out = tmp_path / "out"
    report = prune_and_export(Source("stories", trained, "folder"), targets=["hf", "onnx"], out=out, **REQUEST)
    assert json.loads((out / "report.json").read_text()) == report
    assert sorted(path.name for path in out.iterdir()) == ["hf", "onnx", "report.json", "report.md"]
    assert report["sparsity"] == 0.5
    assert report["coverage"]["zeros"] * 2 == report["coverage"]["selected"]
    dense, pruned = report["perplexity"]["dense"], report["perplexity"]["pruned"]
    assert 1 < dense < pruned
    hf, onnx = report["artifacts"]
    assert (hf["target"], onnx["target"]) == ("hf", "onnx")
    assert hf["perplexity"] == pruned
    assert onnx["perplexity"] == pytest.approx(pruned, rel=1e-4)
    assert list(onnx["engaged"]) == ["dense"]
    assert hf["bytes"] == sum(path.stat().st_size for path in (out / "hf").iterdir())
    assert {"seconds", "peak_memory_bytes", "versions", "model", "pattern", "method"} <= report.keys()
    text = (out / "report.md").read_text()
    assert "No sparse kernel ran" in text
    assert f"{dense:.2f} → {pruned:.2f}" in text
    for target in ("hf", "onnx"):
        assert verify(out / target)[1] == []


def test_the_pipeline_resumes_and_refuses_another_request(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Source("stories", stories, "folder"), tmp_path / "out"
    interrupt(monkeypatch, "sparsify.pipeline.evaluate")
    with pytest.raises(KeyboardInterrupt):
        prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    monkeypatch.undo()
    assert not out.exists()
    before = (tmp_path / "out.partial/hf/model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match="another recipe"):
        prune_and_export(source, targets=["hf"], out=out, **{**REQUEST, "recipe": Recipe("0.5")})
    prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    assert (out / "hf/model.safetensors").stat().st_mtime_ns == before
    assert not (tmp_path / "out.partial").exists()


def test_damaged_interrupted_pruning_inside_the_pipeline_starts_again_when_told(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Source("stories", stories, "folder"), tmp_path / "out"
    interrupt(monkeypatch, "sparsify.prune._Run.finish")
    with pytest.raises(KeyboardInterrupt):
        prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    monkeypatch.undo()
    shard = next((tmp_path / "out.partial/checkpoint.partial").glob("model-00001-*"))
    shard.write_bytes(b"short")
    with pytest.raises(OutputError, match="--overwrite"):
        prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    prune_and_export(source, targets=["hf"], out=out, overwrite=True, **REQUEST)
    assert verify(out / "hf")[1] == []


def test_finished_parts_that_were_damaged_are_made_again_when_told(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Source("stories", stories, "folder"), tmp_path / "out"
    interrupt(monkeypatch, "sparsify.pipeline.export")
    with pytest.raises(KeyboardInterrupt):
        prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    monkeypatch.undo()
    shard = next((tmp_path / "out.partial/checkpoint").glob("model-00001-*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OutputError, match=r"content differs.*--overwrite"):
        prune_and_export(source, targets=["hf"], out=out, **REQUEST)
    prune_and_export(source, targets=["hf"], out=out, overwrite=True, **REQUEST)
    assert verify(out / "hf")[1] == []


def test_a_checkpoint_that_changed_since_it_was_pruned_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shard = next(copy.glob("model-00001-*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match="content differs"):
        export(copy, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy", dirs_exist_ok=True))
    (copy / "README.md").write_text("a model card")
    export(copy, "hf", tmp_path / "hf")


def test_without_evaluation_nothing_is_claimed(stories: Path, tmp_path: Path) -> None:
    request = {**REQUEST, "evaluation": Evaluation("none")}
    report = prune_and_export(Source("stories", stories, "folder"), targets=["hf"], out=tmp_path / "out", **request)
    assert report["perplexity"] == {"dense": None, "pruned": None}
    assert report["artifacts"][0]["engaged"] is None
    assert "not measured" in (tmp_path / "out/report.md").read_text()
