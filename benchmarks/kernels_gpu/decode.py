"""The stage that times few tokens: the Triton kernel against cuBLAS."""

from __future__ import annotations

import argparse
import time
from typing import Any

from vllm_gpu.layer import measure_ceilings

from kernels_gpu.layers import Record, copies_needed, shapes, variants
from kernels_gpu.timing import CLOCK, add_bandwidth, summary, time_variants


def decode(options: argparse.Namespace) -> int:
    """Time packed and dense products of 1 to 64 tokens with weights that are never in the L2 cache."""
    record = Record("decode", options)
    ceilings = measure_ceilings(options.device, options.tiny)
    rows: list[dict[str, Any]] = []
    record.body |= {"ceilings": ceilings, "timing": CLOCK[options.device], "dtype": "bfloat16", "rows": rows}
    print(f"ceilings: {ceilings}", flush=True)
    longest = 0.0
    for name, shape in shapes(options).items():
        for pattern in options.patterns:
            what = f"decode {name} {pattern}"
            if record.left_s < max(longest, 5):
                record.not_run(what, f"the budget is spent: {record.left_s:.0f} s left")
                continue
            started = time.monotonic()
            for row in _rows(record, what, shape, pattern, options, ceilings["bytes_per_s"]):
                rows.append({"layer": name, **row})
            longest = max(longest, time.monotonic() - started)
            record.body["summary"] = summary(rows, ("pattern", "tokens"))
            record.write()
    for line in record.body.get("summary", []):
        print(line)
    return record.close()


def _rows(
    record: Record, what: str, shape: tuple[int, int], pattern: str, options: argparse.Namespace, bytes_per_s: float
) -> list[dict[str, Any]]:
    import torch

    on_gpu = options.device == "cuda"
    names = ["triton"] if on_gpu else ["packed"]
    n_copies = copies_needed(shape, pattern, options.device)
    found, refused = variants(shape, pattern, names, options.device, n_copies)
    for name, why in refused.items():
        record.not_run(f"{what} {name}", why)
    rows = []
    for tokens in options.tokens:
        x = torch.randn(tokens, shape[1], device=options.device, dtype=torch.bfloat16)
        entries, failed = time_variants(found, x, options.samples, on_gpu)
        for name, why in failed.items():
            record.failed(f"{what}, {tokens} tokens, {name}", why)
        add_bandwidth(entries, 2 * tokens * sum(shape), bytes_per_s)
        rows.append({"shape": shape, "pattern": pattern, "tokens": tokens, "copies": n_copies, "variants": entries})
        shown = {name: f"{entry['us']['median']:.1f} us, {entry['speedup']:.2f}x" for name, entry in entries.items()}
        print(f"{what}, {tokens} tokens: {shown}", flush=True)
    if on_gpu:
        torch.cuda.empty_cache()
    return rows
