"""Bars of bytes: what is stored, and what the processes held."""

from __future__ import annotations

from typing import Any

from sparsify.bench.report import size
from sparsify.report.drawing import Figure, Look, draw, legend

Row = dict[str, Any]


def memory_figures(summary: dict[str, Any], look: dict[str, Look]) -> list[Figure]:
    """Bars: what is stored, for each run; what was held, for each runtime."""
    found = []
    several = len(summary["runs"]) > 1
    for run in summary["runs"]:
        number = run["number"]
        where = f" in run {number}" if several else ""
        stored = [row for row in summary["artifacts"] if row["run"] == number]
        groups = [("stored weights", "weight_bytes"), ("all files", "file_bytes")]
        if stored:
            found.append(_bars(f"stored{number}", f"Size on disk{where}", stored, groups, look))
        held = [row for row in summary["memory"] if row["run"] == number]
        groups = [
            ("weights", "weights_resident_bytes"), ("loaded", "loaded_resident_bytes"),
            ("peak", "peak_resident_bytes"), ("device peak", "device_peak_bytes"),
        ]  # fmt: skip
        for i, runtime in enumerate(dict.fromkeys(row["runtime"] for row in held)):
            rows = [row for row in held if row["runtime"] == runtime]
            found.append(_bars(f"memory{number}x{i}", f"Memory held by {runtime}{where}", rows, groups, look))
    return found


def _bars(key: str, title: str, rows: list[Row], groups: list[tuple[str, str]], look: dict[str, Look]) -> Figure:
    groups = [(name, field) for name, field in groups if any(row[field] is not None for row in rows)]
    details = ""
    for name, field in groups:
        values = ", ".join(f"{row['artifact']} {size(row[field])}" for row in rows if row[field] is not None)
        details += f"{name.capitalize()}: {values}. "

    def fill(axes: Any) -> None:
        handles, height = {}, 0.8 / len(rows)
        largest = max(row[field] for row in rows for _, field in groups if row[field] is not None)
        for i, (_, field) in enumerate(groups):
            for j, row in enumerate(rows):
                if row[field] is None:
                    continue
                style, y = look[row["artifact"]], -i - (j - (len(rows) - 1) / 2) * height
                handles[row["artifact"]] = axes.barh(
                    y, row[field] / 1e9, height, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.6
                )
                axes.text(row[field] / 1e9 + largest / 1e11, y, size(row[field]), va="center", fontsize=8)
        axes.set_yticks([-i for i in range(len(groups))], [name for name, _ in groups])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, largest / 1e9 * 1.2)
        axes.set_xlabel("GB")
        legend(axes, list(handles.values()), list(handles))

    head = ("Artifact", *(name for name, _ in groups))
    table = tuple(
        (row["artifact"], *("" if row[field] is None else size(row[field]) for _, field in groups)) for row in rows
    )
    figure = Figure(key, title, "", details.strip(), head, table)
    return draw(figure, fill, height=1.3 + 0.24 * len(groups) * len(rows))
