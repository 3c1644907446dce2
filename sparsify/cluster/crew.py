"""The tasks of a graph, given out to workers as they become free; a worker that dies costs the task it had, no more.

Only who is there is given a task: where nobody can be had any more, as for the machine that a cluster has lost, nothing
waits but that place. One that shows no sign of life for long (``beats``) is ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, Protocol

from sparsify.cluster.beats import SILENT_S, beating
from sparsify.cluster.graph import Graph, Task
from sparsify.errors import SparsifyError, WorkerError

# Workers that may die over one task, as what it asks for may be what kills them; and that may fail to come to a place.
_ATTEMPTS = 3
# Between signs of life where nothing happens.
_WAIT_S = 5.0

Event = Callable[[dict[str, Any]], None]
Begun = Callable[[Task, str], None]
Told = Callable[[str, dict[str, Any]], None]
Done = Callable[[Task, Mapping[str, Any], str], None]
Failed = Callable[[Task, str, SparsifyError], None]


class Worker(Protocol):
    """Does tasks one at a time, in another process mostly. To make one takes no time.

    Attributes:
        name: which it is, for people; the final one once it is ready.
    """

    name: str

    def ready(self) -> None:
        """Return when it can do tasks; another thread may ``close`` it meanwhile.

        Raises:
            WorkerError: it is gone, or there is no room for it.
            SparsifyError: what it met.
        """
        ...

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        """Do ``task`` and return its answer.

        On the way ``event`` receives ``advance`` (steps), ``notice`` (text), or neither as a sign of life.

        Raises:
            WorkerError: the worker is gone.
            SparsifyError: what the task met.
        """
        ...

    def kill(self) -> None:
        """End it, whatever it does; called from another thread, where ``ask`` then raises ``WorkerError``."""
        ...

    def close(self) -> None:
        """End it, and free what it had here."""
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
        with beating(lambda: event({})):
            return self._handlers[task.do](**task.arguments)


def work_alone(
    graph: Graph, worker: Here, begun: Begun, done: Done, told: Told, failed: Failed = lambda *_: None
) -> None:
    """Do all of ``graph`` with one worker in this thread, the lowest rank first; arguments as of ``Crew``.

    Raises:
        SparsifyError: what a task met; ``done`` was called for those before it.
    """
    while graph.left:
        task = graph.ready()[0]
        graph.take(task)
        begun(task, worker.name)
        try:
            answer = worker.ask(task, partial(told, worker.name))
        except SparsifyError as error:
            failed(task, worker.name, error)
            raise
        done(task, answer, worker.name)
        graph.finish(task)


class Crew:
    """Several workers. Leaving the context ends them.

    Args:
        hire: for each place, what starts the worker there; called again where one is gone.
        begun: told of a task and the worker that begins it, in that worker's thread.
        lost: told of a task that a worker died over, or that one did not come for; of the worker, why, how many did,
            and whether it is tried again.
        waits: called every few seconds while nothing happens.
        failed: told of a task that met an error which another worker would meet too; of the worker and the error.
    """

    def __init__(
        self,
        hire: Sequence[Callable[[], Worker]],
        begun: Begun = lambda *_: None,
        lost: Callable[[Task, str, SparsifyError, int, bool], None] = lambda *_: None,
        waits: Callable[[], None] = lambda: None,
        failed: Failed = lambda *_: None,
    ) -> None:
        self._hire, self._begun, self._lost, self._waits, self._failed = hire, begun, lost, waits, failed
        # Those at work, at leisure and on their way.
        self._workers: dict[int, Worker] = {}
        self._free: list[int] = []
        self._coming: dict[Future[Any], tuple[int, Task]] = {}
        # Workers in a row that did not come.
        self._refused = [0] * len(hire)
        # Seconds without a sign of life from those at work.
        self._silence = [0.0] * len(hire)
        self._lock, self._closed = Lock(), False
        # Not of one call of ``work``: a process may be told to end with the thread that started it.
        self._threads = ThreadPoolExecutor(len(hire))

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
        self._threads.shutdown()

    def work(self, graph: Graph, done: Done, told: Told) -> None:
        """Do all of ``graph``.

        After an error nothing new begins; what is under way is awaited, and ``done`` called for it, so that no work is
        lost that a later run could take up.

        Args:
            graph: the tasks.
            done: called in this thread for each task, with its answer and its worker's name.
            told: what a worker (by its name) says on the way; called in its thread, one at a time.

        Raises:
            WorkerError: a task that several workers died over, or that none came for.
            SparsifyError: what a task met first.
        """
        failed: SparsifyError | None = None
        running: dict[Future[Any], tuple[Task, int, Worker]] = {}
        attempts: dict[str, int] = {}
        one = Lock()

        def tell(worker: str, what: dict[str, Any]) -> None:
            with one:
                told(worker, what)

        try:
            while running or (graph.left and failed is None):
                waiting = graph.ready() if failed is None else []
                while waiting and self._free:
                    task, place = waiting.pop(0), self._free.pop(0)
                    graph.take(task)
                    worker = self._workers[place]
                    self._silence[place] = 0.0
                    running[self._threads.submit(self._do, place, worker, task, tell)] = task, place, worker
                self._call(waiting)
                self._waits()
                began = time.monotonic()
                ended = wait({*running, *self._coming}, timeout=_WAIT_S, return_when=FIRST_COMPLETED).done
                # No more than was waited for: this process may have been stopped together with its workers.
                waited = min(time.monotonic() - began, _WAIT_S)
                self._give_up([(place, worker) for _, place, worker in running.values()], waited)
                for future in ended:
                    if future in self._coming:
                        refusal = self._come(future)
                        failed = failed or refusal
                        continue
                    task, place, worker = running.pop(future)
                    try:
                        answer = future.result()
                    except WorkerError as met:
                        error = self._why(place, worker, met)
                        self._leave(place, worker)
                        attempts[task.name] = attempts.get(task.name, 0) + 1
                        again = attempts[task.name] < _ATTEMPTS and failed is None
                        self._lost(task, worker.name, error, attempts[task.name], again)
                        if again:
                            graph.give_back(task)
                        else:
                            failed = failed or WorkerError(
                                f"{task.name}: {_ATTEMPTS} workers died over it, the last so: {error}; where "
                                "memory ran out, use fewer --workers or less calibration text (--windows)"
                            )
                    except SparsifyError as error:
                        self._free.append(place)
                        self._failed(task, worker.name, error)
                        failed = failed or error
                    else:
                        self._free.append(place)
                        done(task, answer, worker.name)
                        graph.finish(task)
        except BaseException:
            # Threads wait for workers that may need hours.
            self.close()
            raise
        if failed is not None:
            raise failed

    def _do(self, place: int, worker: Worker, task: Task, tell: Told) -> dict[str, Any]:
        def heard(what: dict[str, Any]) -> None:
            self._silence[place] = 0.0
            tell(worker.name, what)

        self._begun(task, worker.name)
        return worker.ask(task, heard)

    def _give_up(self, working: Sequence[tuple[int, Worker]], waited: float) -> None:
        """End those at work that nothing was heard of for long."""
        for place, worker in working:
            self._silence[place] += waited
            if self._silence[place] > SILENT_S:
                with suppress(SparsifyError, OSError):
                    worker.kill()

    def _why(self, place: int, worker: Worker, error: WorkerError) -> WorkerError:
        if self._silence[place] <= SILENT_S:
            return error
        return WorkerError(f"{worker.name}: it showed no sign of life for {SILENT_S:g} s and was ended")

    def _call(self, tasks: Sequence[Task]) -> None:
        """Have workers come for ``tasks`` where there are none, besides those that are on their way."""
        coming = {place for place, _ in self._coming.values()}
        empty = [place for place in range(len(self)) if place not in self._workers and place not in coming]
        # Where nobody came several times nobody will.
        empty = [place for place in empty if self._refused[place] < _ATTEMPTS]
        for place, task in zip(empty, tasks[len(coming) :], strict=False):
            self._coming[self._threads.submit(self._start, place)] = place, task

    def _start(self, place: int) -> None:
        worker = self._hire[place]()
        with self._lock:
            closed = self._closed
            if not closed:
                self._workers[place] = worker
        if closed:
            worker.close()
            raise WorkerError("closed")
        worker.ready()

    def _come(self, future: Future[Any]) -> SparsifyError | None:
        """A worker is there, or is not; returns what ends the run."""
        place, task = self._coming.pop(future)
        try:
            future.result()
        except SparsifyError as error:
            if place in self._workers:
                self._leave(place, self._workers[place])
            if not isinstance(error, WorkerError):
                return error
            self._refused[place] += 1
            hope = bool(self._workers or self._coming or min(self._refused) < _ATTEMPTS)
            self._lost(task, f"worker {place + 1}", error, self._refused[place], hope)
            return None if hope else WorkerError(f"{task.name}: no worker can be had for it, the last said: {error}")
        self._refused[place] = 0
        self._free.append(place)
        return None

    def _leave(self, place: int, worker: Worker) -> None:
        """A worker is gone."""
        with self._lock:
            self._workers.pop(place, None)
        with suppress(SparsifyError, OSError):
            worker.close()
