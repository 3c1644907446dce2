"""Passes of the calibration text through one decoder block, for the statistics of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.errors import ModelError
from sparsify.hidden import Calls, HiddenStates
from sparsify.methods import Method
from sparsify.model import Skeleton
from sparsify.progress import Progress
from sparsify.stats import InputStats, Wanted
from sparsify.types import LinearSpec
from sparsify.watch import Collector, Tape, collect, keys, stream_places, watch


@dataclass(frozen=True)
class Streams:
    """The calibration set on its way through the blocks.

    Attributes:
        calls: how blocks are called.
        pruned: hidden states that enter the block being pruned, and the files for what leaves it.
        dense: the same in the dense model; None unless targets are dense, and the same files if blocks see those.
    """

    calls: Calls
    pruned: tuple[HiddenStates, HiddenStates]
    dense: tuple[HiddenStates, HiddenStates] | None = None

    @property
    def shards(self) -> range:
        """Numbers of the text's shards."""
        return range(len(self.pruned[0].shards))


class Passes:
    """What a run's blocks need of the text.

    Args:
        skeleton: the model; a block's weights are loaded while it is run.
        plan: the method.
        device: where blocks run.
        length: tokens of a window.
        progress: receives a step for every window.
        tell: receives notices, and their kinds.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Method,
        device: str,
        length: int,
        progress: Progress,
        tell: Callable[[str, str], None],
    ) -> None:
        self.skeleton, self.plan, self.device, self.length = skeleton, plan, device, length
        self.progress, self._tell = progress, tell
        self.wanted = Wanted(plan.needs_mean, plan.needs_gram, plan.aim != "own", plan.aim == "residual")

    def groups(
        self, block: nn.Module, index: int, specs: Sequence[LinearSpec], streams: Streams
    ) -> list[list[LinearSpec]]:
        """Linears whose statistics are taken together, in the order in which the block computes them."""
        if self.plan.order == "block":
            return [list(specs)]
        groups: dict[str, list[LinearSpec]] = {}
        for shared in self.sharing(block, index, specs, streams):
            # All experts' gates and ups, then all downs: one of each would be a pass over the text per expert.
            groups.setdefault(shared[0].parameter, []).extend(shared)
        called = {spec.name for group in groups.values() for spec in group}
        for spec in specs:
            if spec.name not in called:
                groups.setdefault(spec.parameter, []).append(spec)
        return list(groups.values())

    def sharing(
        self, block: nn.Module, index: int, specs: Sequence[LinearSpec], streams: Streams
    ) -> list[list[LinearSpec]]:
        """``specs`` that see tokens of the first window, by the input they share, in the order they are computed."""
        with collect(block, self.skeleton.prefix(index), specs) as collector:
            streams.calls.run(block, index, self._first(streams))
        return collector.order(specs)

    def places(self, block: nn.Module, index: int, specs: Sequence[LinearSpec], streams: Streams) -> dict[str, str]:
        """Where linears of the dense ``block`` add to the residual stream (``stream_places``); none if no one asks."""
        if self.plan.aim != "residual":
            return {}
        first = self._first(streams)
        found = stream_places(block, self.skeleton.prefix(index), specs, lambda: streams.calls.run(block, index, first))
        if not found:
            self._tell(
                "aim residual: this architecture adds no linear's output to the residual stream as it is; "
                "its aim is dense",
                "",
            )
        return found

    def _first(self, streams: Streams) -> torch.Tensor:
        return next(streams.pruned[0].windows(self.device))

    def collect(
        self,
        block: nn.Module,
        reference: nn.Module | None,
        index: int,
        specs: Sequence[LinearSpec],
        streams: Streams,
        places: Mapping[str, str],
        shards: Sequence[int],
        *,
        leave: bool = False,
    ) -> Collector:
        """Sums of the inputs of ``specs`` from one pass over the text, or over a part of it.

        Args:
            block: as far as it is pruned.
            reference: the dense block, where the aim is not ``own``.
            index: number of the block.
            specs: the linears.
            streams: what enters it.
            places: of the block (``places``).
            shards: of the text.
            leave: write what leaves the dense block to the second of ``streams.dense``.
        """
        places = {spec.parameter: places[spec.parameter] for spec in specs if spec.parameter in places}
        prefix, run = self.skeleton.prefix(index), streams.calls.run

        def ends(shard: int, windows: int) -> bool:
            """Whether the text does after so many windows of a shard."""
            return shard == streams.shards[-1] and windows == streams.pruned[0].shards[shard].layout.n_windows

        if reference is None:
            with collect(block, prefix, specs, self.wanted) as collector:
                for shard in shards:
                    for i, hidden in enumerate(streams.pruned[0].shards[shard].windows(self.device), 1):
                        with collector.window(whole=ends(shard, i)):
                            run(block, index, hidden)
                        self.progress.advance()
                    collector.end_of_shard()
            return collector
        tape = Tape(keys(specs))
        pair = streams.dense or streams.pruned
        with (
            watch(reference, prefix, specs, tape, places.values()),
            collect(block, prefix, specs, self.wanted, tape, places, self.length) as collector,
        ):

            def passes(shard: int) -> Iterator[torch.Tensor]:
                file, dense = streams.pruned[0].shards[shard], pair[0].shards[shard]
                windows = zip(file.windows(self.device), dense.windows(self.device), strict=True)
                for i, (hidden, entering) in enumerate(windows, 1):
                    tape.rewind()
                    whole, output = ends(shard, i), entering
                    # What leaves the block takes a complete pass, the inputs of its linears alone a shorter one.
                    with nullcontext() if leave else tape.window(whole=whole):
                        output = run(reference, index, entering)
                    with collector.window(whole=whole):
                        run(block, index, hidden)
                    self.progress.advance()
                    yield output

            for shard in shards:
                if leave:
                    pair[1].shards[shard].write(passes(shard))
                else:
                    for _ in passes(shard):
                        pass
                tape.rewind()
                collector.end_of_shard()
        return collector

    def check(
        self,
        index: int,
        specs: Sequence[LinearSpec],
        stats: Mapping[str, InputStats | None],
        n_tokens: Mapping[str, int] | None = None,
    ) -> None:
        """Look whether what was collected is what was asked for.

        Args:
            index: number of the block.
            specs: linears whose statistics were taken together.
            stats: of all of them, or of some.
            n_tokens: that reached each of them, by name; None: as ``stats`` has it.

        Raises:
            ModelError: a linear that is never called.
        """
        found = [entry for entry in stats.values() if entry is not None]
        n_tokens = n_tokens or {name: entry.n_tokens for name, entry in stats.items() if entry is not None}
        unseen = [spec for spec in specs if n_tokens[spec.name] == 0]
        # An expert may be routed to by no token; a module, or all experts at once, cannot.
        seen = {spec.parameter for spec in specs if n_tokens[spec.name]}
        for spec in unseen:
            if spec.parameter not in seen:
                raise ModelError(
                    f"{spec.name}: its module is never called, so its inputs cannot be seen; "
                    f"pass --exclude '{spec.name}' or --method magnitude"
                )
        if unseen:
            notice = (
                f"{len({spec.expert for spec in unseen})} experts of block {index} saw no calibration token; "
                "their inputs count as equal (use more calibration text)"
            )
            self._tell(notice, f"unseen in {index}, {unseen[0].parameter}")
        if self.wanted.drift and any(entry.drift is None and entry.n_tokens for entry in found):
            self._tell(
                f"aim {self.plan.aim}: experts are given other tokens in the dense model; their aim is own",
                "aim of experts",
            )
