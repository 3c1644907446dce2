"""Measures the table of this device: dense and packed products of every kind, in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsify.kernels import native
from sparsify.kernels.table import Table, device_key, merged, threads_of
from sparsify.kernels.tuning_cpu import shape_on_cpu, wanted_bytes
from sparsify.kernels.tuning_gpu import shape_on_gpu
from sparsify.kernels.tuning_request import Request, check
from sparsify.progress import Progress, Silent


def tune(
    request: Request, progress: Progress | None = None, measured: Callable[[Table], None] = lambda table: None
) -> Table:
    """Measure ``request``.

    Args:
        request: see ``check``.
        progress: a step for each shape, type of inputs and number of tokens.
        measured: called with the table so far after each shape.

    Raises:
        UsageError: see ``check``.
    """
    check(request)
    progress = progress or Silent()
    kinds = list(request.kinds())
    progress.stage("measuring", len(kinds) * len(request.shapes) * len(request.tokens))
    table = Table(device_key(request.device), threads_of(request.device), _versions(), _run(request), ())
    measure = shape_on_cpu if request.device.type == "cpu" else shape_on_gpu
    for shape in request.shapes:
        for x, weights in kinds:
            table = merged(table, replace(table, entries=tuple(measure(request, shape, x, weights, progress))))
        measured(table)
    return table


def _versions() -> dict[str, str]:
    from sparsify import __version__

    return {"sparsify": __version__, "torch": torch.__version__}


def _run(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": request.rounds, "date": time.strftime("%Y-%m-%d")}
    if request.device.type == "cpu":
        found |= {
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
            "pool": Path(native.pool()).name,
            "bytes": wanted_bytes(request),
        }
    return found
