"""The graph of a run: which blocks wait for which, and who makes what enters them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from sparsify.cluster.graph import Graph, Task

# What a block's statistics are taken on: nothing, or what blocks of the dense or of the pruned model put out.
Inputs = Literal["none", "dense", "pruned"]


def run_graph(
    n_blocks: int, last: int, *, done: Collection[int], entered: Collection[int], inputs: Inputs, ahead: int
) -> Graph:
    """What is left to do.

    Args:
        n_blocks: blocks of the model.
        last: the last with anything to prune; those behind it are copied.
        done: blocks that are in their shards.
        entered: blocks whose inputs are there.
        inputs: what blocks need.
        ahead: by how many blocks the dense model's forward pass may be before the first that is not pruned, in tasks of
            its own, where blocks see dense inputs and several workers prune them; 0: the task that prunes a block also
            writes what leaves it.

    Returns:
        tasks ``prune`` (``block``, ``leave``) for every block that is not done, and ``forward`` (``block``).

    Raises:
        ValueError: inputs of a block are not there, and nothing makes them.
    """
    left = [block for block in range(n_blocks) if block not in done]
    if inputs == "none":
        return Graph(prune_task(block, leave=False) for block in left)
    needy = {block for block in left if block <= last}
    end, frontier = max(needy, default=-1), max(entered, default=-1)
    graph, maker = Graph(), dict.fromkeys(entered, "")
    for block in range(n_blocks):
        carries = frontier <= block < end
        after = {maker[block]} - {""} if block in maker else None
        # What a pruned block puts out is written when it is pruned, and never again.
        lost = carries and block + 1 not in maker and block not in needy and inputs == "pruned"
        if lost or (after is None and (block in needy or carries)):
            raise ValueError(f"inputs of block {block + lost} are missing")
        if block in needy:
            leave = carries and not ahead
            task = prune_task(block, leave=leave, after=after or ())
            graph.add(task)
            if leave:
                maker[block + 1] = task.name
        elif block in left:
            graph.add(prune_task(block, leave=False))
        if carries and block + 1 not in maker:
            room = {_name(before) for before in range(block - max(ahead, 1) + 1) if before in needy}
            task = Task(f"forward {block}", "forward", {"block": block}, frozenset((after or set()) | room), (0, block))
            graph.add(task)
            maker[block + 1] = task.name
    return graph


def inputs_wanted(last: int, *, done: Collection[int], entered: Collection[int]) -> set[int]:
    """Those of ``entered`` that a task of ``run_graph`` reads or would read again."""
    needy = {block for block in range(last + 1) if block not in done}
    frontier = max(entered, default=-1)
    return {block for block in entered if block in needy or (block == frontier and any(n > block for n in needy))}


def _name(block: int) -> str:
    return f"prune {block}"


def prune_task(block: int, *, leave: bool, after: Collection[str] = ()) -> Task:
    """The task that prunes a block by itself, and where it ``leave``s something writes that too."""
    return Task(_name(block), "prune", {"block": block, "leave": leave}, frozenset(after), (1, block))
