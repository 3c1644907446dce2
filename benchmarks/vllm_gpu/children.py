"""Processes of their own, for what may crash or poison a CUDA context, and what they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gpu.engine import ask_engine, time_engine
from vllm_gpu.format import check_format
from vllm_gpu.kernels import check_kernel
from vllm_gpu.record import Record

# Each yields what it finds as it goes.
TASKS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "format": check_format,
    "kernel": check_kernel,
    "ask": ask_engine,
    "time": time_engine,
}


@dataclass(frozen=True)
class Outcome:
    """Of a task in a process of its own.

    Attributes:
        found: what it yielded, also where it crashed afterwards.
        why: the reason it failed or had nothing to say, or "".
        engaged: what the plugin reported of its engine, linears that run alike in one row.
        log: everything that it printed.
    """

    found: list[dict[str, Any]]
    why: str
    engaged: list[dict[str, Any]]
    log: str


def run_child(
    record: Record, what: str, task: str, arguments: dict[str, Any], folder: Path, timeout_s: float
) -> Outcome:
    """Run ``task`` in a process of its own, and end all that it started.

    Where it crashes, has to be stopped or gives no answer, the record says so, and what it printed last.
    """
    from sparsify.plugins.engaged import FOLDER
    from sparsify.runtimes.vllm_settings import cause

    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=f"{task}-"))
    (scratch / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
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
    log = scratch / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(own), "child", task, str(scratch)], env=variables, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        status = None
        try:
            status = process.wait(max(timeout_s, 1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            # An engine may have processes of its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    answer = scratch / "answer"
    # The last line of a process that was killed may be half a line.
    lines = answer.read_text(encoding="utf-8").split("\n")[:-1] if answer.exists() else []
    engaged = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((scratch / "engaged").glob("*.json"))]
    text = log.read_text(encoding="utf-8", errors="replace")
    why = "" if lines else "no answer"
    if status is None:
        why = f"not finished after {timeout_s:.0f} s"
    elif status:
        why = f"exit status {status}: {cause(text)}"
    if why:
        note = record.not_run if status is None else record.failed
        note(what, why)
        record.body["logs"][what] = text.splitlines()[-40:]
    return Outcome([json.loads(line) for line in lines], why, _rows(engaged), text)


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


def child(task: str, scratch: Path) -> None:
    """Run a task; what it yields is written at once, a line each."""
    arguments = json.loads((scratch / "arguments.json").read_text(encoding="utf-8"))
    with (scratch / "answer").open("w", encoding="utf-8") as file:
        for found in TASKS[task](arguments):
            file.write(json.dumps(found) + "\n")
            file.flush()
