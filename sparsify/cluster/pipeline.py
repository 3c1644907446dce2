"""The graph of a run whose blocks see what the pruned ones before them put out, for several workers.

Blocks come one after the other, shard by shard: the sums of a block over a shard begin when the block before has put
that shard out. Which linears a block computes one after the other is seen when it is looked at, so its tasks, and the
look at the next block, are added then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsify.cluster.graph import Graph, Task
from sparsify.cluster.plan import prune_task


@dataclass
class Gathered:
    """What the tasks of a block have answered so far.

    Attributes:
        linears: records, as they came.
        seconds: by step, over all processes.
        workers: that had a part in it, by name.
        peak_memory_bytes: of the largest of their processes.
    """

    linears: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)
    peak_memory_bytes: int = 0

    def add(self, answer: Mapping[str, Any], worker: str) -> None:
        """Take in the answer of one task."""
        self.linears += answer.get("linears", [])
        for step, seconds in answer["seconds"].items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        self.workers.add(worker)
        self.peak_memory_bytes = max(self.peak_memory_bytes, answer["peak_memory_bytes"])


@dataclass
class Pipeline:
    """Adds the tasks of a run to its graph.

    Attributes:
        graph: of the run.
        n_blocks: of the model.
        last: the last block with anything to prune; those behind it are copied.
        chosen: for each block, whether it has anything to prune.
        n_shards: of the text.
        dense: whether the dense model's hidden states go along.
        done: blocks that are in their shards of the checkpoint.
        entered: blocks whose inputs are there.
    """

    graph: Graph
    n_blocks: int
    last: int
    chosen: Sequence[bool]
    n_shards: int
    dense: bool
    done: Collection[int]
    entered: Collection[int]
    # Of each group, the units that are not solved.
    _open: dict[tuple[int, int], int] = field(default_factory=dict)
    # Of each shard, the tasks that make what enters the next block; and what puts the last block into its shard.
    _makers: list[set[str]] = field(default_factory=list)
    _before: str = ""

    def start(self) -> None:
        """Add what can be said before a block was looked at.

        Raises:
            ValueError: inputs of a block are not there, and nothing makes them.
        """
        for block in range(self.last + 1, self.n_blocks):
            if block not in self.done:
                self.graph.add(prune_task(block, leave=False))
        self._makers = [set() for _ in range(self.n_shards)]
        self._go_on(0)

    def _go_on(self, first: int) -> None:
        """Add blocks from ``first`` to the next that has to be looked at."""
        for block in range(first, self.last + 1):
            if block in self.done:
                continue
            if block in self.entered:
                self._makers = [set() for _ in range(self.n_shards)]
            elif not any(self._makers):
                raise ValueError(f"inputs of block {block} are missing")
            if self.chosen[block]:
                # Only how it is called and what shares an input is seen, so any shard will do.
                self.graph.add(self._task("look", block, (0,), after=self._makers[0]))
                return
            task = prune_task(block, leave=self._leaves(block), after=set().union(*self._makers, self._after()))
            self.graph.add(task)
            self._makers, self._before = [{task.name} for _ in range(self.n_shards)], task.name

    def looked(self, block: int, groups: Sequence[Sequence[Sequence[str]]], places: Mapping[str, str]) -> None:
        """A block was looked at: add its tasks, and the look at the next.

        Args:
            block: its number.
            groups: its groups of units of linears, by name.
            places: of it (``block.Course``).
        """
        leaves, solved = self._leaves(block), [f"look {block}"]
        parts: list[int] = []
        dense: list[set[str]] = [set() for _ in range(self.n_shards)]
        for group, units in enumerate(groups):
            names = [name for unit in units for name in unit]
            whole = self.dense and leaves and group == len(groups) - 1
            sums = []
            for shard in range(self.n_shards):
                task = self._task(
                    "sum", block, (1, group, 0, shard),
                    after={*solved, *self._makers[shard]}, group=group, names=names, shard=shard, places=dict(places),
                    parts=list(parts), leave=whole,
                )  # fmt: skip
                self.graph.add(task)
                sums.append(task.name)
                if whole:
                    dense[shard].add(task.name)
            before, solved = list(parts), []
            self._open[block, group] = len(units)
            for unit in units:
                task = self._task(
                    "solve", block, (1, group, 1, len(parts)),
                    after=sums, group=group, names=names, unit=list(unit), part=len(parts), parts=before,
                )  # fmt: skip
                self.graph.add(task)
                solved.append(task.name)
                parts.append(len(parts))
        written = set(solved)
        if leaves:
            self._makers = dense
            for shard in range(self.n_shards):
                # No block is begun before the one before the last is written, whose files are in the way till then.
                after = {*solved, *self._after()}
                task = self._task("leave", block, (2, shard), after=after, shard=shard, parts=list(parts))
                self.graph.add(task)
                self._makers[shard].add(task.name)
            written |= set().union(*self._makers)
        # Last, and in the order of the blocks: what is written is never done again, and takes its inputs with it.
        task = self._task("write", block, (3,), after=written | self._after(), parts=list(parts))
        self.graph.add(task)
        self._before = task.name
        self._go_on(block + 1)

    def solved(self, block: int, group: int) -> bool:
        """A unit of a group is solved; whether it was the last, so that nobody reads the group's sums any more."""
        self._open[block, group] -= 1
        return not self._open[block, group]

    def _leaves(self, block: int) -> bool:
        """Whether anything waits for what leaves a block."""
        return block + 1 not in self.entered and block < self.last

    def _after(self) -> set[str]:
        return {self._before} - {""}

    def _task(self, do: str, block: int, rank: tuple[int, ...], after: Collection[str] = (), **arguments: Any) -> Task:
        number = "".join(f" {arguments[key]}" for key in ("group", "part", "shard") if key in arguments)
        return Task(f"{do} {block}{number}", do, {"block": block, **arguments}, frozenset(after), (0, block, *rank))
