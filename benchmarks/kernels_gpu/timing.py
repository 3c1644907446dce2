"""Variants of a product, timed in turn."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_machine.record import spread
from vllm_gpu.kernels import capture

if TYPE_CHECKING:
    import torch

    from kernels_gpu.layers import Variant

CLOCK = {
    "cuda": "CUDA events around the replay of a graph of several calls, over copies of the weight that together exceed "
    "the L2 cache three times; variants in turn",
    "cpu": "host clock around several calls; variants in turn",
}


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
    turns = itertools.cycle(copies)

    def run() -> Any:
        for _ in range(calls):
            result = next(turns)(x)
        return result

    if not on_gpu:
        run()
        return run
    graph, _ = capture(run)
    graph.replay()
    return graph.replay


def time_variants(
    variants: dict[str, Variant], x: torch.Tensor, samples: int, on_gpu: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """An entry per variant that is right, and why others are not: every product is compared with the dense one."""
    entries: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    ready: dict[str, Callable[[], Any]] = {}
    calls = max(4, *(len(variant.copies) for variant in variants.values()))
    wanted = variants["dense"].copies[-1](x).float()
    for name, variant in variants.items():
        try:
            error = float((variant.copies[-1](x).float() - wanted).norm() / wanted.norm())
            if not error <= variant.tolerance:
                raise ValueError(f"relative difference {error} from the dense product")
            ready[name] = several(variant.copies, x, calls, on_gpu)
        except Exception as error_:  # Triton's own errors have no common class
            failed[name] = f"{type(error_).__name__}: {str(error_).splitlines()[0] if str(error_) else ''}"
            continue
        entries[name] = {"bytes": variant.n_bytes, "error": error, "samples_us": []}
    for _ in range(samples):
        for name, run in ready.items():
            entries[name]["samples_us"].append(seconds(run, on_gpu) / calls * 1e6)
    for entry in entries.values():
        entry["us"] = spread(entry["samples_us"])
        entry["speedup"] = entries["dense"]["us"]["median"] / entry["us"]["median"] if "dense" in entries else None
    return entries, failed


def add_bandwidth(entries: dict[str, dict[str, Any]], n_bytes_besides: int, bytes_per_s: float) -> None:
    """What each read per second, as a share of the measured copy bandwidth."""
    for entry in entries.values():
        rate = (entry["bytes"] + n_bytes_besides) / (entry["us"]["median"] / 1e6)
        entry["share_of_copy_bandwidth"] = rate / bytes_per_s


def summary(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Geometric mean and extremes of the speed-ups of rows alike in ``keys``, for each variant."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        for name, entry in row["variants"].items():
            if name != "dense" and entry["speedup"]:
                groups.setdefault((*(row[key] for key in keys), name), []).append(entry["speedup"])
    return [
        {
            **dict(zip((*keys, "variant"), key, strict=True)), "geometric_mean": statistics.geometric_mean(values),
            "min": min(values), "max": max(values), "n": len(values),
        }
        for key, values in groups.items()
    ]  # fmt: skip
