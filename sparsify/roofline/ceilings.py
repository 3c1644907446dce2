"""What the machine at hand reaches at best: bytes read from memory and operations of large products, per second.

A ceiling is the fastest of many samples, because everything that happens meanwhile only slows; median and slowest say
how far the machine was from quiet. Where other processes use the same cores or memory a ceiling is too low, and work
that runs later, alone, can beat it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import UsageError
from sparsify.kernels.table import device_key, last_level_cache_bytes, threads_of
from sparsify.roofline.devices import HERE, Device

_WARM_UP = 2
_ROUNDS, _QUICK_ROUNDS = 15, 5
_BYTES, _QUICK_BYTES = 1 << 30, 1 << 28
# Buffers are this many caches, as the machine's free memory allows.
_CACHES, _SHARE_OF_MEMORY = 2, 0.25
# Rows and columns of the products. What is too small does not fill a GPU.
_CPU_SIZE, _GPU_SIZE = 2048, 8192
_COLUMNS = 4096


@dataclass(frozen=True)
class Rate:
    """Samples of a rate, per second.

    Attributes:
        best: the fastest: the ceiling.
        median: of the way that was fastest.
        low: the slowest of that way.
        n: samples of that way.
        how: the way.
    """

    best: float
    median: float
    low: float
    n: int
    how: str


@dataclass(frozen=True)
class Ceilings:
    """What was measured.

    Attributes:
        device: the same as a device, with the best rates.
        bandwidth: bytes per second.
        flops: type -> operations per second.
    """

    device: Device
    bandwidth: Rate
    flops: Mapping[str, Rate]


def measure_ceilings(
    device: str = "cpu",
    *,
    quick: bool = False,
    n_bytes: int | None = None,
    size: int | None = None,
    dtypes: Sequence[str] | None = None,
) -> Ceilings:
    """Measure bandwidth and products on ``device``, synchronised and warmed up.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        quick: fewer rounds, smaller buffers.
        n_bytes: of the buffer that is read; None: several times the last-level cache.
        size: rows and columns of the products; None: enough to fill the device.
        dtypes: of the products; None: float32, bfloat16, int8, and on GPUs float16.

    Raises:
        UsageError: no memory for it.
    """
    where = torch.device(device)
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    n_bytes = n_bytes or _buffer_bytes(where, _QUICK_BYTES if quick else _BYTES)
    size = size or (_CPU_SIZE if where.type == "cpu" else _GPU_SIZE)
    dtypes = dtypes or ("float32", "bfloat16", "int8", *(["float16"] if where.type == "cuda" else []))
    try:
        bandwidth = _bandwidth(where, n_bytes, rounds)
        flops = {dtype: rate for dtype in dtypes if (rate := _products(where, dtype, size, rounds)) is not None}
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(
            f"--device {device}: no memory to measure its ceilings in; free some, or name a device"
        ) from error
    return Ceilings(_as_device(where, bandwidth, flops, n_bytes), bandwidth, flops)


def _as_device(where: torch.device, bandwidth: Rate, flops: Mapping[str, Rate], n_bytes: int) -> Device:
    key, threads = device_key(where), threads_of(where)
    name = str(key.get("name", where.type))
    with_threads = f", {threads} threads" if threads else ""
    source = f"measured here: best of {bandwidth.n} reads of {n_bytes >> 20} MiB by {bandwidth.how}{with_threads}"
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        memory, cache = int(properties.total_memory), int(properties.L2_cache_size)
        sparse = properties.major >= 8
        factors = {dtype: 2.0 for dtype in flops if sparse and dtype != "float32"}
        return Device(
            HERE, name, bandwidth.best, _best(flops), factors, memory, source, (name,), "cuda", "measured", 0, cache
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cache = last_level_cache_bytes()
    return Device(
        HERE, name, bandwidth.best, _best(flops), {}, memory, source, (name,), "cpu", "measured", threads, cache,
        os.cpu_count() or 1,
    )  # fmt: skip


def _best(flops: Mapping[str, Rate]) -> dict[str, float]:
    return {dtype: rate.best for dtype, rate in flops.items()}


def _buffer_bytes(where: torch.device, least: int) -> int:
    if where.type == "cuda":
        cache, free = torch.cuda.get_device_properties(where).L2_cache_size, torch.cuda.mem_get_info(where)[0]
    else:
        cache, free = last_level_cache_bytes(), _free_bytes()
    return int(min(max(least, _CACHES * cache), _SHARE_OF_MEMORY * free))


def _free_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bandwidth(where: torch.device, n_bytes: int, rounds: int) -> Rate:
    """Several ways to go through a buffer once take turns; which is fastest depends on processor and threads."""
    n = max(2 * _COLUMNS, n_bytes // 4 // (2 * _COLUMNS) * (2 * _COLUMNS))
    buffer = torch.ones(n, device=where)
    first, second = buffer[: n // 2], buffer[n // 2 :]
    rows, column = buffer.view(-1, _COLUMNS), torch.ones(_COLUMNS, device=where)
    ways: dict[str, Callable[[], Any]] = {
        "sum": buffer.sum,
        "dot of two halves": lambda: torch.dot(first, second),
        "matrix times vector": lambda: torch.mv(rows, column),
        # Half is read and half is written.
        "copy of one half to the other": lambda: second.copy_(first),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(_WARM_UP + rounds):
        for name, run in ways.items():
            taken = _seconds(run, where)
            if i >= _WARM_UP:
                samples[name].append(buffer.nbytes / taken)
    return max((_rate(each, name) for name, each in samples.items()), key=lambda rate: rate.best)


def _products(where: torch.device, dtype: str, size: int, rounds: int) -> Rate | None:
    """Of square matrices of random values; None where torch has no product of such a type here."""
    if dtype == "int8":
        x = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=where)
        run: Callable[[], Any] = lambda: torch._int_mm(x, x)  # noqa: E731
    else:
        y = torch.randn(size, size, device=where).to(getattr(torch, dtype))
        run = lambda: y @ y  # noqa: E731
    try:
        for _ in range(_WARM_UP):
            run()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except RuntimeError:
        return None
    return _rate([2 * size**3 / _seconds(run, where) for _ in range(rounds)], f"products of {size} x {size}")


def _rate(samples: Sequence[float], how: str) -> Rate:
    return Rate(max(samples), statistics.median(samples), min(samples), len(samples), how)


def _seconds(run: Callable[[], Any], where: torch.device) -> float:
    if where.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    event: Any = torch.cuda.Event
    with torch.cuda.device(where):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
