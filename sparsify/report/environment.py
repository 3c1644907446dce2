"""The environment of a run in words."""

from __future__ import annotations

from typing import Any

from sparsify.bench.report import size
from sparsify.report.wording import figure


def facts(run: dict[str, Any]) -> dict[str, str]:
    """What is known about where and how a run measured: name -> value, in order; unknown values say so."""
    environment = run["environment"]
    host = environment["host"]
    known = {
        "began": run["time"],
        "finished": f"after {run['seconds']:,.0f} s, {run['failed']} failed" if run["finished"] else "no: it broke off",
        "command": " ".join(run["command"]),
        "rounds": f"{run['rounds']} after {run['warm_up']} to warm up, seed {run['seed']}",
        "processor": f"{host['processor']}, {host['cores']} cores",
        "last-level cache": size(host["last_level_cache_bytes"]) if "last_level_cache_bytes" in host else "unknown",
        "memory": size(host["memory_bytes"]),
        "system": host["system"],
        "threads": _or_unknown(host["threads"]),
        "OMP_WAIT_POLICY": host["wait_policy"],
        "clock governor": _or_unknown(host["governor"]),
        "load (1 minute)": f"{_or_unknown(host['load_1m'])} before, {_or_unknown(run['load_1m'])} after",
    }
    gpu = environment["gpu"]
    known["GPU"] = _pairs(gpu) if gpu else "none"
    if run["gpu"]:
        known["GPU after"] = _pairs(run["gpu"])
    known["versions"] = _pairs(environment["versions"])
    for ceiling in run["ceilings"]:
        flops = "".join(f", {figure(value / 1e12)} TFLOP/s {dtype}" for dtype, value in ceiling["flops"].items())
        known[f"roof of {ceiling['device']}"] = (
            f"{figure(ceiling['bytes_per_s'] / 1e9)} GB/s{flops} ({ceiling['how']}: {ceiling['source']})"
        )
    return known


def _or_unknown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
