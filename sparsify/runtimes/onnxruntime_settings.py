"""How ONNX Runtime is asked to run: where, with how many threads and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.errors import UsageError

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# What each choice needs, in order of preference. TensorRT leaves to CUDA what it has no layer for.
CHAINS = {"cpu": (CPU,), "cuda": (CUDA,), "tensorrt": (TENSORRT, CUDA)}
AUTO = "auto"
PROVIDERS = (AUTO, *CHAINS)


@dataclass(frozen=True)
class OrtSettings:
    """Options of an ONNX Runtime session.

    Attributes:
        provider: ``cpu``, ``cuda``, ``tensorrt``, or ``auto``: cuda where the installed ONNX Runtime is built with it
            (it must then start, too), else cpu. TensorRT is never chosen unasked: it builds engines for minutes.
        allow_fallback: run on the next provider what the chosen one cannot run, and report it, instead of an error.
        device: index of the GPU.
        threads: threads of one operator; None is one for each core.
        inter_op_threads: operators that may run side by side; above 1 costs memory and rarely gains in a decoder.
        spinning: idle threads poll for work. Faster by some percent on cores of one's own, and several times slower
            where other processes want the same cores.
        arena: keep freed CPU memory for the next run. Off, a prompt costs a tenth to a fifth more time and the memory
            goes back to the system after it.
        unpack: unpack packed weights one by one before ONNX Runtime sees them. Off, it folds them itself, in several
            times the memory.
        gpu_memory_bytes: most that CUDA's arena may hold; None is all there is.
        workspace_bytes: most that TensorRT may use as scratch while an engine is built; None is its own default.
        max_length: TensorRT: longest sequence, cache included, that its engines take.
        max_batch: TensorRT: largest batch that its engines take.
    """

    provider: str = "cpu"
    allow_fallback: bool = False
    device: int = 0
    threads: int | None = None
    inter_op_threads: int = 1
    spinning: bool = True
    arena: bool = True
    unpack: bool = True
    gpu_memory_bytes: int | None = None
    workspace_bytes: int | None = None
    max_length: int = 2048
    max_batch: int = 8

    def check(self) -> None:
        """Refuse values that mean nothing (``UsageError``)."""
        if self.provider not in PROVIDERS:
            raise UsageError(f"provider {self.provider!r} is unknown; choose one of {', '.join(PROVIDERS)}")
        least = {
            "threads": 1, "inter_op_threads": 1, "gpu_memory_bytes": 1, "workspace_bytes": 1, "device": 0,
            "max_length": 2, "max_batch": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} {value}: want at least {low}")


def session_options(settings: OrtSettings) -> Any:
    """``onnxruntime.SessionOptions`` for ``settings``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions; the log would print them a second time
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = settings.inter_op_threads
    if settings.inter_op_threads > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = settings.arena
    # Each step has shapes of its own, and a plan of its memory would be made for each and kept: slower by some percent.
    options.enable_mem_pattern = False
    entries = {
        "session.intra_op.allow_spinning": str(int(settings.spinning)),
        "session.inter_op.allow_spinning": str(int(settings.spinning)),
        # Which provider got which operator: read after the start, to refuse or report what landed elsewhere.
        "session.record_ep_graph_assignment_info": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options
