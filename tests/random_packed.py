"""Random packed weights for tests of kernels."""

import math

import torch

from sparsify.format.packed import Packed, encode
from sparsify.types import NofM


def random_packed(
    n_out: int, n_in: int, pattern: NofM | None, dtype: torch.dtype, perm: bool = False, seed: int = 0
) -> Packed:
    """A random weight whose groups hold up to n values, some none at all."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
    rank = torch.rand(n_out, n_in, generator=generator)
    if pattern is None:
        keep = rank < 0.5
    else:
        groups = rank.view(n_out, -1, pattern.m)
        at_most = torch.randint(0, pattern.n + 1, groups.shape[:2], generator=generator).unsqueeze(2)
        keep = (groups.argsort(dim=2).argsort(dim=2) < at_most).view(n_out, n_in)
    stored = torch.where(keep, weight, 0).to(dtype)
    if not perm:
        return encode(stored, pattern)
    order = torch.randperm(n_in, generator=generator)
    original = torch.empty_like(stored)
    original[:, order] = stored
    return encode(original, pattern, order)


def width(pattern: NofM | None) -> int:
    """Of a weight that the pattern divides; unstructured ones end within a byte of the mask."""
    return 61 if pattern is None else 8 * pattern.m
