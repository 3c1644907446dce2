"""The stage that checks: each kernel against float64, repeated, in CUDA graphs, and twice the same."""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_machine.children import Task, run_process, scratch_folder
from gpu_machine.weights import describe, errors, poison, same_bits

from kernels_gpu.layers import FP8, Record, packed_weight, prepared


def check(options: argparse.Namespace) -> int:
    """Each kernel in a process of its own, which may crash."""
    record = Record("check", options)
    cases: list[dict[str, Any]] = []
    record.body["cases"] = cases
    for part in options.parts:
        if record.left_s < 10:
            record.not_run(part, "the budget is spent")
            continue
        scratch = scratch_folder(options.work, part)
        tool = Path(__file__).parent
        done = run_process(
            record, part, part, {"kernel": part, "device": options.device, "tiny": options.tiny}, scratch,
            record.left_s, tool=tool, variables=os.environ,
        )  # fmt: skip
        for case in done.found:
            if "absent" in case:
                record.not_run(part, case["absent"])
                continue
            cases.append({"kernel": part, **case})
            if not case["ok"]:
                record.failed(f"{part}, {case['case']}", str(case))
        right = sum(case["ok"] for case in cases if case["kernel"] == part)
        print(f"{part}: {right} of {sum(case['kernel'] == part for case in cases)} right", flush=True)
        record.write()
    return record.close()


def check_kernel(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One kernel: shapes, patterns, dtypes and numbers of tokens."""
    import torch

    from sparsify.format.packed import decode

    # The same cases at every call.
    torch.manual_seed(0)
    name, device = arguments["kernel"], arguments["device"]
    shapes = [(96, 192), (64, 128)] if arguments["tiny"] else [(96, 192), (577, 1040), (4096, 4096), (1280, 8192)]
    # Widths that no pattern divides, rows beyond the last program's, both sides of a chunk.
    if name == "triton":
        shapes += [(33, 77), (130, 1031)]
    patterns = ["2:4", "4:8", "0.5", "0.9"] if name == "triton" else ["2:4"]
    refused = ""
    for shape, pattern, dtype in itertools.product(shapes, patterns, (torch.bfloat16, torch.float16)):
        if ":" in pattern and shape[1] % 8:
            continue
        packed = packed_weight(shape, pattern, device, dtype)
        made = prepared(name, packed, device)
        if isinstance(made, str):
            refused = refused or made
            continue
        refused = "none"
        weight = decode(packed)
        for tokens in (1, 2, 3, 4, 16, 17, 64, 65, 300):
            x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
            # No input is near 0: a value of the weight that is left out shows also where there is one token.
            x += torch.ones_like(x).copysign(x)
            poison(tokens * shape[0], dtype, device)
            found = made[1](x)
            error, of_dense, right = errors(found, x, weight)
            if name == FP8:
                right = error <= 0.08
            repeats = same_bits(found, made[1](x))
            in_graph = _in_graph(made[1], x, found) if device == "cuda" and tokens <= 64 else None
            yield {
                "case": f"{describe(packed)}, {pattern}, {tokens} tokens", "error": error, "dense_error": of_dense,
                "repeats": repeats, "in_graph": in_graph,
                "ok": right and (repeats or name != "triton") and in_graph is not False,
            }  # fmt: skip
    if refused != "none":
        yield {"absent": refused}


def _in_graph(run: Any, x: Any, wanted: Any) -> bool:
    """Whether a captured call gives the same, bit for bit, after its result was overwritten."""
    import torch

    from sparsify.kernels.gpu_timing import captured

    graph, result = captured(lambda: run(x))
    result.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return same_bits(result, wanted)


TASKS: dict[str, Task] = dict.fromkeys(("triton", "cusparselt", FP8, "cutlass", "packed"), check_kernel)
