"""Compressed checkpoints opened by transformers itself as dense models: saved again, trained, changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel

from sparsify.errors import UsageError
from sparsify.format.reader import CompressedReader
from sparsify.format.storage import SERVED
from sparsify.types import NofM
from tests.checkpoints import (
    Q_PROJ,
    Folders,
    kinds,
    logits,
    make_folders,
    opened,
    replace_tensors,
    same,
    same_stored,
    set_packed,
    stored,
    tensors_of,
    with_kernel,
)
from tests.conftest import CONFIGS, EXTRA

# The stablelm of these tests has a setting that vLLM lacks, with which export refuses it.
FAMILIES = [*sorted((SERVED & {*CONFIGS, *EXTRA}) - {"stablelm"}), "llama-nine-heads"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("compressed"), ids_file)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_open_dense_and_are_saved_as_they_were(
    family: str, pattern: str, folders: Folders, tmp_path: Path
) -> None:
    plain, packed = folders(family, pattern)
    assert len(CompressedReader(packed).packed) >= 8
    model = opened(packed)
    same(model, opened(plain))
    assert torch.equal(logits(model), logits(opened(plain)))
    model.save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)
    same(opened(tmp_path / "again"), model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_a_dtype_is_applied_to_decoded_weights(family: str, wanted: torch.dtype, folders: Folders) -> None:
    plain, packed = folders(family)
    model = opened(packed, dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    same(model, opened(plain, dtype=wanted))


def test_parameters_that_stay_in_float32_do(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = folders("llama")
    kept = {"down_proj", "input_layernorm"}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", kept)
    model = opened(packed)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "down_proj" in name} == {torch.float32}
    same(model, opened(plain))


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "permuted"])
def test_patterns_and_orders_come_back(pattern: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama", pattern)
    names = stored(packed)[0].keys()
    assert (f"{Q_PROJ}.weight_perm" in names) == (pattern == "permuted")
    for model in (opened(packed), with_kernel(packed, "packed")):
        assert torch.equal(logits(model), logits(opened(plain)))
        model.save_pretrained(tmp_path / "again")
        same_stored(tmp_path / "again", packed)


def test_negative_zeros_survive(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[:, ::2] = -0.0
    replace_tensors(packed, lambda tensors: set_packed(tensors, Q_PROJ, weight, NofM(2, 4)))
    model = opened(packed)
    assert torch.equal(model.get_submodule(Q_PROJ).weight.view(torch.int16), weight.view(torch.int16))
    model.save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)


def test_weights_without_a_value_are_saved(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    empty = [Q_PROJ, "model.layers.1.self_attn.o_proj"]
    zeros = torch.zeros(32, 32, dtype=torch.bfloat16)
    for name in empty:
        replace_tensors(packed, lambda tensors, name=name: set_packed(tensors, name, zeros, None))  # type: ignore[misc]
    for model in (opened(packed), with_kernel(packed, "packed")):
        model.save_pretrained(tmp_path / "again")
        same_stored(tmp_path / "again", packed)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tied_embeddings_and_shards(family: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders(family, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored(packed)[0]
    model = opened(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same(model, opened(plain))
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    same_stored(tmp_path / "again", packed)
    same(opened(tmp_path / "again"), model)
    ours, theirs = CompressedReader(tmp_path / "again"), CompressedReader(packed)
    assert dict(ours.read(ours.tensors)).keys() == dict(theirs.read(theirs.tensors)).keys()
    for kernel in (with_kernel(packed, "packed"), with_kernel(tmp_path / "again", "packed")):
        assert torch.equal(logits(kernel), logits(model))


def test_models_without_a_head(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("qwen2")
    model = AutoModel.from_pretrained(packed, dtype=torch.float32)
    same(model, AutoModel.from_pretrained(plain, dtype=torch.float32))
    model = AutoModel.from_pretrained(packed)
    model.save_pretrained(tmp_path / "body")
    tensors = stored(tmp_path / "body")[0]
    assert sum(name.endswith(".weight_check") for name in tensors) == len(CompressedReader(packed).packed)
    same(AutoModel.from_pretrained(tmp_path / "body"), model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_device_maps(family: str, folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain, packed = folders(family)
    same(opened(packed, device_map="cpu"), opened(plain))
    opened(packed, device_map={"": "cpu"}).save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)
    assert "SparseLinear" in kinds(with_kernel(packed, "packed", device_map="cpu"))
    halves: dict[str, str] = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    halves |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = opened(packed, device_map=halves, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(opened(plain)))
    with pytest.raises(UsageError, match="not in memory; open it without device_map"):
        model.save_pretrained(tmp_path / "offloaded")
    assert not list((tmp_path / "offloaded").iterdir())
    with pytest.raises(UsageError, match="take disk out of device_map"):
        with_kernel(packed, "packed", device_map=halves, offload_folder=tmp_path / "offload")


def test_changed_weights_are_saved_as_they_are(folders: Folders, tmp_path: Path) -> None:
    packed = folders("mixtral")[1]
    model = opened(packed)
    before = stored(packed)
    with torch.no_grad():
        model.get_submodule(Q_PROJ).weight[0, :4] = 1.0
        model.model.layers[0].self_attn.k_proj.weight.fill_(1.0)
        model.model.layers[1].mlp.experts.down_proj[2].fill_(2.0)
        model.model.layers[1].mlp.experts.down_proj[3, 0, :4] = 3.0
    model.save_pretrained(tmp_path / "again")
    same(opened(tmp_path / "again"), model)
    tensors, config = stored(tmp_path / "again")
    dense = ["model.layers.0.self_attn.k_proj", "model.layers.1.block_sparse_moe.experts.2.w2"]
    assert config["ignore"] == [*before[1]["ignore"], *dense]
    assert all(f"{name}.weight_check" not in tensors and f"{name}.weight_mask" not in tensors for name in dense)
    for name in (Q_PROJ, "model.layers.1.block_sparse_moe.experts.3.w2"):
        assert before[0][f"{name}.weight_check"][3:5].tolist() == [2, 4]
        assert tensors[f"{name}.weight_check"][3:5].tolist() == [0, 0]
    changed = {f"{name}.weight" for name in (*dense, Q_PROJ, "model.layers.1.block_sparse_moe.experts.3.w2")}
    for name in before[0].keys() & tensors.keys():
        assert torch.equal(before[0][name], tensors[name]) == (name.partition(".weight")[0] + ".weight" not in changed)
    same(with_kernel(tmp_path / "again", "packed").dequantize(), model)
    # Sparse again, and so stored.
    reopened = opened(packed)
    model.load_state_dict(reopened.state_dict())
    model.save_pretrained(tmp_path / "back")
    same_stored(tmp_path / "back", packed)


def test_training_works_and_is_saved(folders: Folders, tmp_path: Path) -> None:
    packed = folders("llama", dtype=torch.float32)[1]
    model = opened(packed)
    assert model.hf_quantizer.is_trainable
    ids = torch.tensor([[3, 4, 5, 6]])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.save_pretrained(tmp_path / "tuned")
    same(opened(tmp_path / "tuned"), model)
    assert opened(packed).half().dtype == torch.float16


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dequantized_models_are_ordinary(family: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders(family)
    opened(packed).dequantize().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    ours, theirs = load_file(tmp_path / "plain/model.safetensors"), tensors_of(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
