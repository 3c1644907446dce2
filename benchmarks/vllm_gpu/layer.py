"""The stage that times each kernel and F.linear on the linears of real models."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_machine.record import spread

from vllm_gpu.kernels import capture
from vllm_gpu.record import Record
from vllm_gpu.variants import present
from vllm_gpu.weights import pruned

if TYPE_CHECKING:
    import torch

    from sparsify.kernels.kernel import Kernel, State

    Run = Callable[[torch.Tensor], torch.Tensor]

# Linears as vLLM runs them, [out, in]: q, k and v in one, gate and up in one; for 70B on each of 8 ranks.
LAYERS = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "70b/8 qkv": (1280, 8192),
    "70b/8 o": (8192, 1024),
    "70b/8 gate_up": (7168, 8192),
    "70b/8 down": (8192, 3584),
}
SEARCHED = "cusparselt, searched"


def layer(options: argparse.Namespace) -> int:
    """Time each kernel and F.linear on the linears of real models, in turn."""
    import torch

    record = Record("layer", options)
    shapes = {"tiny": (96, 192)} if options.tiny else {k: LAYERS[k] for k in options.shapes}
    tokens = (1, 8) if options.tiny else options.tokens
    kernels = present(record, "kernel", options.kernels, options.device)
    ceilings = measure_ceilings(options.device, options.tiny)
    record.body |= {
        "ceilings": ceilings,
        "bound": "the larger of bytes over measured copy bandwidth and operations over measured dense rate; for 2:4 "
        "9/16 of the weight's bytes and twice the rate, which is the datasheet's claim",
        "timing": "CUDA graphs of several calls over copies of the weight that exceed the L2 cache, replayed in turn"
        if options.device == "cuda"
        else "host clock, calls in turn",
        "dtype": "bfloat16",
        "rows": [],
    }
    print(f"ceilings: {ceilings}", flush=True)
    longest = 0.0
    for name, shape in shapes.items():
        # A shape takes about as long as the longest so far for its size; the first is given the benefit of the doubt.
        if record.left_s < max(longest, 5):
            record.not_run(f"layer {name}", f"the budget is spent: {record.left_s:.0f} s left")
            continue
        started = time.monotonic()
        for row in time_layer(name, shape, tokens, kernels, options, ceilings):
            for what, why in row.pop("failed").items():
                record.failed(f"layer {name}, {row['tokens']} tokens, {what}", why)
            record.body["rows"].append(row)
            medians = {key: f"{value['us']['median']:.1f}" for key, value in row["variants"].items()}
            print(f"{name} {row['tokens']} tokens: us {medians}, bounds {row['bound_us']}", flush=True)
        longest = max(longest, time.monotonic() - started)
        record.write()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return record.close()


def measure_ceilings(device: str, tiny: bool) -> dict[str, float]:
    """Copy bandwidth, counting bytes read and written, and the rate of a large bfloat16 product, on random data."""
    import torch

    size = 1 << 8 if tiny else 1 << 13
    x = torch.randn(size, size, device=device).bfloat16()
    source = torch.randn(1 << (16 if tiny else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def median(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        return statistics.median(_seconds(run, device == "cuda") for _ in range(10))

    return {
        "bytes_per_s": 2 * source.nbytes / median(lambda: target.copy_(source)),
        "dense_flops": 2 * size**3 / median(lambda: x @ x),
    }


def _seconds(run: Callable[[], Any], on_gpu: bool) -> float:
    import torch

    if not on_gpu:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class _Variant:
    """One way to multiply by a weight.

    Attributes:
        engaged: the kernel that runs.
        n_bytes: of one weight.
        copies: one function per copy of the weight.
    """

    engaged: str
    n_bytes: int
    copies: list[Run]


def time_layer(
    name: str,
    shape: tuple[int, int],
    token_counts: tuple[int, ...],
    kernels: list[str],
    options: argparse.Namespace,
    ceilings: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """One row per number of tokens."""
    import torch

    device, n_in = options.device, shape[1]
    on_gpu = device == "cuda"
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0
    # Enough copies that the packed weights, the smallest, are never found in the cache.
    n_copies = max(1, math.ceil(3 * l2_bytes / (math.prod(shape) * 9 / 8)))
    algorithms: dict[int, list[int]] = {}
    variants, refused = _variants(shape, kernels, device, n_copies, None if options.no_search else algorithms)
    for tokens in token_counts:
        x = torch.randn(tokens, n_in, device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"layer": name, "shape": shape, "tokens": tokens, "copies": n_copies, "variants": {}}
        row["failed"] = dict(refused)
        wanted = variants["dense"].copies[-1](x).float()
        ready: dict[str, Callable[[], Any]] = {}
        calls = max(n_copies, 4)
        for key, variant in variants.items():
            try:
                error = float((variant.copies[-1](x).float() - wanted).norm() / wanted.norm())
                if not error <= 0.02:
                    raise ValueError(f"relative difference from F.linear {error}")
                ready[key] = _timed(variant.copies, x, calls, on_gpu)
            except (RuntimeError, ValueError) as failure:
                row["failed"][key] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
                continue
            entry = {"engaged": variant.engaged, "reason": "", "bytes": variant.n_bytes, "error": error}
            row["variants"][key] = {**entry, "samples_us": []}
            if key == SEARCHED:
                row["variants"][key]["algorithm"] = algorithms[tokens]
        for _ in range(options.samples):
            for key, run in ready.items():
                row["variants"][key]["samples_us"].append(_seconds(run, on_gpu) / calls * 1e6)
        for key, entry in row["variants"].items():
            entry["us"] = spread(entry["samples_us"])
            if tokens in (1, 256):
                entry["host_us"] = _host_us(variants[key].copies[0], x, on_gpu)
        row["bound_us"] = {
            "dense": bound_us(shape, tokens, ceilings, 1.0, 1.0),
            "2:4": bound_us(shape, tokens, ceilings, 9 / 16, 2.0),
        }
        yield row


def _variants(
    shape: tuple[int, int], kernels: list[str], device: str, n_copies: int, algorithms: dict[int, list[int]] | None
) -> tuple[dict[str, _Variant], dict[str, str]]:
    """Each variant with ``n_copies`` random weights, and why a kernel does not take them.

    ``algorithms`` takes what cuSPARSELt's own search finds; None leaves that variant out.
    """
    import torch

    from sparsify.format.packed import decode, encode
    from sparsify.kernels.dispatch import choose
    from sparsify.types import NofM

    variants: dict[str, _Variant] = {}
    refused: dict[str, str] = {}

    def add(key: str, engaged: str, n_bytes: int, run: Run) -> None:
        variants.setdefault(key, _Variant(engaged, n_bytes, [])).copies.append(run)

    for _ in range(n_copies):
        weight = pruned(torch.randn(shape, device=device).div_(math.sqrt(shape[1])), NofM(2, 4))
        packed = encode(weight.bfloat16(), NofM(2, 4))
        dense = decode(packed)
        add("dense", "dense", dense.nbytes, partial(torch.nn.functional.linear, weight=dense))
        for name in kernels:
            choice = choose(packed, name)
            if choice.kernel is None:
                refused[name] = choice.reason
                continue
            state = choice.kernel.prepare(packed)
            add(name, choice.name, state.n_bytes, partial(_product, choice.kernel, state))
            if name == "cusparselt" and algorithms is not None:
                add(SEARCHED, name, state.n_bytes, partial(_searched, state.tensors["blob"], algorithms))
    return variants, refused


def _product(kernel: Kernel, state: State, x: torch.Tensor) -> torch.Tensor:
    return kernel.linear(x, state.tensors, state.sizes, None)


def _searched(blob: torch.Tensor, found: dict[int, list[int]], x: torch.Tensor) -> torch.Tensor:
    """CuSPARSELt with the algorithm that its own search finds for the number of tokens: what a search would add.

    Args:
        blob: the compressed weight.
        found: tokens -> what the search said, shared by copies of a weight.
        x: [tokens, in].
    """
    import torch

    missing = -x.shape[0] % 8
    flat = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    if x.shape[0] not in found:
        library: Any = torch._C
        answer = library._cusparselt.mm_search(blob, flat.t(), None, None, None, True)
        found[x.shape[0]] = [int(value) for value in answer]
    alg, split_k, mode = found[x.shape[0]][:3]
    result = torch._cslt_sparse_mm(
        blob, flat.t(), transpose_result=True, alg_id=alg, split_k=split_k, split_k_mode=mode if split_k != 1 else -1
    )
    return result[: x.shape[0]]


def _timed(copies: list[Run], x: torch.Tensor, calls: int, on_gpu: bool) -> Callable[[], Any]:
    """What to time: ``calls`` calls, in a graph where there is a GPU."""
    turns = itertools.cycle(copies)

    def some() -> Any:
        for _ in range(calls):
            result = next(turns)(x)
        return result

    if not on_gpu:
        some()
        return some
    graph, _ = capture(some)
    graph.replay()
    return graph.replay


def _host_us(run: Run, x: torch.Tensor, on_gpu: bool) -> float:
    """Microseconds that a call keeps the host busy, without a graph."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(50):
        run(x)
    taken = time.perf_counter() - started
    if on_gpu:
        torch.cuda.synchronize()
    return taken / 50 * 1e6


def bound_us(shape: tuple[int, int], tokens: int, ceilings: dict[str, float], weight: float, rate: float) -> float:
    """No version runs faster: ``weight`` is the share of its bytes that is read, ``rate`` that of the dense rate."""
    n_out, n_in = shape
    n_bytes = 2 * (weight * n_out * n_in + tokens * (n_in + n_out))
    flops = 2 * tokens * n_out * n_in
    return 1e6 * max(n_bytes / ceilings["bytes_per_s"], flops / (rate * ceilings["dense_flops"]))
