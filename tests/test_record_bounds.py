"""Whatever numbers a record may hold, report and gate make something finite of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from sparsify.bench import latency
from sparsify.bench.record_check import check
from sparsify.bench.records import Record, Records, read
from sparsify.errors import DataError
from sparsify.report import markdown, page, rules
from sparsify.report.asked import Selection
from sparsify.report.gate import gate
from sparsify.report.summary import summarise
from tests.bench_records import write_example
from tests.gating import EVERYTHING

RULES = [*EVERYTHING, rules.FINISHED]
Place = tuple[Any, ...]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Of one runtime and one candidate, the first latency and kernel of each."""
    found = read([write_example(tmp_path_factory.mktemp("records") / "r.jsonl", runtimes=("torch",))])
    kept, seen = [], set()
    for line, source in zip(found.lines, found.sources, strict=True):
        key = line["record"], line.get("artifact")
        if line.get("artifact") != "half" and (key not in seen or line["record"] not in ("latency", "kernel")):
            kept.append((line, source))
        seen.add(key)
    return Records(*map(tuple, zip(*kept, strict=True)))


def shown(records: Records) -> None:
    """That report and gate say something of the records, in JSON as in text."""
    summary = summarise(records)
    json.dumps(summary, allow_nan=False)
    assert markdown.render(summary)
    for confident in (False, True):
        json.dumps([each.to_dict() for each in gate(records, RULES, Selection(confident=confident))], allow_nan=False)


def numbers(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where the numbers of a record are; of a list the first."""
    if isinstance(value, dict):
        for key in value:
            yield from numbers(value[key], (*at, key))
    elif isinstance(value, list):
        for i, each in enumerate(value[:1]):
            yield from numbers(each, (*at, i))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield at


def put(record: Record, at: Place, number: float) -> None:
    """Set one number, and what is derived from it."""
    place: Any = record
    for key in at[:-1]:
        place = place[key]
    if isinstance(at[-1], int):
        # Samples: all of them, or a median would not tell.
        place[:] = [number] * len(place)
    else:
        place[at[-1]] = number
    derive(record)


def derive(record: Record) -> None:
    """Make again what has to be that of the samples."""
    if record["record"] == "latency":
        scenario = record["scenario"]
        record["statistics"] = latency.statistics(record["rounds"], scenario["batch"] * scenario["new_tokens"])
    elif record["record"] == "kernel":
        for times in record["kernels"].values():
            times["median_us"] = statistics.median(times["samples_us"])
    elif record["record"] == "task":
        record["value"] = statistics.fmean(record["samples"])


EXTREMES = (1e308, -1e308, 1e30, 1e18, 1e12, 10**19, 1e-12, 1e-30, 5e-324, 0, -1)


def test_extreme_numbers_are_refused_or_shown(small: Records) -> None:
    accepted = refused = 0
    for i, line in enumerate(small.lines):
        for at in numbers(line):
            for number in EXTREMES:
                changed = json.loads(json.dumps(line))
                try:
                    put(changed, at, number)
                    check(changed, "x")
                except (DataError, ZeroDivisionError, OverflowError):
                    # The latter of the means and rates that are made here.
                    refused += 1
                    continue
                accepted += 1
                shown(Records((*small.lines[:i], changed, *small.lines[i + 1 :]), small.sources))
    assert accepted > 100 < refused


@pytest.mark.parametrize("turned", [False, True])
def test_the_ends_of_what_is_allowed_are_shown(small: Records, turned: bool) -> None:
    """Dense and sparse as far from each other as can be, also on the page with its figures."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = json.loads(json.dumps(small.lines))
    for line in lines:
        slow = (line.get("artifact") == "dense") != turned
        seconds, other, n_bytes = (1e12, 1e-12, 10**18) if slow else (1e-12, 1e12, 1)
        if line["record"] == "latency":
            for each in line["rounds"]:
                each["ttft_s"] = [seconds] * len(each["ttft_s"])
                each["gaps_s"] = [[seconds] * len(row) for row in each["gaps_s"]]
                each["total_s"] = seconds
            line["roof"] |= {"ttft_s": other, "tpot_s": seconds}
        elif line["record"] == "kernel":
            for name, times in line["kernels"].items():
                slow = name.startswith("dense") != turned
                times["samples_us"] = [1e18 if slow else 1e-6] * len(times["samples_us"])
                times["roof_us"] = 1e-6 if slow else 1e18
        elif line["record"] == "artifact":
            line |= {"file_bytes": n_bytes, "weight_bytes": n_bytes}
        elif line["record"] == "memory":
            line |= {"loaded_resident_bytes": n_bytes, "peak_resident_bytes": n_bytes, "device_peak_bytes": n_bytes}
        elif line["record"] == "task":
            line |= {"samples": [1e100 if slow else -1e100] * line["n"], "standard_error": 1e100}
        elif line["record"] == "perplexity":
            line["kl"] |= {"mean_nats": 1e12 if slow else -1e12, "standard_error_nats": 1e12}
        derive(line)
        check(line, "x")
    records = Records(tuple(lines), small.sources)
    shown(records)
    assert "<svg" in page.render(records, summarise(records))
