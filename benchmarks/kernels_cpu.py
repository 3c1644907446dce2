"""What ``auto`` chooses on this CPU against the best dense product, over the grid of docs/kernels.md.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/kernels_cpu.py --out benchmarks/results/kernels_cpu.json

Both are timed as a model calls them: ``SparseLinear`` against the faster of ``nn.Linear`` and the kernels' own loop
over a dense bfloat16 weight, as an operator too, in the same rounds. Weights come from memory, as in ``sparsify tune``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from provenance import commit

from sparsify import _kernels
from sparsify.kernels import native
from sparsify.kernels.dispatch import choose
from sparsify.kernels.table import device_key
from sparsify.kernels.tuning_cpu import Which, copies_of, interleaved
from sparsify.kernels.tuning_request import random_packed
from sparsify.plugins.sparse_linear import SparseLinear, linear
from sparsify.types import parse_pattern

# SmolLM2-135M and Llama-3.1-8B, where vLLM fuses them too.
SHAPES = [
    (576, 576), (192, 576), (1536, 576), (576, 1536), (3072, 576), (960, 576),
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (6144, 4096),
]  # fmt: skip
KINDS = [("bf16", "2:4"), ("bf16", "0.5"), ("bf16", "0.6"), ("bf16", "0.7"), ("int8", "0.5")]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
VALUES = {"bf16": torch.bfloat16, "int8": torch.int8}
# More than the caches hold; long products need not come from memory to be slow.
BYTES, FEW_BYTES = 1 << 30, 1 << 28
DENSE, LOOP = "torch", "loop"


def loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    n_out, n_in = weight.shape
    y = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype)
    tokens, threads = x.numel() // n_in, torch.get_num_threads()
    _kernels.dense_linear(weight.data_ptr(), n_out, n_in, x.data_ptr(), tokens, y.data_ptr(), threads)
    return y


# Reached the way sparse products are: what that takes is not what is compared.
LIBRARY: Any = torch.library.Library("sparsify_benchmark", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("loop(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("loop", loop, "CPU")
LOOP_OP = torch.ops.sparsify_benchmark.loop.default


def cell(shape: tuple[int, int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Every kind of weight of one shape, with one number of tokens."""
    n_out, n_in = shape
    n = max(1, math.ceil((BYTES if tokens <= 32 else FEW_BYTES) / (2 * n_out * n_in)))
    dense = copies_of((torch.randn(shape) / math.sqrt(n_in)).to(torch.bfloat16), n)
    x = torch.randn(tokens, n_in).to(torch.bfloat16)
    layers = [linear(weight, None) for weight in dense]
    run: dict[Which, Any] = {(-1, DENSE): lambda i: layers[i](x)}
    if "bf16" in native.features() and tokens <= 32:
        run[-1, LOOP] = lambda i: LOOP_OP(x, dense[i])
    chosen = {}
    for k, (values, pattern) in enumerate(KINDS):
        packed = random_packed(shape, parse_pattern(pattern), VALUES[values], torch.bfloat16)
        choice = chosen[k] = choose(packed, "auto", torch.bfloat16)
        if choice.kernel is None:
            continue
        copies = [SparseLinear(packed, choice.kernel) for _ in range(n)]
        run[k, choice.name] = lambda i, c=copies: c[i](x)
    with torch.inference_mode():
        samples = interleaved(run, (-1, DENSE), n, rounds if tokens <= 128 else min(rounds, 5))
    times = {which: statistics.median(found) for which, found in samples.items()}
    rivals = {name: found for (k, name), found in times.items() if k < 0}
    best = min(rivals.values())
    rows = []
    for k, (values, pattern) in enumerate(KINDS):
        found = times.get((k, chosen[k].name))
        rows.append(
            {
                "shape": list(shape),
                "tokens": tokens,
                "values": values,
                "pattern": pattern,
                "chosen": chosen[k].name,
                "plan": chosen[k].plan,
                "reason": chosen[k].reason,
                "copies": n,
                "dense_us": {name: samples[-1, name] for name in rivals},
                "packed_us": samples.get((k, chosen[k].name), []),
                # What is chosen to be dense runs as torch's product, and that only.
                "ratio_to_best": best / (found or rivals[DENSE]),
                "ratio_to_torch": rivals[DENSE] / (found or rivals[DENSE]),
            }
        )
    return rows


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind and number of tokens: geometric mean and ends of the ratio to the best dense product, over shapes."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["values"], row["pattern"], row["tokens"]].append(row)
    return [
        {
            "values": values,
            "pattern": pattern,
            "tokens": tokens,
            "mean": mean([row["ratio_to_best"] for row in group]),
            "min": min(row["ratio_to_best"] for row in group),
            "max": max(row["ratio_to_best"] for row in group),
            "mean_to_torch": mean([row["ratio_to_torch"] for row in group]),
        }
        for (values, pattern, tokens), group in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for tokens in options.tokens:
            rows += cell(shape, tokens, options.rounds)
        print(shape, " ".join(f"{r['tokens']}:{r['ratio_to_best']:.2f}" for r in rows if tuple(r["shape"]) == shape))
    record: dict[str, Any] = {
        "commit": commit(),
        "device": device_key(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "pool": Path(native.pool()).name,
        "wake_us": _kernels.wake_ns(torch.get_num_threads()) / 1e3,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "summary": summary(rows),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for line in record["summary"]:
        print(
            f"{line['values']:5} {line['pattern']:4} {line['tokens']:5} tokens: {line['mean']:.2f} "
            f"({line['min']:.2f} to {line['max']:.2f}) of the best dense, {line['mean_to_torch']:.2f} of torch's"
        )


if __name__ == "__main__":
    main()
