"""What methods cost beside SparseGPT, all ours: user CPU, wall time and peak memory of the process, as ratios.

    python benchmarks/method_cost.py --model DIR --ids FILE:calibration_ids --out benchmarks/results/method_cost.json

Every run prunes the same folder in a process of its own; the methods take turns (`--runs` rounds). With `--exclude`
globs for the last blocks only the others are pruned, and the pass over the text ends there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit
from pruning_cost import run

METHODS = ("sparsegpt", "wanda", "ria-cp", "mrp", "fistapruner", "admm", "alps", "fast", "best")


def main() -> None:
    """Run all in turn, print the table, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=METHODS, help="by name, or with changes: best,solver=alps")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--exclude", nargs="*", default=[], help="globs of linears to leave dense")
    options = parser.parse_args()
    version = commit()
    records: list[dict[str, Any]] = []
    for i in range(options.runs):
        for method in options.methods:
            with tempfile.TemporaryDirectory() as scratch:
                command = [sys.executable, "-m", "sparsify", "prune", options.model, "--pattern", options.pattern]
                name, *changes = method.split(",")
                command += ["--method", name, "--calibration", options.ids, "--out", f"{scratch}/out"]
                command += [part for change in changes for part in ("--set", change)]
                command += [part for glob in options.exclude for part in ("--exclude", glob)]
                records.append({"run": i, "method": method, **run(command, Path(scratch) / "log")})
                print(json.dumps(records[-1]), flush=True)
    table = []
    for method in options.methods:
        for figure in ("user_cpu_s", "wall_s", "peak_memory_bytes"):
            ours = [r[figure] for r in records if r["method"] == method]
            base = [r[figure] for r in records if r["method"] == options.methods[0]]
            ratios = sorted(x / y for x, y in zip(ours, base, strict=True))
            table.append(
                {
                    "method": method,
                    "figure": figure,
                    "median": statistics.median(ours),
                    "baseline": options.methods[0],
                    "ratio_median": statistics.median(ratios),
                    "ratio_min": ratios[0],
                    "ratio_max": ratios[-1],
                    "n": len(ratios),
                }
            )
            print(json.dumps(table[-1]), flush=True)
    body = {
        "commit": version,
        "pattern": options.pattern,
        "excluded": options.exclude,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "table": table,
        "records": records,
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
