"""The tables of the report in their order, and those of its first half: the overview and latency."""

from __future__ import annotations

from typing import Any

from sparsify.bench.report import size
from sparsify.report import detail_tables, wording
from sparsify.report.cells import Cell, Line, Mark, Row, Table, none, part, state, table, text, who
from sparsify.report.detail_tables import cost
from sparsify.report.pairs import MEASURES, Measure
from sparsify.report.verdict import headline, is_headline

_CLAIMS: dict[str, tuple[str, Mark]] = {
    "faster": ("▲ faster", "good"), "slower": ("▼ slower", "bad"), "no difference shown": ("= no difference shown", "")
}  # fmt: skip
# The other states are words already.
_BRIEF = {"unknown": "UNKNOWN", "unasked": "SPARSE"}
_NAMES: dict[Measure, str] = {
    "ttft": "First token", "tpot": "Per token", "total": "End to end", "throughput": "Tokens/s"
}  # fmt: skip
_PAIRED = "They are paired by round, not quotients of the medians, and against the faster of dense's two processes."
_THESE = "An interval is of these processes: new ones may differ by more, which a second run shows (bench --append)."


def tables(summary: dict[str, Any]) -> list[Table]:
    """Every table that has a row."""
    made = (overview(summary), _speed(summary), *detail_tables.tables(summary))
    return [each for each in made if each.rows]


def _overview_rows(summary: dict[str, Any]) -> list[Row]:
    """What there is of each artifact and runtime."""
    perplexity, latency = summary["accuracy"]["perplexity"], summary["latency"]
    keys = dict.fromkeys(
        (row["run"], row["artifact"], row["runtime"]) for row in (*latency, *perplexity, *summary["memory"])
    )
    rows = []
    for key in keys:
        run, artifact, runtime = key

        def mine(among: list[Row], key: tuple[Any, ...] = key) -> Row | None:
            return next((row for row in among if (row["run"], row["artifact"], row["runtime"]) == key), None)

        timed = mine([row for row in latency if is_headline(latency, row)])
        found = [row for row in (timed, mine(perplexity), mine(summary["memory"])) if row]
        made = next(row for row in summary["artifacts"] if (row["run"], row["artifact"]) == (run, artifact))
        rows.append(
            {
                "run": run, "artifact": artifact, "runtime": runtime, "timed": timed, "perplexity": mine(perplexity),
                "memory": mine(summary["memory"]), "made": made, "status": found[0]["status"],
                "judged": headline(latency, run, runtime),
                "from": [source for row in (*found, made) for source in row["from"]],
            }
        )  # fmt: skip
    return rows


def overview(summary: dict[str, Any]) -> Table:
    """One row for each artifact and runtime, judged by the runtime's first scenario."""
    rows = _overview_rows(summary)
    judged = list(dict.fromkeys(row["judged"][0] for row in rows if row["judged"]))
    caption = f"Ratios above 1x are better than dense, with their 95 % interval. {_PAIRED} {_THESE}"
    if len(judged) == 1:
        caption += f" Times at {judged[0]}."
    head = ("Artifact", "Runtime", "What ran", "Time to a token", "End to end", "Perplexity", "Weights", "Peak memory")
    about = ("overview", "Speed, accuracy and memory", caption)
    return table(summary, about, head, rows, lambda row: _overview(row, scenario=len(judged) > 1))


def brief(summary: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the overview in few words, for a terminal: one line for each candidate and runtime."""
    candidates = {(row["run"], row["artifact"]) for row in summary["artifacts"] if row["role"] == "candidate"}
    several = len(summary["runs"]) > 1
    rows = []
    for row in _overview_rows(summary):
        if (row["run"], row["artifact"]) not in candidates:
            continue
        speed = _brief_speed(row["timed"]["measures"][row["judged"][1]]) if row["timed"] else ""
        increase = (row["perplexity"] or {}).get("increase")
        held = (row["memory"] or {}).get("to_baseline") or {}
        ratio = held.get("device_peak_bytes", held.get("peak_resident_bytes"))
        rows.append(
            (
                *([str(row["run"])] if several else []), row["artifact"], row["runtime"],
                _BRIEF.get(row["status"]["state"], row["status"]["state"]), speed,
                wording.relative(increase["relative"]) if increase else "", "" if ratio is None else f"{ratio:.2f}x",
            )
        )  # fmt: skip
    return (*(["run"] if several else []), "artifact", "runtime", "ran", "speed", "perplexity", "memory"), rows


def _brief_speed(values: dict[str, Any]) -> str:
    compared = values["comparison"]
    if compared is None:
        return "not compared"
    ratio = wording.times(compared["ratio"])
    if values["why_no_claim"]:
        return f"? {ratio}"
    return f"{_CLAIMS[compared['claim']][0][0]} {ratio} ({compared['low']:.2f}-{compared['high']:.2f})"


def _overview(row: Row, *, scenario: bool) -> list[Cell]:
    perplexity, memory, made, timed = row["perplexity"], row["memory"], row["made"], row["timed"]
    name = [Line(row["artifact"]), *([Line(made["pattern"], "quiet")] if made["pattern"] else [])]
    speed: list[Cell] = [none(), none()]
    if timed:
        measure = row["judged"][1]
        speed = [_short(timed["measures"][each]) for each in (measure, "total")]
        about = ["first token"] if measure == "ttft" else []
        about += [row["judged"][0]] if scenario else []
        speed[0] = [*speed[0], *([Line(", ".join(about), "quiet")] if about else [])]
    held = none()
    if memory:
        keys = ("device_peak_bytes", "peak_resident_bytes")
        held = [
            Line(f"{size(memory[key])}{' device' if key == keys[0] else ''}{part(memory, key)}")
            for key in keys
            if memory[key]
        ]
    stored = text(size(made["weight_bytes"]) + part(made, "weight_bytes"))
    accuracy = cost(perplexity) if perplexity else none()
    return [name, text(row["runtime"]), state(row), *speed, accuracy, stored, held]


def _short(values: dict[str, Any]) -> Cell:
    found = values["statistics"]
    return [Line(wording.seconds(found["median"])), *_claim(values)] if found else none()


def _speed(summary: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[Cell]:
        about = who(row)
        if row["baseline_session"] not in (None, row["session"]):
            about[1] = [*about[1], Line(f"{row['baseline']}: {row['baseline_session']}", "quiet")]
        return [*about, text(wording.scenario(row["scenario"])), state(row), *map(_timed, row["measures"].values())]

    caption = (
        "Median, then percentiles where there are samples enough, least and largest, and n samples; then the median "
        "of the ratios to dense in n rounds with its 95 % interval, the noise (dense against itself), and what part of "
        f"the roof was reached. {_PAIRED} {_THESE}"
    )
    head = ("Artifact", "Runtime", "Scenario", "What ran", *(_NAMES[measure] for measure in MEASURES))
    return table(summary, ("speed", "Latency and throughput", caption), head, summary["latency"], cells)


def _timed(values: dict[str, Any]) -> Cell:
    """Median, percentiles, comparison, noise and roof of one measure."""
    found = values["statistics"]
    if found is None:
        return text("one new token", "quiet")
    show = wording.figure if values["unit"] == "tokens/s" else wording.seconds
    percentiles = [f"{name} {show(found[name])}" for name in ("p90", "p99") if found[name] is not None]
    lines = [Line(show(found["median"]))]
    lines += [Line(", ".join(percentiles), "quiet")] if percentiles else []
    lines += [Line(f"{show(found['min'])} to {show(found['max'])}", "quiet"), Line(f"n = {found['n']}", "quiet")]
    lines += [*_claim(values), *_noise(values)]
    lines += [Line(values["unexplained"], "quiet")] if values["unexplained"] else []
    roof = values["roof"]
    if roof:
        lines.append(Line(f"{wording.share(roof['fraction'])} of {roof['limit']} roof", "quiet"))
    return lines


def _claim(values: dict[str, Any]) -> Cell:
    """A comparison in a line, or why there is none."""
    compared = values["comparison"]
    if compared is None:
        return text(f"not compared: {values['why_no_claim']}", "quiet") if values["why_no_claim"] else []
    ratio = wording.times(compared["ratio"])
    if values["why_no_claim"]:
        return text(f"{ratio}, no claim: {values['why_no_claim']}", "quiet")
    said, mark = _CLAIMS[compared["claim"]]
    return [
        Line(f"{ratio} ({compared['low']:.2f} to {compared['high']:.2f})", mark),
        Line(f"{said}, n = {compared['n']}", mark),
    ]


def _noise(values: dict[str, Any]) -> Cell:
    compared = values["comparison"]
    if compared is None or compared["noise_low"] is None:
        return []
    return text(f"noise {compared['noise_low']:.2f} to {compared['noise_high']:.2f}", "quiet")
