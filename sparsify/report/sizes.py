"""Bytes: what an artifact stores, and what the processes that served it held, beside its baseline's."""

from __future__ import annotations

from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.report import wording
from sparsify.report.pairs import asked_sparse, baseline_of, counterpart

STORED = ("weight_bytes", "file_bytes")
HELD = ("loaded_resident_bytes", "peak_resident_bytes", "weights_resident_bytes", "device_peak_bytes")
_ABOUT = ("path", "role", "kind", "model", "pattern", "method", "sparsity", "precision", "linears", "sha256")


def artifacts(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each artifact record: what it is and its bytes on disk."""
    found = []
    for record in records.of("artifact"):
        name = baseline_of(records, record)
        dense = next((each for each in records.of("artifact", record["run"]) if each["artifact"] == name), None)
        found.append(
            {
                "run": numbers[record["run"]],
                "artifact": record["artifact"],
                **{key: record[key] for key in (*_ABOUT, *STORED)},
                "to_baseline": _ratios(record, dense, STORED, records),
                "from": [records.source(record)],
            }
        )
    return found


def memory(records: Records, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each memory record."""
    found = []
    for record in records.of("memory"):
        made = next(each for each in records.of("artifact", record["run"]) if each["artifact"] == record["artifact"])
        found.append(
            {
                "run": numbers[record["run"]],
                **{key: record[key] for key in ("artifact", "runtime", "session", "processes", *HELD)},
                "status": wording.status(record["engaged"], asked_sparse(records, record), made["linears"]),
                "to_baseline": _ratios(record, counterpart(records, record), HELD, records),
                "from": [records.source(record)],
            }
        )
    return found


def _ratios(record: Record, dense: Record | None, keys: tuple[str, ...], records: Records) -> dict[str, Any] | None:
    """Bytes / the baseline's bytes, of each key that both have; None for a baseline itself."""
    if dense is None or dense is record:
        return None
    ratios = {key: record[key] / dense[key] for key in keys if record[key] is not None and dense[key]}
    return {**ratios, "baseline": dense["artifact"], "from": [records.source(record), records.source(dense)]}
