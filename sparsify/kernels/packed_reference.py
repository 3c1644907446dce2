"""The product with a weight that stays packed: a slice of rows is expanded at a time. Small, exact, and slow.

It is the reference for faster kernels and saves memory now; it saves no time, and ``auto`` never chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsify.format.bits import count_bits
from sparsify.format.packed import Packed, decode
from sparsify.kernels.kernel import Kernel, State, gathered
from sparsify.kernels.operators import define
from sparsify.types import NofM

# Dense values expanded at a time. On a CPU 2 MB in 16 bits, which stay in a core's cache; on a GPU as many as make each
# of the small steps last longer than its launch.
_SLICE = 1 << 20
_GPU_SLICE = 1 << 24


def _packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_out: int,
    n_in: int,
    n: int,
    m: int,
    step: int,
) -> torch.Tensor:
    pattern = NofM(n, m) if m else None
    flat = x.reshape(-1, n_in)
    result = x.new_empty((flat.shape[0], n_out))
    bounds = [] if pattern else starts.tolist()
    for i, start in enumerate(range(0, n_out, step)):
        stop = min(n_out, start + step)
        part = values[start:stop] if pattern else values[bounds[i] : bounds[i + 1]]
        of_rows = None if scale is None else scale[start:stop]
        packed = Packed((stop - start, n_in), pattern, part, mask[start:stop], None, of_rows, x.dtype)
        weight = decode(packed).to(x.dtype)
        slice_bias = None if bias is None else bias[start:stop]
        result[:, start:stop] = torch.nn.functional.linear(flat, weight, slice_bias)
    return result.view(*x.shape[:-1], n_out)


def rows_per_slice(n_in: int, device: torch.device) -> int:
    """Rows of a weight that are expanded at a time on ``device``."""
    return max(1, (_SLICE if device.type == "cpu" else _GPU_SLICE) // n_in)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rest[5]))


_OP = define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor starts, Tensor? scale, Tensor? bias, "
    "SymInt n_out, SymInt n_in, int n, int m, int step) -> Tensor",
    _packed_linear,
    _fake,
)


def _prepare(packed: Packed) -> State:
    n_out, n_in = packed.shape
    step = rows_per_slice(n_in, packed.values.device)
    before = count_bits(packed.mask).sum(dim=1).cumsum(dim=0).cpu()
    # On the CPU, also where another device is the default: the host reads them to cut slices.
    before = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), before))
    edges = [*range(0, n_out, step), n_out]
    tensors = {"values": packed.values, "mask": packed.mask, "starts": before[edges]}
    if packed.perm is not None:
        tensors["perm"] = packed.perm
    if packed.scale is not None:
        tensors["scale"] = packed.scale
    n, m = (packed.pattern.n, packed.pattern.m) if packed.pattern else (0, 0)
    return State(tensors, {"n_out": n_out, "n_in": n_in, "n": n, "m": m, "step": step})


def _linear(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bias: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = _OP(
        gathered(x, tensors), tensors["values"], tensors["mask"], tensors["starts"], tensors.get("scale"), bias,
        sizes["n_out"], sizes["n_in"], sizes["n"], sizes["m"], sizes["step"],
    )  # fmt: skip
    return result


PACKED = Kernel(
    "packed",
    "any pattern, any device: weights stay packed and are expanded slice by slice; saves memory, costs time",
    absent=lambda device: None,
    refuse=lambda packed: None,
    prepare=_prepare,
    linear=_linear,
)
