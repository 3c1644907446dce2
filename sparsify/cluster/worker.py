"""A process that does tasks of one job: ``python -m sparsify.cluster.worker FD``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsify.cluster.job import Bench, Job
from sparsify.workers import Handlers, Say, serve


class Told:
    """A ``sparsify.progress.Progress`` that passes on what happens, ``advance`` and ``notice``."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def stage(self, name: str, total: int) -> None:
        """Nothing: stages are the driver's."""

    def advance(self, steps: int = 1) -> None:
        """Pass on."""
        self._say(advance=steps)

    def notice(self, text: str) -> None:
        """Pass on."""
        self._say(notice=text)


def handlers(say: Say) -> Handlers:
    """``open`` a job, then do its tasks."""
    benches: list[Bench] = []

    def open_(job: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
        benches[:] = [Bench(Job(**job), Told(say), device=device)]
        yield {"open": True}

    def forward(block: int) -> Iterator[dict[str, Any]]:
        yield {"answer": benches[0].forward(block)}

    def prune(block: int, leave: bool) -> Iterator[dict[str, Any]]:
        yield {"answer": benches[0].prune(block, leave)}

    return {"open": open_, "forward": forward, "prune": prune}


if __name__ == "__main__":
    serve(handlers)
