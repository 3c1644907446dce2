"""Compressed checkpoints as others have written or damaged them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import SINGLE
from sparsify.format.packed import Packed, unstructured
from sparsify.format.reader import CompressedReader


def as_compressed_tensors(compressed: Path, out: Path, form: str) -> Path:
    """A copy in the layout of compressed-tensors 0.13, ``form`` one of its two sparse ones."""
    shutil.copytree(compressed, out)
    reader = CompressedReader(compressed)
    stored = load_file(compressed / SINGLE)
    for module in reader.packed:
        packed: Packed = reader.read_packed(module)
        if form == "sparse-bitmask":
            packed = unstructured(packed)
        del stored[f"{module}.weight"], stored[f"{module}.weight_mask"], stored[f"{module}.weight_check"]
        stored[f"{module}.compressed"] = packed.values
        stored[f"{module}.bitmask"] = packed.mask
        stored[f"{module}.shape"] = torch.tensor(packed.shape).reshape(-1, 1)
        if form == "sparse-bitmask":
            counts = torch.tensor(
                [bin(int.from_bytes(bytes(row), "little")).count("1") for row in packed.mask.tolist()]
            )
            stored[f"{module}.row_offsets"] = counts.cumsum(0) - counts
            stored[f"{module}.shape"] = torch.tensor(packed.shape)
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    structure = "2:4" if "24" in form else "unstructured"
    sparsity = {"format": form, "global_sparsity": 0.4, "ignore": ["lm_head"], "sparsity_structure": structure}
    configure(out, {"quant_method": "compressed-tensors", "sparsity_config": {**sparsity, "targets": ["Linear"]}})
    return out


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    """Put ``quantization`` in place of what the config says of it."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def without(folder: Path, out: Path, *names: str) -> Path:
    """A copy of a checkpoint whose tensors that begin with ``names`` are gone."""
    shutil.copytree(folder, out)
    stored = load_file(out / SINGLE)
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(names)}
    assert len(kept) < len(stored)
    save_file(kept, out / SINGLE, metadata={"format": "pt"})
    return out


def no_digest(folder: Path) -> Path:
    """As a checkpoint that ``save_pretrained`` has written."""
    configure(folder, {"quant_method": "sparsify", "format": 1, "ignore": []})
    return folder
