"""The process's memory: keep freed blocks from staying in the heap, and say what the peak was."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD_BYTES = 4 << 20
_TOP_BYTES = 32 << 20


def return_freed_memory() -> None:
    """Give what is free inside the heap back to the system now (glibc; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def return_large_frees() -> None:
    """Have tensors of 4 MiB and more go back to the system the moment they are freed (glibc; elsewhere nothing).

    By default glibc raises that threshold to 32 MiB as a program runs, and the weights of one block after another
    leave holes in the heap: 64 blocks of width 1024 left half a gigabyte behind. Of smaller ones up to 32 MiB stay at
    the end of the heap until ``return_freed_memory``: pages that come and go with each cost time.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TOP_BYTES)
    except (OSError, AttributeError):
        return


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; unlike ``ru_maxrss``, not that of the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_device_bytes(device: str) -> int:
    """Most that torch has held on a CUDA device at once, in this process so far; 0 for any other device."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.max_memory_allocated(device))
