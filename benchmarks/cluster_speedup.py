"""How much faster do two workers prune than one? And are the bits the same?

    python benchmarks/cluster_speedup.py --model smollm2-135m --blocks 8 --out FILE
    python benchmarks/cluster_speedup.py --model smollm2-135m --blocks 8 --method sparsegpt --inputs pruned --out FILE

Each round runs every way once, in an order drawn anew; seconds are those of the whole command, one thread a worker, and
those from the start of the first block's work to the end of the last's, which a whole model has more of. Rounds are
added to those that FILE has of the same commit and arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit, earlier

from sparsify.bench.host import environment
from sparsify.bench.spread import spread

WAYS = {
    "one process": [],
    "2 processes": ["--workers", "2"],
    "1 Ray worker": ["--cluster", "local", "--workers", "1"],
    "2 Ray workers": ["--cluster", "local", "--workers", "2"],
}
PAIRS = (("1 Ray worker", "2 Ray workers"), ("one process", "2 processes"))


def digest(folder: Path) -> str:
    """Of all bits of a checkpoint, but for what tells of the run."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if (path.is_file() and path.suffix in (".safetensors", ".perm")) or path.name == "sparsify.json":
            whole.update(path.name.encode())
            whole.update(path.read_bytes())
    return whole.hexdigest()


def run(command: list[str]) -> dict[str, float]:
    """Seconds that a command takes, and those of processors that it and all it started have used."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": time.monotonic() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def blocks_seconds(folder: Path) -> float:
    """From the beginning of the work on blocks, when workers start too, to the end of the last that is pruned."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    began = next(line["time"] for line in lines if line["event"] == "blocks")
    ended = max(line["time"] for line in lines if line["event"] == "block" and line["linears"])
    return float(ended - began)


def ratios(samples: list[dict[str, Any]], key: str, ways: list[str]) -> dict[str, Any]:
    """How many times the seconds of one worker are those of several, paired within rounds."""
    by_way = {way: [row[key] for row in samples if row["way"] == way] for way in ways}
    return {
        f"{many} over {one}": spread([a / b for a, b in zip(by_way[one], by_way[many], strict=True)])
        for one, many in PAIRS
        if one in ways and many in ways
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, default=8, help="that are pruned; the others are copied")
    parser.add_argument("--method", default="fistapruner")
    parser.add_argument("--inputs", choices=("dense", "pruned"), default="dense")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="to add")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["one process", "2 processes", *PAIRS[0]])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    record: dict[str, Any] = {
        "benchmark": "cluster_speedup",
        "commit": commit(),
        "arguments": {key: value for key, value in vars(options).items() if key not in ("out", "rounds")},
    }
    samples: list[dict[str, Any]] = earlier(options.out, record).get("samples", [])
    includes = [arg for i in range(options.blocks) for arg in ("--include", f"*.layers.{i}.*")]
    first = len(samples) // len(options.ways)
    for number in range(first, first + options.rounds):
        for way in random.Random(number).sample(options.ways, len(options.ways)):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                command = [
                    sys.executable, "-m", "sparsify", "prune", options.model, "--pattern", options.pattern, "--method",
                    options.method, "--inputs", options.inputs, "--windows", str(options.windows), "--length",
                    str(options.length), *includes, "--out", str(out), *WAYS[way],
                ]  # fmt: skip
                row = {"round": number, "way": way, **run(command)}
                samples.append({**row, "blocks_seconds": blocks_seconds(out), "digest": digest(out)})
                print({key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()},
                      round(samples[-1]["blocks_seconds"], 1), flush=True)  # fmt: skip
    found = {row["way"]: row["digest"] for row in samples}
    if len({row["digest"] for row in samples}) != 1:
        raise SystemExit(f"the bits differ: {found}")
    record |= {
        "environment": environment(1),
        "same_bits": True,
        "seconds": {way: spread([row["seconds"] for row in samples if row["way"] == way]) for way in options.ways},
        "cpu_seconds": {
            way: spread([row["cpu_seconds"] for row in samples if row["way"] == way]) for way in options.ways
        },
        "speedups": ratios(samples, "seconds", options.ways),
        "speedups_of_blocks": ratios(samples, "blocks_seconds", options.ways),
        "samples": samples,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("speedups", "speedups_of_blocks")}, indent=1))


if __name__ == "__main__":
    main()
