"""The product with a weight that stays packed: a slice of rows is expanded at a time. Small, exact, and slow.

It is the reference for faster kernels and saves memory now; it saves no time, and ``auto`` never chooses it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparsify.format.bits import count_bits
from sparsify.format.packed import DTYPES, Packed, decode
from sparsify.kernels.kernel import Kernel, State, check_columns
from sparsify.kernels.linear import Operands, linear
from sparsify.kernels.operators import implement
from sparsify.types import NofM

# Dense values expanded at a time. On a CPU 2 MB in 16 bits, which stay in a core's cache; on a GPU as many as make each
# of the small steps last longer than its launch.
_SLICE = 1 << 20
_GPU_SLICE = 1 << 24
# Of the operator.
PLAN = "packed"


def multiply(x: torch.Tensor, weight: Operands) -> torch.Tensor:
    """``x @ weight.T + bias`` [..., out] by slices of ``step`` rows, on any device.

    Raises:
        RuntimeError: there is no such step, or dtypes do not belong together.
    """
    n_out, n_in, step = weight.n_out, weight.n_in, weight.step
    if step < 1:
        raise RuntimeError(f"plan {PLAN} expands {step} rows at a time")
    # A weight is brought to the dtype of x, which of integers would make a product of other numbers.
    if x.dtype not in (DTYPES if weight.scale is not None else (weight.values.dtype,)):
        raise RuntimeError(f"input is {x.dtype}, the weight was prepared as {weight.values.dtype}")
    if weight.bias is not None and weight.bias.dtype != x.dtype:
        raise RuntimeError(f"bias is {weight.bias.dtype} {list(weight.bias.shape)}, want {x.dtype} [{n_out}]")
    pattern = NofM(weight.n, weight.m) if weight.m else None
    flat = x.reshape(-1, n_in)
    result = x.new_empty((flat.shape[0], n_out))
    bounds = [] if pattern else weight.starts.tolist()
    for i, start in enumerate(range(0, n_out, step)):
        stop = min(n_out, start + step)
        part = weight.values[start:stop] if pattern else weight.values[bounds[i] : bounds[i + 1]]
        of_rows = None if weight.scale is None else weight.scale[start:stop]
        packed = Packed((stop - start, n_in), pattern, part, weight.mask[start:stop], None, of_rows, x.dtype)
        rows = decode(packed).to(x.dtype)
        bias = None if weight.bias is None else weight.bias[start:stop]
        result[:, start:stop] = torch.nn.functional.linear(flat, rows, bias)
    return result.view(*x.shape[:-1], n_out)


def _anywhere(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    weight = Operands(*rest)
    check_columns(x, weight.n_in)
    if weight.plan != PLAN:
        raise RuntimeError(f"plan {weight.plan!r} does not run on {x.device.type}")
    return multiply(x, weight)


implement("linear", _anywhere, "CompositeExplicitAutograd")


def rows_per_slice(n_in: int, device: torch.device) -> int:
    """Rows of a weight that are expanded at a time on ``device``."""
    return max(1, (_SLICE if device.type == "cpu" else _GPU_SLICE) // n_in)


def prepare_with(packed: Packed, step: int) -> State:
    """``packed`` to be expanded ``step`` rows at a time: its own tensors, and where the values of each slice begin."""
    n_out, n_in = packed.shape
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


def _prepare(packed: Packed) -> State:
    return prepare_with(packed, rows_per_slice(packed.shape[1], packed.values.device))


PACKED = Kernel(
    "packed",
    "any pattern, any device: weights stay packed and are expanded slice by slice; saves memory, costs time",
    absent=lambda device: None,
    refuse=lambda packed: None,
    prepare=_prepare,
    linear=partial(linear, plan=PLAN),
)
