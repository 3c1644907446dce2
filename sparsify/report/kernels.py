"""Products of single linears: every kernel against the best dense one, and the roof of each."""

from __future__ import annotations

from statistics import median
from typing import Any

from sparsify.bench.engaged import runs_sparse
from sparsify.bench.records import Record, Records
from sparsify.bench.spread import median_interval

_KEYS = (
    "artifact", "device", "linear", "linears", "shape", "pattern", "density", "dtype", "tokens", "threads",
    "best_dense", "auto", "cold", "graphs",
)  # fmt: skip


def rows(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each kernel record; ``shown`` names what auto runs, or the fastest sparse kernel where that is dense.

    There is no run of the best dense kernel against itself, so that ratios have an interval and make no claim.
    """
    found = []
    for record in records.of("kernel"):
        each = [_kernel(record, name) for name in record["kernels"]]
        sparse = sorted((entry for entry in each if not entry["dense"]), key=lambda entry: entry["median_us"])
        auto = next((entry for entry in sparse if entry["kernel"] == record["auto"]), None)
        shown = auto or (sparse[0] if sparse else None)
        found.append(
            {
                "run": numbers[record["run"]],
                **{key: record[key] for key in _KEYS},
                "kernels": each,
                "shown": shown and shown["kernel"],
                "roof_speedup": _roof(record, shown["kernel"]) if shown else None,
                "from": [records.source(record)],
            }
        )
    return found


def _kernel(record: Record, name: str) -> dict[str, Any]:
    times, dense = record["kernels"][name], record["kernels"].get(record["best_dense"])
    samples, roof = times["samples_us"], times["roof_us"]
    return {
        "kernel": name,
        "dense": name == record["best_dense"] or not runs_sparse(name),
        "median_us": times["median_us"],
        "min_us": min(samples),
        "max_us": max(samples),
        "n": len(samples),
        "roof_us": roof,
        "limited_by": times["limited_by"],
        "roof_fraction": None if roof is None else roof / times["median_us"],
        "speedup": _speedup(samples, dense["samples_us"]) if dense and name != record["best_dense"] else None,
    }


def _speedup(samples: list[float], dense: list[float]) -> dict[str, Any]:
    """Best dense time / time: paired where each round has both, else of the medians."""
    if len(samples) != len(dense):
        return {"ratio": median(dense) / median(samples), "low": None, "high": None, "n": min(len(samples), len(dense))}
    ratios = [base / other for base, other in zip(dense, samples, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    return {"ratio": median(ratios), "low": low, "high": high, "n": len(ratios)}


def _roof(record: Record, name: str) -> float | None:
    """What the kernel would gain over the best dense one if both reached their roofs."""
    dense, roof = record["kernels"].get(record["best_dense"]), record["kernels"][name]["roof_us"]
    return dense["roof_us"] / roof if dense and dense["roof_us"] and roof else None
