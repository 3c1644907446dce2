"""The tasks of a block that several processes prune: sums over a shard of the text, linears, and what leaves it.

Blocks that see what pruned ones put out come one after the other; within one, shards and linears are independent. Each
task loads the block and puts into it what is solved already, which lies in files of the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparsify.checkpoint import write_permutations, write_shard
from sparsify.cluster.files import ORDERS, PART, SHARD, SUMS
from sparsify.cluster.job import Bench
from sparsify.errors import ModelError
from sparsify.hidden import HiddenFile, file_crc32
from sparsify.journal import Stopwatch
from sparsify.model import weight_view
from sparsify.offload import offloaded
from sparsify.passes import Streams
from sparsify.sum_files import SumFiles, write_sums
from sparsify.types import LinearSpec

Answer = dict[str, Any]

# What a part holds of a linear: its weight as computed with; the order of its inputs that was folded into the block, or
# recorded.
_WEIGHT, _FOLDED, _RECORDED = "weight:", "folded:", "recorded:"


def handlers_of(bench: Bench) -> Mapping[str, Callable[..., Answer]]:
    """What does the tasks of a job, by ``Task.do``."""
    pieces = Pieces(bench)

    def within(task: Callable[..., Answer]) -> Callable[..., Answer]:
        def run(**arguments: Any) -> Answer:
            with offloaded(bench.folder if bench.job.offload else None):
                return task(**arguments)

        return run

    tasks: dict[str, Callable[..., Answer]] = {
        "forward": bench.forward,
        "prune": bench.prune,
        "look": pieces.look,
        "sum": pieces.sum,
        "solve": pieces.solve,
        "leave": pieces.leave,
        "write": pieces.write,
    }
    return {do: within(task) for do, task in tasks.items()}


class Pieces:
    """Does such tasks; each answers what ``Bench.answer`` does, and more where it says so.

    Args:
        bench: of the job.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @torch.inference_mode()
    def look(self, block: int) -> Answer:
        """See how a block is pruned: ``groups``, each of units of names; and ``places`` (``block.Course``)."""
        clock = Stopwatch()
        streams, module = self._load(block, (), clock)
        self._bench.binding.read_ahead(block + 1)
        with clock("statistics"):
            course = self._bench.pruner.course(module, block, self._bench.chosen[block], streams)
        self._bench.unload(module)
        groups = [[[spec.name for spec in unit] for unit in group] for group in course.groups]
        return {"groups": groups, "places": course.places, **self._bench.answer(clock)}

    @torch.inference_mode()
    def sum(
        self,
        block: int,
        group: int,
        names: Sequence[str],
        shard: int,
        places: Mapping[str, str],
        parts: Sequence[int],
        leave: bool,
    ) -> Answer:
        """Sum the inputs of a group of linears over a shard of the text.

        Args:
            block: its number.
            group: its number in the block.
            names: of its linears.
            shard: of the text.
            places: of the block (``Passes.places``).
            parts: of the block that are solved.
            leave: also write what leaves the dense block.
        """
        bench, clock, specs = self._bench, Stopwatch(), self._specs(block, names)
        streams, module = self._load(block, (), clock)
        reference = deepcopy(module) if bench.recipe.plan.aim != "own" else None
        self._apply(block, parts)
        with clock("statistics"):
            collector = bench.pruner.passes.collect(
                module, reference, block, specs, streams, places, [shard], leave=leave
            )
            write_sums(self._file(SUMS, block, group, shard), collector.inputs())
        bench.unload(module)
        written = [streams.dense[1].shards[shard]] if leave and streams.dense else []
        return bench.answer(clock, written)

    @torch.inference_mode()
    def solve(
        self, block: int, group: int, names: Sequence[str], unit: Sequence[str], part: int, parts: Sequence[int]
    ) -> Answer:
        """Prune linears of a block into a part of it.

        Args:
            block: its number.
            group: that their statistics were taken with, and
            names: of the group's linears.
            unit: names of those to prune.
            part: its number.
            parts: of the block that were solved before.

        Returns:
            also ``linears`` (records).
        """
        bench, clock = self._bench, Stopwatch()
        specs, pruner = self._specs(block, unit), bench.pruner
        streams, module = self._load(block, parts, clock)
        with clock("statistics"):
            sums = SumFiles([self._file(SUMS, block, group, shard) for shard in streams.shards])
            stats = sums.statistics(specs, pruner.passes.wanted, bench.device)
            whole = self._specs(block, names)
            pruner.passes.check(block, whole, stats, {spec.name: sums.n_tokens(spec) for spec in whole})
        with clock("solve"):
            rows, orders = pruner.solve(block, specs, {spec.name: stats.pop(spec.name) for spec in specs})
        folded = {row.name for row in rows if row.permuted == "folded"}
        model = bench.skeleton.model
        tensors = {f"{_WEIGHT}{s.name}": weight_view(model.get_parameter(s.parameter), s).cpu() for s in specs}
        for name, perm in orders.items():
            tensors[f"{_FOLDED if name in folded else _RECORDED}{name}"] = perm.int().cpu()
        with clock("write"):
            write_shard(self._file(PART, block, part), tensors)
        bench.unload(module)
        return {"linears": [asdict(row) for row in rows], **bench.answer(clock)}

    @torch.inference_mode()
    def leave(self, block: int, shard: int, parts: Sequence[int]) -> Answer:
        """Write what leaves the pruned block for a shard of the text."""
        bench, clock = self._bench, Stopwatch()
        streams, module = self._load(block, parts, clock)
        with clock("outputs"):
            written: HiddenFile = bench.leave_shard(module, block, streams, streams.pruned, shard)
        bench.unload(module)
        return bench.answer(clock, [written])

    @torch.inference_mode()
    def write(self, block: int, parts: Sequence[int]) -> Answer:
        """Put the parts of a block together in its shard; also answers ``file``, ``bytes``, ``orders``."""
        bench, clock = self._bench, Stopwatch()
        _, module = self._load(block, (), clock)
        orders = self._apply(block, parts)
        path = bench.folder / ORDERS.format(block)
        if orders:
            write_permutations(path, orders)
        shard = bench.folder / SHARD.format(block + 1, bench.job.n_shards)
        with clock("write"):
            write_shard(shard, bench.binding.stored_form(block))
        bench.unload(module)
        return {
            "file": shard.name,
            "bytes": shard.stat().st_size,
            "orders": {"file": path.name, "crc32": file_crc32(path)} if orders else None,
            **bench.answer(clock),
        }

    def _specs(self, block: int, names: Sequence[str]) -> list[LinearSpec]:
        of = {spec.name: spec for spec in self._bench.chosen[block]}
        return [of[name] for name in names]

    def _file(self, name: str, *numbers: int) -> Path:
        return self._bench.folder / name.format(*numbers)

    def _load(self, block: int, parts: Sequence[int], clock: Stopwatch) -> tuple[Streams, nn.Module]:
        bench = self._bench
        # First: seeing how blocks are called ends with the whole model unloaded.
        streams = bench.streams(block)
        assert streams is not None
        with clock("load"):
            module = bench.binding.load_block(block, bench.dtype, bench.device)
            self._apply(block, parts)
        return streams, module

    def _apply(self, block: int, parts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Put solved linears into the loaded block; returns the orders of inputs that were found, by linear name."""
        orders: dict[str, torch.Tensor] = {}
        bench = self._bench
        for part in parts:
            path = self._file(PART, block, part)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: not readable ({error}); run the command again") from None
            specs = [spec for spec in bench.chosen[block] if f"{_WEIGHT}{spec.name}" in tensors]
            for spec in specs:
                for kind in (_FOLDED, _RECORDED):
                    perm = tensors.get(f"{kind}{spec.name}")
                    if perm is not None:
                        orders[spec.name] = perm.long()
                        if kind == _FOLDED:
                            bench.pruner.reorder.again(block, spec, perm.long())
            # Last: weights of a part are in the order that all of its folding has left them in.
            for spec in specs:
                weight = weight_view(bench.skeleton.model.get_parameter(spec.parameter), spec)
                weight.copy_(tensors[f"{_WEIGHT}{spec.name}"])
        return orders
