"""The stage that searches: configurations of the Triton kernel, algorithms of cuSPARSELt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from kernels_gpu.layers import MLP, Record, kernels, packed_weight, shapes


def tune(options: argparse.Namespace) -> int:
    """Search, keep the results in --work for the stages that time, and write the table that could be shipped."""
    record = Record("tune", options)
    rows: list[dict[str, Any]] = []
    algorithms: dict[str, Any] = {}
    record.body |= {"rows": rows, "algorithms": algorithms}
    if options.device != "cuda":
        record.not_run("tune", "no CUDA device")
        return record.close()
    # Algorithms first: they are few, and the search has a time-out of its own.
    _algorithms(record, options, algorithms)
    cases = [
        (f"tune {name} {pattern} {tokens} tokens", ({"layer": name, "pattern": pattern, "tokens": tokens}, shape))
        for name, shape in shapes(options).items()
        for pattern in options.patterns
        for tokens in options.tokens
    ]
    for what, (row, shape) in record.affordable(cases):
        _configurations(record, what, row, shape, rows)
        record.write()
    return record.close()


def _configurations(
    record: Record, what: str, row: dict[str, Any], shape: tuple[int, int], rows: list[dict[str, Any]]
) -> None:
    import torch

    from sparsify.kernels.triton_decode import tune as tune_triton

    kernel = kernels()["triton"]
    why = kernel.absent(torch.device("cuda"))
    if why:
        record.not_run(what, why)
        return
    state = kernel.prepare(packed_weight(shape, row["pattern"], "cuda"))
    x = torch.randn(row["tokens"], shape[1], device="cuda", dtype=torch.bfloat16)
    try:
        found = tune_triton(x, state.tensors, state.sizes)
    except RuntimeError as error:
        record.failed(what, str(error))
        return
    tried = [{**asdict(config), "us": us} for config, us in found]
    rows.append({**row, "shape": shape, "tried": tried})
    print(f"{what}: {tried[0]}, slowest {tried[-1]['us']:.1f} us of {len(tried)}", flush=True)


def _algorithms(record: Record, options: argparse.Namespace, algorithms: dict[str, Any]) -> None:
    import torch

    from sparsify.kernels.cusparselt_search import Problem, search

    problems = [
        Problem(*shape, tokens, dtype)
        for name, shape in shapes(options).items()
        if name in MLP
        for tokens in options.prefill_tokens
        for dtype in ("bfloat16", "float8_e4m3fn")
    ]
    why = kernels()["cusparselt"].absent(torch.device("cuda"))
    if why:
        record.not_run("cuSPARSELt's algorithms", why)
        return

    def told(problem: Problem, row: dict[str, Any]) -> None:
        algorithms[problem.key] = row
        if "failed" in row:
            record.failed(f"search {problem.key}", row["failed"])
        print(f"search {problem.key}: {row}", flush=True)
        record.write()

    search(problems, torch.device("cuda", 0), timeout_s=60, told=told)
