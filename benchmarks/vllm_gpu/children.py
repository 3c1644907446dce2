"""Processes of their own, for what may crash or poison a CUDA context, and what they do."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_machine.children import Done, Task, run_process, scratch_folder

from vllm_gpu.engine import ask_engine, time_engine
from vllm_gpu.format import check_format
from vllm_gpu.kernels import check_kernel
from vllm_gpu.record import Record

TASKS: dict[str, Task] = {
    "format": check_format,
    "kernel": check_kernel,
    "ask": ask_engine,
    "time": time_engine,
}


@dataclass(frozen=True)
class Outcome(Done):
    """Of a task with an engine, perhaps.

    Attributes:
        engaged: what the plugin reported of its engine, linears that run alike in one row.
    """

    engaged: list[dict[str, Any]]


def run_child(
    record: Record, what: str, task: str, arguments: dict[str, Any], folder: Path, timeout_s: float
) -> Outcome:
    """Run ``task`` in a process of its own, and end all that it started.

    Where it crashes, has to be stopped or gives no answer, the record says so, and what it printed last.
    """
    from sparsify.plugins.engaged import FOLDER

    scratch = scratch_folder(folder, task)
    (scratch / "engaged").mkdir()
    own = Path(__file__).parent
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "cache"),
        # The sampler asks for flashinfer otherwise, which is not packed.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    # An engine's own processes look for the probe.
    paths = filter(None, [str(own.parent), os.environ.get("PYTHONPATH")])
    variables = {
        **defaults,
        **os.environ,
        FOLDER: str(scratch / "engaged"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if arguments.get("in_process"):
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = run_process(record, what, task, arguments, scratch, timeout_s, tool=own, variables=variables)
    engaged = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((scratch / "engaged").glob("*.json"))]
    return Outcome(done.found, done.why, done.log, _rows(engaged))


def _rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    linears = [linear for record in records for linear in record["linears"].values()]
    keys = ("kernel", "pattern", "reason")
    counts = Counter(tuple(linear[key] for key in keys) for linear in linears)
    rows = []
    for values, n in sorted(counts.items()):
        alike = [linear for linear in linears if tuple(linear[key] for key in keys) == values]
        sums = {key: sum(linear[key] for linear in alike) for key in ("dense_bytes", "resident_bytes")}
        rows.append({**dict(zip(keys, values, strict=True)), "linears": n, **sums})
    return rows
