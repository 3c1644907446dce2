"""Latency and throughput of every artifact, runtime and scenario, and what may be claimed against the baseline."""

from __future__ import annotations

from statistics import median
from typing import Any

from sparsify.bench.latency import statistics
from sparsify.bench.records import Record, Records
from sparsify.bench.spread import Comparison, median_interval
from sparsify.report import unexplained, wording
from sparsify.report.pairs import MEASURES, Measure, Pair, comparison, pairs, samples, why_not

# Measure -> its key among a record's statistics, and in its roof.
STATISTICS: dict[Measure, str] = {
    "ttft": "ttft_s", "tpot": "tpot_s", "total": "total_s", "throughput": "tokens_per_s"
}  # fmt: skip
UNITS: dict[Measure, str] = {"ttft": "s", "tpot": "s", "total": "s", "throughput": "tokens/s"}
_FEWEST = next(n for n in range(1, 100) if median_interval([1.0] * n))


def rows(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each latency record, in order.

    Args:
        records: what was read.
        numbers: run -> its number in the report.
    """
    paired = {id(pair.candidate): pair for pair in pairs(records)}
    unpaired = {id(found.candidate): found.why for found in why_not(records)}
    linears = {(made["run"], made["artifact"]): made["linears"] for made in records.of("artifact")}
    found = []
    for record in records.of("latency"):
        pair, why = paired.get(id(record)), unpaired.get(id(record))
        found.append(
            {
                "run": numbers[record["run"]],
                **{key: record[key] for key in ("artifact", "runtime", "session", "baseline", "scenario")},
                "baseline_session": pair.baseline["session"] if pair else None,
                "rounds": len(record["rounds"]),
                **{key: record[key] for key in ("interleaved", "trace_sha256", "asked_sparse", "same_tokens")},
                "status": wording.status(
                    record["engaged"],
                    record["asked_sparse"],
                    linears[record["run"], record["artifact"]],
                    record["scenario"],
                ),
                "measures": {measure: _measure(record, measure, pair, why, records) for measure in MEASURES},
                "from": [records.source(record)],
            }
        )
    return found


def _measure(record: Record, measure: Measure, pair: Pair | None, why: str | None, records: Records) -> dict[str, Any]:
    """Statistics with the roof beside them, and the comparison or why there is none."""
    spread = _statistics(record)[STATISTICS[measure]]
    compared = comparison(pair, measure) if pair else None
    roofs = _roof_ratio(pair, measure) if pair else None
    more = pair and compared and roofs and unexplained.gain(records, pair, measure, compared, roofs)
    if pair and compared is None:
        why = "nothing to time: one new token, or a time below the clock's resolution"
    elif pair and compared:
        why = _reason(compared, pair, measure)
    return {
        "unit": UNITS[measure],
        "statistics": spread,
        "by_round": _by_round(record, measure),
        "roof": _roof(record, measure, spread),
        "comparison": compared.to_dict() if compared else None,
        "roof_ratio": roofs,
        "unexplained": more or None,
        "why_no_claim": why,
        "from": [records.source(record), *([records.source(pair.baseline)] if pair else [])],
    }


def _statistics(record: Record) -> dict[str, Any]:
    """As recorded; of a baseline over its own rounds, without those where it is measured against itself."""
    rounds = [each for each in record["rounds"] if not each["again"]]
    if len(rounds) == len(record["rounds"]) or not rounds:
        return dict(record["statistics"])
    return statistics(rounds, record["scenario"]["batch"] * record["scenario"]["new_tokens"])


def _roof_ratio(pair: Pair, measure: Measure) -> float | None:
    """The ratio if both reached their roofs; None where either is unknown."""
    base, mine = (record["roof"] or {} for record in (pair.baseline, pair.candidate))
    key = STATISTICS[measure]
    return base[key] / mine[key] if base.get(key) and mine.get(key) else None


def _by_round(record: Record, measure: Measure) -> dict[str, Any] | None:
    """Median over rounds and its interval: what comparisons rest on, where ``statistics`` is over single samples."""
    values = list(samples(record, measure).values())
    if not values:
        return None
    low, high = median_interval(values) or (None, None)
    return {"median": median(values), "low": low, "high": high, "n": len(values)}


def _roof(record: Record, measure: Measure, spread: dict[str, Any] | None) -> dict[str, Any] | None:
    roof, key = record["roof"], STATISTICS[measure]
    if roof is None or spread is None or key not in roof or not spread["median"]:
        return None
    return {
        "seconds": roof[key], "limit": roof[f"{measure}_limit"], "ceilings": roof["ceilings"],
        "fraction": roof[key] / spread["median"],
    }  # fmt: skip


def _reason(compared: Comparison, pair: Pair, measure: Measure) -> str | None:
    """Why a comparison claims nothing; None where it claims something."""
    if compared.claim == "not in turn":
        return "candidate and baseline were not measured in turn"
    if compared.claim == "too few rounds":
        repeated = len(samples(pair.baseline, measure, again=True))
        n, what = (compared.n, "") if compared.n < _FEWEST else (repeated, " of the baseline against itself")
        return f"{n} round{'' if n == 1 else 's'}{what}, {_FEWEST} are the fewest"
    return None
