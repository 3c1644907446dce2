"""Variants of a product, timed in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_machine.record import spread
from gpu_machine.timing import host_us, seconds, several

if TYPE_CHECKING:
    import torch

    from kernels_gpu.layers import Variant

CLOCK = {
    "cuda": "CUDA events around the replay of a graph of several calls, over copies of the weight that together exceed "
    "the L2 cache three times; variants in turn",
    "cpu": "host clock around several calls; variants in turn",
}
RATES = {"cusparselt": 2.0, "cutlass": 2.0, "dense_fp8": 2.0, "cusparselt_fp8": 4.0}


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
    if on_gpu:
        for name, entry in entries.items():
            entry["host_us"] = host_us(variants[name].copies[0], x)
    return entries, failed


def add_bound(
    entries: dict[str, dict[str, Any]], shape: tuple[int, int], tokens: int, ceilings: dict[str, float]
) -> None:
    """The time below which none can be, by what is measured of the machine.

    The larger of bytes over copy bandwidth and operations over the rate of a dense bfloat16 product; RATES says by
    how much the tensor cores are faster than that, as the datasheet claims.
    """
    for name, entry in entries.items():
        n_bytes = entry["bytes"] + 2 * tokens * sum(shape)
        rate = RATES.get(name, 1.0) * ceilings["dense_flops"]
        entry["bound_us"] = 1e6 * max(n_bytes / ceilings["bytes_per_s"], 2 * tokens * math.prod(shape) / rate)


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
