"""A process that does tasks of one job: ``python -m sparsify.cluster.worker FD``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sparsify.cluster.beats import beating
from sparsify.cluster.job import Bench, Job
from sparsify.cluster.pieces import handlers_of
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
    """``open`` a job, then do its ``task``s."""
    known: dict[str, Callable[..., dict[str, Any]]] = {}

    def open_(job: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
        known.update(handlers_of(Bench(Job(**job), Told(say), device=device)))
        yield {"open": True}

    def task(name: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with beating(say):
            answer = known[name](**arguments)
        yield {"answer": answer}

    return {"open": open_, "task": task}


if __name__ == "__main__":
    serve(handlers)
