"""Do our times of products agree with those of an independent timer, torch.utils.benchmark, of the same products?

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/agreement_kernels.py --out FILE

Round by round each product is timed by us, as for the kernel records of a run, and by torch's Timer, over the same
copies of its weight, for about as long; which of them goes first alternates. The record has the ratio of each round,
ours / theirs, with its spread and the interval of its median.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from torch.utils.benchmark import Timer

from sparsify.bench.product_times import Products
from sparsify.bench.spread import median_interval, spread
from sparsify.kernels.table import device_key
from sparsify.kernels.tuning_cpu import interleaved
from sparsify.kernels.tuning_request import random_packed
from sparsify.types import parse_pattern

# Of SmolLM2-135M and of a Llama of 1B.
SHAPES = [(576, 1536), (1536, 576), (2048, 8192)]
PATTERN = "2:4"
# Of one sample, as of ours.
_SAMPLE_US = 20e3


def compared(shape: tuple[int, int], tokens: int, rounds: int, n_bytes: int) -> list[dict[str, Any]]:
    """A row for each way to multiply by a weight of ``shape``."""
    products = Products(random_packed(shape, parse_pattern(PATTERN), torch.bfloat16, torch.bfloat16), n_bytes)
    x = torch.randn(tokens, shape[1]).to(torch.bfloat16)
    calls = {name: _next_copy(call, products.n_copies) for name, call in products.calls(x).items()}
    # The timer would have torch use one thread.
    threads = torch.get_num_threads()
    timers = {name: Timer("call(0)", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    ours: dict[str, list[float]] = {name: [] for name in calls}
    theirs: dict[str, list[float]] = {name: [] for name in calls}

    def by_us(name: str) -> None:
        ours[name] += interleaved({(0, name): calls[name]}, (0, name), products.n_copies, 1)[0, name]

    def by_torch(name: str) -> None:
        theirs[name].append(timers[name].timeit(max(1, round(_SAMPLE_US / about_us[name]))).median * 1e6)

    with torch.inference_mode():
        for name in calls:
            by_us(name)
        about_us = {name: found.pop() for name, found in ours.items()}
        for i in range(rounds):
            for name in calls:
                for time_it in (by_us, by_torch) if i % 2 else (by_torch, by_us):
                    time_it(name)
    rows = []
    for name in calls:
        ratios = [mine / other for mine, other in zip(ours[name], theirs[name], strict=True)]
        rows.append(
            {
                "shape": list(shape), "pattern": PATTERN, "tokens": tokens, "way": name, "copies": products.n_copies,
                "cold": products.cold, "ours_us": spread(ours[name]), "torch_us": spread(theirs[name]),
                "ratio": spread(ratios), "ratio_interval": median_interval(ratios), "ratios": ratios,
            }
        )  # fmt: skip
    return rows


def _next_copy(call: Callable[[int], torch.Tensor], n: int) -> Callable[[int], torch.Tensor]:
    """``call`` with the next of ``n`` copies each time, whoever times it: none is in a cache."""
    turn = itertools.cycle(range(n))
    return lambda _: call(next(turn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--shape", action="append", help="as 576x1536; default: three shapes")
    parser.add_argument("--bytes", type=int, default=0, help="of the copies of a weight; 0: more than the cache holds")
    options = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape or ()] or SHAPES
    rows = []
    for (n_out, n_in), tokens in itertools.product(shapes, options.tokens):
        found = compared((n_out, n_in), tokens, options.rounds, options.bytes)
        rows += found
        for row in found:
            ratio = row["ratio"]
            print(
                f"{row['shape']} {row['tokens']} tokens, {row['way']}: {row['ours_us']['median']:.1f} us, "
                f"{ratio['median']:.3f} of torch's timer ({ratio['min']:.3f} to {ratio['max']:.3f})"
            )
    record = {
        "commit": commit(),
        "device": device_key(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_1m": os.getloadavg()[0],
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
