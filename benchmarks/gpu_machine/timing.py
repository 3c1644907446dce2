"""Clocks: one call, several calls, and what the machine can do at most."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seconds(run: Callable[[], Any], on_gpu: bool) -> float:
    """Of one call."""
    import torch

    if not on_gpu:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def several(copies: list[Any], x: torch.Tensor, calls: int, on_gpu: bool) -> Callable[[], Any]:
    """``calls`` calls, each with the next copy, as one graph where there is a GPU."""
    from sparsify.kernels.gpu_timing import captured

    turns = itertools.cycle(copies)

    def run() -> Any:
        for _ in range(calls):
            result = next(turns)(x)
        return result

    if not on_gpu:
        run()
        return run
    graph, _ = captured(run)
    graph.replay()
    return graph.replay


def host_us(run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    """Microseconds that a call keeps the host busy, without a graph."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(50):
        run(x)
    taken = time.perf_counter() - started
    torch.cuda.synchronize()
    return taken / 50 * 1e6


def measure_ceilings(device: str, tiny: bool) -> dict[str, float]:
    """Copy bandwidth, counting bytes read and written, and the rate of a large bfloat16 product, on random data."""
    import torch

    size = 1 << 8 if tiny else 1 << 13
    x = torch.randn(size, size, device=device).bfloat16()
    source = torch.randn(1 << (16 if tiny else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def median(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        return statistics.median(seconds(run, device == "cuda") for _ in range(10))

    return {
        "bytes_per_s": 2 * source.nbytes / median(lambda: target.copy_(source)),
        "dense_flops": 2 * size**3 / median(lambda: x @ x),
    }
