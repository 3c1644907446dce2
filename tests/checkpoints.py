"""Pruned checkpoints of tiny models, plain and compressed, and what tests open and compare of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsify.format.packed import encode
from sparsify.format.reader import CompressedReader
from sparsify.format.record import to_tensors
from sparsify.pipeline import export
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.types import NofM
from tests.conftest import CONFIGS, EXTRA, save_random_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
Folders = Callable[..., tuple[Path, Path]]


def make_folders(root: Path, ids_file: str) -> Folders:
    """Model type, pattern, dtype -> an ordinary pruned checkpoint and the compressed one; not to be written to."""

    def get(model_type: str, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
        folder = root / f"{model_type} {pattern} {dtype} {len(config)}".replace(":", "of")
        plain, packed = folder / "plain", folder / "packed"
        if not packed.exists():
            made = {**CONFIGS, **EXTRA}[model_type]()
            made.update(config)
            save_random_model(folder / "dense", made, dtype=dtype)
            source = Source(model_type, folder / "dense", "folder")
            if pattern == "permuted":
                recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
            else:
                recipe = Recipe(pattern, "magnitude")
            export(prune(source, recipe, plain), "vllm", packed)
        return plain, packed

    return get


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_kernel(folder: Path, kernel: str, **options: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["kernel"] = kernel
    return opened(folder, config=config, **options)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tensors_of(folder), config


def same_stored(folder: Path, other: Path) -> None:
    (ours, config), (theirs, expected) = stored(folder), stored(other)
    # Some tests change tensors and leave the config beside them as it was.
    assert config.pop("digest") == CompressedReader(folder).digest
    expected.pop("digest", None)
    assert config == expected
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


def kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, SparseLinear | nn.Linear)}


def set_packed(tensors: dict[str, torch.Tensor], module: str, weight: torch.Tensor, pattern: NofM | None) -> None:
    tensors |= {f"{module}.{part}": tensor for part, tensor in to_tensors(encode(weight, pattern)).items()}


def replace_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
