"""A pass over the dense model before anything is pruned, to decide how much each linear gives."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from sparsify import allocate
from sparsify.hidden import Calls, HiddenFile, enter
from sparsify.methods import Method
from sparsify.model import weight_view
from sparsify.naming import Binding
from sparsify.progress import Progress
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.stats import InputStats, Wanted
from sparsify.types import LinearSpec, Pattern, Unstructured
from sparsify.watch import collect

_HIDDEN = ("survey.0", "survey.1")


def allocated(
    binding: Binding,
    plan: Method,
    patterns: dict[str, Pattern],
    sparsity: Fraction,
    ids: torch.Tensor,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    progress: Progress,
) -> dict[str, Fraction]:
    """The sparsity of every linear whose pattern asks for ``sparsity``, so that together they meet it.

    ``owl`` counts outliers per block; ``error`` measures the output error of SparseGPT at a few sparsities per linear.
    One block is in memory at a time; nothing of the model is changed.

    Args:
        binding: the checkpoint.
        plan: the method; its ``allocate`` is not ``uniform``.
        patterns: linear name -> pattern as the recipe has it.
        sparsity: to allocate.
        ids: calibration tokens, [windows, length].
        folder: for hidden states while it runs.
        dtype: of the forward passes.
        device: where they run.
        progress: receives a step for every window and linear.

    Raises:
        ModelError, NumericsError: as pruning does.
    """
    skeleton = binding.skeleton
    chosen = [[spec for spec in block if _asks(patterns.get(spec.name), sparsity)] for block in skeleton.linears]
    last = max((index for index, specs in enumerate(chosen) if specs), default=-1)
    steps = [len(ids) * (bool(specs) + (i < last)) + len(specs) for i, specs in enumerate(chosen)]
    progress.stage("allocating sparsity", sum(steps))
    calls, [files] = enter(
        binding, ids, [(folder / _HIDDEN[0], folder / _HIDDEN[1])], dtype, device, resume=False
    )  # fmt: skip
    by_outliers, by_error = _Outliers(plan), _Errors(plan, sparsity)
    for index, specs in enumerate(chosen[: last + 1]):
        block = binding.load_block(index, dtype, device)
        if specs:
            with collect(block, skeleton.prefix(index), specs, Wanted(gram=plan.allocate == "error")) as collector:
                for hidden in files[index % 2].windows(device):
                    with collector.window():
                        calls.run(block, index, hidden)
                    progress.advance()
            stats = collector.result(specs)
            grams: dict[int, Gram] = {}
            for spec in specs:
                weight = weight_view(skeleton.model.get_parameter(spec.parameter), spec).float()
                if plan.allocate == "owl":
                    by_outliers.add(index, weight, stats[spec.name])
                else:
                    by_error.add(spec, weight, stats[spec.name], grams)
                progress.advance()
        if index < last:
            files[(index + 1) % 2].write(_outputs(block, index, calls, files[index % 2], device, progress))
        binding.unload(block)
    for name in _HIDDEN:
        (folder / name).unlink(missing_ok=True)
    if plan.allocate == "error":
        return allocate.least_error(by_error.curves, sparsity, plan.setting("error.spread"))
    shares = by_outliers.result(sparsity)
    return {spec.name: shares[index] for index, specs in enumerate(chosen) for spec in specs}


def _asks(pattern: Pattern | None, sparsity: Fraction) -> bool:
    return isinstance(pattern, Unstructured) and pattern.sparsity == sparsity


def _outputs(
    block: nn.Module, index: int, calls: Calls, file: HiddenFile, device: str, progress: Progress
) -> Iterator[torch.Tensor]:
    for hidden in file.windows(device):
        yield calls.run(block, index, hidden)
        progress.advance()


class _Outliers:
    """Counts for ``owl``."""

    def __init__(self, plan: Method) -> None:
        self._multiple: float = plan.setting("owl.outlier") if plan.allocate == "owl" else 0.0
        self._spread: float = plan.setting("owl.spread") if plan.allocate == "owl" else 0.0
        self._counts: dict[int, tuple[int, int]] = {}

    def add(self, index: int, weight: torch.Tensor, stats: InputStats) -> None:
        found, total = allocate.outliers(weight, stats, self._multiple)
        before = self._counts.get(index, (0, 0))
        self._counts[index] = before[0] + found, before[1] + total

    def result(self, sparsity: Fraction) -> dict[int, Fraction]:
        ratios = {index: found / total for index, (found, total) in self._counts.items()}
        return allocate.owl(ratios, {i: total for i, (_, total) in self._counts.items()}, sparsity, self._spread)


class _Errors:
    """Curves for ``error``."""

    def __init__(self, plan: Method, sparsity: Fraction) -> None:
        self._plan = plan
        self._grid = allocate.grid(sparsity, plan.setting("error.spread")) if plan.allocate == "error" else []
        self.curves: dict[str, allocate.Curve] = {}

    def add(self, spec: LinearSpec, weight: torch.Tensor, stats: InputStats, grams: dict[int, Gram]) -> None:
        assert stats.gram is not None
        matrix = stats.gram if stats.n_tokens else torch.eye(spec.in_features, device=weight.device)
        gram = grams.setdefault(id(stats), Gram(matrix, stats.n_tokens, self._plan.setting("damping")))
        errors = tuple(
            relative_error(weight, sparsegpt(weight, gram, Unstructured(s), group=self._plan.group).weight, gram.matrix)
            for s in self._grid
        )
        self.curves[spec.name] = allocate.Curve(weight.numel(), tuple(map(float, self._grid)), errors)
