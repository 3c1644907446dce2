"""The operator ``sparsify::linear``: a product with a packed weight, on whatever device the tensors lie.

Its reference is ``format.packed.decode`` and ``torch.nn.functional.linear``.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsify.kernels import native
from sparsify.kernels.operators import define, implement


def _cpu(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor | None,
    dense: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_out: int,
    n_in: int,
    n: int,
    m: int,
    plan: str,
) -> torch.Tensor:
    flat = x.reshape(-1, n_in).contiguous()
    tokens = flat.shape[0]
    way = native.way_for(plan, tokens)
    if way == native.DENSE:
        if dense is None:
            raise RuntimeError(f"plan {plan} multiplies with the dense weight, which is not there")
        result = torch.nn.functional.linear(flat, dense, bias)
    elif not tokens:
        result = flat.new_empty((0, n_out))
    else:
        result = native.multiply(flat, values, mask, starts, scale, bias, n_out, n_in, n, m, way)
    return result.view(*x.shape[:-1], n_out)


def _cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    from sparsify.kernels.triton_decode import linear_cuda

    values, mask, starts, scale, _, bias, n_out, n_in, n, m, _ = rest
    return linear_cuda(x, values, mask, starts, scale, bias, n_out, n_in, n, m)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rest[6]))


OP = define(
    "linear(Tensor x, Tensor values, Tensor mask, Tensor starts, Tensor? scale, Tensor? dense, Tensor? bias, "
    "SymInt n_out, SymInt n_in, int n, int m, str plan) -> Tensor",
    _cpu,
    _fake,
    "CPU",
)
implement("linear", _cuda, "CUDA")
