"""Passes over the dense model before anything is pruned: how much each linear gives, in which order channels stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from sparsify import allocate
from sparsify.couplings import reads_residual
from sparsify.errors import UsageError
from sparsify.grams import Grams
from sparsify.hidden import Calls, HiddenStates, enter
from sparsify.layer import salience, seed_of
from sparsify.memory import return_freed_memory
from sparsify.methods import Method
from sparsify.model import weight_view
from sparsify.naming import Binding
from sparsify.permute import parts_of, search
from sparsify.progress import Progress
from sparsify.scores import wanda
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.stats import InputStats, Wanted
from sparsify.types import LinearSpec, NofM, Pattern, Unstructured
from sparsify.watch import collect

_HIDDEN = ("survey.0", "survey.1")
# Rows of the sample from which the order of the residual stream is sought.
_ROWS = 32768

Visitor = Callable[[int, LinearSpec, torch.Tensor, InputStats, Gram | None], None]


@dataclass(frozen=True)
class Survey:
    """What a pass over the dense model needs.

    Attributes:
        binding: the checkpoint.
        plan: the method.
        ids: calibration tokens, [windows, length].
        folder: for hidden states while it runs.
        dtype: of the forward passes.
        device: where they run.
        progress: receives a step for every window and linear.
    """

    binding: Binding
    plan: Method
    ids: torch.Tensor
    folder: Path
    dtype: torch.dtype
    device: str
    progress: Progress

    def visit(self, title: str, chosen: list[list[LinearSpec]], wanted: Wanted, see: Visitor) -> None:
        """Show ``see`` every linear of ``chosen`` (by block) with the statistics of its inputs in the dense model.

        One block is in memory at a time; nothing of the model is changed.

        Raises:
            ModelError, NumericsError: as pruning does.
        """
        skeleton, device = self.binding.skeleton, self.device
        last = max((index for index, specs in enumerate(chosen) if specs), default=-1)
        steps = [len(self.ids) * (bool(specs) + (i < last)) + len(specs) for i, specs in enumerate(chosen)]
        self.progress.stage(title, sum(steps))
        pair = self.folder / _HIDDEN[0], self.folder / _HIDDEN[1]
        calls, [first] = enter(self.binding, self.ids, pair[:1], self.dtype, device)
        # They swap roles from block to block.
        states = first, HiddenStates(pair[1], first.layout)
        for index, specs in enumerate(chosen[: last + 1]):
            block = self.binding.load_block(index, self.dtype, device)
            if specs:
                with collect(block, skeleton.prefix(index), specs, wanted) as collector:
                    left = len(self.ids)
                    for shard in states[index % 2].shards:
                        for hidden in shard.windows(device):
                            left -= 1
                            with collector.window(whole=not left):
                                calls.run(block, index, hidden)
                            self.progress.advance()
                        collector.end_of_shard()
                stats = collector.result(specs)
                grams = Grams(self.plan.setting("damping"))
                for spec in specs:
                    weight = weight_view(skeleton.model.get_parameter(spec.parameter), spec).float()
                    see(index, spec, weight, stats[spec.name], grams.of(stats[spec.name], spec.name))
                    self.progress.advance()
            if index < last:
                states[(index + 1) % 2].write(self._outputs(block, index, calls, states[index % 2]))
            self.binding.unload(block)
            return_freed_memory()
        for each in states:
            each.remove()

    def _outputs(self, block: nn.Module, index: int, calls: Calls, states: HiddenStates) -> Iterator[torch.Tensor]:
        for hidden in states.windows(self.device):
            output = calls.run(block, index, hidden)
            # Before: nobody comes back for more than the windows.
            self.progress.advance()
            yield output


def allocated(survey: Survey, patterns: dict[str, Pattern], sparsity: Fraction) -> dict[str, Fraction]:
    """The sparsity of every linear whose pattern asks for ``sparsity``, so that together they meet it.

    ``owl`` counts outliers among the Wanda scores of each block; ``error`` measures the output error of SparseGPT at a
    few sparsities per linear.

    Args:
        survey: the model; its method's ``allocate`` is not ``uniform``.
        patterns: linear name -> pattern as the recipe has it.
        sparsity: to allocate.

    Raises:
        UsageError: no linear asks for it.
        ModelError, NumericsError: as pruning does.
    """
    plan = survey.plan
    chosen = [[s for s in block if _asks(patterns.get(s.name), sparsity)] for block in survey.binding.skeleton.linears]
    specs = {s.name: s for block in chosen for s in block}
    if not specs:
        raise UsageError(
            f"allocate {plan.allocate}: overrides leave no linear with the sparsity {float(sparsity):g} to allocate; "
            "use --set allocate=uniform"
        )
    if plan.allocate == "owl":
        wanted, spread = _by_outliers(survey, chosen, sparsity), 2 * plan.setting("owl.spread")
    else:
        wanted, spread = _by_error(survey, chosen, patterns, sparsity), plan.setting("error.spread")

    def grain(name: str) -> int:
        pattern = patterns[name]
        assert isinstance(pattern, Unstructured)
        return specs[name].out_features if (pattern.group or plan.group) == "row" else 1

    sizes = {name: spec.n_weights for name, spec in specs.items()}
    return allocate.fitted(wanted, sizes, {name: grain(name) for name in specs}, sparsity, spread)


def _by_outliers(survey: Survey, chosen: list[list[LinearSpec]], sparsity: Fraction) -> dict[str, float]:
    plan = survey.plan
    scores: list[torch.Tensor] = []
    ratios: dict[int, float] = {}

    def see(index: int, _spec: LinearSpec, weight: torch.Tensor, stats: InputStats, _gram: Gram | None) -> None:
        # An outlier is one among the weights of its block, so all of them are needed at once.
        scores.append(wanda(weight, stats))
        if len(scores) == len(chosen[index]):
            ratios[index] = allocate.outliers(scores, plan.setting("owl.outlier"))
            scores.clear()

    survey.visit("allocating sparsity", chosen, Wanted(), see)
    shares = allocate.owl(ratios, sparsity, plan.setting("owl.spread"))
    return {spec.name: shares[index] for index, specs in enumerate(chosen) for spec in specs}


def _by_error(
    survey: Survey, chosen: list[list[LinearSpec]], patterns: dict[str, Pattern], sparsity: Fraction
) -> dict[str, float]:
    plan = survey.plan
    curves: dict[str, allocate.Curve] = {}
    points = allocate.grid(sparsity, plan.setting("error.spread"))

    def see(_index: int, spec: LinearSpec, weight: torch.Tensor, _stats: InputStats, gram: Gram | None) -> None:
        pattern = patterns[spec.name]
        assert gram is not None
        assert isinstance(pattern, Unstructured)
        tried = [sparsegpt(weight, gram, Unstructured(s, pattern.group), group=plan.group).weight for s in points]
        errors = [relative_error(weight, pruned, gram.matrix) for pruned in tried]
        curves[spec.name] = allocate.Curve(weight.numel(), tuple(map(float, points)), tuple(errors))

    survey.visit("allocating sparsity", chosen, Wanted(gram=True), see)
    return allocate.least_error(curves, sparsity, plan.setting("error.spread"))


def residual_order(survey: Survey, patterns: dict[str, Pattern], seed: int) -> torch.Tensor:
    """One order of the residual stream's channels, for all linears with N:M that read it; perm [width].

    What each weight is worth is taken from a seeded sample of the rows of every reader, at most ``_ROWS`` in all, since
    the whole is as large as the model.

    Raises:
        UsageError: an architecture whose stream is not known, or readers with different patterns.
        ModelError, NumericsError: as pruning does.
    """
    skeleton, plan = survey.binding.skeleton, survey.plan
    chosen = [
        [s for s in block if reads_residual(skeleton, s) and isinstance(patterns.get(s.name), NofM)]
        for block in skeleton.linears
    ]
    found = {pattern for block in chosen for s in block if isinstance(pattern := patterns[s.name], NofM)}
    if len(found) != 1:
        raise UsageError("permute residual: its readers need one N:M pattern; use --set permute=fold")
    share = max(_ROWS // sum(map(len, chosen)), 1)
    sample: list[torch.Tensor] = []

    def see(_index: int, spec: LinearSpec, weight: torch.Tensor, stats: InputStats, gram: Gram | None) -> None:
        own_seed = seed_of(spec.name, seed)
        worth = salience(weight, stats, gram, plan, own_seed)
        rows = torch.randperm(len(worth), generator=torch.Generator().manual_seed(own_seed))[:share]
        # Every linear counts the same, whatever the size of its weights and inputs.
        sample.append(worth[rows.to(worth.device)] / worth.mean().clamp_min(torch.finfo(worth.dtype).tiny))

    survey.visit("ordering the residual stream", chosen, Wanted(gram=plan.needs_gram), see)
    [pattern] = found
    parts = parts_of(sample[0].shape[1] // pattern.m, plan.setting("permute.parts"))
    return search(
        torch.cat(sample), pattern, n_sweeps=plan.setting("permute.sweeps"), n_parts=parts, seed=seed
    ).perm.cpu()


def _asks(pattern: Pattern | None, sparsity: Fraction) -> bool:
    return isinstance(pattern, Unstructured) and pattern.sparsity == sparsity
