"""The quantisation config that vLLM builds for a compressed checkpoint: which method loads which layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparsify import __version__
from sparsify.format.legacy import legacy_format
from sparsify.format.storage import METHOD, read_storage
from sparsify.kernels.dispatch import AUTO
from sparsify.plugins.engaged import RECORDS, Record


class SparsifyConfig(QuantizationConfig):
    """What the plugin knows of the model that is being loaded.

    Attributes:
        compressed: the checkpoint holds packed weights; else it is plain, and weights are packed once they are loaded
            (``--quantization sparsify``).
        legacy: name of compressed-tensors' format, where that wrote the checkpoint.
        record: what runs, for the log and ``engaged``.
    """

    def __init__(self, compressed: bool = False, legacy: str | None = None) -> None:
        super().__init__()
        self.compressed = compressed
        self.legacy = legacy
        self.record = Record()
        self._known = False
        self.kernel = AUTO
        self.dummy = False

    @classmethod
    def get_name(cls) -> str:
        """``sparsify``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those the format stores."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None: dense runs everywhere, and a sparse kernel says itself where it runs."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Take over sparse checkpoints of compressed-tensors, which vLLM itself refuses since 0.19.1."""
        return METHOD if legacy_format(hf_quant_cfg) and user_quant in (None, METHOD) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparsifyConfig:
        """The config of a checkpoint's ``quantization_config``.

        Raises:
            ModelError: it is malformed, or of a format this version does not read.
        """
        legacy = legacy_format(config)
        return cls(compressed=bool(legacy or read_storage(config)), legacy=legacy)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, *args: Any, **kwargs: Any) -> None:
        """Put what shapes the compiled graph into its cache key: vLLM hashes the model's config, not this object."""
        stored = getattr(hf_config, "quantization_config", None)
        if isinstance(stored, dict):
            stored["plugin"] = __version__

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method for a linear or for experts; None, which is vLLM's own, for everything else."""
        from sparsify.plugins.vllm_experts import experts_class, make_experts_method
        from sparsify.plugins.vllm_linear import CompressAtLoad, PackedLinear

        self._read_engine()
        if isinstance(layer, LinearBase):
            method = PackedLinear if self.compressed else CompressAtLoad
            return method(self, prefix)
        if self.compressed and isinstance(layer, experts_class()):
            return make_experts_method(self, layer, prefix)
        return None

    def _read_engine(self) -> None:
        """What the user asked of the engine; known from the first layer on, when vLLM has set its config."""
        if self._known:
            return
        engine = get_current_vllm_config()
        own = engine.additional_config.get(METHOD) if isinstance(engine.additional_config, dict) else None
        self.kernel = own.get("kernel", AUTO) if isinstance(own, dict) else AUTO
        self.dummy = str(getattr(engine.load_config.load_format, "value", engine.load_config.load_format)) == "dummy"
        self.record.rank = get_tensor_model_parallel_rank()
        RECORDS.append(self.record)
        self._known = True

    def stored_names(self, prefix: str) -> list[str]:
        """Names of the stored weights that make the linear ``prefix``."""
        stem, dot, leaf = prefix.rpartition(".")
        return [stem + dot + part for part in self.packed_modules_mapping.get(leaf, [leaf])]


def register_config() -> None:
    """Register ``sparsify`` with vLLM; again is harmless."""
    register_quantization_config(METHOD)(SparsifyConfig)
