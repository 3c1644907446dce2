"""The operator ``sparsify::linear``: a product with a packed weight, on whatever device the tensors lie.

Its reference is ``format.packed.decode`` and ``torch.nn.functional.linear``. What computes it registers itself:
``packed_reference`` on every device, ``native`` on CPUs, ``triton_decode`` on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sparsify.kernels.kernel import check_columns, gathered
from sparsify.kernels.operators import declare


class Operands(NamedTuple):
    """What the operator takes after ``x``, in its order.

    A plan says how it multiplies, and with that what ``starts`` holds:

    ===================  ========  ===============================================================================
    ``plan``             runs on   ``starts``
    ===================  ========  ===============================================================================
    ``packed``           anything  int64 [ceil(out / step) + 1]: where the values of each ``step`` rows begin; not
                                   read for n:m. On the host, so that nothing waits for a GPU
    steps of ``native``  CPUs      int64 [out + 1]: where the values of each row begin; empty for n:m
    ``triton``           CUDA      that of ``triton_decode.chunk_starts``; empty where its kernels need none
    ===================  ========  ===============================================================================

    CUDA also takes steps of ``native``, from layers that were prepared on a CPU and moved: it makes its own starts at
    every call, and multiplies with ``dense`` where the plan says so. Whoever makes ``starts`` computes it from
    ``mask``: kernels read as many values as the mask has ones.

    Attributes:
        values: as in ``Packed``; of the dtype of ``x``, or int8.
        mask: uint8 [out, ceil(in / 8)].
        starts: see above.
        scale: float32 [out] of int8 values, else None.
        dense: [out, in] in the dtype of ``x``, where the plan multiplies with it, else None.
        bias: [out] in the dtype of ``x``, or None.
        n_out: rows of the weight.
        n_in: columns of the weight.
        n: values kept per group, 0 without a pattern.
        m: columns of a group, 0 without a pattern.
        plan: see above.
        step: rows that the plan ``packed`` expands at a time; others do not read it.
    """

    values: torch.Tensor
    mask: torch.Tensor
    starts: torch.Tensor
    scale: torch.Tensor | None
    dense: torch.Tensor | None
    bias: torch.Tensor | None
    n_out: int
    n_in: int
    n: int
    m: int
    plan: str
    step: int = 0


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    weight = Operands(*rest)
    check_columns(x, weight.n_in)
    return x.new_empty((*x.shape[:-1], weight.n_out))


OP = declare(
    "linear(Tensor x, Tensor values, Tensor mask, Tensor starts, Tensor? scale, Tensor? dense, Tensor? bias, "
    "SymInt n_out, SymInt n_in, int n, int m, str plan, int step=0) -> Tensor",
    _fake,
)


def operands(
    tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bias: torch.Tensor | None, plan: str
) -> Operands:
    """Those of a ``State``, whose tensors and sizes bear the names of the operator's arguments."""
    return Operands(
        tensors["values"], tensors["mask"], tensors["starts"], tensors.get("scale"), tensors.get("dense"), bias,
        sizes["n_out"], sizes["n_in"], sizes["n"], sizes["m"], plan, sizes.get("step", 0),
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    bias: torch.Tensor | None,
    plan: str,
) -> torch.Tensor:
    """The operator with a ``State``: ``Kernel.linear`` of the kernel that follows ``plan``.

    Args:
        x: [..., in], channels in the model's order.
        tensors: of a ``State``; ``perm`` and ``dense`` may be among them.
        sizes: see ``tensors``.
        bias: [out] or None.
        plan: see ``Operands``.

    Returns:
        [..., out] in the dtype of ``x``.

    Raises:
        RuntimeError: ``x`` does not have ``in`` columns, or the plan does not run on its device with such tensors.
    """
    result: torch.Tensor = OP(gathered(x, tensors), *operands(tensors, sizes, bias, plan))
    return result
