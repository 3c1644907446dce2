"""Files of records with something in them changed or gone, and what a report makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.bench.latency import statistics
from sparsify.bench.records import read
from sparsify.report.summary import summarise

RUNTIMES = ("torch", "onnxruntime", "vllm")
Raw = dict[str, Any]


def edited(source: Path, out: Path, change: Callable[[Raw], Raw | None]) -> Path:
    """A copy of a records file in which ``change`` edited each record, or dropped it by None.

    The statistics of latencies are made again, since no file may hold others than those of its rounds.
    """
    changed = (change(json.loads(line)) for line in source.read_text().splitlines())
    lines = [line for line in changed if line is not None]
    for line in lines:
        if line["record"] == "latency":
            scenario = line["scenario"]
            line["statistics"] = statistics(line["rounds"], scenario["batch"] * scenario["new_tokens"])
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def summary_of(*paths: Path) -> dict[str, Any]:
    """``report.json`` of files of records."""
    return summarise(read(list(paths)))


def slowed(by: float) -> Callable[[Raw], Raw]:
    """Every time of candidates times ``by``."""

    def change(record: Raw) -> Raw:
        if record["record"] == "latency" and record["baseline"]:
            for each in record["rounds"]:
                each["ttft_s"] = [value * by for value in each["ttft_s"]]
                each["gaps_s"] = [[value * by for value in row] for row in each["gaps_s"]]
                each["total_s"] *= by
        return record

    return change


def only(runtime: str, *artifacts: str) -> Callable[[Raw], Raw | None]:
    """Records of one runtime, and of the baseline and ``artifacts``."""

    def change(record: Raw) -> Raw | None:
        names = {"dense", *artifacts}
        return (
            record if record.get("runtime", runtime) == runtime and record.get("artifact", "dense") in names else None
        )

    return change


def lines_of(path: Path, sources: list[str]) -> list[Raw]:
    """The raw records that ``file:line`` name."""
    raw = path.read_text().splitlines()
    for source in sources:
        assert source.rsplit(":", 1)[0] == str(path)
    return [json.loads(raw[int(source.rsplit(":", 1)[1]) - 1]) for source in sources]
