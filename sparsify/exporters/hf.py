"""The ordinary Hugging Face checkpoint: zeros in place, opens in transformers like any model."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify.checkpoint import (
    SINGLE,
    copy_side_files,
    portable_config,
    read_config,
    write_index,
    write_shard,
)
from sparsify.files import write_json
from sparsify.format.reader import open_checkpoint

# One shard is in memory at a time; 2 GB is about one decoder block of a 70B model.
SHARD_BYTES = 2 << 30


def export_hf(checkpoint: Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors of ``checkpoint`` into the existing folder ``out``, repacked into as few shards as fit.

    Args:
        checkpoint: folder of safetensors, config and tokenizer.
        out: existing, empty folder.
        shard_bytes: upper bound of a shard; a larger single tensor has a shard to itself.

    Raises:
        ModelError: the checkpoint cannot be read.
        OutputError: disk full, not writable.
    """
    reader = open_checkpoint(checkpoint)
    groups: list[list[str]] = [[]]
    size = 0
    # In the order of the source shards, so that each is opened once.
    for name, info in sorted(reader.tensors.items(), key=lambda item: (item[1].file, item[0])):
        if groups[-1] and size + info.n_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.n_bytes
    shards: dict[str, dict[str, int]] = {}
    for i, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = dict(reader.read(names))
        write_shard(out / file, tensors)
        shards[file] = {name: reader.tensors[name].n_bytes for name in names}
        del tensors
    if len(groups) > 1:
        write_index(out, shards)
    write_json(out / "config.json", portable_config(read_config(checkpoint)))
    copy_side_files(checkpoint, out)
