"""Where an engine runs: device memory, one stream and CUDA graphs, all from torch, which is here anyway.

On the device ``cpu``, which serves stand-ins for TensorRT in tests, there is no stream and nothing is captured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.errors import SparsifyError, UsageError
from sparsify.exporters.tensorrt_log import out_of_memory

REMEDY = "free the GPU, or build with smaller batch=, prompt= or total="
WITHOUT_GRAPHS = "pass --no-cuda-graphs (cuda_graphs=False)"


class Device:
    """A torch device with a stream of its own.

    Attributes:
        torch: the device, with its index.
        is_cuda: whether it is a GPU.
        compute_capability: as ``9.0``; ``cpu`` where it is none.
        handle: the stream as TensorRT takes it.

    Raises:
        UsageError: no such device.
    """

    def __init__(self, name: str) -> None:
        try:
            self.torch = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device {name!r}: {str(error).splitlines()[0]}; open the engine where there is a GPU, or the ONNX "
                "file beside it with --runtime onnxruntime"
            ) from error
        self.is_cuda = self.torch.type == "cuda"
        # Not the default stream: TensorRT would synchronise the device around every step.
        self._stream = torch.cuda.Stream(self.torch) if self.is_cuda else None  # type: ignore[no-untyped-call]
        self.handle = int(self._stream.cuda_stream) if self._stream else 0
        self.compute_capability = (
            "{}.{}".format(*torch.cuda.get_device_capability(self.torch)) if self.is_cuda else "cpu"
        )

    @contextmanager
    def scope(self, what: str) -> Iterator[None]:
        """Run the block on this device and stream; memory that runs out becomes one line about ``what``.

        Raises:
            SparsifyError: out of GPU memory.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._stream:
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
            except RuntimeError as error:  # torch's own error, or CUDA's as one of several kinds
                if not out_of_memory(str(error)):
                    raise
                line = str(error).splitlines()[0][:200]
                raise SparsifyError(f"{what}: out of GPU memory; {REMEDY}: {line}") from error

    def zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer of ``count`` zeros; where TensorRT reads beyond what was written, nothing can be NaN."""
        return torch.zeros(max(count, 1), dtype=dtype, device=self.torch)

    def staging(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer in host memory that copies to the device need not wait for."""
        return torch.empty(max(count, 1), dtype=dtype, pin_memory=self.is_cuda)

    def capture(self, work: Callable[[], None], what: str) -> Callable[[], None]:
        """What repeats ``work``, which has run before: a CUDA graph of it, or on a CPU ``work`` itself.

        Args:
            work: enqueues on this device's stream.
            what: is captured, for messages.

        Raises:
            SparsifyError: it cannot be captured; names the switch that does without.
        """
        if self._stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        try:
            # TensorRT has threads of its own, whose calls must not spoil the capture.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except (RuntimeError, SparsifyError) as error:
            if out_of_memory(str(error)):
                raise
            line = str(error).splitlines()[0][:200]
            raise SparsifyError(f"{what}: cannot be captured as a CUDA graph; {WITHOUT_GRAPHS}: {line}") from error
        return graph.replay

    def fetch(self, source: torch.Tensor) -> Callable[[], Any]:
        """Enqueue a copy of ``source`` to the host; what comes back waits for it, and for nothing later, and lists it.

        To be called in ``scope``.
        """
        if self._stream is None:
            values = source.tolist()
            return lambda: values
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._stream)

        def arrive() -> Any:
            copied.synchronize()
            return host.tolist()

        return arrive

    def free_bytes(self) -> int:
        """Memory of the device that nobody has allocated; without bound on a CPU, which stands in for one."""
        return int(torch.cuda.mem_get_info(self.torch)[0]) if self.is_cuda else sys.maxsize

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        if self._stream:
            self._stream.synchronize()


def fill(target: torch.Tensor, staging: torch.Tensor, values: NDArray[np.int64]) -> None:
    """Copy ``values`` into ``target`` of the same shape through ``staging``, converted to its dtype.

    ``staging`` must not be used again before the copy has been waited for.
    """
    host = staging[: values.size].view(values.shape)
    host.copy_(torch.tensor(values))
    target.copy_(host, non_blocking=True)
