"""What the records do not hold: what a run said it did not measure, what failed, and what is simply not there."""

from __future__ import annotations

from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.report import wording

_WHAT = {
    "latency": "latency and throughput",
    "memory": "memory in use",
    "perplexity": "perplexity and KL divergence",
    "task": "zero-shot tasks",
    "kernel": "single linears",
}


def stated(records: Records, numbers: dict[str, int], *, failed: bool) -> list[dict[str, Any]]:
    """The ``missing`` records: those that failed, or those that were not tried."""
    return [
        {
            "run": numbers[record["run"]],
            **{key: record[key] for key in ("what", "why", "artifact", "runtime", "scenario")},
            "from": [records.source(record)],
        }
        for record in records.of("missing")
        if record["failed"] == failed
    ]


def absent(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """What no record speaks of, though the rest of the run lets one expect it; ``from`` is the run's record."""
    found = []
    for run in records.of("run"):
        for what in _absent(records, run["run"]):
            found.append({"run": numbers[run["run"]], "what": what, "from": [records.source(run)]})
    return found


def _absent(records: Records, run: str) -> list[str]:
    found = [f"{what}: no record" for kind, what in _WHAT.items() if not records.of(kind, run)]
    made, latencies = records.of("artifact", run), records.of("latency", run)
    candidates = [each["artifact"] for each in made if each["role"] == "candidate"]
    if not candidates:
        found.append("a candidate: no artifact but the baseline")
    if not any(each["role"] == "baseline" for each in made):
        found.append("a baseline: nothing to compare with")
    if latencies:
        found += [
            f"latency of {name}: no record"
            for name in candidates
            if not any(each["artifact"] == name for each in latencies)
        ]
    cells: dict[tuple[str, str], list[Record]] = {}
    for each in latencies:
        cells.setdefault((each["runtime"], wording.scenario(each["scenario"])), []).append(each)
    for (runtime, scenario), there in cells.items():
        names = {each["artifact"] for each in there}
        if not names & set(candidates):
            found.append(f"{scenario} in {runtime}: only of {', '.join(sorted(names))}, no candidate")
            continue
        # An artifact of another kind does not open in this runtime, and is not missed here.
        opened = {each["artifact"] for each in latencies if each["runtime"] == runtime}
        found += [
            f"{scenario} in {runtime}: not of {name}" for name in candidates if name in opened and name not in names
        ]
    return found
