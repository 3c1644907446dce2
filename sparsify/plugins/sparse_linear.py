"""A linear layer whose weight stays as a kernel wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.format.packed import Packed, decode
from sparsify.kernels.dispatch import KERNELS
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.types import NofM


class SparseLinear(nn.Module):
    """``y = x @ weight.T + bias`` by a kernel.

    Args:
        packed: the weight [out, in], on the device where the kernel is to run; copied.
        kernel: one that takes it.
        bias: [out] or None.

    Attributes:
        in_features, out_features: sizes of the weight.
        kernel_name: the kernel that multiplies, for reports.
        bias: as given.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, kernel: Kernel, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.kernel_name = kernel.name
        # What was read from a file may still be a view of the whole file.
        own = replace(packed, values=packed.values.clone(), mask=packed.mask.clone())
        state = kernel.prepare(own if packed.perm is None else replace(own, perm=packed.perm.clone()))
        self.sizes = dict(state.sizes)
        self.state_names = tuple(state.tensors)
        for name, tensor in state.tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] -> [..., out] in its dtype.

        Raises:
            UsageError: from the backward pass, which no kernel has.
        """
        tensors = {name: self.get_buffer(name) for name in self.state_names}
        wanted = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if torch.is_grad_enabled() and wanted:
            result: torch.Tensor = _ForwardOnly.apply(  # type: ignore[no-untyped-call]
                x, self.kernel_name, tensors, self.sizes, self.bias
            )
            return result
        return KERNELS[self.kernel_name].linear(x, tensors, self.sizes, self.bias)

    def packed(self) -> Packed:
        """The weight as a checkpoint stores it; its tensors are those of the layer, not copies.

        Raises:
            UsageError: the kernel keeps it in a form of its own.
        """
        if self.kernel_name != PACKED.name:
            raise UsageError(
                f"kernel {self.kernel_name} keeps weights in a form that no checkpoint has; open the model without a "
                "kernel to save it, or copy the folder it was opened from with sparsify export"
            )
        tensors = {name: self.get_buffer(name) for name in self.state_names}
        n, m = self.sizes["n"], self.sizes["m"]
        shape, pattern = (self.out_features, self.in_features), NofM(n, m) if m else None
        return Packed(shape, pattern, tensors["values"], tensors["mask"], tensors.get("perm"))

    def dense(self) -> nn.Linear:
        """The same layer with its weight decoded.

        Raises:
            UsageError: as ``packed``.
        """
        return linear(decode(self.packed()), self.bias)

    def extra_repr(self) -> str:
        """For ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel_name}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        for buffer in self.buffers(recurse=False):
            # Some hold values and indices in one tensor: a cast would not fail, it would make other weights of them.
            probe = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
            if self.kernel_name != PACKED.name and fn(probe).dtype != buffer.dtype:
                raise UsageError(
                    f"weights prepared for kernel {self.kernel_name} cannot be cast; open the model with dtype="
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _ForwardOnly(torch.autograd.Function):
    """A product that says so when somebody asks for its gradient, where autograd would only warn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernel: str,
        tensors: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.kernel = kernel
        return KERNELS[kernel].linear(x, tensors, sizes, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UsageError(f"kernel {ctx.kernel} computes no gradients; open the model without a kernel to train it")


def linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An ``nn.Linear`` of ``weight`` [out, in] and ``bias`` [out], which are not copied."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", bias)
    return layer
