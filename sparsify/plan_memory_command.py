"""The command that says what pruning will need of memory, disk and time, before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.errors import BudgetError, UsageError
from sparsify.options import (
    Calibration,
    Changes,
    ComputeDtype,
    Device,
    Exclude,
    Group,
    Include,
    Inputs,
    Json,
    Length,
    MethodName,
    Model,
    Offload,
    Override,
    Pattern,
    RecipeFile,
    Trust,
    WindowCount,
    Workers,
    check_device,
    merge_settings,
    required,
)

if TYPE_CHECKING:
    from sparsify.budget.machine import Available
    from sparsify.budget.verdict import Budget


def plan_memory_command(
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the output would go; its disk is measured.", show_default="here"),
    ] = None,
    pattern: Pattern = None,
    method: MethodName = None,
    group: Group = None,
    changes: Changes = None,
    include: Include = None,
    exclude: Exclude = None,
    override: Override = None,
    calibration: Calibration = None,
    windows: WindowCount = None,
    length: Length = None,
    compute_dtype: ComputeDtype = None,
    inputs: Inputs = None,
    recipe: RecipeFile = None,
    device: Device = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the calibration.", show_default="one for each core")
    ] = None,
    workers: Workers = None,
    offload: Offload = False,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Memory and disk only; nothing is measured or written.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Say what pruning MODEL will need: peak memory, disk and time, and whether it fits this machine.

    MODEL may be a folder with nothing but config.json. Takes a few seconds; ends with exit code 12 where it does not
    fit, and says what would.
    """
    settings, run = merge_settings(recipe, locals())
    where = run.get("device", "cpu")
    check_device(where)
    for name, count in (("--workers", run.get("workers")), ("--threads", threads)):
        if count is not None and not 1 <= count <= 4096:
            raise UsageError(f"{name} is {count}, want 1 to 4096")
    named, place = required(run.get("model"), "MODEL"), out or Path()
    import torch

    from sparsify.budget.estimate import budget_of, calibrated
    from sparsify.budget.machine import available
    from sparsify.budget.verdict import check
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.source import resolve

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bars("nothing was written") as progress:
        folder = resolve(named, weights=False).folder
        budget = budget_of(
            folder,
            named,
            settings,
            device=where,
            workers=run.get("workers") or 1,
            offload=run.get("offload", False),
            trust_remote_code=trust_remote_code,
        )
        free = available(place, where)
        if not no_calibration:
            progress.notice("measuring this machine for a few seconds; other work on it makes the time too long")
            budget = calibrated(budget, place)
    problems = check(budget, free)
    if json:
        there = {
            "memory_bytes": free.memory_bytes,
            "memory_source": free.memory_source,
            "device_bytes": free.device_bytes,
            "disk_bytes": free.disk_bytes,
        }
        print_json(budget.to_dict() | {"available": there, "fits": not problems, "problems": problems})
    else:
        _print(budget, free)
        print_line("does not fit" if problems else "fits")
    if problems:
        raise BudgetError("; ".join(problems))


def _print(budget: Budget, free: Available) -> None:
    from sparsify.budget.verdict import size, span, summary
    from sparsify.console import print_line, print_table

    shapes, recipe = budget.shapes, budget.recipe
    data = f"{recipe.windows} x {recipe.length} tokens" if recipe.plan.needs_data else "no text"
    print_line(
        f"ESTIMATE for {shapes.name}: {shapes.n_blocks} blocks, {size(shapes.stored_bytes)} as stored, "
        f"{recipe.pattern} by {recipe.method}, {data}, {budget.workers} "
        f"{'process' if budget.workers == 1 else 'processes'} on {budget.device}"
    )
    print_line(summary(budget, free))
    ranked = sorted(budget.phases, key=budget.phase_bytes, reverse=True)
    print_table(
        ("moment", "memory of a process", *((budget.device,) if budget.on_gpu else ())),
        [
            (
                phase.name,
                size(budget.phase_bytes(phase)),
                *((size(phase.n_bytes(device=True)),) if budget.on_gpu else ()),
            )
            for phase in ranked[:6]
        ],
        title="ESTIMATED memory, the largest moments",
    )
    print_table(
        ("part of the largest", "bytes"),
        [("interpreter and libraries", size(budget.phase_bytes(ranked[0]) - _held(budget)))]
        + [
            (term.what, size(term.n_bytes) + (" in files" if term.in_file else ""))
            for term in ranked[0].terms
            if term.on_device is False or not budget.on_gpu
        ],
    )
    print_table(("files", "bytes"), [(term.what, size(term.n_bytes)) for term in budget.disk_terms])
    if budget.time is not None:
        time = budget.time
        print_line(
            f"time: {span(time.low, time.high)} in all, {span(time.block_low, time.block_high)} for the longest block "
            "(estimate from a short calibration; --json shows the terms)"
        )


def _held(budget: Budget) -> int:
    """Of the largest moment on the host, without what the process is made of itself."""
    phase = budget.largest
    return phase.n_bytes(device=False) + (0 if budget.on_gpu else phase.n_bytes(device=True))
