"""Export to standard ONNX, where the weights lie in it, its session, and parity with the checkpoint."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MambaConfig, MixtralConfig, Qwen2Config

from sparsify.bench.parity import LENGTH, check_parity
from sparsify.errors import (
    DataError,
    MissingExtraError,
    ModelError,
    NumericsError,
    OutputError,
    SparsifyError,
    UsageError,
    VerificationError,
)
from sparsify.exporters import onnx_standard
from sparsify.exporters.onnx_graph import check_standard, operator_domains
from sparsify.exporters.onnx_reader import OnnxWeights
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.onnx_weights import find_weights
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.onnxruntime_settings import OrtSettings
from sparsify.runtimes.torch_session import TorchSession
from tests.conftest import STORIES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

VOCAB = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**BASE),
    # Two layers: one slides over 8 tokens, fewer than parity runs, and one does not.
    "gemma2": lambda: Gemma2Config(**{**BASE, "num_hidden_layers": 2}, head_dim=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
}


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    out: Path

    @property
    def model(self) -> Path:
        return self.out / "model.onnx"


def _save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # Initial weights of 0.02 would leave logits near zero, and biases of zero would hide a lost bias.
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def _export(checkpoint: Path, out: Path, **options: Any) -> Exported:
    out.mkdir()
    export_onnx(checkpoint, out, **options)
    return Exported(checkpoint, out)


def _matrices(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    return {name: t for name, t in load_file(checkpoint / "model.safetensors").items() if t.ndim > 1}


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    return _export(_save(CONFIGS[request.param](), folder / "checkpoint"), folder / "onnx")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The trained model, with its weights in model.onnx.data."""
    if not STORIES.is_dir():
        pytest.skip("shared/data/models/stories260k is absent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_standard, "EXTERNAL_DATA_BYTES", 1000)
        return _export(STORIES, tmp_path_factory.mktemp("stories") / "onnx")


@pytest.fixture
def copy(stories: Exported, tmp_path: Path) -> Exported:
    """A copy of the trained model's export, to be damaged."""
    shutil.copytree(stories.out, tmp_path / "onnx")
    return Exported(stories.checkpoint, tmp_path / "onnx")


def test_families_agree_with_torch(family: Exported) -> None:
    with TorchSession(family.checkpoint) as reference, OnnxRuntimeSession(family.out) as candidate:
        parity = check_parity(reference, candidate, vocab_size=VOCAB)
        assert parity.max_abs_diff < 1e-4
        # prefill and decode 1 sequence each, batch 3, padding 2 with 5 tokens left out
        assert parity.n_compared == (1 + 1 + 3 + 2 * 2) * LENGTH * VOCAB - 2 * 5 * VOCAB
        ids = np.arange(3, 15, dtype=np.int64).reshape(2, 6)
        np.testing.assert_array_equal(candidate.generate(ids, 6), reference.generate(ids, 6))


def test_every_matrix_of_the_checkpoint_is_found(family: Exported) -> None:
    weights = _matrices(family.checkpoint)
    found = find_weights(family.model, weights.items())
    assert found.keys() == weights.keys()
    assert len(found) >= 6
    for name, places in found.items():
        assert len(places) == 1, name
        place = places[0]
        stored = OnnxWeights(family.model).read(place.initializer)
        np.testing.assert_array_equal(place.view(stored), weights[name])


def test_interface_and_operators(family: Exported) -> None:
    assert set(operator_domains(family.model)) == {""}
    model = onnx.load(family.model)
    assert {p.key: p.value for p in model.metadata_props} == {"sparsify.opset": "23", "sparsify.ir_version": "10"}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert axes["input_ids"] == axes["position_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total_sequence"]
    assert axes["logits"] == ["batch", "sequence", VOCAB]
    for kind in ("key", "value"):
        past, present = axes[f"past_key_values.0.{kind}"], axes[f"present.0.{kind}"]
        assert (past[0], past[2]) == ("batch", "past_sequence")
        assert (present[0], present[2]) == ("batch", "total_sequence")


def test_graph_names_no_path_of_the_exporting_machine(family: Exported) -> None:
    assert str(Path(torch.__file__).parent).encode() not in family.model.read_bytes()


def test_trained_model(stories: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        TorchSession(stories.checkpoint) as reference,
        OnnxRuntimeSession(stories.out, OrtSettings(threads=1)) as candidate,
    ):
        assert check_parity(reference, candidate, vocab_size=512, seed=3).max_abs_diff < 1e-3
        start = np.array([[1]], dtype=np.int64)
        np.testing.assert_array_equal(candidate.generate(start, 40), reference.generate(start, 40))
        linears = {n.removesuffix(".weight") for n in _matrices(STORIES) if "embed" not in n}
        for session in (reference, candidate):
            assert linears <= session.engaged().keys()
            assert set(session.engaged().values()) == {"dense"}
    assert (stories.out / "model.onnx.data").is_file()
    assert stories.model.stat().st_size < 200_000
    assert json.loads((stories.out / "config.json").read_text())["rope_theta"] == 10000.0
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (stories.out / name).read_bytes() == (STORIES / name).read_bytes()
    assert capfd.readouterr() == ("", "")


def test_weights_in_external_data_are_found(stories: Exported) -> None:
    weights = _matrices(STORIES)
    found = find_weights(stories.model, weights.items())
    assert all(found.values())
    (place,) = found["model.layers.0.mlp.down_proj.weight"]
    assert place.transposed
    assert place.initializer.startswith("model.layers.0.mlp.down_proj")
    stored = OnnxWeights(stories.model).read(place.initializer)
    np.testing.assert_array_equal(stored.T, weights["model.layers.0.mlp.down_proj.weight"])


def test_a_weight_that_differs_in_one_bit_is_not_found(stories: Exported) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    weight = _matrices(STORIES)[name].copy()
    assert find_weights(stories.model, {name: weight}.items())[name]
    weight[3, 5] = np.nextafter(weight[3, 5], np.float32(9))
    assert find_weights(stories.model, {name: weight}.items()) == {name: ()}


def test_parity_fails_on_a_corrupted_weight(copy: Exported) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    (place,) = find_weights(copy.model, _matrices(STORIES).items())[name]
    tensors = onnx.load(copy.model, load_external_data=False).graph.initializer
    tensor = next(t for t in tensors if t.name == place.initializer)
    offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
    with (copy.out / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        file.write(np.full(64, 0.5, dtype=np.float32).tobytes())
    with (
        TorchSession(STORIES) as reference,
        OnnxRuntimeSession(copy.out) as candidate,
        pytest.raises(VerificationError, match=r"prefill: logits differ .* by .*, more than "),
    ):
        check_parity(reference, candidate, vocab_size=512)
    assert find_weights(copy.model, {name: _matrices(STORIES)[name]}.items()) == {name: ()}


def test_parity_refuses_a_vocabulary_neither_session_has(stories: Exported) -> None:
    with (
        TorchSession(STORIES) as reference,
        OnnxRuntimeSession(stories.out) as candidate,
        pytest.raises(UsageError, match="vocab_size 513"),
    ):
        check_parity(reference, candidate, vocab_size=513)


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_graph(copy: Exported, keep: int) -> None:
    copy.model.write_bytes(copy.model.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        OnnxRuntimeSession(copy.out)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        OnnxWeights(copy.model).read("model.embed_tokens.weight")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_external_data(copy: Exported, damage: str) -> None:
    data = copy.out / "model.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.onnx") as caught:
        OnnxRuntimeSession(copy.out)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"model\.onnx\.data"):
        find_weights(copy.model, _matrices(STORIES).items())


def test_external_data_outside_the_folder_is_refused(copy: Exported) -> None:
    model = onnx.load(copy.model, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    copy.model.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="not a file beside it"):
        OnnxWeights(copy.model).read("model.embed_tokens.weight")


def test_missing_file_and_initializer(stories: Exported, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: no such file"):
        OnnxRuntimeSession(tmp_path)
    with pytest.raises(ModelError, match="no initializer 'nothing'"):
        OnnxWeights(stories.model).read("nothing")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[1, 512]]), "512 is outside"),
        (np.array([[-1, 3]]), "-1 is outside"),
        (np.array([1, 2]), "rank 1"),
        (np.array([[1, 2]], dtype=np.int32), "int32"),
        (np.empty((1, 0), dtype=np.int64), "nothing to run"),
    ],
)
def test_wrong_ids(stories: Exported, ids: np.ndarray[Any, Any], message: str) -> None:
    with TorchSession(STORIES) as reference, OnnxRuntimeSession(stories.out) as candidate:
        for session in (reference, candidate):
            with pytest.raises(DataError, match=message):
                session.logits(ids)
            with pytest.raises(DataError, match=message):
                session.generate(ids, 1)


def test_wrong_masks_and_counts(stories: Exported) -> None:
    ids = np.array([[1, 2, 3]])
    masks: list[np.ndarray[Any, Any]] = [
        np.ones((1, 2), dtype=np.int64),
        np.ones((1, 3)),
        np.array([[1, 2, 1]]),
        np.array([[0, 0, 0]]),
    ]
    with TorchSession(STORIES) as reference, OnnxRuntimeSession(stories.out) as candidate:
        for session in (reference, candidate):
            for mask in masks:
                with pytest.raises(DataError, match="attention mask"):
                    session.logits(ids, mask)
            with pytest.raises(DataError, match="n is 0"):
                session.generate(ids, 0)


def test_non_standard_operators_are_refused(copy: Exported) -> None:
    model = onnx.load(copy.model, load_external_data=False)
    model.graph.node[-1].domain = "com.example"
    copy.model.write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=r"com\.example::"):
        check_standard(copy.model)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        OnnxRuntimeSession(copy.out)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparsify-toolkit\[onnx\]"'):
        export_onnx(tmp_path, tmp_path)


def test_session_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparsify-toolkit\[onnx\]"'):
        OnnxRuntimeSession(tmp_path)


def test_importing_the_modules_needs_no_extra() -> None:
    modules = ("exporters.onnx_standard", "exporters.onnx_weights", "bench.parity", "bench.perplexity")
    imports = "; ".join(f"import sparsify.{module}" for module in modules)
    heavy = "{'onnx', 'onnxscript', 'onnx_ir', 'onnxruntime'}"
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_opset_for_older_runtimes(tmp_path: Path) -> None:
    checkpoint = _save(CONFIGS["qwen2"](), tmp_path / "checkpoint")
    exported = _export(checkpoint, tmp_path / "onnx", opset=18)
    assert "Attention" not in operator_domains(exported.model)[""]
    with TorchSession(checkpoint) as reference, OnnxRuntimeSession(exported.out) as candidate:
        assert check_parity(reference, candidate, vocab_size=VOCAB).max_abs_diff < 1e-4


def test_architecture_without_a_cache_is_refused_in_one_line(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    checkpoint = _save(config, tmp_path / "checkpoint")
    with pytest.raises(ModelError, match="mamba cannot be exported") as caught:
        export_onnx(checkpoint, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_bad_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = _save(CONFIGS["qwen2"](), tmp_path / "checkpoint")
    weights = checkpoint / "model.safetensors"
    whole = load_file(weights)

    def refused(kind: type[SparsifyError], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            export_onnx(checkpoint, tmp_path)
        assert "\n" not in str(caught.value)

    partial = {name: t for name, t in whole.items() if "q_proj.weight" not in name}
    save_file(partial, weights, {"format": "pt"})
    refused(ModelError, "lacks 1 weights, first model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ModelError, match="lacks 1 weights"):
        TorchSession(checkpoint)
    broken = {name: np.full_like(t, np.nan) if "down_proj" in name else t for name, t in whole.items()}
    save_file(broken, weights, {"format": "pt"})
    refused(NumericsError, "down_proj.weight holds NaN")
    weights.write_bytes(weights.read_bytes()[:500])
    refused(ModelError, "truncated or not a safetensors")
    save_file(whole, weights, {"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    refused(ModelError, "cannot be loaded")
    (checkpoint / "config.json").unlink()
    refused(ModelError, r"has no config\.json")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        TorchSession(checkpoint)
    with pytest.raises(UsageError, match="opset 17"):
        export_onnx(checkpoint, tmp_path, opset=17)
    with pytest.raises(OutputError, match="not a folder"):
        export_onnx(checkpoint, tmp_path / "absent")
    with pytest.raises(UsageError, match="dtype 'int8'"):
        TorchSession(checkpoint, dtype="int8")
    with pytest.raises(UsageError, match="device 'nowhere'"):
        TorchSession(checkpoint, device="nowhere")
