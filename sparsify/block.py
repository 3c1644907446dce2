"""Pruning of one loaded decoder block: passes over the calibration text, then its linears, group by group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn

from sparsify.chunks import chunks
from sparsify.errors import NumericsError
from sparsify.finite import all_finite
from sparsify.grams import Grams
from sparsify.journal import Stopwatch
from sparsify.layer import Outcome, prune_layer, pull, seed_of, target
from sparsify.methods import Method
from sparsify.model import Skeleton, weight_view
from sparsify.passes import Passes, Streams
from sparsify.permute import inverse
from sparsify.progress import Progress
from sparsify.reorder import Placed, Reorder
from sparsify.solvers.factor import reorder_columns_
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.stats import InputStats
from sparsify.types import LinearSpec, NofM, Pattern, PrunedLinear

# Of a group, that are solved by themselves; whatever the number of workers, so that a run can be resumed by others.
_UNITS = 8


@dataclass(frozen=True)
class Course:
    """In which order the linears of a block are pruned.

    Attributes:
        groups: linears whose statistics are taken together, in the order of their computation; in each those that have
            to be solved by one process, in order.
        places: of the block (``Passes.places``).
    """

    groups: list[list[list[LinearSpec]]]
    places: dict[str, str]


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
        self.progress = progress
        self._told: set[str] = set()
        self.passes = Passes(skeleton, plan, device, length, progress, self._tell)
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
            one record each; and the order of inputs [in] of those that were reordered.

        Raises:
            ModelError: a linear that is never called.
            NumericsError: NaN or Inf in activations, or a Gram matrix that stays singular.
        """
        if streams is None:
            with clock("solve"):
                return self.solve(index, specs, {spec.name: None for spec in specs})
        # Dense weights are needed beside the pruned ones as long as later groups are compared with them.
        reference = deepcopy(block) if self.plan.aim != "own" else None
        rows: list[PrunedLinear] = []
        orders: dict[str, torch.Tensor] = {}
        with clock("statistics"):
            places = self.passes.places(block, index, specs, streams)
            groups = self.passes.groups(block, index, specs, streams)
        for group in groups:
            last = group is groups[-1]
            with clock("statistics"):
                collector = self.passes.collect(
                    block, reference, index, group, streams, places, streams.shards, leave=write_dense and last
                )
                # Emptied while linears are solved: nothing else may hold what they are done with.
                stats: dict[str, InputStats | None] = {**collector.result(group)}
                del collector
                self.passes.check(index, group, stats)
            if last:
                reference = None
            with clock("solve"):
                found, permuted = self.solve(index, group, stats)
            rows += found
            orders |= permuted
        return rows, orders

    def course(self, block: nn.Module, index: int, specs: list[LinearSpec], streams: Streams) -> Course:
        """How the dense ``block`` can be pruned by several processes; arguments as of ``prune``."""
        groups = self.passes.groups(block, index, specs, streams)
        shared: dict[str, int] = {}
        kinds = {isinstance(self.patterns[spec.name], NofM) for spec in specs}
        # One order for all that read an input; or what is derived for one without an order serves one that has it.
        together = self.plan.permute == "gather" or (self.plan.permute == "simulate" and len(kinds) > 1)
        if together:
            found = self.passes.sharing(block, index, specs, streams)
            shared = {spec.name: i for i, members in enumerate(found) for spec in members}
        made = []
        for group in groups:
            units: dict[object, list[LinearSpec]] = {}
            apart = not self.reorder.moves_later(index, group)
            for spec in group:
                # Who shares an input with an expert that the first window does not reach is not known.
                own = spec.name if not together else "unseen"
                units.setdefault(shared.get(spec.name, own) if apart else None, []).append(spec)
            made.append(_bundled(list(units.values())))
        return Course(made, self.passes.places(block, index, specs, streams))

    def solve(
        self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats | None]
    ) -> tuple[list[PrunedLinear], dict[str, torch.Tensor]]:
        """Prune ``specs``, whose statistics were taken together, in place; returns as ``prune`` does.

        ``stats`` of each by name, None where there is no text; they are emptied as they are used up, and matrices go as
        soon as no linear needs them, where nobody else holds them.
        """
        grams = Grams(self.plan.setting("damping"), self.length, self._tell)
        placed, orders = self.reorder.shared(index, specs, stats, grams)
        return [self._prune_next(index, spec, stats, grams, placed, orders) for spec in specs], orders

    def _prune_next(
        self,
        index: int,
        spec: LinearSpec,
        stats: dict[str, InputStats | None],
        grams: Grams,
        placed: dict[str, Placed],
        orders: dict[str, torch.Tensor],
    ) -> PrunedLinear:
        """Aim, order and solution of one linear; what ``solve`` takes over and hands on."""
        entry = stats.pop(spec.name)
        last = all(other is not entry for other in stats.values())
        gram = grams.of(entry, spec.name)
        weight = weight_view(self.skeleton.model.get_parameter(spec.parameter), spec)
        moved, aimed = pull(weight, entry, self.plan)
        if entry is not None and last:
            entry = grams.without_drift(entry)
        with _named(spec):
            aim = target(weight, gram, moved)
        folded = self.reorder.fold(index, spec, aim, entry, gram)
        if folded is not None:
            placed[spec.name], orders[spec.name] = (None, "folded"), folded.cpu()
            if aim is not weight:
                reorder_columns_(aim, folded)
            entry = None if entry is None else grams.reordered(entry, folded)
            gram = grams.of(entry, spec.name)
        perm, kind = placed.get(spec.name, (None, "no"))
        row = self._prune_linear(spec, weight, aim, entry, gram, perm)
        if entry is not None:
            self.progress.advance()
            if last:
                # With its factorisations a Gram matrix takes six times its size, and experts are many.
                grams.forget(entry)
        return replace(row, permuted=kind, aim=aimed)

    def _tell(self, notice: str, kind: str = "") -> None:
        """Pass a notice on, once for all of its ``kind``."""
        if (kind or notice) not in self._told:
            self._told.add(kind or notice)
            self.progress.notice(notice)

    # --- one linear ------------------------------------------------------------------------------------------------

    def _prune_linear(
        self,
        spec: LinearSpec,
        weight: torch.Tensor,
        aim: torch.Tensor,
        stats: InputStats | None,
        gram: Gram | None,
        perm: torch.Tensor | None = None,
    ) -> PrunedLinear:
        """Prune a linear's ``weight`` in place, which should compute ``aim`` [out, in]: itself or a target."""
        pattern = self.patterns[spec.name]
        with _named(spec):
            outcome = self._solve(spec, aim, stats, gram, perm)
        pruned = outcome.weight
        for rows in chunks(*pruned.shape):
            # In the same storage, as the model will hold it.
            stored = pruned[rows].to(self.dtypes.get(spec.parameter, weight.dtype))
            if not all_finite(stored):
                other = "raise --set damping" if self.plan.solver == "sparsegpt" else "use --method sparsegpt"
                raise NumericsError(
                    f"{spec.name}: weights too large for {str(stored.dtype).removeprefix('torch.')} came out; "
                    f"give more calibration text (--windows) or {other}"
                )
            pruned[rows] = stored.to(weight.dtype)
        # Before the weight is overwritten: there is no other copy of the dense one.
        error = _relative_error(weight, pruned, stats, gram, outcome.energy if aim is weight else None)
        weight.copy_(pruned)
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
            zeros=weight.numel() - int(weight.count_nonzero()),
            relative_error=error,
            n_tokens=stats.n_tokens if stats is not None else 0,
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
        moved = None if gram is None else gram.permuted(perm)
        if stats is not None:
            # One copy of the matrix is enough; a silent input's own is nothing but zeros.
            own = stats.gram if moved is None or stats.silent else moved.matrix
            stats = replace(stats.permuted(perm), gram=own)
        outcome = prune_layer(
            aim[:, perm],
            stats,
            moved,
            self.patterns[spec.name],
            plan,
            seed=seed,
            length=self.length,
        )
        return replace(outcome, weight=outcome.weight[:, inverse(perm)])


def _bundled(units: list[list[LinearSpec]]) -> list[list[LinearSpec]]:
    """At most ``_UNITS`` of consecutive ones: experts are many, and each unit is a block that is read."""
    ends = [len(units) * i // _UNITS for i in range(_UNITS + 1)] if len(units) > _UNITS else range(len(units) + 1)
    return [[spec for unit in units[a:b] for spec in unit] for a, b in pairwise(ends)]


def _relative_error(
    dense: torch.Tensor, pruned: torch.Tensor, stats: InputStats | None, gram: Gram | None, energy: float | None
) -> float:
    """Output error on the inputs seen, relative to the dense output; without a Gram matrix, by input norms alone.

    ``energy`` is that of the dense output, where it is known.
    """
    if gram is not None:
        return relative_error(dense, pruned, gram.matrix, energy)
    scale = stats.rms.square() if stats is not None else torch.ones(1, device=dense.device)
    whole = lost = 0.0
    for rows in chunks(*dense.shape):
        part = dense[rows].float()
        # Rows first: they count alike, and a sum in float64 of all values takes ten times as long.
        whole += float((part.square().sum(dim=0).double() * scale).sum())
        lost += float((part.sub(pruned[rows]).square_().sum(dim=0).double() * scale).sum())
    return lost / whole if whole > 0 else 0.0


@contextmanager
def _named(spec: LinearSpec) -> Iterator[None]:
    """Errors in numbers say whose they are."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{spec.name}: {error}") from None
