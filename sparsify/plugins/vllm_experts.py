"""Mixtures of experts in vLLM: packed experts are decoded as they load, and computed dense by vLLM's own method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

from sparsify.errors import ModelError
from sparsify.format import legacy
from sparsify.format.packed import decode
from sparsify.format.record import PARTS, VALUES, from_tensors, is_complete
from sparsify.plugins.engaged import Engaged
from sparsify.plugins.vllm_plugin import log

if TYPE_CHECKING:
    from sparsify.plugins.vllm_config import SparsifyConfig

# vLLM's parameters for the experts of a layer: gate and up, and down.
_STACKS = ("w13", "w2")


def experts_class() -> type:
    """The class of vLLM that holds the weights of a layer's experts."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    found: type = RoutedExperts
    return found


def make_experts_method(config: SparsifyConfig, layer: Any, prefix: str) -> Any:
    """The method for unquantised experts, vLLM's own, which also takes packed ones."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class PackedExperts(UnquantizedFusedMoEMethod):
        """Registers empty parameters for the parts of a packed expert beside vLLM's own dense ones."""

        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            super().create_weights(layer, *args, **kwargs)
            for stack in _STACKS:
                collector = _Collector(layer, stack, prefix, config.legacy)
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
                    collector.close()
                    for part in collector.parts:
                        if part != VALUES:
                            delattr(layer, f"{stack}_{part}")
            n_bytes = sum(getattr(layer, f"{stack}_weight").nbytes for stack in _STACKS)
            super().process_weights_after_loading(layer)
            reason = "" if config.kernel in ("auto", "dense") else "experts are computed dense"
            config.record.ready(prefix, Engaged("dense", "experts", reason, n_bytes, n_bytes), log)

    config.record.expected.add(prefix)
    return PackedExperts(layer.moe_config)


class _Collector:
    """Parts of the packed experts of one stack, by expert and shard; each is decoded when it is whole."""

    def __init__(self, layer: Any, stack: str, prefix: str, legacy_format: str | None) -> None:
        self.parameter = getattr(layer, f"{stack}_weight")
        moe = layer.moe_config
        # Columns of a dense weight in the checkpoint.
        self.columns = moe.intermediate_size if stack == "w2" else moe.hidden_dim_unpadded
        self.prefix = prefix
        self.legacy = legacy_format
        self.parts = (VALUES, *legacy.PARTS) if legacy_format else PARTS
        self._load_dense = self.parameter.weight_loader
        self._waiting: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def loader(self, part: str) -> Any:
        """The weight loader for one part, with the signature that vLLM's experts have."""

        def load(
            param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, **options: Any
        ) -> Any:
            name = f"{self.prefix}, expert {expert_id}, {shard_id}"
            if part == VALUES and (self.legacy or self._is_dense(loaded_weight)):
                return self._load_dense(
                    self.parameter, loaded_weight, f"{self.prefix}.{VALUES}", shard_id, expert_id, **options
                )
            parts = self._waiting.setdefault((expert_id, shard_id), {})
            parts[part] = loaded_weight
            if not (legacy.is_complete(parts, self.legacy) if self.legacy else is_complete(parts)):
                return True if options.get("return_success") else None
            del self._waiting[expert_id, shard_id]
            packed = legacy.from_legacy(name, parts, self.legacy) if self.legacy else from_tensors(name, parts)
            return self._load_dense(self.parameter, decode(packed), weight_name, shard_id, expert_id, **options)

        return load

    def _is_dense(self, tensor: torch.Tensor) -> bool:
        """Packed values have one axis, or fewer columns than the dense weight."""
        return tensor.dim() == 3 or (tensor.dim() == 2 and tensor.shape[1] == int(self.columns))

    def close(self) -> None:
        """Refuse what has not arrived whole."""
        for (expert, shard), parts in self._waiting.items():
            missing = sorted(set(self.parts) - set(parts) - {"weight_perm"})
            raise ModelError(
                f"{self.prefix}, expert {expert}, {shard}: tensor {missing[0]} is missing; export the model again"
            )
