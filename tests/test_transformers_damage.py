"""Damaged compressed checkpoints opened by transformers: an error that names the tensor, never other weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsify.errors import ModelError
from sparsify.types import NofM
from tests.checkpoints import Q_PROJ, Folders, make_folders, opened, replace_tensors, set_packed, with_kernel

EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w1",
    "qwen2_moe": "model.layers.0.mlp.experts.1.gate_proj",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("compressed"), ids_file)


def flip(tensor: torch.Tensor) -> None:
    tensor.flatten().view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("kernel", ["dense", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("part", ["weight", "weight_mask", "weight_check"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_is_an_error_that_names_the_tensor(
    damage: str, part: str, family: str, kernel: str, folders: Folders, tmp_path: Path
) -> None:
    packed = Path(shutil.copytree(folders(family)[1], tmp_path / "packed"))
    name = f"{EXPERT.get(family, Q_PROJ)}.{part}"
    replace_tensors(packed, lambda tensors: flip(tensors[name]) if damage == "flipped" else tensors.pop(name))
    with pytest.raises(ModelError) as caught:
        with_kernel(packed, kernel)
    assert str(caught.value).startswith(f"{packed / 'model.safetensors'}: tensor ")
    assert name.rpartition(".")[0] in str(caught.value)
    assert (part == "weight_check" and damage == "flipped") or name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    weight = torch.ones(16, 32, dtype=torch.bfloat16) * torch.tensor([1.0, 0.0] * 16, dtype=torch.bfloat16)
    replace_tensors(packed, lambda tensors: set_packed(tensors, Q_PROJ, weight, NofM(2, 4)))
    for kernel in ("dense", "packed"):
        with pytest.raises(ModelError, match=rf"tensor {Q_PROJ}.weight is \[16, 32\], config.json asks for \[32, 32\]"):
            with_kernel(packed, kernel)
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "norm"))
    replace_tensors(packed, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises((ModelError, RuntimeError)):
        opened(packed)


def test_unreadable_configs_and_shards(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    config = json.loads((packed / "config.json").read_text())
    for key, value in (("format", 3), ("ignore", "lm_head")):
        broken = {**config, "quantization_config": {**config["quantization_config"], key: value}}
        (packed / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=key):
            opened(packed)
    (packed / "config.json").write_text(json.dumps(config))
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"model\.safetensors|[Ii]ncomplete|InvalidOffset|[Hh]eader"):
        opened(packed)
