"""Each kernel against float64 and F.linear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_machine.weights import describe, errors, poison, random_packed, same_bits

if TYPE_CHECKING:
    import torch

    from sparsify.format.packed import Packed
    from sparsify.kernels.kernel import Kernel
    from sparsify.types import NofM


def check_kernel(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One kernel against float64 and F.linear: eager, compiled, captured in a graph; and what it refuses."""
    import torch

    from sparsify.kernels.dispatch import KERNELS as TABLE
    from sparsify.kernels.dispatch import choose
    from sparsify.types import NofM

    device, tiny = arguments["device"], arguments["tiny"]
    kernel = TABLE[arguments["kernel"]]
    absent = kernel.absent(torch.device(device))
    if absent:
        yield {"absent": absent}
        return
    two_of_four = NofM(2, 4)
    shapes = [(96, 192), (64, 128)] if tiny else [(96, 192), (512, 512), (1280, 8192), (6144, 4096), (4096, 14336)]
    dtypes = [torch.bfloat16, torch.float16]
    patterns: list[NofM | None] = [two_of_four]
    if kernel.name == "packed":
        dtypes.append(torch.float32)
        patterns += [NofM(4, 8), None]
    for shape, dtype, pattern, perm in itertools.product(shapes, dtypes, patterns, (False, True)):
        if shape in shapes[3:] and (pattern != two_of_four or dtype == torch.float32):
            continue  # the large ones are for what is served
        packed = random_packed(shape, pattern, dtype, perm=perm, device=device)
        choice = choose(packed, kernel.name)
        if choice.kernel is None:
            yield {"case": describe(packed), "ok": False, "why": choice.reason}
            continue
        for case in _eager_cases(kernel, packed, device):
            yield {"part": "eager", "engaged": choice.name, **case, "case": f"{describe(packed)}, {case['case']}"}
    bias = torch.randn(shapes[1][0], device=device, dtype=torch.bfloat16)
    packed = random_packed(shapes[1], two_of_four, torch.bfloat16, device=device)
    for case in _compiled_cases(kernel, packed, bias, "inductor" if device == "cuda" else "aot_eager"):
        yield {"part": "torch.compile", **case}
    if device == "cuda":
        for case in _graph_cases(kernel, packed, bias):
            yield {"part": "CUDA graph", **case}
        yield {"part": "profile", **_profile(kernel, packed)}
    else:
        yield {"not_run": "CUDA graph capture and profile", "why": "no CUDA device"}
    if kernel.name != "packed":
        refused = {
            "24 x 40": random_packed((24, 40), two_of_four, torch.bfloat16, device=device),
            "float32": random_packed((96, 192), two_of_four, torch.float32, device=device),
            "4:8": random_packed((96, 192), NofM(4, 8), torch.bfloat16, device=device),
            "unstructured": random_packed((96, 192), None, torch.bfloat16, device=device),
        }
        for name, other in refused.items():
            choice = choose(other, kernel.name)
            right = choice.kernel is None and bool(choice.reason)
            yield {"part": "refusal", "case": name, "ok": right, "why": choice.reason}


def _eager_cases(kernel: Kernel, packed: Packed, device: str) -> Iterator[dict[str, Any]]:
    import torch

    from sparsify.format.packed import decode

    n_out, n_in = packed.shape
    weight = decode(packed)
    state = kernel.prepare(packed)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=packed.dtype)

    inputs = {f"{tokens} tokens": random(tokens, n_in) for tokens in (0, 1, 7, 8, 64, 300)}
    inputs["2 x 3 tokens"] = random(2, 3, n_in)
    inputs["8 tokens apart"] = random(8, 2 * n_in)[:, ::2]
    inputs["5 tokens of 16"] = random(16, n_in)[3:8]
    for name, with_bias in itertools.product(inputs, (False, True)):
        x, bias = inputs[name], random(n_out) if with_bias else None
        poison((x.numel() // n_in + 8) * n_out, packed.dtype, device)
        result = kernel.linear(x, state.tensors, state.sizes, bias)
        error, dense, right = errors(result, x, weight, bias)
        right &= tuple(result.shape) == (*x.shape[:-1], n_out) and result.dtype == x.dtype and result.is_contiguous()
        again = kernel.linear(x, state.tensors, state.sizes, bias)
        yield {
            "case": name + (", bias" if with_bias else ""), "ok": right, "error": error, "dense_error": dense,
            "repeats": same_bits(result, again), "state_bytes": state.n_bytes,
        }  # fmt: skip


def _compiled_cases(kernel: Kernel, packed: Packed, bias: torch.Tensor, backend: str) -> Iterator[dict[str, Any]]:
    import torch

    state = kernel.prepare(packed)

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = kernel.linear(x * 2, state.tensors, state.sizes, bias)
        return torch.nn.functional.silu(hidden)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (1, 8, 7, 300):
        x = torch.randn(tokens, packed.shape[1], device=bias.device, dtype=bias.dtype)
        found, wanted = compiled(x), block(x)
        right = torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)
        case = {"case": f"{backend}, {tokens} tokens", "ok": right, "equal": same_bits(found, wanted)}
        yield {**case, "largest_difference": float((found - wanted).abs().max())}


def _graph_cases(kernel: Kernel, packed: Packed, bias: torch.Tensor) -> Iterator[dict[str, Any]]:
    import torch

    from sparsify.kernels.gpu_timing import captured

    state = kernel.prepare(packed)
    for tokens in (1, 7, 8, 64, 300):
        x = torch.randn(tokens, packed.shape[1], device="cuda", dtype=bias.dtype)
        graph, result = captured(partial(kernel.linear, x, state.tensors, state.sizes, bias))
        equal = []
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            result.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            equal.append(same_bits(result, kernel.linear(x, state.tensors, state.sizes, bias)))
        yield {"case": f"{tokens} tokens", "ok": all(equal), "equal": equal}


def _profile(kernel: Kernel, packed: Packed) -> dict[str, Any]:
    """Names of the GPU's kernels in one call: what ran, whatever it is called here."""
    import torch

    state = kernel.prepare(packed)
    x = torch.randn(8, packed.shape[1], device="cuda", dtype=packed.dtype)
    kernel.linear(x, state.tensors, state.sizes, None)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kernel.linear(x, state.tensors, state.sizes, None)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return {"case": "8 tokens", "ok": bool(names), "gpu_kernels": names}
