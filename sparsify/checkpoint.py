"""Reading and writing Hugging Face checkpoints tensor by tensor; a whole model is never in memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from sparsify.errors import ModelError
from sparsify.files import read_json, write_atomic, write_json, writing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}

# Files beside the weights that belong to a model (tokenizer, chat template, generation, processor) and are copied as
# they are; the model's own code only where config.json refers to it.
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_SIDE_FILES = (
    "config.json",
    INDEX,
    "sparsify.json",
    "run.json",
    "report.json",
    "gguf.json",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored: ``file``, ``shape``, and ``dtype`` as safetensors names it (``BF16``)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return self.n_values * _BYTES.get(self.dtype, 1)


class CheckpointReader:
    """Tensors of a safetensors checkpoint by name; headers are read and validated at once, data on request.

    Attributes:
        folder: the checkpoint's folder.
        tensors: name -> TensorInfo.

    Raises:
        ModelError: no safetensors, a missing or truncated shard, or an index that disagrees with the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.exists():
            weight_map = _read_index(index)
            self.tensors = _locate(index, weight_map)
        elif (folder / SINGLE).exists():
            self.tensors = dict(_scan(folder / SINGLE))
        else:
            found = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            hint = (
                f"it has {found[0]}, and pickles are not opened: convert it to safetensors first"
                if found
                else f"expected {SINGLE} or {INDEX}"
            )
            raise ModelError(f"{folder}: no safetensors weights; {hint}")
        if not self.tensors:
            raise ModelError(f"{folder}: the checkpoint holds no tensors; download it again")

    @property
    def files(self) -> list[Path]:
        """The shards in use, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) with the stored dtype, grouped by shard; each shard is open only while it is read."""
        return read_tensors(self.tensors, names)


def read_tensors(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of ``names`` among ``tensors``, grouped by shard.

    Raises:
        ModelError: a truncated shard.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(tensors[name].file, []).append(name)
    for file, wanted in by_file.items():
        with open_shard(file) as shard:
            for name in wanted:
                try:
                    yield name, shard.get_tensor(name)
                except SafetensorError as error:
                    raise ModelError(f"{file}: tensor {name}: {error}; download the file again") from error


def open_shard(file: Path) -> Any:
    """An open safetensors file.

    Raises:
        ModelError: missing, truncated or not safetensors.
    """
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{file}: missing shard; download the model again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: truncated or not a safetensors file ({error}); download it again") from None


def _scan(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    with open_shard(file) as shard:
        for name in list(shard.keys()):
            view = shard.get_slice(name)
            yield name, TensorInfo(file, tuple(view.get_shape()), view.get_dtype())


def _read_index(index: Path) -> dict[str, str]:
    try:
        value = read_json(index)
    except (OSError, ValueError) as error:
        raise ModelError(f"{index}: not readable as JSON ({error}); download it again") from None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: key weight_map is missing or empty; download it again")
    for name, file in weight_map.items():
        # A hostile index must not reach files outside the model folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index}: weight_map entry {name} names {file!r}, which is not a file beside the index")
    return weight_map


def _locate(index: Path, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if not path.exists():
            raise ModelError(f"{index}: names {file}, which is missing; download the model again")
        present = dict(_scan(path))
        for name, owner in weight_map.items():
            if owner != file:
                continue
            if name not in present:
                raise ModelError(f"{index}: says {file} holds {name}, but it does not; download the model again")
            tensors[name] = present[name]
    return tensors


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one shard atomically, with the metadata transformers expects.

    Raises:
        OutputError: disk full, not writable.
    """
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt"}))


def write_index(folder: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """Write the index over ``shards``: file name -> {tensor name: bytes}."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(size for names in shards.values() for size in names.values())
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_permutations(path: Path, orders: Mapping[str, torch.Tensor]) -> None:
    """Write orders of inputs by linear name, in the format of safetensors; int32, perm [in].

    Raises:
        OutputError: disk full, not writable.
    """
    write_shard(path, {name: perm.int() for name, perm in orders.items()})


def read_permutations(path: Path) -> dict[str, torch.Tensor]:
    """What ``write_permutations`` wrote; int64, each a permutation.

    Raises:
        ModelError: missing, truncated, or an entry that is not a permutation.
    """
    try:
        orders = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not readable ({error}); prune again") from None
    for name, perm in orders.items():
        if (
            perm.dtype != torch.int32
            or perm.dim() != 1
            or not torch.equal(perm.sort().values, torch.arange(len(perm), dtype=torch.int32))
        ):
            raise ModelError(f"{path}: entry {name} is not a permutation; prune again")
    return {name: perm.long() for name, perm in orders.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: missing, not JSON, not an object.
    """
    path = folder / "config.json"
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder}: has no config.json; is this a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise ModelError(f"{path}: key model_type is missing; download it again")
    return value


def portable_config(config: Mapping[str, Any], rope_parameters: Any = None) -> dict[str, Any]:
    """``config`` as every reader understands it.

    transformers 5 writes the rotary settings inside ``rope_parameters`` only, and tools built on transformers 4 then
    fall back to their defaults without a word; so both forms are written. No quantisation entry survives: the weights
    are plain.

    Args:
        config: ``config.json`` as read.
        rope_parameters: those of the loaded config, for a source that has only the older keys.
    """
    result = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    text = result.get("text_config")
    if isinstance(text, dict):
        # A model that also sees images: the language model's settings are one level down.
        result["text_config"] = portable_config(text, rope_parameters)
        rope_parameters = None
    rope = result.get("rope_parameters") or rope_parameters
    if isinstance(rope, dict) and rope:
        result["rope_parameters"] = rope
        # Gemma 3 has one set for full and one for sliding attention.
        main = rope.get("full_attention", rope)
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            result.setdefault("rope_local_base_freq", local["rope_theta"])
        if isinstance(main, dict) and "rope_theta" in main:
            result["rope_theta"] = main["rope_theta"]
            scaling = {key: main[key] for key in main if key not in ("rope_theta", "partial_rotary_factor")}
            if scaling.get("rope_type", "default") != "default":
                result.setdefault("rope_scaling", scaling)
            if "partial_rotary_factor" in main:
                result.setdefault("partial_rotary_factor", main["partial_rotary_factor"])
            if result.get("model_type") == "gpt_neox":
                result.setdefault("rotary_emb_base", main["rope_theta"])
                result.setdefault("rotary_pct", main.get("partial_rotary_factor", 0.25))
    if isinstance(result.get("dtype"), str):
        result.setdefault("torch_dtype", result["dtype"])
    return result


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and the like, and the model's code if config.json names it.

    Raises:
        OutputError: disk full, not writable.
    """
    suffixes = (*_SIDE_SUFFIXES, ".py") if read_config(source).get("auto_map") else _SIDE_SUFFIXES
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in suffixes and path.name not in _NOT_SIDE_FILES:
            write_atomic(target / path.name, partial(shutil.copyfile, path))
    extra = source / "additional_chat_templates"
    if extra.is_dir():
        with writing(target):
            shutil.copytree(extra, target / extra.name, dirs_exist_ok=True)
