"""A rule of gate held against one measurement after the other; ``sparsify/report/gate.py`` puts findings together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from scipy.special import stdtrit

from sparsify.bench.engaged import ran_sparse, runs_sparse
from sparsify.bench.perplexity import ratio
from sparsify.bench.records import Record
from sparsify.bench.spread import CONFIDENCE
from sparsify.report.asked import FEWEST_SAMPLES, Asked, Finding
from sparsify.report.pairs import (
    Pair,
    baseline_of,
    comparison,
    counterpart,
    difference,
    pairs,
    scenario_name,
    tokens_at_once,
    why_not,
)
from sparsify.report.rules import Kind, Rule


def _speedups(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for lone in why_not(asked.records):
        name = scenario_name(lone.candidate["scenario"])
        if asked.selects(lone.candidate) and fnmatchcase(name, rule.scenario):
            yield asked.unmet(rule, lone.candidate, lone.why, scenario=name)
    for pair in pairs(asked.records):
        name = scenario_name(pair.scenario)
        # One new token has no time between tokens.
        silent = rule.measure == "tpot" and pair.scenario["new_tokens"] == 1
        if asked.selects(pair.candidate) and fnmatchcase(name, rule.scenario) and not silent:
            yield _speedup(asked, rule, pair, name)


def _speedup(asked: Asked, rule: Rule, pair: Pair, name: str) -> Finding:
    found = comparison(pair, rule.measure)
    if found is None:
        return asked.unmet(rule, pair.candidate, f"no {rule.measure} that its clock could tell", scenario=name)
    shown, why = f"{found.ratio:.3f} x", ""
    if found.low is not None and found.high is not None:
        shown += f" ({found.low:.3f} to {found.high:.3f}, n={found.n})"
    if asked.selection.claim and rule.limit > 1:
        tokens = tokens_at_once(pair.scenario, rule.measure)
        sparse = any(runs_sparse(kernel, tokens) for kernel in pair.candidate["engaged"].values())
        asked_sparse = pair.candidate["asked_sparse"]
        if found.claim != "faster":
            why = f"not shown ({found.claim})"
        elif (asked_sparse or asked.described[pair.run, pair.candidate["artifact"]]["linears"]) and not sparse:
            # As in the report: what is faster without them is not faster because of its zeros.
            ran = "no sparse kernel is known to have run" if asked_sparse else "ran dense, as asked"
            why = f"not shown ({ran})"
    if asked.selection.confident and found.low is None:
        why = why or "too few rounds for an interval"
    return asked.finding(rule, pair.candidate, found.ratio, found.low, shown, at_least=True, why=why, scenario=name)


def _perplexities(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for record in filter(asked.selects, asked.records.of("perplexity")):
        found = difference(asked.records, record)
        if isinstance(found, str):
            yield asked.unmet(rule, record, found)
            continue
        value, error = found.value, found.standard_error
        shown = f"{value:+.2%}" + ("" if error is None else f" ± {error:.2%}")
        if not rule.relative:
            value, error = _points(found.dense, record)
            shown = f"{value:+.3f}" + _plus_minus(error)
        yield asked.finding(rule, record, value, _worse(value, error, 1, found.n), shown, at_least=False)


def _points(dense: Record, record: Record) -> tuple[float, float | None]:
    """Increase of perplexity in points, and its standard error over windows by the delta method.

    A window moves each perplexity by that perplexity times the window's part of the mean. Both are scaled, so that
    what is hardly a number still has a square.
    """
    base, mine = dense["perplexity"], record["perplexity"]
    top = max(base, mine, 1.0)
    windows = zip(dense["window_nll"], record["window_nll"], record["window_tokens"], strict=True)
    moved = [n * (mine / top * after - base / top * before) for before, after, n in windows]
    error = ratio(moved, record["window_tokens"])[1]
    return mine - base, None if error is None else top * error


def _divergences(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for record in filter(asked.selects, asked.records.of("perplexity")):
        found = record["kl"]
        if found is None:
            yield asked.unmet(rule, record, "it has no KL divergence (--runtime chooses those that give one)")
            continue
        value, error, n = found["mean_nats"], found["standard_error_nats"], len(record["window_nll"])
        shown = f"{value:.4f} nats" + _plus_minus(error)
        yield asked.finding(rule, record, value, _worse(value, error, 1, n), shown, at_least=False)


def _tasks(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for record in filter(asked.selects, asked.records.of("task")):
        if (record["task"], record["metric"]) != (rule.task, rule.metric):
            continue
        more_is_better = record["higher_is_better"] is not False
        if not rule.relative:
            value, error = record["value"], record["standard_error"]
            worse = _worse(value, error, -1 if more_is_better else 1, record["n"])
            shown = f"{value:.4f}" + _plus_minus(error)
            yield asked.finding(rule, record, value, worse, shown, at_least=more_is_better)
            continue
        found = difference(asked.records, record)
        if isinstance(found, str):
            yield asked.unmet(rule, record, found)
            continue
        # Positive where the candidate is better.
        value, error = found.value if more_is_better else -found.value, found.standard_error
        shown = f"{value:+.4f}" + _plus_minus(error) + ("" if found.paired or error is None else " (unpaired)")
        yield asked.finding(rule, record, value, _worse(value, error, -1, found.n), shown, at_least=True)


def _plus_minus(error: float | None) -> str:
    return "" if error is None or not isfinite(error) else f" ± {error:.4f}"


def _worse(value: float, error: float | None, sign: int, n: int) -> float | None:
    """The worse end of the interval of Student's t over ``n`` samples; None where that cannot be told."""
    if error is None or not isfinite(error) or n < FEWEST_SAMPLES:
        return None
    return value + sign * float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error


def _memories(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for record in filter(asked.selects, asked.records.of("memory")):
        dense = counterpart(asked.records, record)
        if dense is None:
            yield asked.unmet(rule, record, "no baseline was measured in this runtime")
            continue
        # Where a device was used, its memory is what is scarce.
        on_device = record["device_peak_bytes"] and dense["device_peak_bytes"]
        key, where = ("device_peak_bytes", "device") if on_device else ("peak_resident_bytes", "resident")
        value = record[key] / dense[key]
        yield asked.finding(rule, record, value, value, f"{value:.3f} x ({where}, at peak)", at_least=False)


def _file_sizes(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for record in asked.candidates:
        name = baseline_of(asked.records, record)
        if name is None:
            yield asked.unmet(rule, record, "the records do not tell which baseline it is compared with")
            continue
        value = record["file_bytes"] / asked.described[record["run"], name]["file_bytes"]
        yield asked.finding(rule, record, value, value, f"{value:.3f} x", at_least=False)


def _sparse_linears(asked: Asked, rule: Rule) -> Iterator[Finding]:
    """Of what was timed; of an artifact and runtime where nothing was, of whatever else ran."""
    timed = list(filter(asked.selects, asked.records.of("latency")))
    done = {_where(each) for each in timed}
    others = (each for kind in ("memory", "perplexity", "task") for each in asked.records.of(kind))
    rest = (each for each in filter(asked.selects, others) if _where(each) not in done)
    for record in _distinct([*timed, *rest]):
        pruned = asked.described[record["run"], record["artifact"]]["linears"]
        n_sparse, n_known = ran_sparse(record["engaged"], pruned, _tokens(record))
        name = scenario_name(record["scenario"]) if record["record"] == "latency" else ""
        if not pruned:
            yield asked.unmet(rule, record, "nothing in it was pruned", scenario=name)
        elif n_known < pruned:
            why = f"unknown: of {n_known} of its {pruned} pruned linears is known what ran"
            yield asked.unmet(rule, record, why, scenario=name)
        else:
            value = n_sparse / pruned
            shown = f"{value * 100:.4g}%"
            yield asked.finding(rule, record, value, value, shown, at_least=True, scenario=name)


def _where(record: Record) -> tuple[str, str, str]:
    return record["run"], record["artifact"], record["runtime"]


def _tokens(record: Record) -> int | None:
    """That a linear multiplied at a time in what a record is judged by; None where it is of no scenario."""
    return tokens_at_once(record["scenario"]) if record["record"] == "latency" else None


def _distinct(records: Iterable[Record]) -> list[Record]:
    """One record for each thing that ran with so many tokens at a time: a grid of scenarios says it many times over."""
    found: dict[tuple[Any, ...], Record] = {}
    for each in records:
        found.setdefault((*_where(each), _tokens(each), *sorted(each["engaged"].items())), each)
    return list(found.values())


def _finished(asked: Asked, rule: Rule) -> Iterator[Finding]:
    for run in asked.records.of("run"):
        ends = asked.records.of("end", run["run"])
        failed = [each for each in asked.records.of("missing", run["run"]) if each["failed"]]
        at = asked.records.source(run)
        met = Finding(rule.text, run["run"], "", "", "", None, None, 0, "finished", rule.wanted, True, "", at)
        whys = []
        if not ends:
            whys.append(replace(met, why="the run has no end: it was interrupted, or is not over"))
        elif ends[-1]["failed"] > len(failed):
            whys.append(replace(met, why=f"{ends[-1]['failed']} measurements failed"))
        for each in filter(asked.concerns, failed):
            whys.append(
                replace(
                    met,
                    artifact=each["artifact"] or "",
                    runtime=each["runtime"] or "",
                    scenario=scenario_name(each["scenario"]) if each["scenario"] else "",
                    why=f"{each['what']} failed: {each['why']}",
                    source=asked.records.source(each),
                )
            )
        yield from (replace(each, shown="", passed=False) for each in whys)
        if not whys:
            yield met


FINDERS: dict[Kind, Callable[[Asked, Rule], Iterator[Finding]]] = {
    "speedup": _speedups,
    "perplexity": _perplexities,
    "kl": _divergences,
    "task": _tasks,
    "memory": _memories,
    "file": _file_sizes,
    "sparse": _sparse_linears,
    "finished": _finished,
}
