"""Sessions: an artifact opened in the runtime that serves it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.runtimes.session import Session

AUTO = "auto"
RUNTIMES = (AUTO, "torch", "onnxruntime", "vllm", "vllm-server")


@dataclass(frozen=True)
class Runtime:
    """Where to open an artifact, and how.

    Attributes:
        name: one of ``RUNTIMES``. ``auto`` is ONNX Runtime for ONNX; for a compressed checkpoint vLLM where it is
            installed; else PyTorch.
        dtype: of weights and arithmetic; None is float32 in PyTorch and bfloat16, which is served, in vLLM.
        kernel: vLLM: what the plugin is asked to run.
        tensor_parallel: vLLM: ranks that share the model.
        python: vllm-server: interpreter of the environment that has vLLM; None is this one.
        max_length: vLLM: longest sequence in tokens; None is what the model has positions for, up to 2048.
    """

    name: str = AUTO
    dtype: str | None = None
    kernel: str | None = None
    tensor_parallel: int = 1
    python: str | None = None
    max_length: int | None = None

    def resolve(self, path: Path) -> str:
        """The runtime that opens ``path``.

        Raises:
            UsageError: unknown, or an option that this runtime does not have.
        """
        if self.name not in RUNTIMES:
            raise UsageError(f"runtime {self.name!r} is unknown; choose one of {', '.join(RUNTIMES)}")
        name = self.name
        if name == AUTO:
            name = "onnxruntime" if (path / "model.onnx").exists() else "vllm" if _serves(path) else "torch"
        if not name.startswith("vllm") and (self.kernel is not None or self.tensor_parallel != 1):
            raise UsageError(f"runtime {name}: --kernel and --tensor-parallel are for vllm and vllm-server")
        if self.python is not None and name != "vllm-server":
            raise UsageError(f"runtime {name}: --python is for vllm-server")
        if self.dtype is not None and name == "onnxruntime":
            raise UsageError("runtime onnxruntime: the artifact has its dtype; leave --dtype out")
        return name


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

        return OnnxRuntimeSession(path)
    if name == "torch":
        from sparsify.runtimes.torch_session import TorchSession

        return TorchSession(path, dtype=runtime.dtype or "float32", trust_remote_code=trust_remote_code)
    if trust_remote_code:
        raise UsageError(f"runtime {name}: a model's own code is not run there; leave --trust-remote-code out")
    from sparsify.runtimes.vllm_server import VllmServer
    from sparsify.runtimes.vllm_session import VllmSession

    options: dict[str, Any] = {
        "dtype": runtime.dtype or "bfloat16",
        "tensor_parallel": runtime.tensor_parallel,
        "kernel": runtime.kernel,
        "max_length": runtime.max_length,
    }
    if name == "vllm":
        return VllmSession(path, **options)
    return VllmServer(path, python=runtime.python or sys.executable, **options)
