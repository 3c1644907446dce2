"""Time on a GPU: of single calls, as the tuners measure it, and of graphs of calls. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# Smaller buffers are written in less time than the host needs for a launch.
_FLUSH_BYTES = 1 << 28


def timed_us(run: Callable[[], Any], device: torch.device, repeats: int = 15) -> list[float]:
    """Microseconds of ``run`` on a GPU with nothing of its own in the L2 cache, one for each repeat.

    A buffer larger than the cache is written before each call; while that runs the host is ahead, so that launches
    cost nothing.
    """
    event: Any = torch.cuda.Event
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, _FLUSH_BYTES)
    flush = torch.empty(size, dtype=torch.int8, device=device)
    for _ in range(3):
        run()
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [1e3 * float(start.elapsed_time(end)) for start, end in pairs]


def captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a call of ``run``, and its result."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def replayed_us(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each graph, one for each of ``rounds``, in which the graphs take turns."""
    event: Any = torch.cuda.Event
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(1e3 * float(start.elapsed_time(end)))
    return found
