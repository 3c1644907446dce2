"""A linear layer whose weight stays as a kernel wants it, and which weights are worth that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsify.errors import ModelError, UsageError
from sparsify.format.packed import DTYPES, Packed, decode, encode, fits
from sparsify.format.record import MASK, check_bits
from sparsify.kernels.dispatch import KERNELS
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED, prepare_with
from sparsify.types import NofM

TWO_OF_FOUR = NofM(2, 4)
# Below this share of zeros a mask costs about what it saves.
_WORTH_PACKING = 0.25
# Buffers that are the weight of a layer that keeps it packed; its others follow from them.
_STORED = ("values", "mask", "perm", "scale")
_REMEDY = "load the state dict of a model that was compressed from the same weights, or call compress_ after loading"


def packed_if_sparse(weight: torch.Tensor) -> Packed | None:
    """``weight`` [out, in] as 2:4 where its zeros allow it, unstructured where they are many; else None."""
    if weight.dim() != 2 or weight.dtype not in DTYPES or not weight.numel():
        return None
    if int(torch.count_nonzero(weight)) > (1 - _WORTH_PACKING) * weight.numel():
        return None
    packed = encode(weight, TWO_OF_FOUR if fits(weight, TWO_OF_FOUR) else None)
    # A zero with a sign is stored.
    return packed if packed.n_bytes < weight.nbytes else None


class SparseLinear(nn.Module):
    """``y = x @ weight.T + bias`` by a kernel.

    A state dict has every buffer, as usual. Of those loaded, ``values``, ``mask``, ``perm`` and ``scale`` are checked
    against each other, since kernels read as many values as the mask has ones; what a kernel computes from them
    (``starts``, ``dense``) is computed anew, so that it need not be there and may be that of another plan. Of a mask
    the layer takes a copy even with ``assign=True``. Where a move brings no data, as ``to_empty`` does, the mask is
    empty until a state dict is loaded, and kernels may refuse to multiply.

    A call does not check that the mask has as many ones as there are values, which would be to read it all: who writes
    into the layer's own tensors, or calls it with others by ``torch.func.functional_call``, has to see to that.

    Args:
        packed: the weight [out, in], on the device where the kernel is to run.
        kernel: one that takes it.
        bias: [out] or None.
        copy: of ``packed``, whose tensors may be views of a whole file.

    Attributes:
        in_features, out_features: sizes of the weight.
        kernel: that multiplies.
        bias: as given.
        dtype: of the dense weight.
        weight_requires_grad: of the weight that ``to_linear`` gives back.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, kernel: Kernel, bias: nn.Parameter | None = None, *, copy: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.kernel = kernel
        self.weight_requires_grad = True
        self.dtype = packed.dtype
        state = kernel.prepare(_copy(packed) if copy else packed)
        self.sizes = dict(state.sizes)
        self.state_names = tuple(state.tensors)
        for name, tensor in state.tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def kernel_name(self) -> str:
        """Of the kernel, for reports."""
        return self.kernel.reported

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight that stay in memory."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors().values())

    @property
    def holds_packed(self) -> bool:
        """Whether the kernel keeps the weight as a checkpoint stores it, perhaps beside other forms."""
        return {"values", "mask"} <= set(self.state_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] -> [..., out] in its dtype, which is that of the weight; under autocast as ``nn.Linear``.

        Raises:
            UsageError: from the backward pass, which no kernel has.
        """
        # Its name is asked for last: a device makes it anew each time. Meta tensors know no autocast.
        if not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return self._under_autocast(x)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # What nn.Module does to find an attribute of its own takes a tenth of a small product.
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401
        tensors: Any = self._buffers
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            result: torch.Tensor = _ForwardOnly.apply(  # type: ignore[no-untyped-call]
                x, self.kernel, tensors, self.sizes, bias
            )
            return result
        return self.kernel.linear(x, tensors, self.sizes, bias)

    def _under_autocast(self, x: torch.Tensor) -> torch.Tensor:
        """The weight cannot be cast, so the input is brought to its dtype, and the result to that of autocast."""
        device, dtype = x.device.type, x.dtype
        # Others autocast leaves alone.
        cast = x.is_floating_point() and dtype != torch.float64
        # What a kernel leaves to torch must come in the dtype that the kernel asked for.
        with torch.autocast(device, enabled=False):
            result = self._product(x.to(self.dtype) if cast else x)
        return result.to(torch.get_autocast_dtype(device)) if cast else result

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name in self.state_names if (tensor := self._buffers[name]) is not None}

    def packed(self) -> Packed:
        """The weight as a checkpoint stores it; its tensors are those of the layer, not copies.

        Raises:
            UsageError: the kernel keeps it in a form of its own.
        """
        if not self.holds_packed:
            raise UsageError(
                f"kernel {self.kernel.name} keeps weights in a form that no checkpoint has; open the model without a "
                "kernel to save it, or copy the folder it was opened from with sparsify export"
            )
        return self._packed(self._tensors())

    def _packed(self, tensors: Mapping[str, torch.Tensor]) -> Packed:
        n, m = self.sizes["n"], self.sizes["m"]
        shape, pattern = (self.out_features, self.in_features), NofM(n, m) if m else None
        scale = tensors.get("scale")
        scaled = {} if scale is None else {"scaled_dtype": self.dtype}
        return Packed(shape, pattern, tensors["values"], tensors["mask"], tensors.get("perm"), scale, **scaled)

    def to_linear(self) -> nn.Linear:
        """The same layer with its weight decoded.

        Raises:
            UsageError: as ``packed``.
        """
        layer = linear(decode(self.packed()), self.bias)
        layer.weight.requires_grad_(self.weight_requires_grad)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """For ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel_name}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        scale = self._buffers.get("scale")
        kept = [buffer.dtype for name, buffer in self.named_buffers(recurse=False) if name != "scale"]
        # Some hold values and indices in one tensor: a cast would not fail, it would make other weights of them.
        for dtype in (self.dtype, *kept):
            if self.kernel is not PACKED and self._cast(fn, dtype) != dtype:
                raise UsageError(
                    f"weights prepared for kernel {self.kernel.name} cannot be cast; open the model with dtype="
                )
        self.dtype = self._cast(fn, self.dtype)
        before = {name: self._buffers[name] for name in ("mask", "starts") if name in self.state_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(_lost(old, self.get_buffer(name)) for name, old in before.items() if old is not None):
            # Kernels read as many values as the mask has ones, from where they are said to begin: now none.
            for name in before:
                self._buffers[name] = torch.zeros_like(self.get_buffer(name))
        if scale is not None and (moved := self.get_buffer("scale")).dtype != scale.dtype:
            # The weight is cast, not what 8 bits are multiplied by to get it.
            self._buffers["scale"] = scale.to(moved.device)
        return self

    def _cast(self, fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.dtype:
        return fn(torch.empty(0, dtype=dtype, device=self.get_buffer(self.state_names[0]).device)).dtype

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        # They may put other tensors there: what is checked is what they leave, and they run once.
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        state = dict(state_dict)
        if self.holds_packed:
            # Not believed, and not always those of this kernel.
            for name in {*self.state_names, "starts", "dense"} - {*_STORED}:
                state.pop(prefix + name, None)
        try:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            state |= {prefix + name: tensor for name, tensor in self._checked(state, prefix, assign).items()}
            for name, own in (*self._buffers.items(), *self._parameters.items()):
                given = state.get(prefix + name)
                # Of several tensors torch would have copied some before it finds one that does not fit.
                if own is not None and isinstance(given, torch.Tensor) and given.shape != own.shape:
                    sizes = f"{list(given.shape)}, the layer has {list(own.shape)}"
                    raise ModelError(f"{prefix}{name} is {sizes}; {_REMEDY}")
        except ModelError as error:
            error_msgs.append(str(error))
            return
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            super()._load_from_state_dict(
                state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _checked(self, state: Mapping[str, Any], prefix: str, assign: bool) -> Mapping[str, torch.Tensor]:
        """Buffers to load of those in ``state``, and what follows from them; none where there are none.

        They are brought to the layer's device, unless the layer is to take (``assign``) the tensors themselves.

        Raises:
            ModelError: names the key.
        """

        def refuse(name: str, what: str) -> ModelError:
            return ModelError(f"{prefix}{'mask' if name == MASK else name} {what}; {_REMEDY}")

        known = tuple(dict.fromkeys((*_STORED, *self.state_names)))
        found = {name: state[prefix + name] for name in known if prefix + name in state}
        for name, tensor in found.items():
            own = self._buffers.get(name)
            if own is None:
                raise refuse(name, "has no place in the weight of this layer")
            if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
                is_what = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor)
                raise refuse(name, f"is {is_what}, the layer has {own.dtype} {list(own.shape)}")
            if tensor.is_meta:
                raise refuse(name, "has no data")
        if not found:
            return {}
        if (perm := found.get("perm")) is not None:
            every = torch.arange(len(perm), dtype=perm.dtype, device=perm.device)
            if not torch.equal(perm.sort().values, every):
                raise refuse("perm", "is not a permutation")
        if not self.holds_packed:
            return found
        for name in _STORED:
            if name in self.state_names and name not in found:
                raise refuse(name, "is missing beside the other parts of the weight")
        own = self.get_buffer("values")
        device = found["values"].device if assign or own.is_meta else own.device
        found = {name: tensor.to(device) for name, tensor in found.items()}
        if assign:
            # Whoever has the state dict could still change it.
            found["mask"] = found["mask"].clone()
        packed = self._packed(found)
        check_bits(packed.mask, self.in_features, packed.pattern, len(packed.values), refuse)
        if self.kernel is PACKED:
            # In the slices of the layer, which may have been prepared on another device.
            return prepare_with(packed, self.sizes["step"]).tensors
        return self.kernel.prepare(packed).tensors

    def __getstate__(self) -> dict[str, Any]:
        # Not every row of the table can be pickled.
        state = self.__dict__.copy()
        state["kernel"] = self.kernel.name if KERNELS.get(self.kernel.name) is self.kernel else self.kernel
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.kernel, str):
            self.kernel = KERNELS[self.kernel]


def _lost(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether what ``old`` held is not in ``new``, which a move made of it."""
    if new is old or new.is_meta:
        return False
    return old.is_meta or not torch.equal(old.to(new.device), new)


def _copy(packed: Packed) -> Packed:
    own = {name: getattr(packed, name) for name in ("values", "mask", "perm", "scale")}
    return replace(packed, **{name: tensor.clone() for name, tensor in own.items() if tensor is not None})


class _ForwardOnly(torch.autograd.Function):
    """A product that says so when somebody asks for its gradient, where autograd would only warn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernel: Kernel,
        tensors: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.kernel = kernel.name
        return kernel.linear(x, tensors, sizes, bias)

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
