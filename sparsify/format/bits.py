"""Bitmasks: eight columns a byte, bit j of byte b is column 8b + j; unused bits of a row's last byte are zero."""

from __future__ import annotations

import functools

import torch


def mask_bytes(n_in: int) -> int:
    """Bytes of one row of a mask over ``n_in`` columns."""
    return -(-n_in // 8)


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """``keep`` [out, in] bool as bytes, uint8 [out, ceil(in / 8)]."""
    n_out, n_in = keep.shape
    padding = -n_in % 8
    if padding:
        keep = torch.nn.functional.pad(keep, (0, padding))
    flat = keep.contiguous().flatten()
    if flat.storage_offset() % 8:
        # A cut out of one row is contiguous where it starts, and integers are read at multiples of their size only.
        flat = flat.clone()
    # Eight bools are eight bytes of 0 and 1, read as one integer; the product moves bit 8j to bit 56 + j.
    lanes = flat.view(torch.uint8).view(torch.int64)
    return ((lanes * 0x0102040810204080) >> 56).to(torch.uint8).reshape(n_out, mask_bytes(n_in))


@functools.cache
def _lanes(device: torch.device) -> torch.Tensor:
    """For each byte the eight bools of its bits, as one integer: int64 [256]."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


def unpack_bits(mask: torch.Tensor, n_in: int) -> torch.Tensor:
    """``keep`` [out, in] bool of a mask uint8 [out, ceil(in / 8)]."""
    lanes = torch.index_select(_lanes(mask.device), 0, mask.flatten().int())
    keep = lanes.view(torch.bool).view(mask.shape[0], 8 * mask.shape[1])
    return keep if keep.shape[1] == n_in else keep[:, :n_in].contiguous()


@functools.cache
def _counts(device: torch.device) -> torch.Tensor:
    """Number of bits set in each byte: int32 [256]."""
    return ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).sum(dim=1, dtype=torch.int32).to(device)


def count_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bits set in each byte of ``mask``: int32, of its shape."""
    return torch.index_select(_counts(mask.device), 0, mask.flatten().int()).view(mask.shape)


def count_groups(mask: torch.Tensor, n_in: int, m: int) -> torch.Tensor:
    """Bits set in each group of ``m`` columns of a mask over ``n_in``, which m divides; in an order of their own."""
    if m % 8 == 0:
        return count_bits(mask).view(mask.shape[0], -1, m // 8).sum(dim=2)
    if m == 4 and n_in % 8 == 0:
        return torch.stack((count_bits(mask & 15), count_bits(mask >> 4)))
    return unpack_bits(mask, n_in).view(mask.shape[0], -1, m).sum(dim=2)
