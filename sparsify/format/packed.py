"""A pruned weight as bitmask and values, and the dense weight back: bit for bit, or with values rounded to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsify.errors import UsageError
from sparsify.format.bits import count_bits, count_groups, pack_bits, unpack_bits
from sparsify.format.expand import expand
from sparsify.types import NofM

# What a value is compared as: bits, so that -0.0 counts as a value and comes back.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Packed:
    """A weight [out, in] without its zeros.

    Attributes:
        shape: (out, in) of the dense weight.
        pattern: ``NofM`` where every group of m columns keeps exactly n, some of which may be zero; None for
            unstructured.
        values: what is kept, row by row in the order of columns: [out, in * n / m], or [nnz] for unstructured;
            bfloat16, float16 or float32, or int8 with a scale.
        mask: uint8 [out, ceil(in / 8)], see ``format.bits``.
        perm: int32 [in] where the columns are stored in another order, ``stored[:, k] = weight[:, perm[k]]``; mask,
            values and pattern are those of the stored order.
        scale: float32 [out] where values are int8: ``weight[i, j] = scale[i] * value``.
        scaled_dtype: of that weight; without a scale it is that of the values.
    """

    shape: tuple[int, int]
    pattern: NofM | None
    values: torch.Tensor
    mask: torch.Tensor
    perm: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scaled_dtype: torch.dtype = torch.float32

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.values, self.mask, self.perm, self.scale) if t is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return self.values.dtype if self.scale is None else self.scaled_dtype

    def to(self, *args: Any) -> Packed:
        """On another device, or of a dense weight of another dtype, to which values in 8 bits have yet to be scaled."""
        probe = torch.empty(0, dtype=self.dtype, device=self.values.device).to(*args)
        device = probe.device
        values = self.values.to(device, self.values.dtype if self.scale is not None else probe.dtype)
        perm = None if self.perm is None else self.perm.to(device)
        scale = None if self.scale is None else self.scale.to(device)
        scaled = self.scaled_dtype if self.scale is None else probe.dtype
        return replace(self, values=values, mask=self.mask.to(device), perm=perm, scale=scale, scaled_dtype=scaled)


def _used(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(_BITS[weight.itemsize]) != 0


def fits(weight: torch.Tensor, pattern: NofM) -> bool:
    """True if ``weight`` [out, in] has at most n values in every group of m whose bits are not all zero."""
    if weight.shape[1] % pattern.m:
        return False
    return bool((count_groups(pack_bits(_used(weight)), weight.shape[1], pattern.m) <= pattern.n).all())


def encode(weight: torch.Tensor, pattern: NofM | None = None, perm: torch.Tensor | None = None) -> Packed:
    """``weight`` [out, in] packed; ``decode`` gives it back bit for bit.

    Where a group has fewer values than the pattern keeps, its first zeros are kept too, so that tensors of a pattern
    are rectangular.

    Args:
        weight: bfloat16, float16 or float32.
        pattern: None packs every value that is not +0.0.
        perm: order of columns in which the pattern holds.

    Raises:
        UsageError: the weight does not fit the pattern (-0.0 counts as a value), or has another dtype.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise UsageError(f"cannot pack {weight.dtype} of shape {list(weight.shape)}; want a float matrix")
    stored = weight.contiguous() if perm is None else weight[:, perm.long()].contiguous()
    shape = (weight.shape[0], weight.shape[1])
    order = None if perm is None else perm.to(device=weight.device, dtype=torch.int32)
    keep = _used(stored)
    if pattern is not None:
        per_group = count_groups(pack_bits(keep), shape[1], pattern.m) if shape[1] % pattern.m == 0 else None
        if per_group is None or bool((per_group > pattern.n).any()):
            raise UsageError(
                f"a weight of shape {list(shape)} keeps more than {pattern} somewhere; pack it unstructured"
            )
        if bool((per_group < pattern.n).any()):
            keep = _fill(keep.view(shape[0], -1, pattern.m), pattern.n).view(shape)
    values = torch.masked_select(stored, keep)
    if pattern is not None:
        values = values.view(shape[0], -1)
    return Packed(shape, pattern, values, pack_bits(keep), order)


def _fill(keep: torch.Tensor, n: int) -> torch.Tensor:
    """Groups [..., m] with the first of their unused places kept too, until there are ``n``."""
    free = ~keep
    short = n - keep.sum(dim=-1, keepdim=True, dtype=torch.int16)
    return keep | (free & (free.cumsum(dim=-1, dtype=torch.int16) <= short))


def quantise(packed: Packed, scale: torch.Tensor | None = None) -> Packed:
    """``packed`` with values rounded to int8, symmetric, a scale per output: ``|scale * code - value| <= scale / 2``.

    The scale of an output is its largest magnitude / 127, codes are -127 to 127, and what is kept stays kept, also
    where it rounds to 0. An output without values other than 0 has scale 0.

    Args:
        packed: values in floats.
        scale: float32 [out], if it is known. That of a decoded weight gives its codes back, unless they underflowed:
            16 bits moved them by less than half.

    Raises:
        UsageError: a value is NaN or infinite, or the values are codes already.
    """
    if packed.scale is not None:
        raise UsageError("values are in 8 bits already; quantise the weight they were made from")
    if not bool(torch.isfinite(packed.values).all()):
        raise UsageError("a weight holds NaN or Inf, which 8 bits cannot; store it unquantised")
    values = packed.values.float()
    if scale is None:
        scale = _scale(_largest(packed, values.abs()))
    divisor = torch.where(scale > 0, scale, 1)
    codes = (values / _each(packed, divisor)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    return replace(packed, values=codes, scale=scale, scaled_dtype=packed.dtype)


_LARGEST_CODE = 127


def _scale(largest: torch.Tensor) -> torch.Tensor:
    """``largest`` / 127 in float32, rounded up, so that no value is more than 127 of it, also among denormals."""
    exact = largest.double() / _LARGEST_CODE
    scale = exact.float()
    scale = torch.where(scale.double() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    # At the end of float32 the product would overflow; half a step is far more than is then missing.
    return torch.where(torch.isinf(scale * _LARGEST_CODE), torch.nextafter(scale, torch.zeros_like(scale)), scale)


def _n_kept(packed: Packed) -> torch.Tensor:
    """Values of each row, int64 [out]."""
    return count_bits(packed.mask).sum(dim=1)


def _each(packed: Packed, of_row: torch.Tensor) -> torch.Tensor:
    """``of_row`` [out] for each value of ``packed``, of a shape that multiplies them."""
    if packed.pattern is not None:
        return of_row.unsqueeze(1)
    # The size is given: to ask a GPU for it would wait for it, which no graph can hold.
    return of_row.repeat_interleave(_n_kept(packed), output_size=len(packed.values))


def _largest(packed: Packed, values: torch.Tensor) -> torch.Tensor:
    """The largest of ``values`` in each row of ``packed``, 0 where there is none: [out]."""
    if packed.pattern is not None:
        return values.amax(dim=1)
    row = _each(packed, torch.arange(packed.shape[0], device=values.device))
    return values.new_zeros(packed.shape[0]).scatter_reduce_(0, row, values, "amax")


def decode(packed: Packed) -> torch.Tensor:
    """The dense weight [out, in], zeros in place; values in 8 bits are scaled in float32 and rounded once."""
    values = packed.values
    if packed.scale is not None:
        values = (values.float() * _each(packed, packed.scale)).to(packed.dtype)
    weight = expand(values, packed.mask, packed.shape, packed.pattern)
    if packed.perm is None:
        return weight
    original = torch.empty_like(weight)
    original[:, packed.perm.long()] = weight
    return original


def unstructured(packed: Packed) -> Packed:
    """The same weight without a pattern: values without a bit, kept to fill groups or rounded to 0, are dropped."""
    if packed.pattern is None:
        return packed
    n_in = packed.shape[1]
    used = packed.values.flatten().view(_BITS[packed.values.itemsize]) != 0
    keep = torch.zeros(packed.shape, dtype=torch.bool, device=used.device)
    keep.masked_scatter_(unpack_bits(packed.mask, n_in), used)
    return replace(packed, pattern=None, values=packed.values.flatten()[used], mask=pack_bits(keep))


def rows(packed: Packed, start: int, stop: int) -> Packed:
    """Rows ``start`` to ``stop``, copied."""
    mask = packed.mask[start:stop].clone()
    shape = (stop - start, packed.shape[1])
    scale = None if packed.scale is None else packed.scale[start:stop].clone()
    if packed.pattern is not None:
        return replace(packed, shape=shape, values=packed.values[start:stop].clone(), mask=mask, scale=scale)
    before = int(count_bits(packed.mask[:start]).sum())
    values = packed.values[before : before + int(count_bits(mask).sum())].clone()
    return replace(packed, shape=shape, values=values, mask=mask, scale=scale)


def columns(packed: Packed, start: int, stop: int) -> Packed:
    """Columns ``start`` to ``stop``, copied unless that is all; unstructured where the cut goes through a group.

    Raises:
        UsageError: the columns are stored in another order, so that a range of them is no range of what is stored.
    """
    if (start, stop) == (0, packed.shape[1]):
        return packed
    if packed.perm is not None:
        raise UsageError("columns stored in another order cannot be cut")
    shape = (packed.shape[0], stop - start)
    pattern = packed.pattern
    if pattern is not None and (start % pattern.m or stop % pattern.m):
        return columns(unstructured(packed), start, stop)
    keep = unpack_bits(packed.mask, packed.shape[1])
    mask = packed.mask[:, start // 8 : stop // 8].clone() if not (start % 8 or stop % 8) else None
    if mask is None:
        mask = pack_bits(keep[:, start:stop])
    scale = None if packed.scale is None else packed.scale.clone()
    if pattern is not None:
        width = slice(start * pattern.n // pattern.m, stop * pattern.n // pattern.m)
        return replace(packed, shape=shape, values=packed.values[:, width].clone(), mask=mask, scale=scale)
    inside = torch.zeros_like(keep)
    inside[:, start:stop] = True
    return replace(packed, shape=shape, values=packed.values[inside[keep]], mask=mask, scale=scale)


def stack(parts: list[Packed]) -> Packed:
    """Weights of one width below each other, as one; unstructured unless all have the same pattern.

    Raises:
        UsageError: their widths differ, their columns are stored in different orders, or values are floats in one and
            8 bits in another.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1]:
            raise UsageError(f"weights of {first.shape[1]} and {part.shape[1]} columns cannot be stacked")
        same = part.perm is first.perm or (
            part.perm is not None and first.perm is not None and torch.equal(part.perm, first.perm)
        )
        if not same:
            raise UsageError("weights whose columns are stored in different orders cannot be stacked")
        if (part.scale is None) != (first.scale is None) or part.scaled_dtype != first.scaled_dtype:
            raise UsageError("weights in floats and in 8 bits, or scaled to different dtypes, cannot be stacked")
    if any(part.pattern != first.pattern for part in parts):
        parts = [unstructured(part) for part in parts]
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    values = torch.cat([part.values for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    scale = torch.cat(scales) if scales else None
    return replace(parts[0], shape=shape, values=values, mask=torch.cat([part.mask for part in parts]), scale=scale)
