"""Perplexity, KL divergence and tasks of every artifact beside those of its baseline in the same runtime."""

from __future__ import annotations

from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.report import wording
from sparsify.report.pairs import Difference, asked_sparse, counterpart, difference


def perplexities(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each perplexity record; ``increase`` is paired over windows, ``noise_floor`` the baseline's KL."""
    found = []
    for record in records.of("perplexity"):
        dense = counterpart(records, record)
        dense = None if dense is record else dense
        increase, why = _row(difference(records, record), record, records, "relative")
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
        compared, why = _row(difference(records, record), record, records, "value")
        keys = ("task", "metric", "value", "standard_error", "n", "harness", "higher_is_better")
        found.append(
            {
                **_head(records, record, numbers),
                **{key: record[key] for key in keys},
                "difference": compared,
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
        "status": wording.status(record["engaged"], asked_sparse(records, record), made["linears"]),
    }


def _row(
    found: Difference | str, record: Record, records: Records, key: str
) -> tuple[dict[str, Any] | None, str | None]:
    """A comparison as the report has it, its value under ``key``; or why there is none."""
    if isinstance(found, str):
        return None, found
    return {
        key: found.value, "standard_error": found.standard_error, "paired": found.paired,
        "baseline": found.dense["artifact"], "from": [records.source(record), records.source(found.dense)],
    }, None  # fmt: skip
