"""A process that holds one artifact in one runtime: the other end of ``sparsify.bench.worker``."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify import workers
from sparsify.errors import MeasurementError


class WorkerProcess(workers.WorkerProcess):
    """See ``sparsify.workers.WorkerProcess``; what ends it is a measurement that failed."""

    def __init__(self, name: str, *, python: str, variables: Mapping[str, str], timeout_s: float) -> None:
        super().__init__(
            name,
            "sparsify.bench.worker",
            python=python,
            variables=variables,
            timeout_s=timeout_s,
            gone=MeasurementError,
            why=_reason,
        )


def _reason(text: str) -> str | None:
    from sparsify.runtimes.vllm_settings import cause

    return cause(text)
