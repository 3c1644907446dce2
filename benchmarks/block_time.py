"""Time and memory to prune one decoder block by each method, and what that makes for a whole model.

    python benchmarks/block_time.py --device cuda --out benchmarks/results/block_time.json
    python benchmarks/block_time.py --shape 256 688 8 4 --tokens 8 512 --blocks 32 --out FILE

By default a block of Llama-3.1-8B's shape (random weights) on 128 windows of 2048 random tokens, and a model of 32. A
model of one such block and one of two are pruned in processes of their own: their difference is what one more block
takes, passes to the next block included, and the model's time is the first run plus the rest of the blocks at that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from depth_memory import make_model
from provenance import commit

METHODS = ("wanda", "ria-cp", "dsnot", "sparsegpt", "mrp", "fistapruner", "admm", "alps", "fast", "best")


def child(folder: Path, ids: str, method: str, pattern: str, device: str) -> None:
    """Prune once; prints the run's record and the device's peak memory as JSON."""
    import torch

    from sparsify.files import read_json
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(pattern, method, calibration=ids)
        out = prune(Source("random", folder, "folder"), recipe, Path(scratch) / "out", device=device)
        record = read_json(out / "run.json")
    if device != "cpu":
        record["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    print(json.dumps(record))


def main() -> None:
    """Make the models, run every method on both, print and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    names = ("HIDDEN", "MLP", "HEADS", "KV_HEADS")
    parser.add_argument("--shape", type=int, nargs=4, metavar=names, default=[4096, 14336, 32, 8])
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("WINDOWS", "LENGTH"), default=[128, 2048])
    parser.add_argument("--blocks", type=int, default=32, help="of the whole model")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, *rest = options.child
        child(Path(folder), *rest)
        return
    import torch
    from safetensors.torch import save_file

    from sparsify.manifest import versions

    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape = dict(zip(keys, options.shape, strict=True))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        n_windows, length = options.tokens
        ids = torch.randint(1024, (n_windows, length), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids}, root / "ids.safetensors")
        for n_blocks in (1, 2):
            make_model(root / str(n_blocks), n_blocks, shape, length)
        for method in options.methods:
            runs = []
            for n_blocks in (1, 2):
                command = [sys.executable, __file__, "--out", str(options.out), "--child", str(root / str(n_blocks))]
                command += [f"{root}/ids.safetensors:ids", method, options.pattern, options.device]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            one, two = runs
            block = two["seconds"] - one["seconds"]
            records.append(
                {
                    "method": method,
                    "first_block_seconds": one["seconds"],
                    "block_seconds": round(block, 3),
                    "model_seconds": round(one["seconds"] + (options.blocks - 1) * block, 1),
                    "peak_memory_bytes": two["peak_memory_bytes"],
                    "device_peak_bytes": two.get("device_peak_bytes"),
                    "threads": two["threads"],
                }
            )
            print(json.dumps(records[-1]), flush=True)
    body = {
        "commit": commit(),
        "versions": versions("torch", "transformers"),
        "device": torch.cuda.get_device_name(options.device) if options.device != "cpu" else "cpu",
        "shape": shape,
        "tokens": options.tokens,
        "blocks": options.blocks,
        "pattern": options.pattern,
        "records": records,
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
