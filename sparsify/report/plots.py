"""The figures of the report: accuracy against latency, distributions, gains with their intervals, linears, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.bench.spread import percentile
from sparsify.report import wording
from sparsify.report.drawing import Figure, Look, draw, legend, looks
from sparsify.report.linear_plots import linear_figures
from sparsify.report.memory_plots import memory_figures
from sparsify.report.pairs import Measure
from sparsify.report.verdict import headline, is_headline

Row = dict[str, Any]
_AXIS: dict[Measure, str] = {"tpot": "time to a token, ms", "ttft": "time to the first token, ms"}
# Points of a distribution that are drawn: more cannot be told apart.
_POINTS = 300


def figures(records: Records, summary: dict[str, Any]) -> list[Figure]:
    """Every figure that there are numbers for; of the same records, ``summary`` is ``summarise(records)``."""
    made = summary["artifacts"]
    look = looks([row["artifact"] for row in made], [row["artifact"] for row in made if row["role"] == "baseline"])
    latency = summary["latency"]
    found: list[Figure] = []
    for run, runtime in dict.fromkeys((row["run"], row["runtime"]) for row in latency):
        judged = headline(latency, run, runtime)
        assert judged is not None
        where = f"{runtime}{f', run {run}' if len(summary['runs']) > 1 else ''}"
        rows = [row for row in latency if (row["run"], row["runtime"]) == (run, runtime)]
        drawn = (
            _pareto(f"pareto{len(found)}", where, [row for row in rows if is_headline(latency, row)], summary, look),
            _gains(f"gains{len(found)}", where, rows, judged[1], look),
            _distribution(f"spread{len(found)}", where, _with_samples(records, summary, run, runtime), judged, look),
        )
        found += [figure for figure in drawn if figure]
    found += linear_figures(summary)
    found += memory_figures(summary, look)
    return found


@dataclass(frozen=True)
class _Point:
    """An artifact between latency and accuracy: increase in percent; ``known``: dense, or shown to be faster."""

    name: str
    time: dict[str, Any]
    cost: float
    error: float | None
    measure: Measure
    known: bool

    def beats(self, other: _Point) -> bool:
        """Whether it is known to be no worse in both, and better in one."""
        mine, its = (self.time["median"], self.cost), (other.time["median"], other.cost)
        return self.known and mine != its and mine[0] <= its[0] and mine[1] <= its[1]


def _pareto(key: str, where: str, rows: list[Row], summary: dict[str, Any], look: dict[str, Look]) -> Figure | None:
    """Perplexity increase against latency; the frontier are those that none beats in both."""
    points = []
    for row in rows:
        of = [
            each
            for each in summary["accuracy"]["perplexity"]
            if all(each[name] == row[name] for name in ("run", "artifact", "runtime"))
        ]
        measure: Measure = "tpot" if row["measures"]["tpot"]["by_round"] else "ttft"
        time = row["measures"][measure]["by_round"]
        if not of or time is None or (of[0]["increase"] is None and of[0]["role"] == "candidate"):
            continue
        increase = of[0]["increase"] or {"relative": 0.0, "standard_error": None}
        compared = row["measures"][measure]["comparison"]
        gains = compared is not None and compared["claim"] == "faster"
        points.append(
            _Point(
                row["artifact"],
                time,
                increase["relative"] * 100,
                increase["standard_error"],
                measure,
                gains or not of[0]["increase"],
            )
        )
    if len(points) < 2:
        return None
    frontier = sorted(
        (point for point in points if point.known and not any(other.beats(point) for other in points)),
        key=lambda point: (point.time["median"], point.cost),
    )
    title = f"Accuracy against latency in {where}"
    caption = (
        f"{wording.scenario(rows[0]['scenario'])}. Better is left and down. On the frontier is dense, and what is "
        "shown to be faster than dense while no other is better in both."
    )
    details = f"On the frontier: {', '.join(point.name for point in frontier)}."

    def fill(axes: Any) -> None:
        xs, ys = [point.time["median"] * 1e3 for point in frontier], [point.cost for point in frontier]
        # One point makes no line.
        lines = (
            axes.step(xs, ys, where="post", color="#666666", linestyle="--", linewidth=1) if len(frontier) > 1 else []
        )
        handles = []
        for point in points:
            style, middle, low, high = look[point.name], *(point.time[key] for key in ("median", "low", "high"))
            sides = None if low is None else [[(middle - low) * 1e3], [(high - middle) * 1e3]]
            handles.append(
                axes.errorbar(
                    [middle * 1e3], [point.cost], xerr=sides, yerr=None if point.error is None else [point.error * 100],
                    marker=style.marker, color=style.colour, markeredgecolor="black", markersize=8, linestyle="none",
                    ecolor="#444444", elinewidth=1, capsize=2,
                )
            )  # fmt: skip
        axes.set_xlabel(_AXIS[points[0].measure])
        axes.set_ylabel("increase of perplexity, %")
        axes.margins(0.12)
        axes.set_xlim(left=0)
        legend(axes, [*handles, *lines], [*(point.name for point in points), *("frontier" for _ in lines)])

    table = tuple(
        (
            point.name, wording.seconds(point.time["median"]), f"{point.cost:+.1f} %",
            "" if point.error is None else f"{point.error * 100:.1f} %", "yes" if point in frontier else "no",
        )
        for point in points
    )  # fmt: skip
    head = ("Artifact", "Median time", "Increase of perplexity", "Standard error", "On the frontier")
    return draw(Figure(key, title, caption, details, head, table), fill)


def _gains(key: str, where: str, rows: list[Row], measure: Measure, look: dict[str, Look]) -> Figure | None:
    """Paired ratios with their interval in every scenario, over the noise of dense against itself."""
    found = [(row, row["measures"][measure]["comparison"]) for row in rows]
    drawn = [(row, compared) for row, compared in found if compared and compared["low"] is not None]
    if not drawn:
        return None
    names = list(dict.fromkeys(row["artifact"] for row, _ in drawn))
    title = f"Gain over dense in {where}"
    does = "decoding" if measure == "tpot" else "time to the first token"
    claims = "; ".join(f"{row['artifact']} at {wording.scenario(row['scenario'])}: {c['claim']}" for row, c in drawn)
    caption = f"{does.capitalize()}: ratio to dense with its 95 % interval; grey is the noise, dense against itself."
    details = f"Claims: {claims}."

    def fill(axes: Any) -> None:
        handles = {}
        for i, (row, compared) in enumerate(drawn):
            style, y = look[row["artifact"]], -i
            axes.fill_betweenx(
                [y - 0.42, y + 0.42], compared["noise_low"], compared["noise_high"], color="#cccccc", linewidth=0
            )
            middle = compared["ratio"]
            handles[row["artifact"]] = axes.errorbar(
                [middle], [y], xerr=[[middle - compared["low"]], [compared["high"] - middle]], marker=style.marker,
                color=style.colour, markeredgecolor="black", linestyle="none", capsize=3,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks([-i for i in range(len(drawn))], [wording.scenario(row["scenario"]) for row, _ in drawn])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{does}: times as fast as dense")
        axes.margins(x=0.08)
        legend(axes, list(handles.values()), names)

    table = tuple(
        (
            row["artifact"], wording.scenario(row["scenario"]), f"{c['ratio']:.3f}",
            f"{c['low']:.3f} to {c['high']:.3f}", f"{c['noise_low']:.3f} to {c['noise_high']:.3f}", str(c["n"]),
            c["claim"],
        )
        for row, c in drawn
    )  # fmt: skip
    head = ("Artifact", "Scenario", "Ratio", "95 % interval", "Noise", "Rounds", "Claim")
    return draw(Figure(key, title, caption, details, head, table), fill, height=1.6 + 0.26 * len(drawn))


def _with_samples(records: Records, summary: dict[str, Any], run: int, runtime: str) -> list[tuple[Row, Record]]:
    """The rows of a runtime's first scenario with their records: a row for each record, in their order."""
    latency = summary["latency"]
    return [
        (row, record)
        for row, record in zip(latency, records.of("latency"), strict=True)
        if (row["run"], row["runtime"]) == (run, runtime) and is_headline(latency, row)
    ]


def _distribution(
    key: str, where: str, rows: list[tuple[Row, Record]], judged: tuple[str, Measure], look: dict[str, Look]
) -> Figure | None:
    """Share of single times at or below each value: of gaps between tokens, else of times to the first."""
    scenario, measure = judged
    samples: list[tuple[str, list[float]]] = []
    for row, record in rows:
        rounds = [each for each in record["rounds"] if not each["again"]]
        gaps = [gap for each in rounds for line in each["gaps_s"] for gap in line]
        firsts = [first for each in rounds for first in each["ttft_s"]]
        values = sorted(gaps if measure == "tpot" else firsts)
        if values:
            samples.append((row["artifact"], values))
    if not samples:
        return None
    what = "times between tokens" if measure == "tpot" else "times to the first token"
    title = f"Distribution of {what} in {where}"
    middle = "; ".join(f"{name} {wording.seconds(percentile(values, 0.5))}" for name, values in samples)
    caption = f"{scenario}. The share of {what} that were no longer; further left is faster."
    details = f"Medians: {middle}."

    def fill(axes: Any) -> None:
        handles = []
        for name, values in samples:
            style, n = look[name], len(values)
            places = [round(i * (n - 1) / (_POINTS - 1)) for i in range(_POINTS)] if n > _POINTS else list(range(n))
            (line,) = axes.step(
                [values[i] * 1e3 for i in places], [(i + 1) / n for i in places], where="post", color=style.colour,
                linestyle=style.dashes, marker=style.marker, markevery=max(1, len(places) // 6), markersize=5,
                markeredgecolor="black",
            )  # fmt: skip
            handles.append(line)
        axes.set_xlabel(_AXIS[measure])
        axes.set_ylabel("share of samples")
        axes.set_ylim(0, 1.02)
        legend(axes, handles, [name for name, _ in samples])

    shares = (0.0, 0.5, 0.9, 0.99, 1.0)
    table = tuple(
        (name, str(len(values)), *(wording.seconds(percentile(values, share)) for share in shares))
        for name, values in samples
    )
    head = ("Artifact", "Samples", "Least", "Median", "90 %", "99 %", "Largest")
    return draw(Figure(key, title, caption, details, head, table), fill)
