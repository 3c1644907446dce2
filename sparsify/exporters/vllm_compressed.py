"""The compressed checkpoint that vLLM serves through the plugin: pruned linears packed, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsify.checkpoint import (
    SINGLE,
    copy_side_files,
    portable_config,
    read_config,
    read_permutations,
    write_index,
    write_shard,
)
from sparsify.errors import ModelError, UsageError
from sparsify.exporters.hf import SHARD_BYTES
from sparsify.files import write_json
from sparsify.format.packed import DTYPES, Packed, encode, fits, quantise
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.format.record import to_tensors
from sparsify.format.storage import KEY, SERVED, Storage
from sparsify.manifest import PERMUTATIONS
from sparsify.model import load_skeleton
from sparsify.naming import Binding, linear_weights
from sparsify.types import NofM, parse_pattern

# Settings of a model that vLLM does not implement, though it knows the type.
_NOT_IN_VLLM = {"stablelm": "qk_layernorm"}


def export_compressed(
    checkpoint: Path,
    out: Path,
    linears: list[dict[str, Any]],
    *,
    int8: bool = False,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write ``checkpoint`` into the existing folder ``out`` with the pruned ``linears`` packed.

    One tensor is packed at a time and one shard is in memory. A linear with too few zeros to become smaller stays
    dense; one whose zeros do not fit its pattern bit for bit (-0.0 is a value) is packed unstructured.

    Args:
        checkpoint: pruned checkpoint.
        out: existing, empty folder.
        linears: rows of the manifest.
        int8: round the values that are packed to 8 bits and a scale for each output.
        trust_remote_code: let the model's own code load.
        shard_bytes: a shard is closed when it has reached this size.

    Returns:
        for the manifest, ``storage``: counts of linears ``packed`` by pattern, ``dense`` (pruned, and stored dense),
        ``packed_bytes``, and ``dense_bytes`` of the same weights; where values were rounded also their dtype in
        ``values``, and ``rounded`` with the exact zeros of each linear, to which small weights were added.

    Raises:
        ModelError: the checkpoint cannot be read, or vLLM's loader for its model type is not known to take packed
            weights.
        UsageError: a weight that is to be rounded holds NaN or Inf; names the tensor.
        OutputError: disk full, not writable.
    """
    config = read_config(checkpoint)
    if config["model_type"] not in SERVED:
        raise ModelError(
            f"{checkpoint / 'config.json'}: how vLLM loads model type {config['model_type']!r} has not been checked "
            "with packed weights; export with --dense, which needs no plugin"
        )
    unknown = _NOT_IN_VLLM.get(config["model_type"], "")
    if config.get(unknown):
        raise ModelError(f"{checkpoint / 'config.json'}: key {unknown} is set, which vLLM does not implement")
    plan = _Plan(checkpoint, linears, int8, trust_remote_code)
    shards: dict[str, dict[str, int]] = {}
    for i, tensors in enumerate(_batches(plan.tensors(), shard_bytes), 1):
        file = f"model-{i:05d}.safetensors"
        write_shard(out / file, tensors)
        shards[file] = {name: tensor.nbytes for name, tensor in tensors.items()}
    if len(shards) == 1:
        (out / next(iter(shards))).rename(out / SINGLE)
    else:
        write_index(out, shards)
    ignore = tuple(name.removesuffix(".weight") for name in plan.dense_matrices)
    int8 = int8 and bool(plan.packed)
    storage = Storage(ignore, CompressedReader(out).digest, int8)
    write_json(out / "config.json", {**portable_config(config), KEY: storage.to_dict()})
    copy_side_files(checkpoint, out)
    facts: dict[str, Any] = {
        "packed": dict(sorted(plan.packed.items())),
        "dense": plan.left_dense,
        "packed_bytes": plan.packed_bytes,
        "dense_bytes": plan.dense_bytes,
    }
    if not int8:
        return {"storage": facts}
    names = {row["name"] for row in linears}
    weights = linear_weights(out, trust_remote_code=trust_remote_code)
    zeros = {spec.name: int((weight == 0).sum()) for spec, weight in weights if spec.name in names}
    return {"storage": {**facts, "values": "int8"}, "rounded": {"values": "int8", "zeros": zeros}}


def _batches(tensors: Iterator[dict[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of tensors of ``limit`` bytes or a little more; what belongs to one weight stays together."""
    batch: dict[str, torch.Tensor] = {}
    n_bytes = 0
    for group in tensors:
        batch |= group
        n_bytes += sum(tensor.nbytes for tensor in group.values())
        if n_bytes >= limit:
            yield batch
            batch, n_bytes = {}, 0
    if batch:
        yield batch


# The (pattern, order) that a linear of a parameter was pruned in, each once: its bytes are the key of an order.
_Layouts = dict[tuple[NofM, bytes], torch.Tensor | None]


def _has_layout(weight: torch.Tensor, pattern: NofM, perm: torch.Tensor | None) -> bool:
    """True if ``pattern`` holds in ``weight`` [out, in] with its columns in the order ``perm``."""
    if perm is None:
        return fits(weight, pattern)
    # Each of a hundred experts may have an order of its own; a few rows tell it from all the others.
    return len(perm) == weight.shape[1] and all(fits(part[:, perm], pattern) for part in (weight[:8], weight))


class _Plan:
    """Which stored tensors hold pruned linears, and what has been written of them so far."""

    def __init__(self, checkpoint: Path, linears: list[dict[str, Any]], int8: bool, trust_remote_code: bool) -> None:
        self.int8 = int8
        self.reader = open_checkpoint(checkpoint)
        skeleton = load_skeleton(checkpoint, trust_remote_code=trust_remote_code)
        binding = Binding(self.reader, skeleton)
        rows = {row["name"]: row for row in linears}
        recorded = any(row.get("permuted") == "recorded" for row in linears)
        orders = read_permutations(checkpoint / PERMUTATIONS) if recorded else {}
        parameters: dict[str, _Layouts] = {}
        for spec in (spec for block in skeleton.linears for spec in block if spec.name in rows):
            row = rows[spec.name]
            pattern = parse_pattern(row["pattern"], None, f"{spec.name}: pattern")
            layouts = parameters.setdefault(spec.parameter, {})
            if not isinstance(pattern, NofM):
                continue
            order = orders.get(spec.name) if row.get("permuted") == "recorded" else None
            if order is None and row.get("permuted") == "recorded":
                raise ModelError(f"{checkpoint / PERMUTATIONS}: entry {spec.name} is missing; prune again")
            layouts[pattern, b"" if order is None else order.numpy().tobytes()] = order
        # Experts are stored in several tensors for one fused parameter, whose names are the family's own; which of its
        # linears a tensor holds is seen from its zeros.
        self.layouts: dict[str, _Layouts] = {}
        for parameter, layouts in parameters.items():
            for name in binding.stored_for(parameter):
                self.layouts.setdefault(name, {}).update(layouts)
        self.packed: dict[str, int] = {}
        self.dense_matrices: list[str] = []
        self.left_dense = self.packed_bytes = self.dense_bytes = 0

    def tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        """What to write, one stored tensor or the parts of one packed weight at a time."""
        order = sorted(self.reader.tensors.items(), key=lambda item: (item[1].file, item[0]))
        for name, tensor in self.reader.read(name for name, _ in order):
            packed = self._pack(name, tensor) if name in self.layouts else None
            if packed is None:
                if tensor.dim() == 2 and name.endswith(".weight"):
                    self.dense_matrices.append(name)
                yield {name: tensor}
                continue
            module = name.removesuffix(".weight")
            parts = to_tensors(packed)
            kind = str(packed.pattern or "unstructured")
            self.packed[kind] = self.packed.get(kind, 0) + 1
            self.packed_bytes += sum(part.nbytes for part in parts.values())
            self.dense_bytes += tensor.nbytes
            yield {f"{module}.{part}": value for part, value in parts.items()}

    def _pack(self, name: str, tensor: torch.Tensor) -> Packed | None:
        if tensor.dim() != 2 or tensor.dtype not in DTYPES or not name.endswith(".weight"):
            self.left_dense += 1
            return None
        # What fits 1:4 fits 2:4 too, with zeros among the values: the pattern that keeps least is tried first.
        layouts = sorted(self.layouts[name].items(), key=lambda item: item[0][0].n / item[0][0].m)
        found = ((pattern, perm) for (pattern, _), perm in layouts if _has_layout(tensor, pattern, perm))
        pattern, perm = next(found, (None, None))
        packed = encode(tensor, pattern, perm)
        if self.int8:
            try:
                packed = quantise(packed)
            except UsageError as error:
                raise UsageError(f"{self.reader.tensors[name].file}: tensor {name}: {error}") from None
        if packed.n_bytes >= tensor.nbytes:
            self.left_dense += 1
            return None
        return packed
