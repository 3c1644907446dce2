"""Time on a GPU, as the tuners measure it."""

from __future__ import annotations

from collections.abc import Callable
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
