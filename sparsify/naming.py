"""Checkpoint tensors to module parameters and back, one decoder block at a time.

Most tensors differ from the parameter they fill by their name at most. Some families are stored one expert at a time
and held as one fused parameter; transformers owns the table of those conversions and the operations, which are
used here in both directions so that the pruned checkpoint has the tensors of its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from sparsify.checkpoint import FLOATS, CheckpointReader
from sparsify.errors import ModelError, NumericsError
from sparsify.finite import all_finite
from sparsify.format.reader import open_checkpoint
from sparsify.model import Skeleton, load_skeleton, quiet, weight_view
from sparsify.readahead import read_ahead
from sparsify.types import LinearSpec


@dataclass(frozen=True)
class _Origin:
    """How a checkpoint tensor reaches the model: ``parameter`` it fills, and the converter's pattern if it is fused."""

    parameter: str
    source_pattern: str | None


class Binding:
    """The checkpoint and the skeleton, matched and checked against each other before any weight is read.

    Raises:
        ModelError: a parameter without tensor, a tensor of the wrong shape or of a dtype that is not a float.
    """

    def __init__(self, reader: CheckpointReader, skeleton: Skeleton) -> None:
        self.reader = reader
        self.skeleton = skeleton
        mapping = get_model_conversion_mapping(skeleton.model)
        self._converters = {
            pattern: entry
            for entry in mapping
            if isinstance(entry, WeightConverter)
            for pattern in entry.source_patterns
        }
        self._origins = self._match(mapping)
        self._check()
        self._notice_unused()
        self._transposed = {spec.parameter for block in skeleton.linears for spec in block if spec.transposed}
        # Set by the driver where parameters are to be read in another order of channels.
        self.reorder: Callable[[str, torch.Tensor], torch.Tensor] | None = None
        self._by_owner: dict[str, list[str]] = {}
        for name, origin in self._origins.items():
            self._by_owner.setdefault(self._owner(origin.parameter), []).append(name)

    def _match(self, mapping: list[Any]) -> dict[str, _Origin]:
        model = self.skeleton.model
        state = model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        origins = {}
        for name in sorted(self.reader.tensors, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if parameter not in state and name in state:
                parameter, pattern = name, None
            if parameter in state:
                origins[name] = _Origin(parameter, pattern)
        filled = {origin.parameter for origin in origins.values()}
        for name, origin in origins.items():
            # A tied weight that is stored under the name of its copy (the head) fills the original (the embedding).
            source = self.tied().get(origin.parameter)
            if source is not None and source not in filled:
                origins[name] = _Origin(source, origin.source_pattern)
        return origins

    def tied(self) -> dict[str, str]:
        """Parameters that are copies of another: name of the copy -> name of the original."""
        return dict(getattr(self.skeleton.model, "all_tied_weights_keys", None) or {})

    def _targets(self, origin: _Origin) -> list[str]:
        """Every parameter that a tensor contributes to; a converter names only the first in ``origin``."""
        if origin.source_pattern is None:
            return [origin.parameter]
        targets: list[str] = self._converters[origin.source_pattern].target_patterns
        stem = next((origin.parameter.removesuffix(t) for t in targets if origin.parameter.endswith(t)), None)
        return [origin.parameter] if stem is None else [stem + target for target in targets]

    def _check(self) -> None:
        model = self.skeleton.model
        state = model.state_dict()
        filled = {target for origin in self._origins.values() for target in self._targets(origin)}
        # A tied parameter is stored once, under either of its names.
        for target, source in self.tied().items():
            if target in filled or source in filled:
                filled |= {target, source}
        missing = sorted(set(state) - filled, key=dot_natural_key)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelError(
                f"{self.reader.folder}: tensor {missing[0]}{more} is missing from the checkpoint; "
                "config.json and the shards do not belong together, or a shard was not downloaded"
            )
        for name, origin in self._origins.items():
            info = self.reader.tensors[name]
            if info.dtype not in FLOATS and state[origin.parameter].is_floating_point():
                raise ModelError(
                    f"{info.file}: tensor {name} is stored as {info.dtype}, and {', '.join(FLOATS)} are read; "
                    "prune the unquantised model"
                )
            expected = tuple(state[origin.parameter].shape)
            if origin.source_pattern is None and info.shape != expected:
                raise ModelError(
                    f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(expected)}; "
                    "they do not belong together"
                )

    def _notice_unused(self) -> None:
        """Say which tensors the model has no parameter for; refuse what looks like blocks that config.json denies."""
        ignored = getattr(self.skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or []
        unused = [
            name
            for name in self.reader.tensors
            if name not in self._origins and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if not unused:
            return
        base = self.skeleton.model.base_model_prefix
        path = re.escape(self.skeleton.blocks.removeprefix(f"{base}."))
        further = re.compile(rf"({re.escape(base)}\.)?{path}\.(\d+)\.")
        # Layers that predict further tokens are stored behind the blocks and used by no language model class.
        extra = getattr(self.skeleton.text_config, "num_nextn_predict_layers", 0)
        limit = self.skeleton.n_blocks + (extra if isinstance(extra, int) else 0)
        for name in unused:
            index = further.match(name)
            if index and int(index[2]) >= limit:
                raise ModelError(
                    f"{self.reader.folder}: holds {name}, but config.json builds {self.skeleton.n_blocks} blocks; "
                    "config.json and the shards do not belong together"
                )
        self.skeleton.notices.append(
            f"{len(unused)} tensors of the checkpoint, {unused[0]} first, belong to no parameter of the model; "
            "they are copied as they are"
        )

    def _owner(self, parameter: str) -> str:
        rest = parameter.removeprefix(self.skeleton.blocks + ".")
        if rest == parameter:
            return ""
        return f"{self.skeleton.blocks}.{rest.partition('.')[0]}."

    def stored_in(self, prefix: str) -> list[str]:
        """Names of the checkpoint tensors of the block ``prefix``."""
        return self._by_owner.get(prefix, [])

    def stored_for(self, parameter: str) -> list[str]:
        """Names of the checkpoint tensors that ``parameter`` is filled from: one, or several for a fused one."""
        return [name for name, origin in self._origins.items() if parameter in self._targets(origin)]

    def stored_outside_blocks(self) -> list[str]:
        """Names of every checkpoint tensor that belongs to no block, those the model does not use included."""
        inside = {n for prefix, names in self._by_owner.items() if prefix for n in names}
        return [name for name in self.reader.tensors if name not in inside]

    def load(self, names: list[str], dtype: torch.dtype, device: str) -> None:
        """Fill the parameters that ``names`` belong to, as ``dtype`` on ``device``.

        Raises:
            ModelError: experts that do not stack (wrong shape), a truncated shard.
            NumericsError: NaN or Inf; names module and input channel.
        """
        model = self.skeleton.model
        fused: dict[str, Any] = {}
        for name, tensor in sorted(self.reader.read(names), key=lambda item: dot_natural_key(item[0])):
            origin = self._origins[name]
            self._refuse_nan(name, origin.parameter, tensor)
            if self.reorder is not None:
                tensor = self.reorder(origin.parameter, tensor)
            value = tensor.to(device=device, dtype=dtype) if tensor.is_floating_point() else tensor.to(device)
            if origin.source_pattern is None:
                # A copy even where nothing changes: the mapped file must not be written through.
                _assign(model, origin.parameter, value.clone() if value.data_ptr() == tensor.data_ptr() else value)
            else:
                converter = fused.setdefault(origin.parameter, deepcopy(self._converters[origin.source_pattern]))
                converter.add_tensor(origin.parameter, name, origin.source_pattern, value)
        for parameter, converter in fused.items():
            try:
                with quiet():
                    converted = converter.convert(parameter, model=model, config=model.config)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(
                    f"{self.reader.folder}: tensors of {parameter} do not fit together: {reason}"
                ) from error
            for target, value in converted.items():
                value = value[0] if isinstance(value, list) else value
                expected = tuple(model.get_parameter(target).shape)
                if tuple(value.shape) != expected:
                    raise ModelError(
                        f"{self.reader.folder}: tensors of {target} have shape {list(value.shape)} together, "
                        f"config.json asks for {list(expected)}; they do not belong together"
                    )
                _assign(model, target, value)

    def _refuse_nan(self, name: str, parameter: str, tensor: torch.Tensor) -> None:
        if all_finite(tensor):
            return
        bad = ~torch.isfinite(tensor)
        if tensor.dim() > 1 and parameter in self._transposed:
            bad = bad.transpose(-1, -2)
        channel = int(bad.reshape(-1, bad.shape[-1]).any(dim=0).nonzero()[0])
        raise NumericsError(
            f"{name.removesuffix('.weight')}: channel {channel} of the weight is NaN or Inf; fix the model"
        )

    def copies(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors outside the blocks as they are stored.

        Raises:
            ModelError: a truncated shard.
            NumericsError: NaN or Inf; names module and channel.
        """
        tensors = dict(self.reader.read(names))
        for name, tensor in tensors.items():
            self._refuse_nan(name, name, tensor)
            if self.reorder is not None and name in self._origins:
                tensors[name] = self.reorder(self._origins[name].parameter, tensor)
        return tensors

    def load_surroundings(self, dtype: torch.dtype, device: str) -> None:
        """Fill what runs around the blocks (embeddings, final norm); the head, which pruning never runs, stays meta.

        Raises:
            ModelError: as ``load``.
        """
        model = self.skeleton.model
        prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
        stored = [name for name in self.stored_in("") if self._origins[name].parameter.startswith(prefix)]
        blocks = self.skeleton.blocks + "."
        _fill_buffers(model, (part for name, part in model.named_modules() if not name.startswith(blocks)), device)
        self.load(stored, dtype, device)

    def load_block(self, index: int, dtype: torch.dtype, device: str) -> nn.Module:
        """The block with its weights, ready to run.

        Raises:
            ModelError, NumericsError: as ``load``.
        """
        block = self.skeleton.block(index)
        _fill_buffers(self.skeleton.model, block.modules(), device)
        self.load(self.stored_in(self.skeleton.prefix(index)), dtype, device)
        return block

    def read_ahead(self, index: int) -> None:
        """Have a block's weights read from disk while something else is computed; nothing for one that is none."""
        if index < self.skeleton.n_blocks:
            read_ahead(self.reader.tensors, self.stored_in(self.skeleton.prefix(index)))

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Parameter name -> the dtype it is stored in."""
        return {
            target: FLOATS[self.reader.tensors[name].dtype]
            for name, origin in self._origins.items()
            if self.reader.tensors[name].dtype in FLOATS
            for target in self._targets(origin)
        }

    def stored_form(self, index: int) -> dict[str, torch.Tensor]:
        """The block's tensors under their checkpoint names and in their stored dtypes.

        Raises:
            ModelError: transformers cannot bring the fused parameters back to the form they were stored in.
        """
        model = self.skeleton.model
        names = self.stored_in(self.skeleton.prefix(index))
        result: dict[str, torch.Tensor] = {}
        fused: dict[str, torch.Tensor] = {}
        for name in names:
            origin = self._origins[name]
            if origin.source_pattern is None:
                result[name] = _lookup(model, origin.parameter)
            else:
                fused |= {target: _lookup(model, target) for target in self._targets(origin)}
        if fused:
            with quiet():
                result |= revert_weight_conversion(model, fused)
        if set(result) != set(names):
            odd = sorted(set(result) ^ set(names))[0]
            raise ModelError(f"{self.reader.folder}: tensor {odd} cannot be written back in the form it was stored in")
        return {name: result[name].to("cpu", FLOATS.get(self.reader.tensors[name].dtype)) for name in names}

    def unload(self, module: nn.Module) -> None:
        """Free the weights of ``module``."""
        module.to("meta")


def _lookup(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return value.detach()


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _fill_buffers(model: Any, modules: Iterable[nn.Module], device: str) -> None:
    """Compute the buffers of ``modules`` that no checkpoint stores (rotary frequencies, causal masks).

    transformers builds every model on the meta device and recomputes them in ``_init_weights``; so do we. That also
    draws random weights, which costs nothing while they are on the meta device: call this before loading them.
    """
    for part in modules:
        stale = {n: b for n, b in part._buffers.items() if b is not None and b.is_meta}
        stale = {n: b for n, b in stale.items() if n in part._non_persistent_buffers_set}
        for name, buffer in stale.items():
            part._buffers[name] = torch.empty_like(buffer, device=device)
        if stale:
            with torch.no_grad():
                model._init_weights(part)


def linear_weights(folder: Path, *, trust_remote_code: bool = False) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
    """Yield every prunable linear of a checkpoint with its ``weight`` [out, in] float32, one block in memory at a time.

    Args:
        folder: checkpoint.
        trust_remote_code: let the model's own code load.

    Raises:
        ModelError, NumericsError: as ``Binding``.
    """
    skeleton = load_skeleton(folder, trust_remote_code=trust_remote_code)
    binding = Binding(open_checkpoint(folder), skeleton)
    for index in range(skeleton.n_blocks):
        block = binding.load_block(index, torch.float32, "cpu")
        for spec in skeleton.linears[index]:
            yield spec, weight_view(skeleton.model.get_parameter(spec.parameter), spec)
        binding.unload(block)
