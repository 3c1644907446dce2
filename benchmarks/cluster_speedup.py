"""How much faster do two workers prune than one, where blocks can be pruned by themselves? And are the bits the same?

Each round runs every way once, in an order drawn anew; seconds are those of the whole command, one thread a worker.

    python benchmarks/cluster_speedup.py --model smollm2-135m --blocks 8 --out FILE
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

from provenance import commit

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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, default=8, help="that are pruned; the others are copied")
    parser.add_argument("--method", default="fistapruner")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["one process", "2 processes", *PAIRS[0]])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    digests: dict[str, set[str]] = {way: set() for way in options.ways}
    draw = random.Random(0)
    for _ in range(options.rounds):
        for way in draw.sample(options.ways, len(options.ways)):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                includes = [arg for i in range(options.blocks) for arg in ("--include", f"*.layers.{i}.*")]
                command = [
                    sys.executable, "-m", "sparsify", "prune", options.model, "--method", options.method, "--inputs",
                    "dense", "--windows", str(options.windows), *includes, "--out", str(out), *WAYS[way],
                ]  # fmt: skip
                began = time.monotonic()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds[way].append(time.monotonic() - began)
                digests[way].add(digest(out))
                print(way, round(seconds[way][-1], 1), flush=True)
    if len(set.union(*digests.values())) != 1:
        raise SystemExit(f"the bits differ: {digests}")
    record: dict[str, Any] = {
        "benchmark": "cluster_speedup",
        "commit": commit(),
        "environment": environment(1),
        "arguments": {key: value for key, value in vars(options).items() if key != "out"},
        "same_bits": True,
        "seconds": {way: spread(values) for way, values in seconds.items()},
        "samples_s": seconds,
        "speedups": {
            f"{many} over {one}": spread([a / b for a, b in zip(seconds[one], seconds[many], strict=True)])
            for one, many in PAIRS
            if one in seconds and many in seconds
        },
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["speedups"], indent=1))


if __name__ == "__main__":
    main()
