"""Prune a model with LLM Compressor's Wanda or SparseGPT on given token windows and record what that cost.

The baseline half of the pruning-cost comparison. LLM Compressor is not a dependency of this project: run the script
with an environment that has `llmcompressor` (0.14.0.1 was tried, with torch 2.13.0 and transformers 5.17.0).

    OMP_NUM_THREADS=2 python benchmarks/peer_llmcompressor.py --method wanda --model DIR \
        --ids FILE:calibration_ids --pattern 2:4 --out DIR --json FILE

`--model` is an ordinary Hugging Face folder with a tokenizer; it is loaded and pruned in float32. Every linear of the
decoder blocks is pruned, embeddings and head stay dense, and each block sees what the pruned blocks before it produce.
`--ids` names an integer tensor [windows, tokens] in a safetensors file; the windows go in as they are, in their order.
`--out` receives the pruned model in the data type of the source, as plain safetensors without a compression config.
The record separates the pruning call from the whole process, which also imports, loads, checks and saves. User CPU
seconds cover all threads. The threads are torch's default: set OMP_NUM_THREADS. Threads that wait for each other
spin, so other work on the machine inflates the user CPU seconds of a run with several threads: measure on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_START = time.perf_counter()

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "accelerate", "safetensors", "numpy")
BLOCKS = r"re:model\.layers\.\d+$"  # what LLM Compressor's own examples target
BLOCK_WEIGHT = re.compile(r"^model\.layers\.\d+\.")


@dataclass(frozen=True)
class Cost:
    """Resources spent between two moments of this process; `user_cpu_s` sums over threads."""

    user_cpu_s: float
    sys_cpu_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Cost:
        """Everything spent since the process started (wall time: since this script started)."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime, usage.ru_stime, time.perf_counter() - _START)

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(
            self.user_cpu_s - earlier.user_cpu_s, self.sys_cpu_s - earlier.sys_cpu_s, self.wall_s - earlier.wall_s
        )


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far.

    Linux hands `ru_maxrss` down from the process that started this one, so the kernel's own mark comes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory() -> bool:
    """Set the kernel's mark back to the present size, so that the next reading is the peak from here on (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def parse_pattern(text: str) -> tuple[int, int]:
    """Read N:M, N weights kept in every M consecutive inputs."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not N:M with 0 < N < M, for example 2:4")
    return int(match[1]), int(match[2])


def parse_ids(text: str) -> tuple[Path, str]:
    """Read FILE:TENSOR."""
    path, _, name = text.rpartition(":")
    if not path or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE:TENSOR, for example ids.safetensors:calibration_ids")
    return Path(path), name


def load_windows(path: Path, name: str, batch_size: int) -> Any:
    """A DataLoader of `input_ids` over the stored windows, neither shuffled nor tokenised again."""
    from safetensors import safe_open
    from torch.utils.data import DataLoader

    with safe_open(path, framework="pt") as file:
        ids = file.get_tensor(name).long()
    if ids.ndim != 2:
        raise SystemExit(f"{name} in {path} has shape {tuple(ids.shape)}, expected [windows, tokens]")
    windows: Any = [{"input_ids": window} for window in ids]
    return DataLoader(windows, batch_size=batch_size, shuffle=False)


def check(model: Any, n_kept: int, group: int) -> dict[str, int | float]:
    """Count zeros over the linears of the decoder blocks, and groups that break the pattern."""
    import torch

    n_linears = n_weights = n_zeros = n_broken = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and BLOCK_WEIGHT.match(name):
            nonzero = module.weight.detach() != 0
            n_linears += 1
            n_weights += nonzero.numel()
            n_zeros += nonzero.numel() - int(nonzero.sum())
            n_broken += int((nonzero.reshape(nonzero.shape[0], -1, group).sum(-1) > n_kept).sum())
    sparsity = n_zeros / n_weights
    return {"n_linears": n_linears, "n_weights": n_weights, "n_broken_groups": n_broken, "sparsity": sparsity}


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), default="wanda", help="modifier (wanda)")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--ids", type=parse_ids, required=True, metavar="FILE:TENSOR", help="calibration windows")
    parser.add_argument("--pattern", type=parse_pattern, default=(2, 4), metavar="N:M", help="N kept of M (2:4)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows per forward pass (1, LLM Compressor's own)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned model")
    parser.add_argument("--json", type=Path, required=True, help="file for the record")
    args = parser.parse_args()
    n_kept, group = args.pattern

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is local
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    windows = load_windows(args.ids[0], args.ids[1], args.batch_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model)  # asked for, though nothing is tokenised
    source_dtype = AutoConfig.from_pretrained(args.model).dtype
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[args.method]
    recipe = modifier(
        sparsity=(group - n_kept) / group,
        mask_structure=f"{group - n_kept}:{group}",  # LLM Compressor counts the removed weights, not the kept ones
        targets=[BLOCKS],
        ignore=["re:.*lm_head"],
    )
    load_peak = peak_memory_bytes()
    separated = forget_peak_memory()

    before = Cost.now()
    oneshot(model=model, processor=tokenizer, dataset=windows, recipe=recipe, pipeline="sequential")
    cost = Cost.now() - before
    prune_peak = peak_memory_bytes()

    counts = check(model, n_kept, group)
    # The class's method: oneshot replaces the instance's by one that writes a recipe and a compression config.
    type(model).save_pretrained(model.to(source_dtype), args.out)
    tokenizer.save_pretrained(args.out)

    record = {
        "tool": "llmcompressor",
        "method": args.method,
        "pattern": f"{n_kept}:{group}",
        "calibration": {"tensor": args.ids[1], "n_windows": len(windows.dataset), "batch_size": args.batch_size},
        "prune": {**asdict(cost), "peak_memory_bytes": prune_peak if separated else None},
        "process": asdict(Cost.now()),
        "peak_memory_bytes": max(load_peak, peak_memory_bytes()),
        **counts,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in PACKAGES},
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    if counts["n_broken_groups"]:
        raise SystemExit(f"{counts['n_broken_groups']} groups keep more than {n_kept} of {group} weights")


if __name__ == "__main__":
    main()
