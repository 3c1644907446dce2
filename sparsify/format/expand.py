"""Packed values to dense ones, in slices of rows that the cores of a CPU share."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from sparsify.format.bits import count_bits, unpack_bits
from sparsify.types import NofM

# Weights of a slice, as many as leave each step below the size from which torch starts threads of its own: those would
# multiply with ours. Shifts see a quarter of the elements.
_SCATTERED, _SHIFTED = 1 << 15, 1 << 17
# Below this many weights, threads cost more than they bring; kernels expand less at a time.
_ALONE = 1 << 20
# Between the steps Python's lock is held: more threads would wait for it.
_THREADS = 4


def expand(values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int], pattern: NofM | None) -> torch.Tensor:
    """The dense weight ``shape`` with ``values`` where ``mask`` has ones; the columns stay in the stored order.

    Args:
        values: [out, in * n / m], or [nnz] for unstructured.
        mask: uint8 [out, ceil(in / 8)].
        shape: (out, in).
        pattern: None for unstructured.
    """
    n_out, n_in = shape
    weight = torch.empty(shape, dtype=values.dtype, device=values.device)
    shifted = pattern == NofM(2, 4) and values.itemsize == 2 and n_in % 8 == 0
    step = max(1, (_SHIFTED if shifted else _SCATTERED) // n_in) if values.device.type == "cpu" else max(n_out, 1)
    slices = list(itertools.pairwise([*range(0, n_out, step), n_out]))
    if len(slices) == 1:
        parts = [values]  # also on a GPU, where looking for offsets would wait for it, which no graph can hold
    elif pattern is None:
        before = count_bits(mask).sum(dim=1).cumsum(dim=0)
        ends = before[[bottom - 1 for _, bottom in slices]].tolist()
        parts = [values[start:end] for start, end in itertools.pairwise([0, *ends])]
    else:
        parts = [values[top:bottom] for top, bottom in slices]
    inference = torch.is_inference_mode_enabled()

    def fill(share: slice) -> None:
        # The mode is the thread's, and a tensor made under it is written under it only.
        with torch.inference_mode(inference):
            for (top, bottom), part in zip(slices[share], parts[share], strict=True):
                (_shift_into if shifted else _scatter_into)(weight[top:bottom], part, mask[top:bottom])

    threads = min(len(slices), len(os.sched_getaffinity(0)), _THREADS)
    if threads < 2 or weight.numel() <= _ALONE:
        fill(slice(None))
        return weight
    # Not kept for the next call: a pool does not survive a fork.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, [slice(i, None, threads) for i in range(threads)]))
    return weight


def _scatter_into(weight: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
    weight.zero_().masked_scatter_(unpack_bits(mask, weight.shape[1]), values)


@functools.cache
def _shifts(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each nibble of a mask how far its first and second value move, in bits: int64 [16] each."""
    first, second = torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    for a in range(4):
        for b in range(a + 1, 4):
            first[1 << a | 1 << b], second[1 << a | 1 << b] = 16 * a, 16 * b
    return first.to(device), second.to(device)


def _shift_into(weight: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
    """2:4 in 16 bits, in half the time of a scatter: two values are read as an int32, four are written as an int64."""
    pair = values.contiguous().view(torch.int32).flatten().to(torch.int64)
    byte = mask.contiguous().flatten()
    nibble = torch.stack((byte & 15, byte >> 4), dim=1).flatten().int()
    first, second = _shifts(weight.device)
    low = (pair & 0xFFFF) << torch.index_select(first, 0, nibble)
    high = ((pair >> 16) & 0xFFFF) << torch.index_select(second, 0, nibble)
    torch.bitwise_or(low, high, out=weight.view(torch.int64).flatten())
