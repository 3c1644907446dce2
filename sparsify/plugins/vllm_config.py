"""The quantisation config that vLLM builds for a compressed checkpoint: which method loads which layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparsify import __version__
from sparsify.errors import ModelError, UsageError
from sparsify.files import stamps
from sparsify.format.legacy import legacy_format
from sparsify.format.reader import open_checkpoint
from sparsify.format.storage import METHOD, SERVED, read_storage
from sparsify.kernels import native
from sparsify.kernels.device_cache import cache_folder
from sparsify.kernels.dispatch import AUTO, check_request
from sparsify.kernels.table import SHIPPED
from sparsify.plugins.engaged import RECORDS
from sparsify.plugins.vllm_loading import Loading


class SparsifyConfig(QuantizationConfig):
    """What vLLM asks about the model that is being loaded.

    Args:
        compressed, legacy: see ``Loading``. Without arguments vLLM builds it for ``--quantization sparsify`` on a plain
            checkpoint.
    """

    def __init__(self, compressed: bool = False, legacy: str | None = None) -> None:
        super().__init__()
        # vLLM fills the mapping in place when it knows the model's class.
        self.loading = Loading(compressed, legacy, self.packed_modules_mapping)
        self._known = False

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
        """Refuse what would load wrongly, and put what shapes the compiled graph into vLLM's key for it.

        vLLM hashes the model's config for that key, and neither the weights nor this object; but which linears are
        packed, and how, is part of the graph, and ``auto`` follows what was measured on this machine. A model that is
        not a local folder is told apart by the digest that export wrote.

        Raises:
            ModelError: a model type whose loader is not known to take packed weights, or files that lack a tensor.
        """
        model_type = getattr(hf_config, "model_type", None)
        if self.loading.compressed and model_type not in SERVED:
            raise ModelError(
                f"{model_name}: how vLLM loads model type {model_type!r} has not been checked with packed weights; "
                "export it with --dense"
            )
        folder = Path(model_name)
        files: list[Any] = []
        if folder.is_dir():
            if self.loading.compressed:
                # A shard that is gone: vLLM looks for missing tensors only where nothing is quantised.
                open_checkpoint(folder)
            files = sorted(stamps(folder.glob("*.safetensors")).items())
        if hf_config is not None:
            hf_config.sparsify = {"plugin": __version__, "files": files, "kernels": _measurements()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method for a linear or for experts; None, which is vLLM's own, for everything else."""
        from sparsify.plugins.vllm_experts import experts_class, make_experts_method
        from sparsify.plugins.vllm_linear import CompressAtLoad, PackedLinear

        self._read_engine()
        if isinstance(layer, LinearBase):
            method = PackedLinear if self.loading.compressed else CompressAtLoad
            return method(self.loading, prefix)
        if self.loading.compressed and isinstance(layer, experts_class()):
            return make_experts_method(self.loading, layer, prefix)
        return None

    def _read_engine(self) -> None:
        """What the user asked of the engine; known from the first layer on, when vLLM has set its config."""
        if self._known:
            return
        engine, loading = get_current_vllm_config(), self.loading
        options = engine.additional_config if isinstance(engine.additional_config, dict) else {}
        loading.kernel = _kernel(options.get(METHOD, {}))
        check_request(loading.kernel, torch.empty(0).device)
        form = engine.load_config.load_format
        loading.dummy = str(getattr(form, "value", form)) == "dummy"
        loading.record.rank = get_tensor_model_parallel_rank()
        RECORDS.append(loading.record)
        self._known = True


def _measurements() -> dict[str, Any]:
    """What the choice of kernels depends on beside the weights, as JSON values."""
    tables = [*SHIPPED.glob("*.json"), *(cache_folder() / "tables").glob("*.json")]
    threads = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")}
    return {"tables": sorted(stamps(tables).items()), "threads": threads, "features": sorted(native.features())}


def _kernel(options: Any) -> str:
    """The kernel that ``additional_config`` asks for.

    Raises:
        UsageError: it is not ``{"sparsify": {"kernel": NAME}}``.
    """
    if not isinstance(options, dict) or not set(options) <= {"kernel"}:
        raise UsageError(f"additional_config: sparsify is {options!r}; write {{'sparsify': {{'kernel': NAME}}}}")
    return str(options.get("kernel", AUTO))


def register_config() -> None:
    """Register ``sparsify`` with vLLM; again is harmless."""
    register_quantization_config(METHOD)(SparsifyConfig)
