"""Linears of vLLM with packed weights: loaded in parts, cut to this rank, computed by the kernel that was chosen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from sparsify.errors import ModelError
from sparsify.format import legacy
from sparsify.format.packed import Packed, decode
from sparsify.format.record import PARTS
from sparsify.kernels.dispatch import AUTO, DENSE, Choice, choose
from sparsify.plugins.engaged import Engaged
from sparsify.plugins.shards import Cut, Key, Shards
from sparsify.plugins.sparse_linear import packed_if_sparse
from sparsify.plugins.vllm_loading import Loading

_DTYPES = {"weight_mask": torch.uint8, "bitmask": torch.uint8, "weight_perm": torch.int32}
_FLOATS = ("weight", "compressed")
_QKV = {"q": 0, "k": 1, "v": 2}


class _SparseLinearMethod(LinearMethodBase):
    """What both ways to a packed weight share: the choice of a kernel, and the product.

    Args:
        loading: of the model.
        prefix: name of the linear in vLLM's model.
    """

    def __init__(self, loading: Loading, prefix: str) -> None:
        self.loading = loading
        self.prefix = prefix
        # Composed, not inherited: vLLM asks isinstance to tell unquantised checkpoints, and its CPU path replaces
        # the weight by one that oneDNN has laid out.
        self.dense = UnquantizedLinearMethod()
        self.choice = Choice(None)
        loading.record.expected.add(prefix)

    def install(self, layer: Any, weight: Packed | torch.Tensor, notes: list[str]) -> None:
        """Give ``layer`` its weight as the chosen kernel wants it."""
        shape = tuple(weight.shape)
        dense_bytes = math.prod(shape) * weight.dtype.itemsize
        pattern = str(weight.pattern or "unstructured") if isinstance(weight, Packed) else "dense"
        if isinstance(weight, Packed):
            self.choice = choose(weight, self.loading.kernel)
        asked = self.loading.kernel not in (AUTO, DENSE)
        why = "; ".join(dict.fromkeys(notes)) or ("" if isinstance(weight, Packed) else "its weight is not packed")
        reason = self.choice.reason or (why if asked else "")
        resident = dense_bytes
        if self.choice.kernel is None:
            layer.weight = Parameter(decode(weight) if isinstance(weight, Packed) else weight, requires_grad=False)
            self.dense.process_weights_after_loading(layer)
        else:
            assert isinstance(weight, Packed)
            state = self.choice.kernel.prepare(weight)
            layer.sparsify_sizes = dict(state.sizes)
            layer.sparsify_tensors = tuple(state.tensors)
            for name, tensor in state.tensors.items():
                layer.register_buffer(f"sparsify_{name}", tensor, persistent=False)
            resident = state.n_bytes
        self.loading.record.ready(self.prefix, Engaged(self.choice.name, pattern, reason, dense_bytes, resident))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product [..., out] of ``x`` [..., in] with the layer's weight."""
        if self.choice.kernel is None:
            result: torch.Tensor = self.dense.apply(layer, x, bias)
            return result
        tensors = {name: getattr(layer, f"sparsify_{name}") for name in layer.sparsify_tensors}
        return self.choice.kernel.linear(x, tensors, layer.sparsify_sizes, bias)


class PackedLinear(_SparseLinearMethod):
    """A linear of a compressed checkpoint; stored weights may be packed or dense, alone or fused."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register empty parameters under the stored names; their loaders keep what arrives."""
        device = torch.empty(0).device
        names = self.loading.stored_names(self.prefix)
        if len(names) != len(output_partition_sizes):
            names = [f"{self.prefix}[{i}]" for i in range(len(output_partition_sizes))]
        if len(output_partition_sizes) == 1:
            names = [self.prefix]
        cut = Cut(
            names=names,
            rows=list(output_partition_sizes),
            sections=_sections(layer, output_partition_sizes, output_size),
            n_in=input_size_per_partition,
            total_in=input_size,
            rank=layer.tp_rank,
            world=layer.tp_size,
            dtype=params_dtype,
            device=device,
        )
        n_parts = len(output_partition_sizes)
        layer.sparsify_shards = Shards(cut, lambda key: _places(key, n_parts, self.prefix), self.loading.legacy)
        for part in legacy.PARTS if self.loading.legacy else PARTS:
            dtype = params_dtype if part in _FLOATS else _DTYPES.get(part, torch.int64)
            parameter: Any = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _loader(layer.sparsify_shards, part)
            layer.register_parameter(part, parameter)
        if self.loading.legacy:  # a linear that is not sparse is stored as usual
            parameter = Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = _loader(layer.sparsify_shards, "weight")
            layer.register_parameter("weight", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the collected weights together and choose the kernel.

        Raises:
            ModelError: a stored weight has not arrived; names it.
        """
        shards: Shards | None = getattr(layer, "sparsify_shards", None)
        if shards is None:
            return  # done before
        if shards.empty and self.loading.dummy:
            shape = (sum(shards.cut.rows), shards.cut.n_in)
            weight: Packed | torch.Tensor = _random(shape, shards.cut)
        else:
            weight = shards.finish()
        for part in (*PARTS, *legacy.PARTS):
            if part in layer._parameters:
                delattr(layer, part)
        del layer.sparsify_shards
        self.install(layer, weight, shards.notes)


class CompressAtLoad(_SparseLinearMethod):
    """A linear of a plain checkpoint: loaded as usual, then packed where a sparse kernel will compute with it."""

    def create_weights(self, layer: Any, *args: Any, **extra: Any) -> None:
        """As vLLM does, and note what arrives."""
        layer.sparsify_loaded = []
        load = extra.pop("weight_loader")

        def loader(parameter: Parameter, tensor: torch.Tensor, *key: Any) -> None:
            layer.sparsify_loaded.append(key)
            load(parameter, tensor, *key)

        self.dense.create_weights(layer, *args, weight_loader=loader, **extra)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight where its zeros allow it and a kernel was asked for."""
        if not hasattr(layer, "sparsify_loaded"):
            return  # done before
        # vLLM itself looks for missing weights only where nothing is quantised.
        if not layer.sparsify_loaded and not self.loading.dummy:
            raise ModelError(f"tensor {self.prefix}.weight is missing from the checkpoint; download it again")
        del layer.sparsify_loaded
        weight: torch.Tensor = layer.weight.data
        del layer.weight
        packed = None if self.loading.kernel == DENSE else packed_if_sparse(weight)
        self.install(layer, weight if packed is None else packed, [])


def _loader(shards: Shards, part: str) -> Any:
    def load(parameter: Parameter, tensor: torch.Tensor, key: Key = None) -> None:
        shards.add(part, tensor, key)

    return load


def _places(key: Key, n_parts: int, prefix: str) -> list[int]:
    """Places of the stored weight that vLLM calls ``key`` among those fused into a linear."""
    if key is None:
        return list(range(n_parts))
    if isinstance(key, tuple):
        return list(key)
    place = _QKV.get(key, n_parts) if isinstance(key, str) else key
    if place >= n_parts:
        raise ModelError(f"{prefix}: vLLM loads a part {key!r}, which the plugin does not know; export with --dense")
    return [place]


def _sections(layer: Any, parts: list[int], output_size: int) -> list[int]:
    """Rows of each fused weight in the whole model."""
    if len(parts) == 1:
        return [output_size]
    if hasattr(layer, "total_num_kv_heads") and len(parts) == 3:
        v_head_size = getattr(layer, "v_head_size", layer.head_size)
        kv_heads = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, kv_heads * layer.head_size, kv_heads * v_head_size]
    return list(getattr(layer, "output_sizes", parts))


def _random(shape: tuple[int, int], cut: Cut) -> torch.Tensor:
    """For ``load_format=dummy``: small random weights."""
    return (torch.randn(shape, dtype=torch.float32, device=cut.device) * 1e-3).to(cut.dtype)
