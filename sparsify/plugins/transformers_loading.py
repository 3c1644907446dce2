"""How packed weights become parameters while transformers loads a checkpoint: its converters, fed with decoded weights.

A converter collects the stored tensors of a parameter; here it hands decoded weights to what it does with them, so that
experts are whole before transformers merges them. Everything that is not packed is left to transformers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from sparsify.checkpoint import FLOATS, open_shard
from sparsify.errors import ModelError
from sparsify.format.packed import Packed, decode
from sparsify.format.record import PARTS, VALUES, from_tensors
from sparsify.kernels.dispatch import choose
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.types import NofM

# Parts that only a packed weight has.
_BESIDE = frozenset(PARTS) - {VALUES}


@dataclass(frozen=True)
class Layout:
    """How a weight is stored: ``pattern``, the order of columns that it holds in, the scale of values in 8 bits."""

    pattern: NofM | None
    perm: torch.Tensor | None = None
    scale: torch.Tensor | None = None


@dataclass
class Plan:
    """One checkpoint on its way into one model.

    Attributes:
        kernel: what was asked for.
        files: packed module -> the shard that holds it, for messages.
        dtypes: packed module -> dtype of the values in the shard.
        skeleton: parameter or buffer -> shape and dtype it is to have.
        renamed: packed modules by the names they have in the model (before experts are merged).
        layouts: packed module, by its name in the checkpoint -> how it was stored; filled while loading.
        linears: linear of the model -> the same, for those that are one stored weight.
        refused: why linears stayed dense although a kernel was asked for.
    """

    kernel: str
    files: dict[str, Path]
    dtypes: dict[str, torch.dtype]
    skeleton: dict[str, tuple[torch.Size, torch.dtype]]
    renamed: frozenset[str] = frozenset()
    layouts: dict[str, Layout] = field(default_factory=dict)
    linears: dict[str, Layout] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def unpack(self, module: str, parts: Mapping[str, torch.Tensor]) -> Packed | torch.Tensor:
        """The weight of ``module``, checked if it is packed."""
        if len(parts) == 1 and not parts.keys() & _BESIDE:
            return next(iter(parts.values()))
        if VALUES in parts and module in self.dtypes:
            # transformers before 5.21 widens what is to stay in float32 as it is read.
            parts = {**parts, VALUES: parts[VALUES].to(self.dtypes[module])}
        packed = from_tensors(module, parts, where=self.files.get(module, ""))
        perm, scale = (None if part is None else part.cpu().clone() for part in (packed.perm, packed.scale))
        self.layouts[module] = Layout(packed.pattern, perm, scale)
        return packed

    def dense(self, parameter: str, weight: Packed | torch.Tensor) -> torch.Tensor:
        """``weight`` in the dtype that ``parameter`` is to have; one that is scaled is rounded to it once."""
        dtype = self.skeleton[parameter][1]
        if isinstance(weight, Packed):
            return decode(weight.to(dtype))
        return weight.to(dtype) if weight.is_floating_point() else weight


def split_name(name: str) -> tuple[str, str]:
    """Module and part of a tensor that belongs to a packed weight; ``""`` is the part of any other."""
    module, _, part = name.rpartition(".")
    return (module, part) if part in PARTS else (name, "")


class Unpacking(WeightConverter):
    """The converter ``inner``, fed with decoded weights where the checkpoint holds packed ones.

    What is raised while tensors are collected reaches the user; what an operation raises would be logged, and the
    parameter filled with random values before anybody stops.
    """

    __slots__ = ("inner", "keys", "plan")

    def __init__(self, inner: Any, plan: Plan) -> None:
        sources, targets = list(inner._original_source_patterns), list(inner._original_target_patterns)
        super().__init__(sources, targets, inner.operations)
        for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        self.inner, self.plan = inner, plan
        self.keys: dict[str, list[str]] = defaultdict(list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpacking:
        # transformers copies a converter for every tensor: only what is collected has to be the copy's own.
        twin = copy.copy(self)
        twin.collected_tensors, twin.layer_targets = defaultdict(list), defaultdict(set)
        twin.keys = defaultdict(list)
        return twin

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """A part of a packed weight goes where the weight goes."""
        module, part = split_name(source_key)
        renamed: tuple[str, str | None] = super().rename_source_key(f"{module}.{VALUES}" if part else source_key)
        return (source_key, None) if renamed[1] is None else renamed

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Collect a stored tensor, and remember its name."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.keys[source_pattern].append(source_key)

    def materialize_tensors(self) -> dict[str, list[torch.Tensor]]:
        """Pattern -> dense weights in the order of their names.

        Raises:
            ModelError: a packed weight lacks a part or differs from its checks.
        """
        target = next(iter(self.layer_targets))
        found: dict[str, list[torch.Tensor]] = defaultdict(list)
        for pattern, module, parts in self._stored():
            weight = self.plan.unpack(module, parts)
            found[pattern].append(self.plan.dense(target, weight))
        return dict(found)

    def _stored(self) -> Iterator[tuple[str, str, dict[str, torch.Tensor]]]:
        """Pattern, module and tensors of each weight that was collected."""
        for pattern, tensors in super().materialize_tensors().items():
            modules: dict[str, dict[str, torch.Tensor]] = {}
            for key, tensor in zip(self.keys[pattern], tensors, strict=True):
                module, part = split_name(key)
                modules.setdefault(module, {})[part] = tensor
            for module in list(modules):
                yield pattern, module, modules.pop(module)


class _Decode(ConversionOps):
    """A converter must have an operation; ``Whole`` has done everything before."""

    def convert(self, input_dict: dict[str, Any], **others: Any) -> dict[str, Any]:
        """The input."""
        return input_dict


class Whole(Unpacking):
    """The converter for packed weights that are one parameter, decoded or given to a kernel."""

    __slots__ = ()

    def __init__(self, plan: Plan) -> None:
        super().__init__(WeightConverter([rf"\.{VALUES}$"], [f".{VALUES}"], [_Decode()]), plan)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Packed weights keep their names, which are known."""
        module, part = split_name(source_key)
        if not part or module not in self.plan.renamed:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return f"{module}.{VALUES}", self.source_patterns[0]

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, torch.Tensor]:
        """The parameter by its name; nothing where a kernel has taken the place of its linear."""
        (_, module, parts), *_ = self._stored()
        weight = self.plan.unpack(module, parts)
        if not isinstance(weight, Packed):
            return {layer_name: self.plan.dense(layer_name, weight)}
        shape, dtype = self.plan.skeleton[layer_name]
        if weight.shape != tuple(shape):
            place = self.plan.files.get(module, "checkpoint")
            raise ModelError(
                f"{place}: tensor {module}.{VALUES} is {list(weight.shape)}, config.json asks for {list(shape)}; "
                "they do not belong together"
            )
        name = layer_name.removesuffix(f".{VALUES}")
        if isinstance(model.get_submodule(name), nn.Linear):
            self.plan.linears[name] = self.plan.layouts[module]
            reason = put_kernel(model, name, weight if weight.dtype == dtype else weight.to(dtype), self.plan.kernel)
            if reason is None:
                loading_info.missing_keys.discard(layer_name)
                return {}
            self.plan.refused += [reason] if reason else []
        return {layer_name: self.plan.dense(layer_name, weight)}


def put_kernel(model: nn.Module, name: str, packed: Packed, kernel: str) -> str | None:
    """Put a ``SparseLinear`` in the place of the linear ``name``; where it stays dense, why (``""``: as asked for).

    Raises:
        UsageError: the kernel is unknown or cannot run where ``packed`` lies.
    """
    choice = choose(packed, kernel)
    if choice.kernel is None:
        return choice.reason
    layer = SparseLinear(packed, choice.kernel, model.get_submodule(name).bias)  # type: ignore[arg-type]
    layer.train(model.training)
    layer._is_hf_initialized = True  # type: ignore[assignment]
    model.set_submodule(name, layer)
    return None


def scan(files: Iterable[str]) -> tuple[dict[str, Path], dict[str, torch.dtype]]:
    """Packed modules of a checkpoint: where each is, and the dtype of its values."""
    modules: dict[str, Path] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in (Path(file) for file in files if file.endswith(".safetensors")):
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                module, part = split_name(name)
                if part == VALUES and (dtype := FLOATS.get(shard.get_slice(name).get_dtype())):
                    dtypes[module] = dtype
                elif part in _BESIDE:
                    modules[module] = file
    return modules, dtypes
