"""Which records are compared with which, and what the comparison gives: report and gate both ask here.

``pairs`` and ``why_not`` part the latency records of candidates into those that have a baseline and those that have
none; ``comparison`` and ``samples`` compare a pair in one measure. ``baseline_of`` and ``counterpart`` find the record
of the dense model beside one of memory, perplexity or a task, and ``difference`` compares two of accuracy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sparsify.bench.perplexity import paired_increase, ratio
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
        again: of a baseline: the times of its twin, the same artifact in another process.

    Rounds where there is nothing to time (tpot of one new token) or the clock showed no time that can be are left out.
    """
    scenario, seconds = latency["scenario"], _SECONDS[measure]
    found = {number: seconds(each, scenario) for number, each in _by_round(latency, again=again).items()}
    rate = measure == "throughput"
    return {number: 1 / value if rate else value for number, value in found.items() if _SHORTEST < value < _LONGEST}


def comparison(pair: Pair, measure: Measure) -> Comparison | None:
    """How much better the candidate is in ``measure``, round by round, than either process of its baseline.

    Ratios above 1 mean that the candidate is better. What was not measured in turn with its baseline may differ by
    what else the machine did in between: it is compared, and claims nothing.

    Returns:
        None where the measure says nothing: tpot of one new token, or times below the clock's resolution.
    """
    base, other = samples(pair.baseline, measure), samples(pair.candidate, measure)
    repeated = samples(pair.baseline, measure, again=True)
    first, second, noise = (
        [_better(one[i], two[i], measure) for i in sorted(one.keys() & two.keys())]
        for one, two in ((base, other), (repeated, other), (base, repeated))
    )
    if not first:
        return None
    found = compare(first, second, noise)
    in_turn = pair.candidate["interleaved"] and pair.baseline["interleaved"]
    return found if in_turn else replace(found, claim="not in turn")


def _better(base: float, other: float, measure: Measure) -> float:
    return other / base if measure == "throughput" else base / other


def scenario_name(scenario: dict[str, Any]) -> str:
    """``128+32x8``: 128 tokens of prompt, 32 new ones, 8 rows at once; ``128+32c8`` with 8 requests at a server."""
    by = "x" if scenario["load"] == "batch" else "c"
    return f"{scenario['prompt_tokens']}+{scenario['new_tokens']}{by}{scenario['batch']}"


def tokens_at_once(scenario: dict[str, Any], measure: Measure | None = None) -> int:
    """How many tokens a linear multiplies in what decides a measure.

    Those of the prompt for the time to the first token, and where there is no other one; else those of a step.

    Args:
        scenario: see ``Pair``.
        measure: None: the one that a runtime is judged by.
    """
    prompt = measure == "ttft" or scenario["new_tokens"] == 1
    return int(scenario["batch"] * (scenario["prompt_tokens"] if prompt else 1))


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


def asked_sparse(records: Records, record: Record) -> bool:
    """Whether the session that a record is of was to run sparse.

    Latency records of the same artifact and runtime say so; without any, what was pruned was.
    """
    run, label = record["run"], record["artifact"]
    timed = [
        each for each in records.of("latency", run) if (each["artifact"], each["runtime"]) == (label, record["runtime"])
    ]
    if timed:
        return any(each["asked_sparse"] for each in timed)
    return any(each["pattern"] is not None for each in records.of("artifact", run) if each["artifact"] == label)


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


@dataclass(frozen=True)
class Difference:
    """Perplexity or a task of a candidate against its baseline's, on the same windows or questions.

    Attributes:
        dense: the baseline's record.
        value: relative increase of the perplexity, or difference of the task's values.
        standard_error: of ``value``; None where one sample, or a metric without one, gives none.
        paired: whether that is of differences, sample by sample. Where records lack what the pairing needs, it is the
            error as of independent samples: rather too large.
        n: samples: windows or questions.
    """

    dense: Record
    value: float
    standard_error: float | None
    paired: bool
    n: int


def difference(records: Records, record: Record) -> Difference | str:
    """``record``, of perplexity or a task, against its baseline's in the same runtime; or why they do not compare."""
    keys = ("task", "metric") if record["record"] == "task" else ()
    dense = counterpart(records, record, *keys)
    if dense is None or dense is record:
        return "no such record of its baseline in this runtime"
    if record["record"] == "task":
        if any(record[key] != dense[key] for key in ("samples_sha256", "n", "harness")):
            return "other samples or another harness than its baseline's"
        return Difference(dense, *_task_difference(record, dense), record["n"])
    if record["text"]["sha256"] != dense["text"]["sha256"] or record["window_tokens"] != dense["window_tokens"]:
        return "not the same windows of the same text as its baseline's"
    if not len(record["window_nll"]) == len(dense["window_nll"]) == len(record["window_tokens"]):
        return "its windows do not match its baseline's"
    value, error = paired_increase(dense["window_nll"], record["window_nll"], record["window_tokens"])
    if not math.isfinite(value):
        return "an increase that is larger than a number can be"
    return Difference(dense, value, error, True, len(record["window_nll"]))


def _task_difference(record: Record, dense: Record) -> tuple[float, float | None, bool]:
    mine, base, known = record["samples"], dense["samples"], record["samples_sha256"]
    value = record["value"] - dense["value"]
    if mine and base and len(mine) == len(base) and known is not None and known == dense["samples_sha256"]:
        each = [after - before for after, before in zip(mine, base, strict=True)]
        return value, ratio(each, [1.0] * len(each))[1], True
    errors = (record["standard_error"], dense["standard_error"])
    return value, None if None in errors else math.hypot(*errors), False
