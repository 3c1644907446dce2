"""What a pruned checkpoint has besides its blocks: other tensors, index, configuration, orders of inputs, manifest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.checkpoint import (
    copy_side_files,
    portable_config,
    read_permutations,
    write_index,
    write_permutations,
    write_shard,
)
from sparsify.cluster.files import ORDERS, PASSING, SHARD
from sparsify.data import Windows
from sparsify.files import sha256_file, write_json
from sparsify.naming import Binding
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.types import PrunedLinear

# Tensors outside the blocks (embeddings, head) are copied in shards of at most this size, the bound on that step's
# memory; a larger single tensor has a shard to itself.
_COPY_BYTES = 1 << 30

Blocks = Mapping[str, Mapping[str, Any]]
"""Number of a block -> ``file``, ``bytes``, ``linears``, ``orders``."""


class Rest:
    """The parts of a checkpoint that are made when all blocks are in their shards.

    Args:
        folder: where it is built.
        binding: the dense model.
        source: where that is from.
        recipe: of the run.
        windows: calibration text, where there is some.
    """

    def __init__(self, folder: Path, binding: Binding, source: Source, recipe: Recipe, windows: Windows | None) -> None:
        self.folder, self.binding, self.skeleton = folder, binding, binding.skeleton
        self.source, self.recipe, self.windows = source, recipe, windows

    @property
    def n_shards(self) -> int:
        """Files of tensors, one a block and those of the rest."""
        return self.skeleton.n_blocks + len(self._groups)

    @cached_property
    def _groups(self) -> list[list[str]]:
        groups: list[list[str]] = []
        size = _COPY_BYTES
        for name in sorted(self.binding.stored_outside_blocks()):
            n_bytes = self.binding.reader.tensors[name].n_bytes
            if size + n_bytes > _COPY_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += n_bytes
        return groups

    def write(self, blocks: Blocks) -> None:
        """Write everything but the manifest, and remove what only the run needed.

        Raises:
            OutputError: disk full, not writable.
            ModelError, NumericsError: as ``Binding.copies``.
        """
        reader, folder = self.binding.reader, self.folder
        shards = {
            block["file"]: {
                name: reader.tensors[name].n_bytes for name in self.binding.stored_in(self.skeleton.prefix(index))
            }
            for index, block in _in_order(blocks)
        }
        for i, names in enumerate(self._groups, self.skeleton.n_blocks + 1):
            shard = SHARD.format(i, self.n_shards)
            write_shard(folder / shard, self.binding.copies(names))
            shards[shard] = {name: reader.tensors[name].n_bytes for name in names}
        write_index(folder, shards)
        write_json(
            folder / "config.json",
            portable_config(self.skeleton.config, getattr(self.skeleton.text_config, "rope_parameters", None)),
        )
        # Before files of the model come that may be called alike.
        for path in [path for pattern in PASSING for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
        copy_side_files(self.source.folder, folder)
        self._join_orders()

    def _join_orders(self) -> None:
        """Put the orders of inputs that blocks left into ``sparsify.perm``, int32 [in] by linear name."""
        parts = [self.folder / ORDERS.format(index) for index in ("residual", *range(self.skeleton.n_blocks))]
        parts = [path for path in parts if path.exists()]
        orders = {name: perm for path in parts for name, perm in read_permutations(path).items()}
        # Where it exists, an interrupted run has joined them all and may have removed some.
        if orders and not (self.folder / manifest.PERMUTATIONS).exists():
            write_permutations(self.folder / manifest.PERMUTATIONS, orders)
        for path in parts:
            path.unlink()

    def described(self, blocks: Blocks) -> dict[str, Any]:
        """The body of the manifest."""
        linears = [
            PrunedLinear(**{**row, "shape": tuple(row["shape"])})
            for _, block in _in_order(blocks)
            for row in block["linears"]
        ]
        # Parameters, not stored tensors: checkpoints may hold buffers, and a tied weight twice.
        tied = self.binding.tied()
        total = sum(p.numel() for name, p in self.skeleton.model.named_parameters() if name not in tied)
        prunable = sum(spec.n_weights for block in self.skeleton.linears for spec in block)
        return {
            "kind": "checkpoint",
            "source": {
                "name": self.source.name,
                "origin": self.source.origin,
                "model_type": self.skeleton.config["model_type"],
                "files": {path.name: sha256_file(path) for path in self.binding.reader.files},
            },
            "recipe": self.recipe.to_dict(),
            "calibration": self.windows.describe() if self.windows else None,
            "coverage": manifest.coverage(total, prunable, linears),
            "linears": manifest.linear_records(linears),
            "notices": self.skeleton.notices,
            "versions": manifest.versions("torch", "transformers", "safetensors"),
        }


def _in_order(blocks: Blocks) -> list[tuple[int, Mapping[str, Any]]]:
    """Records by the blocks' numbers."""
    return sorted(((int(index), block) for index, block in blocks.items()), key=lambda each: each[0])
