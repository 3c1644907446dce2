"""The tables behind the overview: accuracy, sizes, memory, single linears, environment, and what is not there."""

from __future__ import annotations

from typing import Any

from sparsify.bench.report import size
from sparsify.report import wording
from sparsify.report.cells import Cell, Line, Row, Sources, Table, none, part, plus, state, table, text, who
from sparsify.report.environment import facts


def tables(summary: dict[str, Any]) -> list[Table]:
    """All of them, with or without rows."""
    return [make(summary) for make in (_perplexity, _tasks, _artifacts, _memory, _kernels, _runs, _gaps)]


def cost(row: Row) -> Cell:
    """Perplexity, and its increase or why there is none."""
    lines = [Line(f"{row['perplexity']:,.2f}{plus(row['standard_error'])}")]
    if row["increase"]:
        error = row["increase"]["standard_error"]
        extra = "" if error is None else f" ± {error * 100:.1f}"
        lines.append(Line(wording.relative(row["increase"]["relative"]) + extra))
    elif row["role"] == "candidate":
        lines.append(Line(f"not compared: {row['why_no_increase']}", "quiet"))
    return lines


def _perplexity(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        kl, floor, windows = row["kl"], row["noise_floor"], row["text"]
        value, *increase = cost(row)
        divergence: Cell = none()
        if kl:
            same = Line(f"same first choice {wording.share(kl['top1_agreement'])}", "quiet")
            divergence = [Line(f"{_nats(kl)} nats from {kl['reference']}"), same]
            if floor:
                divergence = [*divergence, Line(f"noise floor {_nats(floor)}", "quiet")]
        used = f"{windows['source']}, {windows['windows']} windows of {windows['length']}, {row['n_tokens']:,} tokens"
        return [*who(row), state(row), [value], increase or text("baseline", "quiet"), divergence, text(used)]

    caption = (
        "± is the standard error over windows, no interval; the increase is paired, window by window, with dense in "
        "the same runtime. The noise floor is the divergence of dense itself in that runtime."
    )
    head = ("Artifact", "Runtime", "What ran", "Perplexity", "Increase", "KL divergence", "Text")
    return table(summary, ("perplexity", "Accuracy", caption), head, summary["accuracy"]["perplexity"], cells)


def _nats(kl: dict[str, Any]) -> str:
    return f"{kl['mean_nats']:.3g}{plus(kl['standard_error_nats'], '.2g')}"


def _tasks(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        found = row["difference"]
        difference = text("baseline", "quiet")
        if found:
            unpaired = found["standard_error"] is not None and not found["paired"]
            difference = [Line(f"{found['value']:+.3f}{plus(found['standard_error'], '.3f')}")]
            difference += [Line("unpaired", "quiet")] if unpaired else []
        elif row["role"] == "candidate":
            difference = text(f"not compared: {row['why_no_difference']}", "quiet")
        value = text(f"{row['value']:.3f}{plus(row['standard_error'], '.3f')}")
        n = [Line(f"{row['n']:,}"), Line(row["harness"], "quiet")]
        return [*who(row), text(f"{row['task']}, {row['metric']}"), value, difference, n]

    caption = (
        "± is the standard error, no interval; that of a difference is paired, question by question, with dense in "
        "the same runtime. Unpaired: as if both had scored other samples, so rather too large."
    )
    head = ("Artifact", "Runtime", "Task", "Value", "Difference to dense", "Samples")
    return table(summary, ("tasks", "Zero-shot tasks", caption), head, summary["accuracy"]["tasks"], cells)


def _artifacts(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        about = [row["model"], row["pattern"], row["method"], row["precision"]]
        sparse = (
            "" if row["sparsity"] is None else f", {wording.share(row['sparsity'])} zeros in {row['linears']} linears"
        )
        what = [Line(", ".join(part for part in about if part) + sparse), Line(row["path"], "quiet")]
        return [
            [Line(row["artifact"]), Line(row["role"], "quiet")], text(row["kind"]), what,
            *(text(size(row[key]) + part(row, key)) for key in ("weight_bytes", "file_bytes")),
            text(row["sha256"][:16], "quiet"),
        ]  # fmt: skip

    caption = "Bytes on disk; in brackets their ratio to the baseline's."
    head = ("Artifact", "Kind", "What it is", "Weights", "All files", "SHA-256")
    return table(summary, ("artifacts", "Artifacts and their size", caption), head, summary["artifacts"], cells)


def _memory(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        held = [
            none() if row[key] is None else text(size(row[key]) + part(row, key))
            for key in ("weights_resident_bytes", "loaded_resident_bytes", "peak_resident_bytes", "device_peak_bytes")
        ]
        return [*who(row), text(str(row["processes"])), *held]

    caption = "Memory of the processes that served each artifact; in brackets the ratio to the baseline's."
    head = ("Artifact", "Runtime", "Processes", "Weights", "Loaded", "Peak resident", "Peak on device")
    return table(summary, ("memory", "Memory in use", caption), head, summary["memory"], cells)


def _kernels(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        about = f"{row['pattern']}, {row['dtype']}, {wording.share(row['density'])} kept"
        name = [Line(row["linear"]), Line(f"{row['shape'][0]}x{row['shape'][1]}, {row['linears']} alike", "quiet")]
        how = [*(["cold"] if row["cold"] else ["in cache"]), *(["CUDA graphs"] if row["graphs"] else [])]
        timed = [line for each in row["kernels"] for line in _kernel(each, row)]
        where = [Line(row["device"]), Line(", ".join(how), "quiet")]
        roof = "unknown" if row["roof_speedup"] is None else wording.times(row["roof_speedup"])
        return [name, text(row["artifact"]), text(about), where, text(str(row["tokens"])), timed, text(roof)]

    caption = (
        "Median time of a product, its part of the roof, and the ratio of the best dense time to it with the 95 % "
        "interval of paired rounds. The best dense kernel was not run against itself, so that nothing is claimed here."
    )
    head = ("Linear", "Artifact", "Weights", "Device", "Tokens", "Kernels", "Roof of the ratio")
    return table(summary, ("kernels", "Single linears", caption), head, summary["kernels"], cells)


def _kernel(each: dict[str, Any], row: Row) -> list[Line]:
    roof = "" if each["roof_fraction"] is None else f", {wording.share(each['roof_fraction'])} of the roof"
    gain = each["speedup"]
    ratio = ", best dense" if each["kernel"] == row["best_dense"] else ""
    if gain:
        ratio = f": {wording.times(gain['ratio'])}"
        ratio += "" if gain["low"] is None else f" ({gain['low']:.2f} to {gain['high']:.2f})"
    auto = ", what auto runs" if each["kernel"] == row["auto"] else ""
    return [
        Line(f"{each['kernel']}{ratio}{auto}"),
        Line(f"{wording.seconds(each['median_us'] / 1e6)}, n = {each['n']}{roof}", "quiet"),
    ]


def _runs(summary: dict[str, Any]) -> Table:
    """The environment: one column for each run."""
    each = [facts(run) for run in summary["runs"]]
    keys = list(dict.fromkeys(key for found in each for key in found))
    rows = [(text(key), *(text(found.get(key, "")) for found in each)) for key in keys]
    sources = Sources(summary)
    rows.append((text("from line"), *(sources.cell(run["from"]) for run in summary["runs"])))
    head = ("", *(f"Run {run['number']}" for run in summary["runs"]))
    return Table("runs", "Where and how it was measured", "What each run found when it began.", head, tuple(rows))


def _gaps(summary: dict[str, Any]) -> Table:
    kinds = (("failed", "✖ failed", "bad"), ("not_measured", "not measured", ""), ("absent", "no record", ""))
    rows = [{**row, "kind": name, "mark": mark} for key, name, mark in kinds for row in summary[key]]

    def cells(row: Row) -> list[Cell]:
        scenario = row.get("scenario")
        about = [row.get("artifact"), row.get("runtime"), wording.scenario(scenario) if scenario else None]
        where = ", ".join(part for part in about if part)
        return [
            [Line(row["what"]), *([Line(where, "quiet")] if where else [])], text(row["kind"], row["mark"]),
            text(row.get("why", "")),
        ]  # fmt: skip

    caption = "Said by the run, or concluded from what its records lack."
    return table(summary, ("gaps", "What was not measured", caption), ("What", "How", "Why"), rows, cells)
