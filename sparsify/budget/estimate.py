"""The budget of a run: shapes from the model's folder, what a process holds here, rates of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.budget.machine import available, existing, measure_rates, resident_bytes
from sparsify.budget.operations import Rates, time_of
from sparsify.budget.shapes import shapes_of, stored_in
from sparsify.budget.verdict import Budget, check, summary, timed
from sparsify.data import MAX_TEXT_BYTES
from sparsify.errors import BudgetError, DataError
from sparsify.files import folder_bytes, staging_path
from sparsify.progress import Progress
from sparsify.recipe import DEFAULT_CALIBRATION, Recipe

if TYPE_CHECKING:
    from sparsify.source import Source

# Rates below those of any machine: what is short at these is not worth a calibration.
_SLOW = Rates(
    product=5e9, product64=2e9, factor=5e8, spectrum=5e7, distance=2e8, memory=1e9, read=5e7, write=3e7, digest=1e8
)
_SHORT_SECONDS = 60
# More than Python's help has.
_PYDOC_BYTES = 1 << 20


def budget_of(
    folder: Path,
    name: str,
    recipe: Recipe,
    *,
    device: str = "cpu",
    workers: int = 1,
    offload: bool = False,
    trust_remote_code: bool = False,
) -> Budget:
    """What pruning the model of ``folder`` by ``recipe`` will need, without its time.

    Args:
        folder: with config.json, and with or without the weights.
        name: what the user calls the model.
        recipe: how to prune.
        device: torch device of weights and statistics.
        workers: processes at once.
        offload: large matrices lie in files.
        trust_remote_code: let the model's own code load.

    Raises:
        ModelError: config or weights cannot be used.
        UsageError: the recipe does not fit the model.
    """
    # A process of the run has imported the driver.
    import sparsify.prune  # noqa: F401
    from sparsify.format.reader import open_checkpoint
    from sparsify.model import load_skeleton
    from sparsify.roofline.config import check_size

    weights = any(folder.glob("*.safetensors"))
    if not weights:
        check_size(folder)
    skeleton = load_skeleton(folder, trust_remote_code=trust_remote_code, weights=weights)
    patterns = recipe.assign([spec for block in skeleton.linears for spec in block])
    stored = stored_in(open_checkpoint(folder).tensors.values()) if weights else None
    shapes = shapes_of(skeleton, patterns, name, stored)
    return Budget(shapes, with_ids(recipe), device, workers, resident_bytes(), _text_bytes(recipe), offload=offload)


def _text_bytes(recipe: Recipe) -> int:
    """Of the calibration text; a guess from above where it is not a file."""
    if not recipe.plan.needs_data or ".safetensors:" in recipe.calibration or recipe.calibration == "self":
        return 0
    if recipe.calibration == DEFAULT_CALIBRATION:
        return _PYDOC_BYTES
    path = Path(recipe.calibration).expanduser()
    return min(path.stat().st_size, MAX_TEXT_BYTES) if path.is_file() else MAX_TEXT_BYTES


def with_ids(recipe: Recipe) -> Recipe:
    """The recipe with windows and length of its token ids, where it names a file of them.

    Raises:
        DataError: there is no such tensor, or it is none of ids.
    """
    path, _, key = recipe.calibration.rpartition(":")
    if not path.endswith(".safetensors") or not recipe.plan.needs_data:
        return recipe
    from sparsify.checkpoint import open_shard
    from sparsify.errors import ModelError

    try:
        with open_shard(Path(path)) as shard:
            shape = shard.get_slice(key).get_shape() if key in shard.keys() else []  # noqa: SIM118 (no mapping)
    except ModelError as error:
        raise DataError(f"{path}: not a readable safetensors file of token ids ({error})") from None
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise DataError(f"{path}: has no tensor {key!r} [windows, length] of token ids")
    return replace(recipe, windows=shape[0], length=shape[1])


def calibrated(budget: Budget, out: Path) -> Budget:
    """The budget with its time, from a few seconds of products, factors and files on the disk of ``out``.

    Raises:
        OutputError: nothing can be written there.
    """
    linears = [linear for block in budget.shapes.blocks for linear in block.linears]
    rates = measure_rates(
        existing(out),
        budget.device,
        width=budget.shapes.width,
        widest=max(linear.n_in for linear in linears),
        length=budget.recipe.length,
    )
    return timed(budget, rates)


def _places_here(device: str) -> int:
    """Workers that a cluster of this machine alone has room for, as its cores or GPUs are counted."""
    import torch

    n = torch.cuda.device_count() if device == "cuda" else (os.cpu_count() or 1) // torch.get_num_threads()
    return max(n, 1)


def announce(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    cluster: str | None = None,
    offload: bool = False,
    enforce: bool = True,
    targets: Sequence[str] = (),
    measures: bool = False,
    trust_remote_code: bool = False,
    progress: Progress,
) -> int:
    """Say what a run will need before it begins, and refuse one that cannot fit; returns bytes of each worker.

    Work of less than a minute on the slowest machine is not timed.

    Args:
        source: the model.
        recipe: how to prune.
        out: the output folder; what an interrupted run left beside it counts as there.
        device: torch device.
        workers: processes at once; None is 1.
        cluster: where Ray runs them; memory of other machines is not looked at, and of this one as if it were one.
        offload: large matrices lie in files.
        enforce: refuse; else what does not fit is a notice.
        targets: that the model is then exported for, and
        measures: whether the dense and the pruned model are then compared.
        trust_remote_code: let the model's own code load.
        progress: receives the notices.

    Raises:
        BudgetError: memory or disk do not suffice; the message holds the remedy.
        ModelError, UsageError, DataError: as ``budget_of``.
    """
    elsewhere = cluster not in (None, "local")
    budget = budget_of(
        source.folder,
        source.name,
        recipe,
        device=device,
        workers=workers or (1 if cluster is None else 2 if elsewhere else _places_here(device)),
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    budget = replace(budget, elsewhere=elsewhere, targets=tuple(targets), whole_models=2 if measures else 0)
    free = available(out, device)
    left = staging_path(out.absolute())
    if left.is_dir():
        free = replace(free, disk_bytes=free.disk_bytes + folder_bytes(left))
    problems = check(budget, free)
    short = time_of(budget.shapes, budget.recipe, _SLOW).high < _SHORT_SECONDS
    if not problems and not short:
        budget = calibrated(budget, out)
    progress.notice(summary(budget, free) + (", less than a minute" if short else ""))
    if problems and enforce:
        raise BudgetError(f"{problems[0]}; or pass --no-budget to try all the same")
    for problem in problems:
        progress.notice(f"does not fit: {problem}")
    return budget.phase_bytes(budget.largest)
