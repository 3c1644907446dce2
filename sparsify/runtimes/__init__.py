"""Sessions: an artifact opened in the runtime that serves it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.runtimes.session import Session

AUTO = "auto"
RUNTIMES = (AUTO, "torch", "onnxruntime", "onnxruntime-genai", "tensorrt", "vllm", "vllm-server")
# option -> the runtimes that have it; others may be set for any
_OPTIONS = {
    "dtype": ("torch", "vllm", "vllm-server"),
    "kernel": ("torch", "vllm", "vllm-server"),
    "device": ("torch",),
    "tensor_parallel": ("vllm", "vllm-server"),
    "eager": ("vllm", "vllm-server"),
    "max_batch": ("vllm", "vllm-server"),
    "python": ("vllm-server",),
    "provider": ("onnxruntime", "onnxruntime-genai"),
    "threads": ("onnxruntime", "onnxruntime-genai"),
    "allow_fallback": ("onnxruntime",),
    "trust_engine": ("tensorrt",),
    "cuda_graphs": ("tensorrt",),
    "weight_budget": ("tensorrt",),
}


@dataclass(frozen=True)
class Runtime:
    """Where to open an artifact, and how.

    Attributes:
        name: one of ``RUNTIMES``. ``auto`` is TensorRT for an engine and ONNX Runtime for ONNX; for a compressed
            checkpoint vLLM where it is installed; else PyTorch.
        dtype: of weights and arithmetic; None is float32 in PyTorch and bfloat16, which is served, in vLLM.
        kernel: what is to multiply by sparse weights in PyTorch and vLLM; None is ``auto``.
        device: torch: where it runs.
        tensor_parallel: vLLM: ranks that share the model.
        eager: vLLM: no torch.compile and no CUDA graphs.
        max_batch: vLLM: sequences in flight.
        python: vllm-server: interpreter of the environment that has vLLM; None is this one.
        max_length: longest sequence in tokens, for vLLM and ONNX Runtime's TensorRT provider, which plan for it; None
            is what the model has positions for, up to 2048.
        provider: onnxruntime: ``cpu``, ``cuda``, ``tensorrt`` or ``auto``; onnxruntime-genai: ``cpu`` or ``cuda``. None
            is ``auto`` in the one and what genai_config.json says in the other.
        threads: onnxruntime, onnxruntime-genai: threads of one operator; None is one for each core.
        allow_fallback: onnxruntime: run elsewhere, and report, what the provider cannot run.
        trust_engine: tensorrt: deserialise an engine that this user did not build.
        cuda_graphs: tensorrt: decode in captured CUDA graphs.
        weight_budget: tensorrt: bytes of the weights that stay on the GPU, where they can be streamed; None is as many
            as there is room for.
    """

    name: str = AUTO
    dtype: str | None = None
    kernel: str | None = None
    tensor_parallel: int = 1
    python: str | None = None
    max_length: int | None = None
    provider: str | None = None
    threads: int | None = None
    allow_fallback: bool = False
    trust_engine: bool = False
    cuda_graphs: bool = True
    weight_budget: int | None = None
    device: str = "cpu"
    eager: bool = True
    max_batch: int = 8

    def resolve(self, path: Path) -> str:
        """The runtime that opens ``path``.

        Raises:
            UsageError: unknown, or an option that this runtime does not have.
        """
        if self.name not in RUNTIMES:
            raise UsageError(f"runtime {self.name!r} is unknown; choose one of {', '.join(RUNTIMES)}")
        name = self.name if self.name != AUTO else _automatic(path)
        for field in fields(self):
            owners = _OPTIONS.get(field.name, (name,))
            if getattr(self, field.name) != field.default and name not in owners:
                option = field.name.replace("_", "-")
                raise UsageError(f"runtime {name}: --{option} is for {' and '.join(owners)}; leave it out")
        return name


def _automatic(path: Path) -> str:
    if (path / "model.engine").exists():
        return "tensorrt"
    if (path / "model.onnx").exists():
        return "onnxruntime"
    return "vllm" if _serves(path) else "torch"


def _serves(path: Path) -> bool:
    from sparsify.checkpoint import read_config
    from sparsify.errors import ModelError
    from sparsify.format.storage import KEY, read_storage

    if importlib.util.find_spec("vllm") is None:
        return False
    try:
        return read_storage(read_config(path).get(KEY), path / "config.json") is not None
    except ModelError:
        return False


def open_session(path: Path, runtime: Runtime | None = None, *, trust_remote_code: bool = False) -> Session:
    """The session that serves the artifact in ``path``.

    Raises:
        UsageError: as ``Runtime.resolve``, or vLLM is asked to run a model's own code.
    """
    runtime = runtime or Runtime()
    name = runtime.resolve(path)
    if name == "onnxruntime":
        from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
        from sparsify.runtimes.onnxruntime_settings import AUTO as ANY
        from sparsify.runtimes.onnxruntime_settings import OrtSettings

        provider = runtime.provider or ANY
        settings = OrtSettings(provider, allow_fallback=runtime.allow_fallback, threads=runtime.threads)
        if runtime.max_length is not None:
            settings = replace(settings, max_length=runtime.max_length)
        return OnnxRuntimeSession(path, settings)
    if name == "onnxruntime-genai":
        from sparsify.runtimes.genai_session import GenaiSession

        return GenaiSession(path, provider=runtime.provider, threads=runtime.threads)
    if name == "tensorrt":
        from sparsify.runtimes.tensorrt_session import TensorRtSession

        return TensorRtSession(
            path,
            trust_engine=runtime.trust_engine,
            cuda_graphs=runtime.cuda_graphs,
            weight_budget=runtime.weight_budget,
        )
    if name == "torch":
        from sparsify.runtimes.torch_session import TorchSession

        kernel = runtime.kernel or AUTO
        dtype = runtime.dtype or "float32"
        return TorchSession(
            path, dtype=dtype, device=runtime.device, kernel=kernel, trust_remote_code=trust_remote_code
        )
    if trust_remote_code:
        raise UsageError(f"runtime {name}: a model's own code is not run there; leave --trust-remote-code out")
    from sparsify.runtimes.vllm_server import VllmServer
    from sparsify.runtimes.vllm_session import VllmSession

    options: dict[str, Any] = {
        "dtype": runtime.dtype or "bfloat16",
        "tensor_parallel": runtime.tensor_parallel,
        "kernel": runtime.kernel,
        "max_length": runtime.max_length,
        "eager": runtime.eager,
        "max_batch": runtime.max_batch,
    }
    if name == "vllm":
        return VllmSession(path, **options)
    return VllmServer(path, python=runtime.python or sys.executable, **options)
