"""How long a model of Llama-3.1-8B's shape takes to prune on this GPU, and how much of its memory: `fast` and `best`.

Not yet run on a GPU. For a machine with torch and transformers and a copy of this checkout, without a network:

    python benchmarks/pruning_gpu.py --out benchmarks/results/pruning_gpu.json --budget-s 800

Random weights are made on the GPU (16 GB on disk), then each method prunes them to 2:4 on 32 windows of 2048 random
tokens, by the command line in a process of its own. The record is written again after every step. A method that the
budget ends has its finished blocks in the record, by step, and is said to be unfinished.

Exit status: 0 all well, 1 something failed, 3 something was not run. `--device cpu --tiny` tries it on any machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_machine.llama import LLAMA_8B, Llama, write_dense_model
from gpu_machine.record import NOT_RUN, Record, spread

TINY = Llama(64, 128, 3, 4, 2, 256)
# What a process needs to start and to end.
_LEAST_S = 30.0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that an ordinary machine runs in seconds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pruning_gpu")
    parser.add_argument("--budget-s", type=float, default=800)
    parser.add_argument("--methods", nargs="+", default=["fast", "best"])
    parser.add_argument("--pattern", default="2:4")
    return parser.parse_args(arguments)


def blocks_of(journal: Path) -> list[dict[str, Any]]:
    """Seconds by step of every finished block."""
    if not journal.exists():
        return []
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [
        {key: line[key] for key in ("block", "took_s", "seconds", "worst")}
        for line in lines
        if line["event"] == "block"
    ]


def prune(record: Record, options: argparse.Namespace, method: str, model: Path, ids: Path) -> None:
    """One method; what it took goes into the record."""
    out = options.work / f"out-{method}"
    command = [sys.executable, "-m", "sparsify", "prune", str(model), "--method", method, "--pattern", options.pattern]
    command += ["--calibration", f"{ids}:ids", "--device", options.device, "--out", str(out), "--overwrite", "--json"]
    started, timeout = time.monotonic(), max(record.left_s - _LEAST_S, 1)
    found: dict[str, Any] = {"method": method, "pattern": options.pattern, "finished": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        record.not_run(method, f"not finished after {timeout:.0f} s")
    else:
        if done.returncode:
            record.failed(method, (done.stderr.strip().splitlines() or ["no message"])[-1][:300])
        else:
            found |= {"finished": True, **json.loads((out / "run.json").read_text(encoding="utf-8"))}
    found["wall_s"] = round(time.monotonic() - started, 2)
    folder = out if found["finished"] else out.with_name(f"{out.name}.partial")
    found["blocks"] = blocks_of(folder / "journal.jsonl")
    if found["blocks"]:
        found["block_seconds"] = spread([block["took_s"] for block in found["blocks"]])
    record.body.setdefault("runs", []).append(found)
    record.write()
    peak = found.get("peak_device_bytes", 0) / 1e9
    print(f"{method}: {len(found['blocks'])} blocks, {found['wall_s']:.0f} s, GPU peak {peak:.1f} GB", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Make the model, prune it by each method, write the record; the exit status."""
    import torch
    from safetensors.torch import save_file

    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: this needs an NVIDIA GPU and a CUDA build of torch; try --device cpu --tiny")
        return NOT_RUN
    record = Record("pruning_gpu", options, ("torch", "transformers", "safetensors"))
    sizes, windows, length = (TINY, 4, 32) if options.tiny else (LLAMA_8B, 32, 2048)
    model, ids = options.work / "model", options.work / "ids.safetensors"
    shutil.rmtree(options.work, ignore_errors=True)
    model.mkdir(parents=True)
    record.body["model"] = write_dense_model(model, sizes, options.device)
    record.body["calibration"] = {"windows": windows, "length": length}
    tokens = torch.randint(3, sizes.vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    save_file({"ids": tokens}, ids)
    record.write()
    for method in options.methods:
        if record.left_s < 2 * _LEAST_S and not options.tiny:
            record.not_run(method, f"the budget is spent: {record.left_s:.0f} s left")
            continue
        prune(record, options, method, model, ids)
    shutil.rmtree(options.work, ignore_errors=True)
    return record.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
