"""Weights with zeros, inputs for them, and the kernels that have a CPU here."""

import pytest
import torch

from sparsify.kernels.dispatch import KERNELS
from sparsify.types import NofM

BF16, F32 = torch.bfloat16, torch.float32
TWO_OF_FOUR = NofM(2, 4)
NO_NATIVE = KERNELS["native"].absent(torch.device("cpu"))
# Those that have a CPU here.
NAMES = ["packed", pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or ""))]


def zeroed(shape: tuple[int, int], pattern: NofM | None, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    rank = torch.rand(shape, generator=generator)
    if pattern is None:
        return torch.where(rank < 0.5, weight, 0).to(dtype)
    order = rank.view(shape[0], -1, pattern.m).argsort(dim=2).argsort(dim=2)
    return torch.where((order < pattern.n).view(shape), weight, 0).to(dtype)


def x_of(dtype: torch.dtype, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(9)).to(dtype)


def kernel_of(reported: str) -> str:
    """The kernel of what reports name, without the numbers of tokens for which it expands the weight."""
    return reported.partition("+expanded:")[0]
