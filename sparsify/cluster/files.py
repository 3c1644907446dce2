"""Names of the files that a run makes in its folder beside the checkpoint, and what can be told from them."""

from __future__ import annotations

from collections.abc import Iterable

from sparsify.hidden import shards_of
from sparsify.recipe import Recipe

# Hidden states that enter a block: of the pruned model, and of the dense one where targets or inputs are dense. Each
# shard of the text has a file, ``<name>.<shard>``.
PRUNED, DENSE = "hidden.{}", "dense.{}"
# Of a block that several processes prune: sums of a group's inputs over a shard, and solved linears.
SUMS, PART = "sums.{}.{}.{}", "part.{}.{}"
# Orders of inputs found in a block, until they are put into one file.
ORDERS = "orders.{}"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
# What matches these is of no more use once the checkpoint is whole.
PIECES = ("sums.*.*.*", "part.*.*", "matrix.*.tmp")
PASSING = ("hidden.*.*", "dense.*.*", "*.tmp", *PIECES)


def streams_of(recipe: Recipe) -> list[str]:
    """Names of the files of hidden states, with the number of the block that they enter left open."""
    plan = recipe.plan
    if not plan.needs_data:
        return []
    if plan.inputs == "dense":
        return [DENSE]
    return [PRUNED] if plan.aim == "own" else [PRUNED, DENSE]


def hidden_names(recipe: Recipe, block: int, n_windows: int) -> set[str]:
    """Files of what enters a block."""
    shards = range(len(shards_of(n_windows)))
    return {f"{each.format(block)}.{shard}" for each in streams_of(recipe) for shard in shards}


def entered_of(recipe: Recipe, hidden: Iterable[str], n_windows: int) -> set[int]:
    """Blocks of which all inputs are among the files ``hidden``, for a text of ``n_windows`` windows."""
    names = set(hidden)
    blocks = {int(number) for name in names if (number := name.split(".")[1]).isdecimal()}
    return {block for block in blocks if hidden_names(recipe, block, n_windows) <= names}
