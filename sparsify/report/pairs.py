"""Which records are compared with which, and what the comparison gives: report and gate both ask here.

``pairs`` and ``why_not`` part the latency records of candidates into those that have a baseline and those that have
none; ``comparison`` and ``samples`` compare a pair in one measure. ``baseline_of`` and ``counterpart`` find the record
of the dense model beside one of memory, perplexity or a task.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sparsify.bench.records import Record, Records
from sparsify.bench.spread import Comparison, compare

Measure = Literal["ttft", "tpot", "total", "throughput"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
_AMONG = ("runtime", "scenario", "trace_sha256")


@dataclass(frozen=True)
class Pair:
    """Latency of a candidate and of its baseline: one run, runtime, scenario and trace of prompts.

    Attributes:
        run, runtime: of both.
        candidate, baseline: their latency records.
        scenario: ``prompt_tokens``, ``new_tokens``, ``batch``, ``load``.
        sources: ``file:line`` of candidate and baseline.
    """

    run: str
    runtime: str
    candidate: Record
    baseline: Record
    scenario: dict[str, Any]
    sources: tuple[str, str]


@dataclass(frozen=True)
class Unpaired:
    """A latency record of a candidate that has no baseline to compare with: where it is, and why in a few words."""

    candidate: Record
    source: str
    why: str


def pairs(records: Records) -> list[Pair]:
    """Every latency record of a candidate with that of its baseline, in order; ``why_not`` has the rest."""
    return [found for found in _matched(records) if isinstance(found, Pair)]


def why_not(records: Records) -> list[Unpaired]:
    """The latency records of candidates that cannot be compared."""
    return [found for found in _matched(records) if isinstance(found, Unpaired)]


def _matched(records: Records) -> list[Pair | Unpaired]:
    latencies = records.of("latency")
    roles = {(each["run"], each["artifact"]): each["role"] for each in records.of("artifact")}
    found: list[Pair | Unpaired] = []
    for candidate in latencies:
        if roles[candidate["run"], candidate["artifact"]] == "baseline":
            continue
        source, name = records.source(candidate), candidate["baseline"]
        same = [
            each
            for each in latencies
            if each["run"] == candidate["run"]
            and each["artifact"] == name
            and all(each[key] == candidate[key] for key in _AMONG)
        ]
        if name is None:
            found.append(Unpaired(candidate, source, "names no baseline"))
        elif len(same) != 1:
            count = "not" if not same else f"{len(same)} times"
            found.append(Unpaired(candidate, source, f"{name} was {count} measured in this scenario"))
        elif not _by_round(candidate).keys() & _by_round(same[0]).keys():
            found.append(Unpaired(candidate, source, f"no round has both it and {name}"))
        else:
            run, runtime, scenario = (candidate[key] for key in ("run", "runtime", "scenario"))
            found.append(Pair(run, runtime, candidate, same[0], scenario, (source, records.source(same[0]))))
    return found


def _by_round(latency: Record, *, again: bool = False) -> dict[int, dict[str, Any]]:
    return {each["round"]: each for each in latency["rounds"] if each["again"] == again}


def _ttft(round_: dict[str, Any], _scenario: dict[str, Any]) -> float:
    return float(statistics.median(round_["ttft_s"]))


def _tpot(round_: dict[str, Any], _scenario: dict[str, Any]) -> float:
    gaps: list[float] = [gap for row in round_["gaps_s"] for gap in row]
    return statistics.median(gaps) if gaps else 0.0


def _total(round_: dict[str, Any], _scenario: dict[str, Any]) -> float:
    total: float = round_["total_s"]
    return total


def _seconds_a_token(round_: dict[str, Any], scenario: dict[str, Any]) -> float:
    tokens: int = scenario["batch"] * scenario["new_tokens"]
    return _total(round_, scenario) / tokens


# No clock tells less, and nobody waits for more.
_SHORTEST, _LONGEST = 1e-12, 1e12
# Seconds, so that baseline / candidate is above 1 where the candidate is better: of throughput its reciprocal.
_SECONDS: dict[Measure, Callable[[dict[str, Any], dict[str, Any]], float]] = {
    "ttft": _ttft,
    "tpot": _tpot,
    "total": _total,
    "throughput": _seconds_a_token,
}


def samples(latency: Record, measure: Measure, *, again: bool = False) -> dict[int, float]:
    """Round -> seconds (ttft, tpot: the median over its rows; total), or tokens per second (throughput).

    Args:
        latency: a latency record.
        measure: what to take of each round.
        again: of a baseline: its second run in each round.

    Rounds where there is nothing to time (tpot of one new token) or the clock showed no time that can be are left out.
    """
    scenario, seconds = latency["scenario"], _SECONDS[measure]
    found = {number: seconds(each, scenario) for number, each in _by_round(latency, again=again).items()}
    rate = measure == "throughput"
    return {number: 1 / value if rate else value for number, value in found.items() if _SHORTEST < value < _LONGEST}


def comparison(pair: Pair, measure: Measure) -> Comparison | None:
    """How much better the candidate is in ``measure``, round by round, against its baseline's noise.

    Ratios above 1 mean that the candidate is better. What was not measured in turn with its baseline may differ by
    what else the machine did in between: it is compared, and claims nothing.

    Returns:
        None where the measure says nothing: tpot of one new token, or times below the clock's resolution.
    """
    base, other = samples(pair.baseline, measure), samples(pair.candidate, measure)
    repeated = samples(pair.baseline, measure, again=True)
    ratios = [_better(base[i], other[i], measure) for i in sorted(base.keys() & other.keys())]
    noise = [_better(base[i], repeated[i], measure) for i in sorted(base.keys() & repeated.keys())]
    if not ratios:
        return None
    found = compare(ratios, noise)
    in_turn = pair.candidate["interleaved"] and pair.baseline["interleaved"]
    return found if in_turn else replace(found, claim="not in turn")


def _better(base: float, other: float, measure: Measure) -> float:
    return other / base if measure == "throughput" else base / other


def scenario_name(scenario: dict[str, Any]) -> str:
    """``128+32x8``: 128 tokens of prompt, 32 new ones, 8 rows at once; ``128+32c8`` with 8 requests at a server."""
    by = "x" if scenario["load"] == "batch" else "c"
    return f"{scenario['prompt_tokens']}+{scenario['new_tokens']}{by}{scenario['batch']}"


def runs_sparse(kernel: str) -> bool:
    """Whether what ``engaged`` names is a kernel that makes use of the zeros, on every rank.

    ``dense`` and ``unknown`` do not, nor does any operator of ONNX Runtime (``DOMAIN::NAME``).
    """
    return all(not part.startswith(("dense", "unknown")) and "::" not in part for part in kernel.split("+"))


def sparse_share(engaged: dict[str, str], pruned: int) -> float | None:
    """Share of ``pruned`` linears that ran sparse; None where it is not known what ran, or nothing was pruned.

    A runtime that fuses linears, or knows only some by name, has fewer: then it is the share of those.
    """
    among = min(pruned, len(engaged))
    return min(1.0, sum(runs_sparse(kernel) for kernel in engaged.values()) / among) if among else None


def baseline_of(records: Records, record: Record) -> str | None:
    """Label of the dense artifact that ``record``, of any kind that names an artifact and a runtime, compares with.

    That is the one that the latency records of the same artifact and runtime name, else the only baseline that has a
    record of this kind and runtime; None where neither decides.
    """
    run, runtime = record["run"], record.get("runtime")
    named = {
        each["baseline"]
        for each in records.of("latency", run)
        if each["artifact"] == record["artifact"] and runtime in (None, each["runtime"])
    } - {None}
    if len(named) == 1:
        return str(named.pop())
    dense = {each["artifact"] for each in records.of("artifact", run) if each["role"] == "baseline"}
    measured = {
        each["artifact"]
        for each in records.of(record["record"], run)
        if each["artifact"] in dense and each.get("runtime") == runtime
    }
    return str(measured.pop()) if len(measured) == 1 else None


def counterpart(records: Records, record: Record, *same: str) -> Record | None:
    """The baseline's record of the kind of ``record``, in its run and runtime, equal in the keys ``same``.

    Returns:
        None where there is none, or more than one.
    """
    name = baseline_of(records, record)
    found = [
        each
        for each in records.of(record["record"], record["run"])
        if each["artifact"] == name
        and each.get("runtime") == record.get("runtime")
        and all(each[key] == record[key] for key in same)
    ]
    return found[0] if len(found) == 1 else None
