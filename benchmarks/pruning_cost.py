"""What pruning costs beside LLM Compressor: user CPU, wall time and peak memory, as ratios.

    python benchmarks/pruning_cost.py --method wanda --python ENV/bin/python --model DIR --ids FILE:calibration_ids \
        --out benchmarks/results/pruning_cost.json

`ENV` holds both tools (`pip install llmcompressor` and this project), so that torch and transformers are the same.
Both prune the same folder by `--method` to 2:4 on the same windows in float32, `--runs` times each in turn (A B A B
...), every run in a process of its own with the same environment. Threads wait passively in both: threads that spin
would charge the machine's other work to whoever waits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit

HERE = Path(__file__).parent


def run(command: list[str], log: Path) -> dict[str, float]:
    """Run to the end; user CPU, wall time and peak memory of the process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return {
        "user_cpu_s": usage.ru_utime,
        "sys_cpu_s": usage.ru_stime,
        "wall_s": time.monotonic() - began,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    """Run both in turn, print the table, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), default="wanda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    version = commit()
    records: list[dict[str, Any]] = []
    for i in range(options.runs):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            ours = [
                options.python,
                "-m",
                "sparsify",
                "prune",
                options.model,
                "--pattern",
                "2:4",
                "--method",
                options.method,
            ]
            ours += ["--calibration", options.ids, "--out", str(folder / "ours")]
            peer = [
                options.python,
                str(HERE / "peer_llmcompressor.py"),
                "--method",
                options.method,
                "--model",
                options.model,
                "--ids",
                options.ids,
            ]
            peer += ["--pattern", "2:4", "--out", str(folder / "peer"), "--json", str(folder / "peer.json")]
            for name, command in (("sparsify", ours), ("llmcompressor", peer)):
                process = run(command, folder / "log")
                if name == "sparsify":
                    inner = json.loads((folder / "ours/run.json").read_text())
                    call = {"user_cpu_s": inner["user_cpu_seconds"], "wall_s": inner["seconds"]}
                    versions = json.loads((folder / "ours/sparsify.json").read_text())["versions"]
                else:
                    inner = json.loads((folder / "peer.json").read_text())
                    call = {key: inner["prune"][key] for key in ("user_cpu_s", "wall_s")}
                    versions = inner["versions"]
                records.append({"run": i, "tool": name, "process": process, "call": call, "versions": versions})
                print(i, name, {k: round(v, 1) for k, v in process.items()}, "call", call, flush=True)
    table = []
    for scope, key in (
        ("process", "user_cpu_s"),
        ("process", "wall_s"),
        ("process", "peak_memory_bytes"),
        ("call", "user_cpu_s"),
    ):
        a, b = ([r[scope][key] for r in records if r["tool"] == tool] for tool in ("sparsify", "llmcompressor"))
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        table.append(
            {
                "scope": scope,
                "figure": key,
                "sparsify_median": statistics.median(a),
                "llmcompressor_median": statistics.median(b),
                "ratio_median": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "n": len(ratios),
            }
        )
        print(json.dumps(table[-1]), flush=True)
    options.out.write_text(
        json.dumps({"commit": version, "method": options.method, "table": table, "records": records}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
