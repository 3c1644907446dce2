"""``report.json``: everything the report says, as plain JSON values, each beside the records it is from.

A pure function of records: no clock, no environment, and numbers of different runs never meet in a ratio.
"""

from __future__ import annotations

from typing import Any

from sparsify.bench.records import Records
from sparsify.bench.spread import CONFIDENCE
from sparsify.report import accuracy, gaps, kernels, sizes, speed
from sparsify.report.verdict import sentences, verdict
from sparsify.report.wording import clean, scenario, share

FORMAT = 1
# What is reached of a roof; more than that is no error of rounding.
_POSSIBLE = 1.05


def summarise(records: Records) -> dict[str, Any]:
    """What the records show.

    Returns:
        ``verdict``, ``verdicts``, ``warnings``, ``runs``, ``artifacts``, ``latency``, ``accuracy`` (``perplexity``,
        ``tasks``), ``memory``, ``kernels``, ``failed``, ``not_measured``, ``absent``: docs/formats.md has the keys.
        ``latency`` has one row for each latency record, in their order. Times in seconds, of single linears in
        microseconds; ratios above 1 mean that the candidate is better; ``from`` names ``file:line`` of each record.
    """
    numbers = {record["run"]: number for number, record in enumerate(records.of("run"), 1)}
    found: dict[str, Any] = {
        "format": FORMAT,
        "verdict": "",
        "confidence": CONFIDENCE,
        "warnings": [],
        "runs": _runs(records, numbers),
        "artifacts": sizes.artifacts(records, numbers),
        "latency": speed.rows(records, numbers),
        "accuracy": {
            "perplexity": accuracy.perplexities(records, numbers),
            "tasks": accuracy.tasks(records, numbers),
        },
        "memory": sizes.memory(records, numbers),
        "kernels": kernels.rows(records, numbers),
        "failed": gaps.stated(records, numbers, failed=True),
        "not_measured": gaps.stated(records, numbers, failed=False),
        "absent": gaps.absent(records, numbers),
    }
    found = clean(found)
    found["verdicts"] = sentences(found)
    found["verdict"] = verdict(found)
    found["warnings"] = _warnings(found)
    return found


def _runs(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    found = []
    for record in records.of("run"):
        end = next(iter(records.of("end", record["run"])), None)
        found.append(
            {
                "number": numbers[record["run"]],
                **{key: record[key] for key in ("run", "time", "command", "seed", "rounds", "warm_up")},
                "finished": end is not None,
                **{key: end[key] if end else None for key in ("seconds", "failed", "load_1m", "gpu")},
                **{key: record[key] for key in ("environment", "ceilings")},
                "from": [records.source(record), *([records.source(end)] if end else [])],
            }
        )
    return found


def _warnings(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a reader must not miss: text, ``from``."""
    warnings = [
        {"text": f"Run {run['number']} did not finish: what it measured is here, the rest is not.", "from": run["from"]}
        for run in found["runs"]
        if not run["finished"]
    ]
    several = len(found["runs"]) > 1
    warnings += _what_ran(found, several)
    for run in found["runs"]:
        warnings += _other_work(found, run, _of_run(run["number"], several))
    warnings += [
        {"text": f"Failed{_of_run(entry['run'], several)}: {_about(entry)}: {entry['why']}", "from": entry["from"]}
        for entry in found["failed"]
    ]
    return warnings


def _what_ran(found: dict[str, Any], several: bool) -> list[dict[str, Any]]:
    """What ran otherwise than asked; in which scenarios, where it did not in all that was measured."""
    every = (*found["latency"], *found["memory"], *found["accuracy"]["perplexity"], *found["accuracy"]["tasks"])
    rows: dict[tuple[int, str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in every:
        texts = rows.setdefault((row["run"], row["artifact"], row["runtime"]), {})
        texts.setdefault(row["status"]["text"], []).append(row)
    warnings = []
    for (run, artifact, runtime), texts in rows.items():
        for text, each in texts.items():
            if each[0]["status"]["state"] not in ("DENSE", "unknown", "unasked"):
                continue
            where = f"{artifact} in {runtime}{_of_run(run, several)}"
            timed = [scenario(row["scenario"]) for row in each if "scenario" in row] if len(texts) > 1 else []
            where += f" at {'; '.join(timed)}" if timed else ""
            warnings.append({"text": f"{where}: {text}.", "from": [source for row in each for source in row["from"]]})
    return warnings


def _of_run(number: int, several: bool) -> str:
    return f" (run {number})" if several else ""


def _other_work(found: dict[str, Any], run: dict[str, Any], which: str) -> list[dict[str, Any]]:
    """Signs that the machine was not the run's own."""
    warnings = []
    host = run["environment"]["host"]
    if host["load_1m"] is not None and host["load_1m"] > host["cores"] / 2:
        text = f"Other work ran when it began{which}: load {host['load_1m']:.1f} on {host['cores']} cores."
        warnings.append({"text": f"{text} Its ceilings may be too low, and its times too long.", "from": run["from"]})
    reached = [
        (values["roof"]["fraction"], f"{row['artifact']} in {row['runtime']}", values["roof"]["ceilings"], row["from"])
        for row in found["latency"]
        for values in row["measures"].values()
        if row["run"] == run["number"] and values["roof"]
    ]
    best = max(reached, default=None, key=lambda each: each[0])
    if best and best[0] > _POSSIBLE:
        why = "was measured too low: other work ran" if best[2] == "measured" else "that is published is too low"
        warnings.append(
            {"text": f"The ceiling{which} {why} ({best[1]} reached {share(best[0])} of it).", "from": best[3]}
        )
    return warnings


def _about(entry: dict[str, Any]) -> str:
    where = [entry["artifact"], entry["runtime"], entry["scenario"] and scenario(entry["scenario"])]
    named = ", ".join(part for part in where if part and part not in entry["what"])
    return f"{entry['what']}{f' ({named})' if named else ''}"
