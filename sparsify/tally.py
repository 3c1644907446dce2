"""What the driver of a run has heard so far: stages, blocks, workers and failed tasks, as a snapshot of any moment."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from sparsify.memory import peak_memory_bytes
from sparsify.metrics import Blocks, Snapshot, Stage, Worker

# Blocks whose median is the usual time of one.
_LAST = 8


class Tally:
    """Counts along; pure but for the clock and the process's own peak memory.

    Args:
        clock: seconds since 1970.
        model, method, pattern: of the run.
    """

    def __init__(self, clock: Callable[[], float], model: str, method: str, pattern: str) -> None:
        self._clock = clock
        self._now = Snapshot(0.0, clock(), model=model, method=method, pattern=pattern)
        self._stages: dict[str, Stage] = {}
        self._workers: dict[str, Worker] = {}
        self._weights: list[int] = []
        self._begun: dict[int, float] = {}
        self._finished: set[int] = set()
        self._took: deque[float] = deque(maxlen=_LAST)

    def snapshot(self, state: str = "running") -> Snapshot:
        """The run now, in ``state``."""
        blocks = self._now.blocks
        return replace(
            self._now,
            time=self._clock(),
            state=state,
            stages=tuple(self._stages.values()),
            blocks=blocks and replace(blocks, begun=tuple(self._begun.values())),
            workers=tuple(self._workers.values()),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def stage(self, name: str, total: int) -> None:
        """A stage begins; those before it are over."""
        # The same name again is a stage of its own, and the current one.
        self._stages.pop(name, None)
        self._stages = {other: replace(stage, done=stage.total) for other, stage in self._stages.items()}
        self._stages[name] = Stage(name, total, 0, 0, self._clock())

    def advance(self, steps: int, skipped: int) -> None:
        """``steps`` of the stage are done, ``skipped`` of them by an earlier process."""
        if self._stages:
            name, stage = next(reversed(self._stages.items()))
            self._stages[name] = replace(stage, done=stage.done + steps, skipped=stage.skipped + skipped)

    def blocks(self, total: int, done: Collection[int], weights: Sequence[int] | None) -> None:
        """Work on the blocks begins; see ``Journal.blocks``."""
        now = self._clock()
        self._weights = list(weights) if weights is not None and any(weights) else [1] * total
        self._finished = set(done)
        left = sum(weight for index, weight in enumerate(self._weights) if index not in self._finished)
        self._now = replace(self._now, blocks=Blocks(total, len(done), len(done), now, now, 0, left))

    def block(self, index: int, seconds: Mapping[str, float]) -> float:
        """A block is finished; returns the seconds from its beginning to its end."""
        now, blocks = self._clock(), self._now.blocks
        if blocks is None or index in self._finished:
            raise ValueError(f"block {index} is finished twice, or before the blocks were begun")
        # A driver that does not say when it begins a block began this one when the last was finished.
        took = now - self._begun.pop(index, blocks.last)
        self._finished.add(index)
        self._took.append(took)
        weights = self._weights[index]
        blocks = replace(
            blocks,
            done=blocks.done + 1,
            last=now,
            weights_here=blocks.weights_here + weights,
            weights_left=blocks.weights_left - weights,
            usual_s=statistics.median(self._took),
        )
        block_s = dict(self._now.block_s)
        for step, value in seconds.items():
            block_s[step] = block_s.get(step, 0.0) + value
        self._now = replace(self._now, blocks=blocks, block_s=block_s)
        return took

    def worker(self, name: str, doing: str | None, block: int | None, peak: int | None) -> bool:
        """A worker was heard of; returns whether it began a task."""
        now, before = self._clock(), self._workers.get(name)
        since = now
        if before is not None:
            if before.alive and (before.doing, before.block) == (doing, block):
                since = before.since
            peak = max((each for each in (peak, before.peak_memory_bytes) if each is not None), default=None)
        self._workers[name] = Worker(name, doing, block, since, now, True, peak)
        if block is not None and doing is not None and block not in self._finished:
            self._begun.setdefault(block, now)
        return doing is not None and since == now

    def seen(self, name: str) -> None:
        """A worker was heard of, and does what it did."""
        now = self._clock()
        before = self._workers.get(name, Worker(name, None, None, now, now))
        self._workers[name] = replace(before, seen=now, alive=True)

    def lost(self, name: str) -> Worker:
        """A worker is gone; returns what was last known of it."""
        now = self._clock()
        before = self._workers.get(name, Worker(name, None, None, now, now))
        self._workers[name] = replace(before, doing=None, block=None, since=now, alive=False)
        return before

    def task(self, retried: bool) -> None:
        """A task failed."""
        failed, again = self._now.tasks_failed + 1, self._now.tasks_retried + int(retried)
        self._now = replace(self._now, tasks_failed=failed, tasks_retried=again)
