"""What a stage found, on which machine, with which code."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from provenance import commit

T = TypeVar("T")
WRONG, NOT_RUN = 1, 3
# Of what was packed; lies beside the folder with the packages.
MANIFEST = "manifest.json"
# Enough to try a case of which nothing is known.
_LEAST_S = 5.0


class Budget(ABC):
    """Time that is given, and what it is enough for.

    Args:
        seconds: from now on.

    Attributes:
        deadline: on the monotonic clock.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def affordable(
        self, cases: Iterable[tuple[str, T]], kind: Callable[[T], tuple[str, float]] = lambda case: ("", _LEAST_S)
    ) -> Iterator[tuple[str, T]]:
        """Those of ``cases`` that the budget is enough for, if each takes as long as the longest of its kind did.

        The others are noted as not run.

        Args:
            cases: their names first.
            kind: of a case, and the seconds that the first of the kind is expected to take.
        """
        longest: dict[str, float] = {}
        for what, case in cases:
            name, prior = kind(case)
            if self.left_s < longest.get(name, prior):
                self.unaffordable(what, f"the budget is spent: {self.left_s:.0f} s left")
                continue
            started = time.monotonic()
            yield what, case
            longest[name] = max(longest.get(name, _LEAST_S), time.monotonic() - started)

    def unaffordable(self, what: str, why: str) -> None:
        """Note that there is no time for ``what``."""
        self.not_run(what, why)

    @abstractmethod
    def not_run(self, what: str, why: str) -> None:
        """Note that ``what`` could not be tried."""


class Record(Budget):
    """What a stage has found so far, written again after every step."""

    def __init__(self, benchmark: str, options: argparse.Namespace, packages: tuple[str, ...]) -> None:
        super().__init__(options.budget_s)
        self.path: Path = options.out
        self.body: dict[str, Any] = {
            "benchmark": benchmark,
            **origin(),
            "environment": environment(options.device, packages),
            "arguments": {k: str(v) for k, v in vars(options).items() if k != "run"},
            "failed": [],
            "not_run": [],
            "logs": {},
        }

    def failed(self, what: str, why: str) -> None:
        """Note that ``what`` gave a wrong result or crashed."""
        self.body["failed"].append({"what": what, "why": why})
        print(f"WRONG   {what}: {why}", flush=True)

    def not_run(self, what: str, why: str) -> None:
        """Note that ``what`` could not be tried."""
        self.body["not_run"].append({"what": what, "why": why})
        print(f"NOT RUN {what}: {why}", flush=True)

    def write(self) -> None:
        """Write the record as it is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.body, indent=1) + "\n", encoding="utf-8")

    def close(self) -> int:
        """Write it for the last time; the exit status."""
        self.body["gpu_at_the_end"] = gpu_state()
        self.write()
        if self.body["failed"]:
            return WRONG
        return NOT_RUN if self.body["not_run"] else 0


def origin() -> dict[str, str | None]:
    """Which code runs: the commit of the checkout, and that of the package if it was packed."""
    import sparsify

    checkout = None
    with suppress(OSError, subprocess.CalledProcessError):  # a copy without history
        checkout = commit()
    manifest = Path(sparsify.__file__).parents[2] / MANIFEST
    packed = json.loads(manifest.read_text(encoding="utf-8")).get("commit") if manifest.exists() else None
    return {"commit": checkout or packed, "packed_commit": packed}


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None where it is not installed."""
    keys = [
        "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu", "pstate",
    ]  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(keys, (part.strip() for part in done.stdout.split(",")), strict=False))


def environment(device: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Hardware, and versions of Python and of ``packages``."""
    import torch

    from sparsify.manifest import versions

    found: dict[str, Any] = {
        "versions": versions(*packages),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": gpu_state(),
    }
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version(),
        }
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and number of ``values``."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
