"""What a process needs to know to do any task of a pruning run, and the tasks themselves.

All that is large lies in the run's staging folder, which every process sees; what tasks are given and answer are small
JSON values. A task writes files under names of its own and changes nothing else, so that one whose process died can be
done again by another, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.block import BlockPruner
from sparsify.checkpoint import read_permutations, write_permutations, write_shard
from sparsify.cluster.files import DENSE, ORDERS, PRUNED, SHARD, streams_of
from sparsify.cluster.plan import Inputs
from sparsify.couplings import in_stream_order
from sparsify.errors import OutputError
from sparsify.format.reader import open_checkpoint
from sparsify.hidden import Calls, HiddenFile, HiddenStates, Layout, enter, file_crc32
from sparsify.journal import Stopwatch
from sparsify.memory import peak_device_bytes, peak_memory_bytes, return_freed_memory, return_large_frees
from sparsify.model import Skeleton, load_skeleton
from sparsify.naming import Binding
from sparsify.passes import Streams
from sparsify.progress import Progress
from sparsify.recipe import Recipe, from_mapping
from sparsify.types import LinearSpec, Pattern, PrunedLinear, Unstructured


@dataclass(frozen=True)
class Job:
    """A run, as JSON values.

    Attributes:
        folder: where its files are made.
        source: folder of the dense model.
        recipe: how to prune (``Recipe.to_dict``).
        allocation: linear name -> sparsity, where one was allocated.
        residual: file with the order of the residual stream; None where it stays as it is.
        shape: calibration windows and tokens of each; None where the method needs no text.
        first: tokens of the first window, from which it is seen how blocks are called.
        n_shards: files of the checkpoint.
        device: where blocks run.
        threads: of each process; sums depend on their number.
        trust_remote_code: let the model's own code load.
        offload: matrices that are large lie in files (``sparsify.offload``).
    """

    folder: str
    source: str
    recipe: dict[str, Any]
    allocation: dict[str, str] | None
    residual: str | None
    shape: tuple[int, int] | None
    first: list[int]
    n_shards: int
    device: str
    threads: int
    trust_remote_code: bool
    offload: bool


class Bench:
    """Does the tasks of one job in this process.

    Args:
        job: what for.
        progress: receives a step for every window and linear, and notices.
        binding: of the job's model, where it was opened already.
        device: instead of the job's, such as one GPU of several.
    """

    def __init__(
        self, job: Job, progress: Progress, *, binding: Binding | None = None, device: str | None = None
    ) -> None:
        self.job, self.progress = job, progress
        self.folder, self.device = Path(job.folder), device or job.device
        if not self.folder.is_dir():
            raise OutputError(f"{self.folder}: a worker does not see it; choose an --out that all machines share")
        return_large_frees()
        torch.set_num_threads(job.threads)
        self.recipe = from_mapping(job.recipe, job.folder)
        if binding is None:
            skeleton = load_skeleton(Path(job.source), trust_remote_code=job.trust_remote_code)
            binding = Binding(open_checkpoint(Path(job.source)), skeleton)
        self.binding = binding
        self.patterns = patterns_of(self.recipe, self.skeleton, job.allocation)
        if job.residual is not None:
            perm = read_permutations(self.folder / job.residual)["residual"]
            binding.reorder = partial(in_stream_order, self.skeleton, perm)
        self.chosen, self.last = chosen_of(self.skeleton, self.patterns)
        self._calls: Calls | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The model without weights."""
        return self.binding.skeleton

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the forward passes."""
        dtype: torch.dtype = getattr(torch, self.recipe.compute_dtype)
        return dtype

    @cached_property
    def pruner(self) -> BlockPruner:
        """Of this job's blocks."""
        return BlockPruner(
            self.skeleton,
            self.recipe.plan,
            self.patterns,
            self.binding.stored_dtypes(),
            seed=self.recipe.seed,
            length=self.job.shape[1] if self.job.shape else 1,
            device=self.device,
            progress=self.progress,
        )

    def enter(self, ids: torch.Tensor) -> dict[str, Any]:
        """Write what enters the first block for ids [windows, length]; returns files and their CRC-32."""
        names = [each.format(0) for each in streams_of(self.recipe)]
        paths = [self.folder / name for name in names]
        self._calls, made = enter(self.binding, ids, paths, self.dtype, self.device)
        return {"hidden": {file.path.name: file.crc32 for states in made for file in states.shards}}

    def forward(self, block: int) -> dict[str, Any]:
        """Run a dense block on its inputs, and write what leaves it."""
        clock = Stopwatch()
        with torch.inference_mode():
            streams = self.streams(block)
            assert streams is not None
            assert streams.dense is not None
            with clock("load"):
                module = self.binding.load_block(block, self.dtype, self.device)
            with clock("outputs"):
                self._leave(module, block, streams, streams.dense)
            self.unload(module)
        return self.answer(clock, streams.dense[1].shards)

    def prune(self, block: int, leave: bool) -> dict[str, Any]:
        """Prune a block into its shard.

        Args:
            block: its number.
            leave: also write what leaves it.

        Returns:
            ``file``, ``bytes``, ``linears`` (records), ``orders`` (file and CRC-32, or None); and as ``forward``
            ``hidden`` (files of what left it, with their CRC-32), ``seconds`` by step, ``peak_memory_bytes`` and
            ``peak_device_bytes`` of the process.
        """
        with torch.inference_mode():
            return self._prune(block, leave)

    def _prune(self, index: int, leave: bool) -> dict[str, Any]:
        specs, plan, clock = self.chosen[index], self.recipe.plan, Stopwatch()
        # First: seeing how blocks are called ends with the whole model unloaded.
        streams = self.streams(index) if index <= self.last else None
        with clock("load"):
            module = self.binding.load_block(index, self.dtype, self.device)
            self.binding.read_ahead(index + 1)
        written: list[HiddenFile] = []
        dense = streams.dense if streams is not None and leave else None
        # Where the method runs the dense block anyway, the pruner writes what leaves it on its way.
        along = dense is not None and bool(specs) and plan.aim != "own"
        if streams is not None and dense is not None:
            written += dense[1].shards
            if not along:
                with clock("outputs"):
                    self._leave(module, index, streams, dense)
        rows: list[PrunedLinear] = []
        orders: dict[str, torch.Tensor] = {}
        if specs:
            rows, orders = self.pruner.prune(module, index, specs, streams, clock, write_dense=along)
        part = self.folder / ORDERS.format(index)
        if orders:
            write_permutations(part, orders)
        shard = self.folder / SHARD.format(index + 1, self.job.n_shards)
        stored = self.binding.stored_form(index)

        def write() -> None:
            with clock("write"):
                write_shard(shard, stored)

        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write)
            if streams is not None and leave and plan.inputs == "pruned":
                with clock("outputs"):
                    self._leave(module, index, streams, streams.pruned)
                written += streams.pruned[1].shards
            writing.result()
        self.unload(module)
        return {
            "file": shard.name,
            "bytes": shard.stat().st_size,
            "linears": [asdict(row) for row in rows],
            "orders": {"file": part.name, "crc32": file_crc32(part)} if orders else None,
            **self.answer(clock, written),
        }

    def answer(self, clock: Stopwatch, written: Sequence[HiddenFile] = ()) -> dict[str, Any]:
        """What every task answers: ``hidden``, ``seconds``, and peaks of memory (see ``prune``)."""
        return {
            "hidden": {file.path.name: file.crc32 for file in written},
            "seconds": clock.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_bytes": peak_device_bytes(self.device),
        }

    def steps(self, do: str, block: int, leave: bool = False) -> int:
        """Steps that a task reports: its linears are solved; windows run for statistics and for outputs; it is over."""
        n_windows, plan, specs = self.job.shape[0] if self.job.shape else 0, self.recipe.plan, self.chosen[block]
        if do == "forward":
            return n_windows
        # By group, nearly every architecture has four: before attention, its output, before the MLP, its output.
        passes = (4 if plan.order == "group" else 1) if specs and block <= self.last else 0
        # Dense outputs come out of the last of the passes, if there are any.
        outputs = (len(streams_of(self.recipe)) - (plan.aim != "own" and bool(specs))) if leave else 0
        return 1 + n_windows * (passes + outputs) + (len(specs) if n_windows else 0)

    def streams(self, index: int) -> Streams | None:
        """What enters block ``index``, and the files for what leaves it."""
        if self.job.shape is None:
            return None
        if self._calls is None:
            # How blocks are called is seen by running what is before them.
            ids = torch.tensor([self.job.first])
            self._calls, _ = enter(self.binding, ids, [], self.dtype, self.device)
        layout = Layout(*self.job.shape, self._calls.width, self.dtype)
        pairs = {
            name: (
                HiddenStates(self.folder / name.format(index), layout),
                HiddenStates(self.folder / name.format(index + 1), layout),
            )
            for name in streams_of(self.recipe)
        }
        first = next(iter(pairs.values()))
        return Streams(self._calls, pairs.get(PRUNED, first), pairs.get(DENSE))

    def _leave(self, module: nn.Module, index: int, streams: Streams, pair: tuple[HiddenStates, HiddenStates]) -> None:
        for shard in streams.shards:
            self.leave_shard(module, index, streams, pair, shard)

    def leave_shard(
        self,
        module: nn.Module,
        index: int,
        streams: Streams,
        pair: tuple[HiddenStates, HiddenStates],
        shard: int,
    ) -> HiddenFile:
        """Run a block on a shard of what enters it, and write what leaves it."""

        def windows() -> Iterator[torch.Tensor]:
            for hidden in pair[0].shards[shard].windows(self.device):
                yield streams.calls.run(module, index, hidden)
                self.progress.advance()

        file = pair[1].shards[shard]
        file.write(windows())
        return file

    def unload(self, module: nn.Module) -> None:
        """Free a block's weights."""
        self.binding.unload(module)
        return_freed_memory()


def patterns_of(recipe: Recipe, skeleton: Skeleton, allocation: dict[str, str] | None) -> dict[str, Pattern]:
    """Linear name -> pattern, with the sparsities that were allocated."""
    patterns = recipe.assign([spec for block in skeleton.linears for spec in block])
    base = recipe.parsed
    for name, text in (allocation or {}).items():
        assert isinstance(base, Unstructured)
        patterns[name] = Unstructured(Fraction(text), base.group)
    return patterns


def chosen_of(skeleton: Skeleton, patterns: dict[str, Pattern]) -> tuple[list[list[LinearSpec]], int]:
    """The linears of each block that are pruned, and the last block with any: what leaves it feeds none of them."""
    chosen = [[spec for spec in block if spec.name in patterns] for block in skeleton.linears]
    return chosen, max(index for index, specs in enumerate(chosen) if specs)


def inputs_of(recipe: Recipe) -> Inputs:
    """What a block's statistics are taken on."""
    plan = recipe.plan
    if not plan.needs_data:
        return "none"
    return "dense" if plan.inputs == "dense" else "pruned"
