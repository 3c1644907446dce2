"""What an order of inputs that is not folded costs: a gather of the channels before the product, beside the product.

    OMP_NUM_THREADS=1 python benchmarks/gather_cost.py --out benchmarks/results/gather_cost.json

Dense weights in bfloat16, the linear with and without the gather in turn; the ratio is of medians of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import commit

from sparsify.manifest import versions

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 16, 256)


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Median of ``repeat`` calls."""
    samples = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def main() -> None:
    """Time all shapes, print the ratios, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for n_out, n_in in SHAPES:
        weight = torch.randn(n_out, n_in).bfloat16()
        perm = torch.randperm(n_in).int()
        for tokens in TOKENS:
            x = torch.randn(tokens, n_in).bfloat16()

            def plain(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight)

            def gathered(x: torch.Tensor = x, weight: torch.Tensor = weight, perm: torch.Tensor = perm) -> torch.Tensor:
                return torch.nn.functional.linear(x.index_select(-1, perm), weight)

            repeat = 5 if tokens * n_out * n_in > 1 << 30 else 50
            for work in (plain, gathered):
                work()
            rounds = [(seconds(plain, repeat), seconds(gathered, repeat)) for _ in range(options.rounds)]
            ratios = sorted(after / before for before, after in rounds)
            rows.append(
                {
                    "shape": [n_out, n_in], "tokens": tokens, "rounds": rounds,
                    "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
                }
            )  # fmt: skip
            middle = statistics.median(ratios)
            print(f"{n_out} x {n_in}, {tokens} tokens: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    record = {
        "benchmark": "gather_cost",
        "commit": commit(),
        "versions": versions("torch"),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
