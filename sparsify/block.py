"""Pruning of one loaded decoder block: passes over the calibration text, then its linears, group by group."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import torch
from torch import nn

from sparsify.couplings import Coupling, couplings, fold_attention, fold_mlp
from sparsify.errors import ModelError, NumericsError
from sparsify.hidden import Calls, HiddenFile
from sparsify.layer import Outcome, prune_layer, salience, seed_of
from sparsify.methods import Method
from sparsify.model import Skeleton, weight_view
from sparsify.permute import inverse, search
from sparsify.progress import Progress
from sparsify.solvers.quadratic import Gram, relative_error, retarget
from sparsify.stats import InputStats, Wanted
from sparsify.types import LinearSpec, NofM, Pattern, PrunedLinear
from sparsify.watch import Tape, collect, keys, stream_places, watch

# Tokens per channel below which a solver is said to have little to go by.
_TOKENS_PER_CHANNEL = 4

# By the identity of the statistics, which are kept beside their matrix so that it stays theirs.
Grams = dict[int, tuple[InputStats, Gram]]


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

    def turned(self, index: int) -> Streams:
        """The files as block ``index`` needs them: each pair swaps roles from block to block."""
        if index % 2 == 0:
            return self
        return Streams(self.calls, self.pruned[::-1], self.dense[::-1] if self.dense else None)


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

    def prune(
        self, block: nn.Module, index: int, specs: list[LinearSpec], streams: Streams | None
    ) -> tuple[list[PrunedLinear], dict[str, torch.Tensor]]:
        """Prune ``specs`` of ``block`` in place.

        Returns:
            one record each, in their order; and the order of inputs [in] of those that were reordered.

        Raises:
            ModelError: a linear that is never called.
            NumericsError: NaN or Inf in activations, or a Gram matrix that stays singular.
        """
        if streams is None:
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
        for group in self._groups(block, index, specs, streams):
            found, permuted = self._prune_group(
                index, group, dict(self._collect(block, reference, index, group, streams, places))
            )
            rows += found
            orders |= permuted
        place = {spec.name: i for i, spec in enumerate(specs)}
        return sorted(rows, key=lambda row: place[row.name]), orders

    def _prune_group(
        self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats | None]
    ) -> tuple[list[PrunedLinear], dict[str, torch.Tensor]]:
        grams: Grams = {}
        permuted = self._reorder(index, specs, stats, grams)
        rows = []
        for spec in specs:
            entry = stats[spec.name]
            inside, kind = None, "no"
            if spec.name in permuted:
                # Folded, the linear has that order already.
                order, kind = permuted[spec.name]
                inside = order if kind == "recorded" else None
            row = self._prune_linear(spec, entry, self._gram(entry, grams, spec), inside)
            rows.append(replace(row, permuted=kind))
            if entry is not None:
                self.progress.advance()
        return rows, {name: order.cpu() for name, (order, _) in permuted.items()}

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
    ) -> dict[str, InputStats]:
        wanted = Wanted(self.plan.needs_mean, self.plan.needs_gram, self.plan.aim != "own", self.plan.aim == "residual")
        prefix = self.skeleton.prefix(index)
        run = streams.calls.run
        places = {spec.parameter: places[spec.parameter] for spec in specs if spec.parameter in places}
        if reference is None:
            with collect(block, prefix, specs, wanted) as collector:
                for hidden in streams.pruned[0].windows(self.device):
                    with collector.window():
                        run(block, index, hidden)
                    self.progress.advance()
        else:
            tape = Tape(keys(specs))
            dense = (streams.dense or streams.pruned)[0]
            with (
                watch(reference, prefix, specs, tape, places.values()),
                collect(block, prefix, specs, wanted, tape, places) as collector,
            ):
                for hidden, entering in zip(
                    streams.pruned[0].windows(self.device), dense.windows(self.device), strict=True
                ):
                    tape.rewind()
                    with tape.window():
                        run(reference, index, entering)
                    with collector.window():
                        run(block, index, hidden)
                    self.progress.advance()
        stats = collector.result(specs)
        self._check_seen(index, specs, stats)
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

    def _gram(self, stats: InputStats | None, made: Grams, spec: LinearSpec) -> Gram | None:
        """The Gram matrix with its factorisations, made once for the linears that share it."""
        if stats is None or stats.gram is None:
            return None
        if id(stats) not in made:
            matrix = stats.gram
            if stats.n_tokens == 0:
                matrix = torch.eye(len(matrix), device=matrix.device)
            elif stats.n_tokens < _TOKENS_PER_CHANNEL * len(matrix):
                wanted = -(-10 * len(matrix) // self.length)
                self._tell(
                    f"{spec.name}: {stats.n_tokens} calibration tokens for {len(matrix)} inputs, which fits them and "
                    f"little else; ten times as many as inputs are advised (--windows {wanted})",
                    f"tokens for {len(matrix)}",
                )
            made[id(stats)] = stats, Gram(matrix, stats.n_tokens, self.plan.setting("damping"))
        return made[id(stats)][1]

    # --- the order of inputs ---------------------------------------------------------------------------------------

    def _reorder(
        self, index: int, specs: list[LinearSpec], stats: dict[str, InputStats | None], grams: Grams
    ) -> dict[str, tuple[torch.Tensor, str]]:
        """Seek an order of the inputs of each linear with N:M; fold it where that is wanted and possible.

        ``stats`` of a linear whose order was folded are replaced by those of the reordered inputs.

        Returns:
            linear name -> (perm, ``folded`` or ``recorded``).
        """
        plan = self.plan
        grouped = [spec for spec in specs if isinstance(self.patterns[spec.name], NofM)]
        if plan.permute == "none" or not grouped:
            return {}
        folds = {} if plan.permute == "simulate" else couplings(self.skeleton, index)
        found: dict[str, tuple[torch.Tensor, str]] = {}
        for spec in grouped:
            if spec.name not in folds:
                continue
            perm = self._fold(folds[spec.name], self._salience(spec, stats[spec.name], grams))
            if perm is not None:
                found[spec.name] = perm, "folded"
                entry = stats[spec.name]
                stats[spec.name] = None if entry is None else entry.permuted(perm)
        if plan.permute in ("gather", "simulate"):
            # One order per input, so that one gather serves all that read it; or one each, as the paper evaluates it.
            shared: dict[Any, list[LinearSpec]] = {}
            for spec in grouped:
                if spec.name not in found:
                    together = plan.permute == "gather" and stats[spec.name] is not None
                    key = (id(stats[spec.name]), self.patterns[spec.name]) if together else spec.name
                    shared.setdefault(key, []).append(spec)
            for members in shared.values():
                worth = [self._salience(spec, stats[spec.name], grams) for spec in members]
                perm = self._search(torch.cat(worth), members[0])
                found |= {spec.name: (perm, "recorded") for spec in members}
        return found

    def _salience(self, spec: LinearSpec, stats: InputStats | None, grams: Grams) -> torch.Tensor:
        """[out, in], what each weight of a linear is worth."""
        weight = weight_view(self.skeleton.model.get_parameter(spec.parameter), spec).float()
        gram = self._gram(stats, grams, spec)
        aim, _ = self._target(spec, weight, stats, gram)
        return salience(aim, stats, gram, self.plan, seed_of(spec.name, self.seed))

    def _search(self, score: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
        pattern = self.patterns[spec.name]
        assert isinstance(pattern, NofM)
        found = search(
            score,
            pattern,
            n_sweeps=self.plan.setting("permute.sweeps"),
            n_parts=gcd(self.plan.setting("permute.parts"), score.shape[1] // pattern.m),
            seed=self.seed,
        )
        return found.perm

    def _fold(self, coupling: Coupling, score: torch.Tensor) -> torch.Tensor | None:
        spec, heads, model = coupling.consumer, coupling.heads, self.skeleton.model
        if heads is None:
            perm = self._search(score, spec)
            fold_mlp(model, coupling, perm)
            return perm
        pattern = self.patterns[spec.name]
        assert isinstance(pattern, NofM)
        if heads.head_dim % pattern.m:
            if self.plan.permute == "gather":
                return None
            self._tell(
                f"{spec.name}: heads of {heads.head_dim} are no multiple of {pattern.m}; its inputs stay in order"
            )
            return None
        # Query heads that read one key-value head share its order. Groups lie within heads, so moving whole heads would
        # change no group.
        by_key = score.reshape(len(score), heads.n_key, -1, heads.head_dim)
        within = [
            self._search(by_key[:, key].transpose(0, 1).reshape(-1, heads.head_dim), spec) for key in range(heads.n_key)
        ]
        return fold_attention(model, coupling, within).to(score.device)

    # --- one linear ------------------------------------------------------------------------------------------------

    def _prune_linear(
        self, spec: LinearSpec, stats: InputStats | None, gram: Gram | None, perm: torch.Tensor | None = None
    ) -> PrunedLinear:
        pattern = self.patterns[spec.name]
        weight = weight_view(self.skeleton.model.get_parameter(spec.parameter), spec)
        # A copy: the weight is overwritten before the two are compared.
        dense = weight.to(torch.float32, copy=True)
        try:
            aim, aimed = self._target(spec, dense, stats, gram)
            outcome = self._solve(spec, aim, stats, gram, perm)
        except NumericsError as error:
            raise NumericsError(f"{spec.name}: {error}") from None
        weight.copy_(outcome.weight.to(self.dtypes.get(spec.parameter, weight.dtype)))
        status = outcome.status
        if stats is not None and stats.n_tokens == 0:
            status = "fallback: no calibration token came here, all inputs counted as equal"
        elif status.startswith("fallback"):
            self._tell(f"{spec.name}: {status} (and so where the manifest says it)", status.partition(",")[0])
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

    def _target(
        self, spec: LinearSpec, dense: torch.Tensor, stats: InputStats | None, gram: Gram | None
    ) -> tuple[torch.Tensor, str]:
        """What the linear should compute, [out, in] float32, and which targets that are."""
        if self.plan.aim == "own" or stats is None or gram is None or stats.cross is None or stats.n_tokens == 0:
            return dense, "own"
        shift = stats.shift if stats.shift is not None and stats.shift.shape[0] == spec.out_features else None
        target = retarget(
            dense,
            gram,
            stats.cross,
            self.plan.setting("aim.share"),
            shift,
            self.plan.setting("aim.residual_share") if self.plan.aim == "residual" else 0.0,
        )
        return target, "dense" if shift is None else "residual"


def _relative_error(dense: torch.Tensor, pruned: torch.Tensor, stats: InputStats | None, gram: Gram | None) -> float:
    """Output error on the inputs seen, relative to the dense output; without a Gram matrix, by input norms alone."""
    if gram is not None:
        return relative_error(dense, pruned, gram.matrix)
    scale = stats.rms.square() if stats is not None else 1.0
    whole = float((dense.square() * scale).sum(dtype=torch.float64))
    lost = float(((dense - pruned.float()).square() * scale).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
