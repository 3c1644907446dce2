"""Pruning of one loaded decoder block: passes over the calibration text, then its linears, group by group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from sparsify.errors import ModelError, NumericsError
from sparsify.grams import Grams
from sparsify.hidden import Calls, HiddenFile
from sparsify.journal import Stopwatch
from sparsify.layer import Outcome, prune_layer, seed_of, target
from sparsify.methods import Method
from sparsify.model import Skeleton, weight_view
from sparsify.permute import inverse
from sparsify.progress import Progress
from sparsify.reorder import Reorder
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.stats import InputStats, Wanted
from sparsify.types import LinearSpec, NofM, Pattern, PrunedLinear
from sparsify.watch import Tape, collect, keys, stream_places, watch


@dataclass(frozen=True)
class Streams:
    """The calibration set on its way through the blocks.

    Attributes:
        calls: how blocks are called.
        pruned: hidden states that enter the block being pruned, and the file for what leaves it.
        dense: the same in the dense model; None unless targets are dense, and the same files if blocks see those.
    """

    calls: Calls
    pruned: tuple[HiddenFile, HiddenFile]
    dense: tuple[HiddenFile, HiddenFile] | None = None


class BlockPruner:
    """Prunes the blocks of one run, one at a time.

    Args:
        skeleton: the model; a block's weights are loaded while it is pruned.
        plan: the method.
        patterns: linear name -> pattern.
        dtypes: parameter name -> dtype it is stored in, to which weights are rounded before anything is computed
            with them.
        seed: of the run.
        length: tokens of a window.
        device: where statistics are taken and problems solved.
        progress: receives a step for every window and linear, and notices.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Method,
        patterns: dict[str, Pattern],
        dtypes: dict[str, torch.dtype],
        *,
        seed: int,
        length: int,
        device: str,
        progress: Progress,
    ) -> None:
        self.skeleton = skeleton
        self.plan = plan
        self.patterns = patterns
        self.dtypes = dtypes
        self.seed = seed
        self.length = length
        self.device = device
        self.progress = progress
        self._told: set[str] = set()
        self.reorder = Reorder(skeleton, plan, patterns, seed, self._tell)

    def prune(
        self,
        block: nn.Module,
        index: int,
        specs: list[LinearSpec],
        streams: Streams | None,
        clock: Stopwatch,
        *,
        write_dense: bool = False,
    ) -> tuple[list[PrunedLinear], dict[str, torch.Tensor]]:
        """Prune ``specs`` of ``block`` in place.

        Args:
            block: with its weights loaded.
            index: its number.
            specs: its linears that are pruned, one at least.
            streams: what enters it; None where the method needs no text.
            clock: counts the time of ``statistics`` and ``solve``.
            write_dense: write what leaves the dense block to the second of ``streams.dense``, in the last pass that
                runs it anyway (of a method whose aim is not ``own``).

        Returns:
            one record each, in their order; and the order of inputs [in] of those that were reordered.

        Raises:
            ModelError: a linear that is never called.
            NumericsError: NaN or Inf in activations, or a Gram matrix that stays singular.
        """
        if streams is None:
            with clock("solve"):
                return self._prune_group(index, specs, {spec.name: None for spec in specs})
        # Dense weights are needed beside the pruned ones as long as later groups are compared with them.
        reference = deepcopy(block) if self.plan.aim != "own" else None
        places: dict[str, str] = {}
        if self.plan.aim == "residual":
            first = next(streams.pruned[0].windows(self.device))
            places = stream_places(
                block, self.skeleton.prefix(index), specs, lambda: streams.calls.run(block, index, first)
            )
            if not places:
                self._tell(
                    "aim residual: this architecture adds no linear's output to the residual stream as it is; "
                    "its aim is dense"
                )
        rows: list[PrunedLinear] = []
        orders: dict[str, torch.Tensor] = {}
        groups = self._groups(block, index, specs, streams)
        for group in groups:
            leaving = streams.dense[1] if write_dense and streams.dense and group is groups[-1] else None
            with clock("statistics"):
                stats = self._collect(block, reference, index, group, streams, places, leaving)
            with clock("solve"):
                found, permuted = self._prune_group(index, group, dict(stats))
            rows += found
            orders |= permuted
        place = {spec.name: i for i, spec in enumerate(specs)}
        return sorted(rows, key=lambda row: place[row.name]), orders

    def _prune_group(
        self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats | None]
    ) -> tuple[list[PrunedLinear], dict[str, torch.Tensor]]:
        grams = Grams(self.plan.setting("damping"), self.length, self._tell)
        placed, orders = self.reorder.shared(index, specs, stats, grams)
        rows = []
        for i, spec in enumerate(specs):
            entry = stats[spec.name]
            folded = self.reorder.fold(index, spec, entry, grams)
            if folded is not None:
                placed[spec.name], orders[spec.name] = (None, "folded"), folded.cpu()
                entry = None if entry is None else grams.reordered(entry, folded)
            perm, kind = placed.get(spec.name, (None, "no"))
            row = self._prune_linear(spec, entry, grams.of(entry, spec.name), perm)
            rows.append(replace(row, permuted=kind))
            if entry is not None:
                self.progress.advance()
                if all(stats[later.name] is not stats[spec.name] for later in specs[i + 1 :]):
                    # With its factorisations a Gram matrix takes six times its size, and experts are many.
                    grams.forget(entry)
        return rows, orders

    def _tell(self, notice: str, kind: str = "") -> None:
        """Pass a notice on, once for all of its ``kind``."""
        if (kind or notice) not in self._told:
            self._told.add(kind or notice)
            self.progress.notice(notice)

    # --- statistics ------------------------------------------------------------------------------------------------

    def _groups(
        self, block: nn.Module, index: int, specs: list[LinearSpec], streams: Streams
    ) -> list[list[LinearSpec]]:
        """Linears whose statistics are taken together, in the order in which the block computes them."""
        if self.plan.order == "block":
            return [specs]
        with collect(block, self.skeleton.prefix(index), specs) as collector:
            streams.calls.run(block, index, next(streams.pruned[0].windows(self.device)))
        groups: dict[str, list[LinearSpec]] = {}
        for shared in collector.order(specs):
            # All experts' gates and ups, then all downs: one of each would be a pass over the text per expert.
            groups.setdefault(shared[0].parameter, []).extend(shared)
        called = {spec.name for group in groups.values() for spec in group}
        for spec in specs:
            if spec.name not in called:
                groups.setdefault(spec.parameter, []).append(spec)
        return list(groups.values())

    def _collect(
        self,
        block: nn.Module,
        reference: nn.Module | None,
        index: int,
        specs: list[LinearSpec],
        streams: Streams,
        places: dict[str, str],
        leaving: HiddenFile | None,
    ) -> dict[str, InputStats]:
        """Statistics of ``specs`` from one pass over the text; ``leaving`` receives what leaves the dense block."""
        wanted = Wanted(self.plan.needs_mean, self.plan.needs_gram, self.plan.aim != "own", self.plan.aim == "residual")
        prefix = self.skeleton.prefix(index)
        run = streams.calls.run
        n_windows = streams.pruned[0].layout.n_windows
        places = {spec.parameter: places[spec.parameter] for spec in specs if spec.parameter in places}
        if reference is None:
            with collect(block, prefix, specs, wanted) as collector:
                for i, hidden in enumerate(streams.pruned[0].windows(self.device), 1):
                    with collector.window(whole=i == n_windows):
                        run(block, index, hidden)
                    self.progress.advance()
        else:
            tape = Tape(keys(specs))
            dense = (streams.dense or streams.pruned)[0]
            with (
                watch(reference, prefix, specs, tape, places.values()),
                collect(block, prefix, specs, wanted, tape, places, self.length) as collector,
            ):

                def passes() -> Iterator[torch.Tensor]:
                    windows = zip(streams.pruned[0].windows(self.device), dense.windows(self.device), strict=True)
                    for i, (hidden, entering) in enumerate(windows, 1):
                        tape.rewind()
                        output = entering
                        # What leaves the block takes a complete pass, the inputs of its linears alone a shorter one.
                        with nullcontext() if leaving is not None else tape.window(whole=i == n_windows):
                            output = run(reference, index, entering)
                        with collector.window(whole=i == n_windows):
                            run(block, index, hidden)
                        self.progress.advance()
                        yield output

                if leaving is not None:
                    leaving.write(passes())
                else:
                    for _ in passes():
                        pass
        stats = collector.result(specs)
        self._check_seen(index, specs, stats)
        if wanted.drift and any(entry.drift is None and entry.n_tokens for entry in stats.values()):
            self._tell(
                f"aim {self.plan.aim}: experts are given other tokens in the dense model; their aim is own",
                "aim of experts",
            )
        return stats

    def _check_seen(self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats]) -> None:
        unseen = [spec for spec in specs if stats[spec.name].n_tokens == 0]
        # An expert may be routed to by no token; a module, or all experts at once, cannot.
        seen = {spec.parameter for spec in specs if stats[spec.name].n_tokens}
        for spec in unseen:
            if spec.parameter not in seen:
                raise ModelError(
                    f"{spec.name}: its module is never called, so its inputs cannot be seen; "
                    f"pass --exclude '{spec.name}' or --method magnitude"
                )
        if unseen:
            self.progress.notice(
                f"{len({spec.expert for spec in unseen})} experts of block {index} saw no calibration token; "
                "their inputs count as equal (use more calibration text)"
            )

    # --- one linear ------------------------------------------------------------------------------------------------

    def _prune_linear(
        self, spec: LinearSpec, stats: InputStats | None, gram: Gram | None, perm: torch.Tensor | None = None
    ) -> PrunedLinear:
        pattern = self.patterns[spec.name]
        weight = weight_view(self.skeleton.model.get_parameter(spec.parameter), spec)
        # A copy: the weight is overwritten before the two are compared.
        dense = weight.to(torch.float32, copy=True)
        try:
            aim, aimed = target(dense, stats, gram, self.plan)
            outcome = self._solve(spec, aim, stats, gram, perm)
        except NumericsError as error:
            raise NumericsError(f"{spec.name}: {error}") from None
        stored = outcome.weight.to(self.dtypes.get(spec.parameter, weight.dtype))
        if not bool(torch.isfinite(stored).all()):
            other = "raise --set damping" if self.plan.solver == "sparsegpt" else "use --method sparsegpt"
            raise NumericsError(
                f"{spec.name}: weights too large for {str(stored.dtype).removeprefix('torch.')} came out; "
                f"give more calibration text (--windows) or {other}"
            )
        weight.copy_(stored)
        status = outcome.status
        if stats is not None and stats.n_tokens == 0:
            status = "fallback: no calibration token came here, all inputs counted as equal"
        elif stats is not None and stats.silent:
            status = "fallback: its inputs are always 0, all counted as equal"
        if status.startswith("fallback") and (stats is None or stats.n_tokens):
            self._tell(f"{spec.name}: {status} (and so where the manifest says it)", status.partition(",")[0])
        # Where the number of iterations is the method's own, as of ADMM, or was chosen, ending there is no news.
        if "max_iter" in status and self.plan.solver == "alps" and "alps.iterations" not in self.plan.settings:
            self._tell(
                f"{spec.name}: alps had not settled after {outcome.n_iter} iterations (and so where the manifest says "
                f"max_iter); --set alps.iterations={2 * outcome.n_iter} gives it more",
                "max_iter",
            )
        return PrunedLinear(
            name=spec.name,
            shape=(spec.out_features, spec.in_features),
            pattern=str(pattern),
            group=str(pattern.m) if isinstance(pattern, NofM) else (pattern.group or self.plan.group),
            zeros=int((weight == 0).sum()),
            relative_error=_relative_error(dense, weight, stats, gram),
            n_tokens=stats.n_tokens if stats is not None else 0,
            aim=aimed,
            objective_before=outcome.objective_before,
            objective=outcome.objective,
            n_iter=outcome.n_iter,
            status=status,
        )

    def _solve(
        self,
        spec: LinearSpec,
        aim: torch.Tensor,
        stats: InputStats | None,
        gram: Gram | None,
        perm: torch.Tensor | None,
    ) -> Outcome:
        """The outcome in the model's order of inputs, with the pattern in that of ``perm``."""
        seed, plan = seed_of(spec.name, self.seed), self.plan
        if plan.refine in ("dsnot", "r2-dsnot") and fnmatchcase(spec.name, plan.setting("dsnot.skip")):
            plan = replace(plan, refine="none")
        if perm is None:
            return prune_layer(aim, stats, gram, self.patterns[spec.name], plan, seed=seed, length=self.length)
        outcome = prune_layer(
            aim[:, perm],
            None if stats is None else stats.permuted(perm),
            None if gram is None else gram.permuted(perm),
            self.patterns[spec.name],
            plan,
            seed=seed,
            length=self.length,
        )
        return replace(outcome, weight=outcome.weight[:, inverse(perm)])


def _relative_error(dense: torch.Tensor, pruned: torch.Tensor, stats: InputStats | None, gram: Gram | None) -> float:
    """Output error on the inputs seen, relative to the dense output; without a Gram matrix, by input norms alone."""
    if gram is not None:
        return relative_error(dense, pruned, gram.matrix)
    scale = stats.rms.square() if stats is not None else 1.0
    whole = float((dense.square() * scale).sum(dtype=torch.float64))
    lost = float(((dense - pruned.float()).square() * scale).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
