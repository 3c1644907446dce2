"""Linears that are timed, the weights they get, and the ways to multiply by them."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_machine import record
from gpu_machine.llama import LLAMA_8B, LLAMA_70B
from gpu_machine.weights import pruned

if TYPE_CHECKING:
    import torch

    from sparsify.format.packed import Packed
    from sparsify.kernels.kernel import Kernel

    Run = Callable[[torch.Tensor], torch.Tensor]

# [out, in], as inference engines fuse them; those of SHARDS on each of 8 GPUs.
LAYERS = {
    f"{size} {name}": shape
    for size, sizes in (("8b", LLAMA_8B), ("70b", LLAMA_70B))
    for name, shape in sizes.fused().items()
}
SHARDS = {f"70b/8 {name}": shape for name, shape in LLAMA_70B.fused(8).items()}
MLP = [name for name in LAYERS if name.endswith(("gate_up", "down"))]
TINY = {"tiny": (96, 192)}
DECODE = ("2:4", "0.5", "0.6", "0.7")
FP8 = "cusparselt_fp8"


class Record(record.Record):
    """A record of one stage of this benchmark."""

    def __init__(self, stage: str, options: argparse.Namespace) -> None:
        super().__init__(f"kernels_gpu {stage}", options, ("torch", "triton"))


@dataclass(frozen=True)
class Variant:
    """One way to multiply.

    Attributes:
        n_bytes: of one weight as it lies in memory.
        copies: a function per copy of the weight.
        tolerance: relative difference from the dense product that is rounding and no error.
    """

    n_bytes: int
    copies: list[Run]
    tolerance: float = 0.02


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """The linears that were asked for."""
    return TINY if options.tiny else {name: {**LAYERS, **SHARDS}[name] for name in options.layers}


def packed_weight(shape: tuple[int, int], pattern: str, device: str, dtype: Any = None) -> Packed:
    """A random weight, half or another share of whose values are zero, bfloat16 unless said otherwise."""
    import torch

    from sparsify.format.packed import encode
    from sparsify.types import NofM, parse_pattern

    weight = torch.randn(shape, device=device, dtype=torch.float32).div_(math.sqrt(shape[1]))
    parsed = parse_pattern(pattern)
    if isinstance(parsed, NofM):
        return encode(pruned(weight, parsed).to(dtype or torch.bfloat16), parsed)
    # By a threshold for all rows: their numbers of values differ, as those of a pruned model do.
    limit = statistics.NormalDist(0.0, 1.0 / math.sqrt(shape[1])).inv_cdf(0.5 + float(Fraction(pattern)) / 2)
    weight.masked_fill_(weight.abs() < limit, 0)
    return encode(weight.to(dtype or torch.bfloat16))


def copies_needed(shape: tuple[int, int], pattern: str, device: str) -> int:
    """How many weights in turn exceed the L2 cache three times, packed, so that none is ever found in it."""
    import torch

    if device != "cuda":
        return 2
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    share = 0.5 if pattern == "2:4" else 1 - float(pattern)
    return max(1, math.ceil(3 * l2_bytes / (math.prod(shape) * (2 * share + 0.125))))


def variants(
    shape: tuple[int, int], pattern: str, names: list[str], device: str, n_copies: int
) -> tuple[dict[str, Variant], dict[str, str]]:
    """``dense`` and the kernels ``names``, and why a kernel is not among them."""
    import torch

    from sparsify.format.packed import decode

    found: dict[str, Variant] = {}
    refused: dict[str, str] = {}
    for _ in range(n_copies):
        packed = packed_weight(shape, pattern, device)
        dense = decode(packed)
        copy = partial(torch.nn.functional.linear, weight=dense)
        found.setdefault("dense", Variant(dense.nbytes, [])).copies.append(copy)
        for name in names:
            made = prepared(name, packed, device)
            if isinstance(made, str):
                refused[name] = made
                continue
            n_bytes, run = made
            tolerance = 0.08 if name == FP8 else 0.02
            found.setdefault(name, Variant(n_bytes, [], tolerance)).copies.append(run)
    return found, refused


def prepared(name: str, packed: Packed, device: str) -> tuple[int, Run] | str:
    """Bytes and product of a kernel with ``packed``, or why it does not take it."""
    import torch

    kernel = kernels()[name]
    why = kernel.absent(torch.device(device)) or kernel.refuse(packed)
    if why:
        return why
    state = kernel.prepare(packed)
    if name == "triton":
        from sparsify.kernels.linear import operands
        from sparsify.kernels.triton_decode import linear_cuda

        weight = operands(state.tensors, state.sizes, None, name)
        # Not through the operator: what is measured is this kernel, whatever else is registered.
        return state.n_bytes, lambda x: linear_cuda(x, weight)
    return state.n_bytes, lambda x: kernel.linear(x, state.tensors, state.sizes, None)


def kernels() -> dict[str, Kernel]:
    """By name, whether they are in the dispatch table or not."""
    from sparsify.kernels.packed_reference import PACKED
    from sparsify.kernels.semi_structured import CUSPARSELT, CUSPARSELT_FP8, CUTLASS
    from sparsify.kernels.triton_decode import TRITON

    return {kernel.name: kernel for kernel in (PACKED, CUSPARSELT, CUSPARSELT_FP8, CUTLASS, TRITON)}
