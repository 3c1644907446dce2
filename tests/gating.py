"""Rules held against records whose figures are known, and records with something in them changed or gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.report import rules
from sparsify.report.asked import Finding, Selection
from sparsify.report.gate import gate

EVERYTHING = [
    rules.speedup("1.2"),
    rules.speedup("tpot=1.2"),
    rules.perplexity("50%"),
    rules.perplexity("6"),
    rules.kl("0.5"),
    rules.task("arc_easy:acc=-0.2"),
    rules.task("arc_easy=0.3"),
    rules.ratio("--max-memory-ratio", "0.9"),
    rules.ratio("--max-file-ratio", "70%"),
    rules.sparse("100%"),
]

Edit = Callable[[Record], Record | None]


def edited(records: Records, edit: Edit) -> Records:
    """The records after ``edit``, which is given a copy of each; without those it makes None."""
    kept = []
    for line, source in zip(records.lines, records.sources, strict=True):
        new = edit(json.loads(json.dumps(line)))
        if new is not None:
            kept.append((new, source))
    return Records(*map(tuple, zip(*kept, strict=True))) if kept else Records((), ())


def without(records: Records, kind: str, **keys: Any) -> Records:
    """The records without those of ``kind`` that have ``keys``."""

    def drop(record: Record) -> Record | None:
        return None if record["record"] == kind and all(record[k] == v for k, v in keys.items()) else record

    return edited(records, drop)


def changed(records: Records, kind: str, artifact: str, change: Callable[[Record], object]) -> Records:
    """The records with those of ``kind`` and ``artifact``, of which there are some, changed in place."""
    count = 0

    def edit(record: Record) -> Record:
        nonlocal count
        if record["record"] == kind and record["artifact"] == artifact:
            change(record)
            count += 1
        return record

    found = edited(records, edit)
    assert count
    return found


def held(records: Records, rule: rules.Rule, **selection: Any) -> list[Finding]:
    """What the gate found of ``rule``; ``selection`` are fields of ``Selection``."""
    found = gate(records, [rule], Selection(**selection))
    assert found, "a rule without a finding passes on nothing"
    return found


def passes(records: Records, rule: rules.Rule, **selection: Any) -> bool:
    """Whether all that ``rule`` was held against met it."""
    return all(each.passed for each in held(records, rule, **selection))
