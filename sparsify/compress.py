"""Packed weights in a model that is in memory: linears replaced by sparse ones, and back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.format.packed import Packed
from sparsify.kernels.dispatch import AUTO, DENSE, check_request, choose
from sparsify.memory import return_freed_memory
from sparsify.plugins.engaged import Engaged, summary
from sparsify.plugins.sparse_linear import SparseLinear, packed_if_sparse

_LOG = logging.getLogger("sparsify")
Model = TypeVar("Model", bound=nn.Module)
Globs = str | Sequence[str] | None


def compress_(model: Model, kernel: str = AUTO, *, include: Globs = None, exclude: Globs = None) -> Model:
    """Replace the linears of ``model`` whose zeros are worth it by packed ones that ``kernel`` multiplies by, in place.

    A weight is packed as 2:4 where its zeros allow it, unstructured where at least a quarter of it is zeros (-0.0 is
    none), and as it was stored where the model was opened from a compressed checkpoint. Linears for which the kernel is
    ``dense`` stay as they are, as do tied weights, subclasses of ``nn.Linear``, linears with hooks or without their
    weight in memory, and the experts of a mixture that are one tensor. One linear is packed at a time. Packed linears
    have no gradients. ``save_pretrained`` of a transformers model writes a compressed checkpoint afterwards. A second
    call with another kernel changes the kernel. What ``auto`` and ``native`` choose is for torch's number of threads at
    that time and stays; after ``torch.set_num_threads`` a second call chooses anew.

    One line in the log (``sparsify``, level INFO) says what runs; ``report`` and ``engaged`` say it for each linear.

    Args:
        model: any module, on the device where it is to run.
        kernel: ``auto``, ``dense`` or a kernel that ``sparsify doctor`` lists.
        include: globs of names of linears; None means all.
        exclude: globs of linears that stay as they are.

    Returns:
        ``model``.

    Raises:
        UsageError: the kernel does not exist or cannot run on the model's device, a glob matches nothing, or linears
            are packed already in a form that cannot be undone.
    """
    if _is_linear(model):
        raise UsageError("the model is itself a linear, in whose place nothing can be put; wrap it in a module")
    names = _chosen([name for name, part in model.named_modules() if _is_linear(part)], include, exclude)
    for device in {tensor.device for tensor in chain(model.parameters(), model.buffers())} or {torch.device("cpu")}:
        if device.type != "meta":
            check_request(kernel, device)
    _check_undoable(model, names)
    tied = _tied(model)
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        replaced, found[name] = _replaced(layer, kernel, tied, _stored(model, name))
        if replaced is not layer:
            model.set_submodule(name, replaced)
        del layer, replaced
    return_freed_memory()
    model.sparsify_report = found  # type: ignore[assignment]
    _tell_transformers(model)
    _log(model, kernel, found)
    return model


def decompress_(model: Model) -> Model:
    """Replace packed linears by ordinary ones with their dense weight, in place: ``compress_`` undone bit for bit.

    Returns:
        ``model``.

    Raises:
        UsageError: a kernel keeps weights in a form that cannot be undone; nothing has been changed then.
    """
    names = [name for name, part in model.named_modules() if isinstance(part, SparseLinear)]
    _check_undoable(model, names)
    for name in names:
        model.set_submodule(name, model.get_submodule(name).to_linear())  # type: ignore[operator]
    if hasattr(model, "sparsify_report"):
        del model.sparsify_report
    return_freed_memory()
    _tell_transformers(model)
    return model


def report(model: nn.Module) -> dict[str, Engaged]:
    """Of the linears that ``compress_`` looked at: kernel, pattern, bytes, and why it is not what was asked for."""
    found: dict[str, Engaged] = getattr(model, "sparsify_report", {})
    return dict(found)


def engaged(model: nn.Module) -> dict[str, str]:
    """The kernel, or ``dense``, for each parameter with 2 or more axes below a linear or an expert layer.

    Known from the modules themselves: torch has no kernel that skips the zeros of a plain strided tensor. A tensor
    subclass (semi-structured, for one) or a sparse layout is reported by its own name instead.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, SparseLinear):
            found[name] = module.kernel_name
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not leaf.endswith("bias"):  # experts have biases of 2 axes
                found[name if leaf == "weight" else f"{name}.{leaf}"] = _kind(parameter)
    return found


def _kind(parameter: nn.Parameter) -> str:
    kind = type(parameter.data)
    if kind is not torch.Tensor:
        return kind.__name__
    return DENSE if parameter.layout is torch.strided else str(parameter.layout).removeprefix("torch.")


def _is_linear(module: nn.Module) -> bool:
    # A subclass may compute something else.
    return type(module) in (nn.Linear, SparseLinear)


def _chosen(names: Sequence[str], include: Globs, exclude: Globs) -> list[str]:
    """Those of ``names`` that ``include`` and ``exclude`` leave."""
    globs: dict[str, list[str]] = {}
    for option, given in (("include", include), ("exclude", exclude)):
        globs[option] = [given] if isinstance(given, str) else list(given or ())
        for glob in globs[option]:
            if not any(fnmatchcase(name, glob) for name in names):
                like = f"; names look like {names[0]}" if names else ""
                raise UsageError(f"{option} {glob!r} matches no linear of the model{like}")

    def matches(name: str, option: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs[option])

    return [name for name in names if (include is None or matches(name, "include")) and not matches(name, "exclude")]


def _check_undoable(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, SparseLinear) and not layer.holds_packed:
            raise UsageError(f"{name}: what kernel {layer.kernel_name} keeps cannot be undone; open the model again")


def _tied(model: nn.Module) -> set[int]:
    """Addresses of parameters that the model has under several names."""
    places = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False) if not p.is_meta)
    return {address for address, n in places.items() if n > 1}


def _replaced(layer: nn.Module, kernel: str, tied: set[int], stored: Any) -> tuple[nn.Module, Engaged]:
    """What is to stand in the place of ``layer``, perhaps itself, and how it runs."""
    why = ""
    packed: Packed | None = None
    if isinstance(layer, SparseLinear):
        packed = layer.packed()
        n_bytes = layer.out_features * layer.in_features * packed.dtype.itemsize
    else:
        assert isinstance(layer, nn.Linear)
        n_bytes = layer.weight.nbytes
        why = _left_alone(layer, tied)
        if not why and kernel != DENSE:
            packed = packed_if_sparse(layer.weight.data) if stored is None else stored(layer.weight.data)
            why = "" if packed is not None else "it is not sparse"
    if packed is None:
        return layer, Engaged(DENSE, "dense", why, n_bytes, n_bytes)
    choice = choose(packed, kernel)
    pattern = str(packed.pattern or "unstructured")
    if choice.kernel is None:
        dense = layer.to_linear() if isinstance(layer, SparseLinear) else layer
        return dense, Engaged(DENSE, pattern, choice.reason, n_bytes, n_bytes)
    # Nobody else holds these tensors, or the layer does that is replaced.
    sparse = SparseLinear(packed, choice.kernel, layer.bias, copy=False)
    sparse.weight_requires_grad = (
        layer.weight_requires_grad if isinstance(layer, SparseLinear) else bool(layer.weight.requires_grad)
    )
    sparse.train(layer.training)
    return sparse, Engaged(choice.name, pattern, choice.reason, n_bytes, sparse.n_bytes)


def _left_alone(layer: nn.Linear, tied: set[int]) -> str:
    """Why ``layer`` must stay as it is; empty if it need not."""
    if layer.weight.is_meta:
        return "its weight is not in memory"
    if layer.weight.data_ptr() in tied:
        return "its weight is tied"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or hasattr(layer, "_hf_hook"):
        return "it has hooks"
    if type(layer.weight.data) is not torch.Tensor or layer.weight.layout is not torch.strided:
        return "its weight is no plain tensor"
    return ""


def _stored(model: nn.Module, name: str) -> Any:
    """How to pack the weight of a linear that a compressed checkpoint held, as it was stored; None for any other."""
    if getattr(model, "hf_quantizer", None) is None:
        return None
    from sparsify.plugins.transformers_quantizer import as_stored

    return as_stored(model, name)


def _tell_transformers(model: nn.Module) -> None:
    """Let transformers know what it may do with the model now, and how to save it."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from sparsify.plugins.transformers_quantizer import follow

        follow(model)


def _log(model: nn.Module, kernel: str, found: dict[str, Engaged]) -> None:
    text = f"linears: {summary(found)}"
    experts = sum(p.ndim == 3 for name, p in model.named_parameters() if not name.endswith("bias"))
    if experts:
        text += f"; {experts} tensors of fused experts stay dense"
    dense = [entry for entry in found.values() if entry.kernel == DENSE and entry.pattern != DENSE]
    level = logging.WARNING if dense and kernel not in (AUTO, DENSE) else logging.INFO
    _LOG.log(level, "%s", text)
