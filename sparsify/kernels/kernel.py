"""What a kernel is: a weight turned into tensors once, and a product with them many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sparsify.format.packed import Packed


@dataclass(frozen=True)
class State:
    """A weight as a kernel wants it.

    Attributes:
        tensors: by name, on the device the kernel runs on; what stays in memory.
        sizes: integers the kernel needs besides, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    sizes: Mapping[str, int]

    @property
    def n_bytes(self) -> int:
        """Bytes that stay in memory."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


Linear = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Mapping[str, int], torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: as in options.
        summary: one line for help texts.
        absent: device -> why the kernel cannot run there, None if it can.
        refuse: weight -> why the kernel cannot take it, None if it can.
        prepare: weight -> State, on the weight's device.
        linear: (x [..., in], tensors, sizes, bias [out] or None) -> [..., out] in the dtype of x, contiguous. Safe
            under torch.compile: what it runs is one operator with a fake implementation.
        densely: for which numbers of tokens it multiplies by zeros too, as ``+expanded:513-``; empty: for none.
    """

    name: str
    summary: str
    absent: Callable[[torch.device], str | None]
    refuse: Callable[[Packed], str | None]
    prepare: Callable[[Packed], State]
    linear: Linear
    densely: str = ""

    @property
    def reported(self) -> str:
        """What logs and reports say that runs, as ``sparsify.bench.engaged`` reads it."""
        return self.name + self.densely


def check_columns(x: torch.Tensor, n_in: int) -> None:
    """Refuse an ``x`` that a reshape would silently cut into other rows.

    Raises:
        RuntimeError: its last dimension is not ``n_in``.
    """
    if not x.dim() or x.shape[-1] != n_in:
        raise RuntimeError(f"input has the shape {list(x.shape)}, the weight takes {n_in} columns")


def gathered(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``x`` [..., in] with its channels in the order in which the weight is stored.

    Raises:
        RuntimeError: ``x`` has another number of channels than that order.
    """
    if "perm" not in tensors:
        return x
    # Of too many channels, some would silently be left out.
    check_columns(x, tensors["perm"].shape[0])
    return x.index_select(-1, tensors["perm"])
