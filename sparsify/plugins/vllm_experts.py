"""Mixtures of experts in vLLM: packed experts are decoded as they load, and computed dense by vLLM's own method."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from sparsify.errors import ModelError
from sparsify.format import legacy
from sparsify.format.packed import Packed, decode
from sparsify.format.record import PARTS, VALUES, from_tensors, is_complete
from sparsify.kernels.dispatch import AUTO, DENSE
from sparsify.plugins.engaged import Engaged
from sparsify.plugins.vllm_loading import Loading

# vLLM's parameters for the experts of a layer: gate and up, and down.
_STACKS = ("w13", "w2")


def experts_class() -> type:
    """The class of vLLM that holds the weights of a layer's experts."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    found: type = RoutedExperts
    return found


def make_experts_method(loading: Loading, layer: Any, prefix: str) -> Any:
    """The method for unquantised experts, vLLM's own, which also takes packed ones."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class PackedExperts(UnquantizedFusedMoEMethod):
        """Registers empty parameters for the parts of a packed expert beside vLLM's own dense ones."""

        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            super().create_weights(layer, *args, **kwargs)
            for stack in _STACKS:
                collector = _Collector(layer, stack, prefix, loading.legacy)
                for part in collector.parts:
                    if part == VALUES:
                        getattr(layer, f"{stack}_weight").weight_loader = collector.loader(part)
                        continue
                    parameter: Any = Parameter(torch.empty(0), requires_grad=False)
                    parameter.weight_loader = collector.loader(part)
                    layer.register_parameter(f"{stack}_{part}", parameter)
                layer.__dict__[f"sparsify_{stack}"] = collector

        def process_weights_after_loading(self, layer: Any) -> None:
            for stack in _STACKS:
                collector = layer.__dict__.pop(f"sparsify_{stack}", None)
                if collector is not None:
                    collector.close(loading.dummy)
                    for part in collector.parts:
                        if part != VALUES:
                            delattr(layer, f"{stack}_{part}")
            n_bytes = sum(getattr(layer, f"{stack}_weight").nbytes for stack in _STACKS)
            super().process_weights_after_loading(layer)
            reason = "" if loading.kernel in (AUTO, DENSE) else "experts are computed dense"
            loading.record.ready(prefix, Engaged(DENSE, "experts", reason, n_bytes, n_bytes))

    loading.record.expected.add(prefix)
    return PackedExperts(layer.moe_config)


class _Collector:
    """Parts of the packed experts of one stack, by expert and shard; each is decoded when it is whole."""

    def __init__(self, layer: Any, stack: str, prefix: str, legacy_format: str | None) -> None:
        self.parameter = getattr(layer, f"{stack}_weight")
        moe = layer.moe_config
        # Columns of a dense weight in the checkpoint.
        self.columns = moe.intermediate_size if stack == "w2" else moe.hidden_dim_unpadded
        self.shards = ("w2",) if stack == "w2" else ("w1", "w3") if moe.is_act_and_mul else ("w1",)
        # Under this name and no other vLLM takes a tensor for a weight.
        self.name = f"{prefix}.{stack}_{VALUES}"
        self.prefix = prefix
        self.legacy = legacy_format
        self.parts = (VALUES, *legacy.PARTS) if legacy_format else PARTS
        self._load_dense = self.parameter.weight_loader
        self._local = layer._map_global_expert_id_to_local_expert_id
        self._global = layer.global_num_experts
        self._waiting: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self._loaded: set[tuple[int, str]] = set()

    def loader(self, part: str) -> Any:
        """The weight loader for one part, with the signature that vLLM's experts have."""

        def load(
            param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, **options: Any
        ) -> Any:
            if part == VALUES and (self.legacy or self._is_dense(loaded_weight)):
                return self._keep(loaded_weight, shard_id, expert_id, options)
            parts = self._waiting.setdefault((expert_id, shard_id), {})
            parts[part] = loaded_weight
            if not (legacy.is_complete(parts, self.legacy) if self.legacy else is_complete(parts)):
                return True if options.get("return_success") else None
            del self._waiting[expert_id, shard_id]
            if self._local(expert_id) == -1:
                return self._keep(None, shard_id, expert_id, options)
            packed = self._read(expert_id, shard_id, parts)
            # vLLM would cast it too, and round what is scaled twice.
            return self._keep(decode(packed.to(self.parameter.dtype)), shard_id, expert_id, options)

        return load

    def _read(self, expert: int, shard: str, parts: dict[str, torch.Tensor]) -> Packed:
        name = f"{self.prefix}.{expert}.{shard}"
        return legacy.from_legacy(name, parts, self.legacy) if self.legacy else from_tensors(name, parts)

    def _keep(self, weight: torch.Tensor | None, shard_id: str, expert_id: int, options: dict[str, Any]) -> Any:
        """Hand a dense weight to vLLM, unless another rank computes this expert."""
        self._loaded.add((expert_id, shard_id))
        if weight is None:
            return False if options.get("return_success") else None
        return self._load_dense(self.parameter, weight, self.name, shard_id, expert_id, **options)

    def _is_dense(self, tensor: torch.Tensor) -> bool:
        """Packed values have one axis, or fewer columns than the dense weight."""
        return tensor.dim() == 3 or (tensor.dim() == 2 and tensor.shape[1] == int(self.columns))

    def close(self, dummy: bool) -> None:
        """Refuse what has not arrived whole: vLLM would compute with memory as it was.

        Raises:
            ModelError: names the first expert that lacks something.
        """
        for (expert, shard), parts in self._waiting.items():
            self._read(expert, shard, parts)  # says which part is missing
            raise ModelError(f"tensor {self.prefix}.{expert}.{shard}.{VALUES} lacks a part; export the model again")
        for expert in range(0 if dummy else self._global):
            for shard in self.shards:
                if (expert, shard) not in self._loaded and self._local(expert) != -1:
                    raise ModelError(
                        f"tensor {self.prefix}.{expert}.{shard}.{VALUES} is missing; export the model again"
                    )
