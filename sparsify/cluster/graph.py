"""The tasks of a run and what each waits for; who does them, and what they are, is not known here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """A piece of work that any process of a job can do, since all it reads and writes lies in the job's folder.

    Attributes:
        name: unique in its graph; for people too.
        do: which handler does it (``cluster.job``).
        arguments: JSON values that it is called with.
        after: names of the tasks that must be done before.
        rank: of tasks that could begin, that of the lowest does.
    """

    name: str
    do: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    after: frozenset[str] = frozenset()
    rank: tuple[int, ...] = ()


class Graph:
    """Tasks in the order of what they wait for. A task can only wait for one that is known: there are no circles."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._tasks: dict[str, Task] = {}
        self._waiting: dict[str, set[str]] = {}
        self._done: set[str] = set()
        for task in tasks:
            self.add(task)

    def add(self, task: Task) -> None:
        """Take in a task.

        Raises:
            ValueError: its name is taken, or it waits for one that is not known.
        """
        if task.name in self._tasks:
            raise ValueError(f"task {task.name} is there already")
        unknown = sorted(task.after - self._tasks.keys())
        if unknown:
            raise ValueError(f"task {task.name} waits for {unknown[0]}, which is not known")
        self._tasks[task.name] = task
        self._waiting[task.name] = set(task.after - self._done)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    @property
    def left(self) -> int:
        """Tasks that are not done."""
        return len(self._tasks) - len(self._done)

    def ready(self) -> list[Task]:
        """What waits for nothing and was not taken, lowest rank first."""
        free = [self._tasks[name] for name, waiting in self._waiting.items() if not waiting]
        return sorted(free, key=lambda task: (task.rank, task.name))

    def take(self, task: Task) -> None:
        """``task``, one of ``ready``, has begun."""
        del self._waiting[task.name]

    def give_back(self, task: Task) -> None:
        """What was taken was not done: it is ready again."""
        self._waiting[task.name] = set()

    def finish(self, task: Task) -> None:
        """What was taken is done."""
        self._done.add(task.name)
        for waiting in self._waiting.values():
            waiting.discard(task.name)
