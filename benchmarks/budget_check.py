"""What `sparsify plan-memory` said against what `sparsify prune` then took: peak memory and time, method by method.

    python benchmarks/budget_check.py --model DIR --ids FILE:calibration_ids --out benchmarks/results/budget_check.json

Each method is planned and then run, both by the command line, in processes of their own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit

METHODS = ("magnitude", "wanda", "dsnot", "symwanda", "sparsegpt", "mrp", "admm", "alps", "fistapruner", "fast", "best")


def answer(*arguments: str) -> dict[str, Any]:
    """The JSON document that a command prints."""
    command = [sys.executable, "-m", "sparsify", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Every method; table and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--exclude", nargs="*", default=[], help="globs of linears to leave dense")
    options = parser.parse_args()
    records = []
    print("| method | planned MB | peak MB | ratio | planned s | took s |\n|---|--:|--:|--:|---|--:|")
    for method in options.methods:
        with tempfile.TemporaryDirectory() as scratch:
            shared = [options.model, "--pattern", options.pattern, "--method", method, "--calibration", options.ids]
            shared += [part for glob in options.exclude for part in ("--exclude", glob)]
            shared += ["--out", f"{scratch}/out"]
            planned, ran = answer("plan-memory", *shared), answer("prune", *shared)
        record = {
            "method": method,
            "planned_bytes": planned["memory_bytes"],
            "peak_bytes": ran["peak_memory_bytes"],
            "planned_seconds": [planned["time"]["seconds_low"], planned["time"]["seconds_high"]],
            "seconds": ran["seconds"],
            "threads": ran["threads"],
            "largest": max(planned["phases"], key=lambda phase: phase["host_bytes"])["phase"],
        }
        records.append(record)
        low, high = record["planned_seconds"]
        ratio = record["planned_bytes"] / record["peak_bytes"]
        print(
            f"| {method} | {record['planned_bytes'] / 1e6:.0f} | {record['peak_bytes'] / 1e6:.0f} | {ratio:.2f} | "
            f"{low:.0f} to {high:.0f} | {record['seconds']:.0f} |",
            flush=True,
        )
    if options.out:
        body = {"commit": commit(), "model": options.model, "pattern": options.pattern, "records": records}
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
