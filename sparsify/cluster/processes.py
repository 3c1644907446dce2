"""Workers that are processes of this machine, one for each GPU or for some of the cores."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from sparsify.cluster.crew import Event
from sparsify.cluster.graph import Task
from sparsify.cluster.job import Job
from sparsify.errors import UsageError, WorkerError
from sparsify.workers import WorkerProcess

_MODULE = "sparsify.cluster.worker"


class Process:
    """A worker in a process of its own, which ends when this process does.

    Args:
        name: of it, for people.
        job: whose tasks it does.
        device: where it runs blocks.
    """

    def __init__(self, name: str, job: Job, device: str) -> None:
        self.name, self._job, self._device = name, job, device
        self._process = WorkerProcess(
            name,
            _MODULE,
            python=sys.executable,
            variables={"OMP_NUM_THREADS": str(job.threads)},
            timeout_s=None,
            gone=WorkerError,
            why=_last_line,
            makes_output=True,
        )

    def ready(self) -> None:
        """As ``Worker``."""
        self._process.ask("open", job=asdict(self._job), device=self._device)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        """As ``Worker``."""
        for found in self._process.ask_all("task", name=task.do, arguments=dict(task.arguments)):
            if "answer" in found:
                answer: dict[str, Any] = found["answer"]
            else:
                event(found)
        return answer

    def kill(self) -> None:
        """As ``Worker``: what it writes appears whole or not at all."""
        self._process.kill()

    def close(self) -> None:
        """As ``Worker``."""
        self._process.kill()
        self._process.close()


def devices(device: str, workers: int) -> list[str]:
    """The device of each of so many workers: a GPU each where ``device`` is ``cuda``.

    Raises:
        UsageError: there are fewer GPUs.
    """
    if device != "cuda":
        return [device] * workers
    import torch

    n = torch.cuda.device_count()
    if workers > n:
        raise UsageError(f"--workers {workers}: there are {n} GPUs, and each worker needs one")
    return [f"cuda:{i}" for i in range(workers)]


def _last_line(text: str) -> str | None:
    """What an interpreter that ended by an exception printed last."""
    return text.strip().splitlines()[-1][:300] if text.strip() else None
