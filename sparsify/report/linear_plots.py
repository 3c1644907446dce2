"""Gains of single linears over numbers of tokens, each with the roof of its gain."""

from __future__ import annotations

from typing import Any

from sparsify.report import wording
from sparsify.report.drawing import Figure, draw, legend, looks

Row = dict[str, Any]
_SAME = ("run", "artifact", "device", "pattern", "density", "dtype")
# More lines in one figure would not be told apart.
_MOST = 6


def linear_figures(summary: dict[str, Any]) -> list[Figure]:
    """A figure for each artifact, device, pattern and dtype, and for every few linears of it."""
    groups: dict[tuple[Any, ...], dict[str, list[tuple[Row, dict[str, Any]]]]] = {}
    for row in summary["kernels"]:
        shown = next((each for each in row["kernels"] if each["kernel"] == row["shown"]), None)
        if shown and shown["speedup"]:
            same = groups.setdefault(tuple(row[key] for key in _SAME), {})
            same.setdefault(row["linear"], []).append((row, shown))
    found: list[Figure] = []
    for group, linears in groups.items():
        names = list(linears)
        step = -(-len(names) // -(-len(names) // _MOST))
        for start in range(0, len(names), step):
            some = {name: sorted(linears[name], key=_tokens) for name in names[start : start + step]}
            found.append(_figure(f"linears{len(found)}", group, some, several=len(summary["runs"]) > 1))
    return found


def _tokens(entry: tuple[Row, dict[str, Any]]) -> int:
    tokens: int = entry[0]["tokens"]
    return tokens


def _figure(
    key: str, group: tuple[Any, ...], linears: dict[str, list[tuple[Row, dict[str, Any]]]], *, several: bool
) -> Figure:
    run, artifact, device, pattern, density, dtype = group
    title = f"Single linears of {artifact}, {pattern}, on {device}{f', run {run}' if several else ''}"
    each = [entry for entries in linears.values() for entry in entries]
    ratios = sorted(shown["speedup"]["ratio"] for _, shown in each)
    caption = (
        f"{wording.share(density)} kept, {dtype}. Upright bars are 95 % intervals, level ones of the same "
        "colour the roof: the gain if both products ran as fast as the device allows. White: auto runs dense there."
    )
    details = f"The ratios go from {wording.times(ratios[0])} to {wording.times(ratios[-1])}."
    look = looks(list(linears))
    counts = sorted({row["tokens"] for row, _ in each})

    def fill(axes: Any) -> None:
        handles = []
        for i, (name, entries) in enumerate(linears.items()):
            style = look[name]
            # Side by side, so that none hides another.
            aside = (i - (len(linears) - 1) / 2) * 0.6 / max(1, len(linears))
            xs = [counts.index(row["tokens"]) + aside for row, _ in entries]
            ys = [shown["speedup"]["ratio"] for _, shown in entries]
            (line,) = axes.plot(
                xs, ys, color=style.colour, linestyle=style.dashes, marker=style.marker, markeredgecolor="black",
                linewidth=1,
            )  # fmt: skip
            for x, y, (row, shown) in zip(xs, ys, entries, strict=True):
                gain = shown["speedup"]
                if gain["low"] is not None:
                    axes.vlines(x, gain["low"], gain["high"], color=style.colour, linewidth=2.5, alpha=0.6)
                if row["auto"] != row["shown"]:
                    axes.plot([x], [y], marker=style.marker, color="white", markeredgecolor="black", linestyle="none")
                if row["roof_speedup"] is not None:
                    axes.hlines(row["roof_speedup"], x - 0.09, x + 0.09, color=style.colour, linewidth=3)
            handles.append(line)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlim(-0.6, len(counts) - 0.4)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel("tokens in the product")
        axes.set_ylabel("times as fast as the best dense")
        legend(axes, handles, [_label(name, entries[0][0]) for name, entries in linears.items()])

    head = ("Linear", "Shape", "Tokens", "Kernel", "Ratio", "95 % interval", "Roof of the ratio", "Auto runs")
    rows = tuple(_row(row, shown) for row, shown in each)
    return draw(Figure(key, title, caption, details, head, rows), fill, height=3.4)


def _label(name: str, row: Row) -> str:
    """The end of a linear's name, which tells it from the others, and its shape."""
    return f"{name.rsplit('.', 1)[-1]} {row['shape'][0]}x{row['shape'][1]}"


def _row(row: Row, shown: dict[str, Any]) -> tuple[str, ...]:
    gain = shown["speedup"]
    return (
        row["linear"], f"{row['shape'][0]}x{row['shape'][1]}", str(row["tokens"]), shown["kernel"],
        f"{gain['ratio']:.3f}", "" if gain["low"] is None else f"{gain['low']:.3f} to {gain['high']:.3f}",
        "" if row["roof_speedup"] is None else f"{row['roof_speedup']:.3f}", row["auto"] or "unknown",
    )  # fmt: skip
