"""The command that predicts what sparsity would gain, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sparsify.errors import UsageError
from sparsify.options import Json, Model, Trust, required

if TYPE_CHECKING:
    from sparsify.progress import Progress
    from sparsify.roofline.calibration import Point
    from sparsify.roofline.devices import Device
    from sparsify.roofline.prediction import LinearGain, Plan, StepGain

_Row = TypeVar("_Row")
_PATTERNS = ("2:4", "0.5", "0.6", "0.7")


def plan_command(
    model: Model = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="here (measured now), or a GPU by its published peaks: h200, h100-sxm, h100-pcie, a100-80gb, …",
            show_default="here",
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="N:M or a sparsity; repeatable.", show_default=", ".join(_PATTERNS)),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and inputs: bfloat16, float16, float32, float8, int8. The dense model is taken in it too.",
            show_default="bfloat16",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; repeatable.", show_default="1")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of each prompt.", show_default="512")] = None,
    new: Annotated[int | None, typer.Option(help="Tokens generated for each.", show_default="128")] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Records of sparsify bench with kernels measured on that device; repeatable."),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Predict what sparsity would gain a model on a device, before pruning it or downloading its weights.

    Each figure says what it rests on: products measured on the device, published measurements, or the roof alone, which
    is an upper bound. MODEL may be a folder with nothing but config.json.
    """
    from sparsify.console import print_json, progress_bars
    from sparsify.model import load_skeleton
    from sparsify.roofline.calibration import raised
    from sparsify.roofline.config import check_size
    from sparsify.roofline.devices import dtype_name
    from sparsify.roofline.plan import check, plan
    from sparsify.roofline.verdict import notes, verdicts
    from sparsify.source import resolve

    named = required(model, "MODEL")
    wanted = dtype_name("bfloat16" if dtype is None else dtype)
    patterns, batches = tuple(dict.fromkeys(pattern or _PATTERNS)), tuple(dict.fromkeys(batch or [1]))
    lengths = (512 if prompt is None else prompt, 128 if new is None else new)
    # What was typed is checked before anything is downloaded or measured.
    check(patterns, batches, *lengths)
    with progress_bars("nothing was written") as progress:
        folder = resolve(named, weights=False).folder
        check_size(folder)
        skeleton = load_skeleton(folder, trust_remote_code=trust_remote_code, weights=False)
        for text in skeleton.notices:
            progress.notice(text)
        known = _device(device, progress)
        points = _points(known, records or [], progress)
        known = raised(known, points)
    made = plan(skeleton, known, patterns, wanted, batches, *lengths, points, named)
    if json:
        found: dict[str, Any] = {"verdicts": verdicts(made), "notes": notes(made)}
        found["verdicts"] = [
            {"pattern": each.pattern, "pays": each.pays, "reasons": list(each.reasons)} for each in found["verdicts"]
        ]
        print_json(made.to_dict() | found)
    else:
        _print(made)


def _device(name: str | None, progress: Progress) -> Device:
    from sparsify.roofline.devices import HERE, find_device

    if name not in (None, HERE):
        return find_device(str(name))
    import torch

    from sparsify.roofline.ceilings import measure_ceilings

    progress.notice("measuring this machine's bandwidth and products; other work on it makes them too low")
    return measure_ceilings("cuda" if torch.cuda.is_available() else "cpu", quick=True).device


def _points(device: Device, files: Sequence[Path], progress: Progress) -> list[Point]:
    """What was measured on the device: the records given, and at hand the tuner's tables."""
    from sparsify.roofline.calibration import from_records, from_table, kernels
    from sparsify.roofline.devices import HERE

    points: list[Point] = []
    if files:
        from sparsify.bench.records import read

        lines = read(files).lines
        points = from_records(lines, device)
        if not all(point.own for point in points):
            progress.notice(
                f"--records: some are of a machine with {device.full_name} that has other cores, memory or ceilings "
                "than this one; of those only ratios are taken, where there is nothing of this one"
            )
        if not points:
            found = {f"{on}, {record['threads']} threads" if record["threads"] else on for record, on in kernels(lines)}
            asked = f"{device.full_name}, {device.threads} threads" if device.threads else device.full_name
            raise UsageError(
                f"--records: no kernel was measured on {asked}; there are those of {'; '.join(sorted(found)) or 'none'}"
            )
    if device.name == HERE:
        import torch

        from sparsify.kernels.table import table_for

        points += from_table(table_for(torch.device(device.kind)))
        if not points:
            progress.notice("no product was measured on this device; sparsify tune does, and predictions get better")
    return points


def _print(made: Plan) -> None:
    from sparsify.console import print_line, print_table
    from sparsify.roofline.prediction import ROOF_ONLY
    from sparsify.roofline.verdict import notes, verdicts

    device = made.device
    print_line(
        f"PREDICTION, this model was not run: {made.model}, {made.n_weights / 1e9:.2f} billion weights, "
        f"{100 * made.prunable:.0f} % of them prunable, {made.dtype}"
    )
    peak = device.flops[made.dtype] / 1e12
    rate = f"{peak:.0f}" if peak >= 10 else f"{peak:.2g}"
    print_line(
        f"{device.full_name}: {device.bytes_per_s / 1e9:.0f} GB/s, {rate} Tflop/s in {made.dtype} ({device.source})"
    )
    sources = _Sources()
    rows = (*made.steps, *made.alternative)
    print_table(
        ("step", "batch", "dense", *dict.fromkeys(row.pattern for row in rows)),
        [
            (_phase(made, same[0]), str(same[0].batch), _dense(same[0]), *(_step(row, sources) for row in same))
            for same in _grouped(rows, lambda row: (row.phase, row.batch))
        ],
        title="PREDICTED for whole steps: dense time / pruned time",
    )
    tokens = dict.fromkeys(map(_tokens, made.linears))
    print_table(
        ("linears", "weight", "pattern", *tokens),
        [
            (_names(same[0]), "{}x{}".format(*same[0].shape), same[0].pattern, *_cells(same, tokens, sources))
            for same in _grouped(made.linears, lambda row: (row.pattern, row.shape))
        ],
        title="PREDICTED for each linear: dense time / sparse time",
    )
    print_table(
        ("memory", "weights, GB", "with cache, GB"),
        [(row.pattern or "dense", f"{row.weight_bytes / 1e9:.2f}", f"{row.n_bytes / 1e9:.2f}") for row in made.memory],
        title="PREDICTED memory",
    )
    for verdict in verdicts(made):
        print_line(f"{verdict.pattern} {_PAYS[verdict.pays]}. {' '.join(map(_sentence, verdict.reasons))}")
    for note in notes(made):
        print_line(f"Note: {note}.")
    if any(ROOF_ONLY in row.basis for row in rows):
        print_line("up to: by the roof alone, an upper bound that nothing measured supports.")
    for line in sources.lines():
        print_line(line)


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], Any]) -> list[list[_Row]]:
    found: dict[Any, list[_Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _names(row: LinearGain) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in row.linears))


def _tokens(row: LinearGain) -> str:
    """Of experts the mean, which need not be whole."""
    count = f"{row.tokens:.0f}" if row.tokens >= 10 else f"{row.tokens:.3g}"
    return f"{count} token" if count == "1" else f"{count} tokens"


def _phase(made: Plan, step: StepGain) -> str:
    return f"{step.phase} of {made.prompt}" if step.phase == "prefill" else step.phase


def _step(step: StepGain, sources: _Sources) -> str:
    from sparsify.roofline.prediction import TOO_SMALL

    if step.too_small:
        return TOO_SMALL
    marks = [sources.mark(basis) for basis in step.basis]
    return _gain(step.low, step.high, [mark for mark in marks if mark], roof_only=not any(marks))


def _cells(rows: Sequence[LinearGain], tokens: Iterable[str], sources: _Sources) -> list[str]:
    by_tokens = {_tokens(row): row for row in rows}
    cells = []
    for count in tokens:
        row = by_tokens.get(count)
        mark = sources.mark(row.basis) if row else ""
        cells.append(_gain(row.low, row.high, [mark] if mark else [], roof_only=not mark) if row else "")
    return cells


def _gain(low: float, high: float, marks: Sequence[str], *, roof_only: bool) -> str:
    from sparsify.roofline.prediction import span

    if roof_only:
        return f"up to {high:.2f}" if high >= 1.005 else "1.00"
    return " ".join([span(low, high), *dict.fromkeys(marks)])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


_PAYS = {"yes": "pays", "no": "does not pay", "unclear": "may pay"}


class _Sources:
    """Numbers what predictions rest on: too long for a table."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def mark(self, basis: str) -> str:
        """``[1]``; nothing for the roof alone."""
        from sparsify.roofline.prediction import ROOF_ONLY

        if basis == ROOF_ONLY:
            return ""
        if basis not in self._found:
            self._found.append(basis)
        return f"[{self._found.index(basis) + 1}]"

    def lines(self) -> list[str]:
        """What the numbers stand for."""
        return [f"[{i}] {basis}" for i, basis in enumerate(self._found, 1)]


def _dense(step: StepGain) -> str:
    seconds = step.dense_s
    time = f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return f"{'≈' if step.dense_is_measured else '≥'} {time}"
