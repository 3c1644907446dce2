"""Reading the sparse checkpoints that compressed-tensors wrote until 2026, whose readers were all removed.

Per weight ``<module>.compressed`` (values), ``<module>.bitmask`` (as ours) and ``<module>.shape`` (int64, two values);
``sparse-bitmask`` has ``<module>.row_offsets`` too, which follow from the mask. There are no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsify.errors import ModelError
from sparsify.format.bits import count_bits, mask_bytes
from sparsify.format.packed import DTYPES, Packed
from sparsify.format.record import check_bits
from sparsify.types import NofM

# Name of the format -> its pattern.
FORMATS: dict[str, NofM | None] = {"sparse-24-bitmask": NofM(2, 4), "sparse-bitmask": None}
VALUES, MASK, SHAPE, OFFSETS = "compressed", "bitmask", "shape", "row_offsets"
PARTS = (VALUES, MASK, SHAPE, OFFSETS)


def legacy_format(config: Any) -> str | None:
    """The format of ``quantization_config`` where compressed-tensors stored sparse, unquantised weights; else None."""
    if not isinstance(config, Mapping) or config.get("quant_method") != "compressed-tensors":
        return None
    sparsity = config.get("sparsity_config")
    name = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    # Quantised and sparse at once is stored in yet another way, which only its own reader knew.
    plain = not config.get("config_groups") and not config.get("kv_cache_scheme")
    return name if isinstance(name, str) and name in FORMATS and plain else None


def is_complete(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether every part of a weight of format ``name`` is there."""
    wanted = {VALUES, MASK, SHAPE} | ({OFFSETS} if FORMATS[name] is None else set())
    return wanted <= tensors.keys()


def from_legacy(module: str, tensors: Mapping[str, torch.Tensor], name: str, where: object = "") -> Packed:
    """The packed weight that ``tensors`` of format ``name`` hold, checked as far as the format allows.

    Raises:
        ModelError: a part is missing, of another dtype or shape, or inconsistent; names the tensor.
    """
    place = f"{where}: " if str(where) else ""

    def refuse(part: str, what: str) -> ModelError:
        return ModelError(f"{place}tensor {module}.{part} {what}; download the model again")

    for part in (VALUES, MASK, SHAPE):
        if part not in tensors:
            raise refuse(part, "is missing")
    values, mask = tensors[VALUES], tensors[MASK]
    whole = tensors[SHAPE].dtype in (torch.int64, torch.int32)
    size = tensors[SHAPE].flatten().tolist() if whole else []
    if len(size) != 2 or min(size) < 1:
        raise refuse(SHAPE, f"is {size[:4]}, want two positive integers")
    pattern, (n_out, n_in) = FORMATS[name], size
    if pattern is not None and n_in % pattern.m:
        raise refuse(SHAPE, f"says {n_in} columns, no multiple of {pattern.m}")
    if values.dtype not in DTYPES:
        raise refuse(VALUES, f"is {values.dtype}, want a 16-bit or 32-bit float")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (n_out, mask_bytes(n_in)):
        raise refuse(MASK, f"is {mask.dtype} {list(mask.shape)}, want uint8 {[n_out, mask_bytes(n_in)]}")
    if values.dim() != 1 if pattern is None else tuple(values.shape) != (n_out, n_in // 2):
        raise refuse(VALUES, f"has shape {list(values.shape)}, which does not belong to {size}")
    check_bits(mask, n_in, pattern, len(values), lambda part, what: refuse(MASK, what))
    if pattern is None and OFFSETS in tensors:
        per_row = count_bits(mask).sum(dim=1)
        offsets = tensors[OFFSETS].flatten()
        if offsets.dtype != torch.int64 or not torch.equal(offsets, per_row.cumsum(dim=0) - per_row):
            raise refuse(OFFSETS, "does not follow from the mask")
    return Packed((n_out, n_in), pattern, values, mask)
