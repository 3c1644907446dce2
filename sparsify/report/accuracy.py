"""Perplexity, KL divergence and tasks of every artifact beside those of its baseline in the same runtime."""

from __future__ import annotations

import math
from typing import Any

from sparsify.bench.perplexity import paired_increase
from sparsify.bench.records import Record, Records
from sparsify.report import wording
from sparsify.report.pairs import counterpart


def perplexities(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each perplexity record; ``increase`` is paired over windows, ``noise_floor`` the baseline's KL."""
    found = []
    for record in records.of("perplexity"):
        dense = _dense(records, record)
        increase, why = _increase(record, dense, records)
        floor = dense and dense["kl"] and {**dense["kl"], "from": [records.source(dense)]}
        found.append(
            {
                **_head(records, record, numbers),
                **{key: record[key] for key in ("text", "perplexity", "standard_error", "nll_mean", "n_tokens", "kl")},
                "increase": increase,
                "why_no_increase": why,
                "noise_floor": floor,
                "from": [records.source(record)],
            }
        )
    return found


def tasks(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each task record, with its difference to the baseline's where both scored the same samples."""
    found = []
    for record in records.of("task"):
        dense = _dense(records, record, "task", "metric")
        difference, why = _difference(record, dense, records)
        keys = ("task", "metric", "value", "standard_error", "n", "harness", "higher_is_better")
        found.append(
            {
                **_head(records, record, numbers),
                **{key: record[key] for key in keys},
                "difference": difference,
                "why_no_difference": why,
                "from": [records.source(record)],
            }
        )
    return found


def _head(records: Records, record: Record, numbers: dict[str, int]) -> dict[str, Any]:
    made = next(each for each in records.of("artifact", record["run"]) if each["artifact"] == record["artifact"])
    return {
        "run": numbers[record["run"]],
        **{key: record[key] for key in ("artifact", "runtime", "session")},
        "role": made["role"],
        "status": wording.status(record["engaged"], made["pattern"] is not None, made["linears"]),
    }


def _dense(records: Records, record: Record, *same: str) -> Record | None:
    """The baseline's record; None for a baseline's own, too."""
    found = counterpart(records, record, *same)
    return None if found is record else found


def _increase(record: Record, dense: Record | None, records: Records) -> tuple[dict[str, Any] | None, str | None]:
    if dense is None:
        return None, "no such record of its baseline in this runtime"
    if record["text"]["sha256"] != dense["text"]["sha256"] or record["window_tokens"] != dense["window_tokens"]:
        return None, "another text or other windows than its baseline's"
    if not len(record["window_nll"]) == len(dense["window_nll"]) == len(record["window_tokens"]):
        return None, "its windows do not match its baseline's"
    increase, error = paired_increase(dense["window_nll"], record["window_nll"], record["window_tokens"])
    if not math.isfinite(increase):
        return None, "larger than a number can be"
    return {
        "relative": increase, "standard_error": error, "baseline": dense["artifact"],
        "from": [records.source(record), records.source(dense)],
    }, None  # fmt: skip


def _difference(record: Record, dense: Record | None, records: Records) -> tuple[dict[str, Any] | None, str | None]:
    if dense is None:
        return None, "no such record of its baseline in this runtime"
    if any(record[key] != dense[key] for key in ("samples_sha256", "n", "harness")):
        return None, "other samples or another harness than its baseline's"
    errors = [record["standard_error"], dense["standard_error"]]
    return {
        "value": record["value"] - dense["value"],
        # As if the samples were not the same: too large rather than too small.
        "standard_error": None if None in errors else math.hypot(*errors),
        "baseline": dense["artifact"],
        "from": [records.source(record), records.source(dense)],
    }, None  # fmt: skip
