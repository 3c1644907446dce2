"""The stage that times few tokens: the Triton kernel against cuBLAS."""

from __future__ import annotations

import argparse
from typing import Any

from gpu_machine.timing import measure_ceilings

from kernels_gpu.layers import Record, copies_needed, shapes, variants
from kernels_gpu.timing import CLOCK, add_bandwidth, add_bound, summary, time_variants


def decode(options: argparse.Namespace) -> int:
    """Time packed and dense products of 1 to 64 tokens with weights that are never in the L2 cache."""
    record = Record("decode", options)
    ceilings = measure_ceilings(options.device, options.tiny)
    rows: list[dict[str, Any]] = []
    record.body |= {"ceilings": ceilings, "timing": CLOCK[options.device], "dtype": "bfloat16", "rows": rows}
    print(f"ceilings: {ceilings}", flush=True)
    cases = [
        (f"decode {name} {pattern}", (name, shape, pattern))
        for name, shape in shapes(options).items()
        for pattern in options.patterns
    ]
    for what, (name, shape, pattern) in record.affordable(cases):
        for row in _rows(record, what, shape, pattern, options, ceilings):
            rows.append({"layer": name, **row})
        record.body["summary"] = summary(rows, ("pattern", "tokens"))
        record.write()
    for line in record.body.get("summary", []):
        print(line)
    return record.close()


def _rows(
    record: Record,
    what: str,
    shape: tuple[int, int],
    pattern: str,
    options: argparse.Namespace,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    import torch

    on_gpu = options.device == "cuda"
    names = options.kernels or (["triton"] if on_gpu else ["packed"])
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
        add_bandwidth(entries, 2 * tokens * sum(shape), ceilings["bytes_per_s"])
        add_bound(entries, shape, tokens, ceilings)
        rows.append({"shape": shape, "pattern": pattern, "tokens": tokens, "copies": n_copies, "variants": entries})
        shown = {name: f"{entry['us']['median']:.1f} us, {entry['speedup']:.2f}x" for name, entry in entries.items()}
        print(f"{what}, {tokens} tokens: {shown}", flush=True)
    if on_gpu:
        torch.cuda.empty_cache()
    return rows
