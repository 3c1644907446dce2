"""The command that measures which kernel is fastest on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.errors import OutputError, UsageError
from sparsify.options import Device, Json, Trust, check_device

if TYPE_CHECKING:
    import torch

    from sparsify.kernels.table import Table

_SHAPE = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})")
_COLUMNS = 6


def tune_command(
    device: Device = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="OUTxIN of a weight; repeatable.", show_default="SmolLM2-135M, Llama of 1B and 8B"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The shapes of this model's linears.", show_default="none")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, f16, f32, int8 (with bf16 inputs), int8-f32; repeatable.",
            show_default="bf16, on a CPU also int8",
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="N:M or a sparsity; repeatable.", show_default="2:4, 0.5, 0.6, 0.7")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Rows of the input; repeatable.", show_default="1 to 2048")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each way.", show_default="7")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="as torch decides")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write.", show_default="this device's, in the cache")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer numbers of tokens, rounds and copies.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure sparse and dense products on this machine; `auto` then chooses by what was measured.

    What a table holds already and is measured again is replaced, the rest stays. Interrupted, the shapes that were
    finished stay too.
    """
    from dataclasses import replace

    import torch

    from sparsify.console import print_json, print_line, print_table, progress_bars
    from sparsify.kernels import tuning_request as ask
    from sparsify.kernels.table import merged, places, threads_of, write
    from sparsify.kernels.tuning import tune

    check_device(device or "cpu")
    if rounds is not None and rounds < 1:
        raise UsageError(f"--rounds {rounds} is below 1")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads {threads} is below 1")
        torch.set_num_threads(threads)
    where = torch.device(device or "cpu")
    request = ask.Request(where, dtypes=ask.DTYPES if where.type == "cpu" else ask.GPU_DTYPES)
    if quick:
        request = replace(request, tokens=ask.QUICK_TOKENS, rounds=3, n_bytes=ask.QUICK_BYTES)
    given: dict[str, Any] = {"dtypes": dtype, "patterns": pattern, "tokens": tokens}
    given = {name: tuple(dict.fromkeys(value)) for name, value in given.items() if value}
    request = replace(request, **given, rounds=rounds or request.rounds)
    if shape or model:
        shapes = [_shape(text) for text in shape or []]
        shapes += _shapes_of(model, trust_remote_code=trust_remote_code) if model else []
        request = replace(request, shapes=tuple(dict.fromkeys(shapes)))
    ask.check(request)
    path = out or places(where)["measured here"]
    known: Table | None = None
    result: Table | None = None
    stopped = False

    with progress_bars() as progress:
        known = _known(path, where, mine=out is None, notice=progress.notice)
        if where.type == "cpu":
            policy = os.environ.get("OMP_WAIT_POLICY", "not set")
            progress.notice(f"{torch.get_num_threads()} threads of torch; OMP_WAIT_POLICY is {policy}")
            if policy.upper() != "PASSIVE":
                progress.notice("threads that spin while they wait distort times on shared cores: set it to PASSIVE")

        def keep(table: Table) -> None:
            nonlocal result
            result = table
            write(table if known is None else merged(known, table), path)

        try:
            tune(request, progress, keep)
        except KeyboardInterrupt:
            stopped = True
    if json:
        print_json({"out": str(path), "complete": not stopped, "rows": _rows(result)})
    elif result is not None:
        counts = _shown(result)
        print_table(("weight", *map(str, counts)), _cells(result, counts))
        print_line(f"{path}: best dense time / best packed time by number of tokens, {threads_of(where)} threads")
    if stopped:
        raise typer.Exit(130)


def _known(path: Path, device: torch.device, *, mine: bool, notice: Callable[[str], None]) -> Table | None:
    """The table that is there already; what lies in the cache and is none is replaced, anything else is refused."""
    from sparsify.kernels.table import read

    table = read(path, device) if path.exists() else None
    if table is None and path.exists():
        if not mine:
            raise OutputError(f"{path}: is there and no table of this device and its threads; choose another --out")
        notice(f"{path} is replaced")
    return table


def _rows(table: Table | None) -> list[dict[str, Any]]:
    """For each entry, the best dense time / the best packed time by number of tokens."""
    rows = []
    for entry in table.entries if table else ():
        speed = {str(t): round(entry.rival_us(t) / us, 3) for t in entry.tokens if (us := entry.packed_us(t))}
        kind = {key: getattr(entry, key) for key in ("n_out", "n_in", "values", "x", "pattern", "density")}
        rows.append({**kind, "speed": speed})
    return rows


def _shown(table: Table) -> list[int]:
    """Numbers of tokens for a terminal: no more than some, the ends among them."""
    counts = sorted({tokens for entry in table.entries for tokens in entry.tokens})
    step = max(1, -(-(len(counts) - 1) // (_COLUMNS - 1)))
    return sorted({*counts[::step], counts[-1]})


def _cells(table: Table, counts: list[int]) -> list[tuple[str, ...]]:
    cells = []
    for row in _rows(table):
        kept = f"{row['density']:g} kept" if row["pattern"] == "unstructured" else row["pattern"]
        speed = [f"{row['speed'][str(t)]:.2f}" if str(t) in row["speed"] else "" for t in counts]
        cells.append((f"{row['n_out']}x{row['n_in']} {row['values']} {kept}", *speed))
    return cells


def _shape(text: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(f"--shape {text!r}: write OUTxIN, such as 4096x4096")
    return int(match[1]), int(match[2])


def _shapes_of(model: str, *, trust_remote_code: bool) -> list[tuple[int, int]]:
    from sparsify.model import load_skeleton
    from sparsify.source import resolve

    skeleton = load_skeleton(resolve(model).folder, trust_remote_code=trust_remote_code)
    return sorted({(spec.out_features, spec.in_features) for block in skeleton.linears for spec in block})
