"""The tasks of a graph, given out to workers as they become free; a worker that dies costs the task it had, no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, Protocol

from sparsify.cluster.graph import Graph, Task
from sparsify.errors import SparsifyError, WorkerError

# Workers that may die over one task: what it asks for may be what kills them.
_ATTEMPTS = 3
# Between signs of life where nothing happens.
_WAIT_S = 5.0

Event = Callable[[dict[str, Any]], None]
Begun = Callable[[Task, str], None]
Told = Callable[[str, dict[str, Any]], None]
Done = Callable[[Task, Mapping[str, Any], str], None]


class Worker(Protocol):
    """Does tasks one at a time, in another process mostly.

    Attributes:
        name: which it is, for people.
    """

    name: str

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        """Do ``task`` and return its answer; ``event`` receives ``advance`` (steps) and ``notice`` (text) on the way.

        Raises:
            WorkerError: the worker is gone.
            SparsifyError: what the task met.
        """
        ...

    def close(self) -> None:
        """End it, whatever it does."""
        ...


class Here:
    """This process as a worker.

    Args:
        handlers: what does the tasks, by ``Task.do``.
    """

    name = "this process"

    def __init__(self, handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
        self._handlers = handlers

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        """As ``Worker``; progress is reported by the handlers themselves."""
        return self._handlers[task.do](**task.arguments)

    def close(self) -> None:
        """Nothing: it goes on."""


def work_alone(graph: Graph, worker: Worker, begun: Begun, done: Done, told: Told) -> None:
    """Do all of ``graph`` with one worker in this thread, the lowest rank first; arguments as of ``Crew``.

    Raises:
        SparsifyError: what a task met; ``done`` was called for those before it.
    """
    while graph.left:
        task = graph.ready()[0]
        graph.take(task)
        begun(task, worker.name)
        done(task, worker.ask(task, partial(told, worker.name)), worker.name)
        graph.finish(task)


class Crew:
    """Several workers. Leaving the context ends them.

    Args:
        hire: for each place, what starts the worker there; called again where one is gone.
        begun: told of a task and the worker that begins it, in that worker's thread.
        lost: told of the task that a worker died over, the worker, why, how many did, and whether it is tried again.
        waits: called every few seconds while nothing happens.
    """

    def __init__(
        self,
        hire: Sequence[Callable[[], Worker]],
        begun: Begun = lambda *_: None,
        lost: Callable[[Task, str, SparsifyError, int, bool], None] = lambda *_: None,
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        self._hire, self._begun, self._lost, self._waits = hire, begun, lost, waits
        self._workers: dict[int, Worker] = {}
        self._lock, self._closed = Lock(), False

    def __enter__(self) -> Crew:
        return self

    def __len__(self) -> int:
        return len(self._hire)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; what they do fails."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
            self._workers.clear()
        for worker in workers:
            with suppress(SparsifyError, OSError):
                worker.close()

    def work(self, graph: Graph, done: Done, told: Told) -> None:
        """Do all of ``graph``.

        After an error nothing new begins; what is under way is awaited, and ``done`` called for it, so that no work is
        lost that a later run could take up.

        Args:
            graph: the tasks.
            done: called in this thread for each task, with its answer and its worker's name.
            told: what a worker (by its name) says on the way; called in its thread, one at a time.

        Raises:
            WorkerError: a task that several workers died over.
            SparsifyError: what a task met first.
        """
        free: list[int] = list(range(len(self._hire)))
        failed: SparsifyError | None = None
        running: dict[Future[tuple[dict[str, Any], str]], tuple[Task, int]] = {}
        attempts: dict[str, int] = {}
        one = Lock()

        def tell(worker: str, what: dict[str, Any]) -> None:
            with one:
                told(worker, what)

        with ThreadPoolExecutor(len(self._hire)) as threads:
            try:
                while running or (graph.left and failed is None):
                    for task in graph.ready() if failed is None else []:
                        if not free:
                            break
                        graph.take(task)
                        place = free.pop(0)
                        running[threads.submit(self._do, place, task, tell)] = task, place
                    self._waits()
                    for future in wait(running, timeout=_WAIT_S, return_when=FIRST_COMPLETED).done:
                        task, place = running.pop(future)
                        free.append(place)
                        try:
                            answer, name = future.result()
                        except WorkerError as error:
                            attempts[task.name] = attempts.get(task.name, 0) + 1
                            again = attempts[task.name] < _ATTEMPTS and failed is None
                            self._lost(task, f"worker {place + 1}", error, attempts[task.name], again)
                            if again:
                                graph.give_back(task)
                            else:
                                failed = failed or WorkerError(
                                    f"{task.name}: {_ATTEMPTS} workers died over it, the last so: {error}; where "
                                    "memory ran out, use fewer --workers or less calibration text (--windows)"
                                )
                        except SparsifyError as error:
                            failed = failed or error
                        else:
                            done(task, answer, name)
                            graph.finish(task)
            except BaseException:
                # Threads wait for workers that may need hours.
                self.close()
                raise
        if failed is not None:
            raise failed

    def _do(self, place: int, task: Task, tell: Told) -> tuple[dict[str, Any], str]:
        with self._lock:
            worker = self._workers.get(place)
        if worker is None:
            worker = self._hire[place]()
            with self._lock:
                if self._closed:
                    worker.close()
                    raise WorkerError("closed")
                self._workers[place] = worker
        self._begun(task, worker.name)
        try:
            return worker.ask(task, partial(tell, worker.name)), worker.name
        except WorkerError:
            with self._lock:
                self._workers.pop(place, None)
            with suppress(SparsifyError, OSError):
                worker.close()
            raise
