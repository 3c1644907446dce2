"""The stage that times a decode step of a whole model of Llama-3.1-8B's shape, all its layers in one CUDA graph.

Written out here so that nothing but the linears differs: norms, attention over a cache of a fixed length, the gate and
the output projection, which stays dense, are torch's in every variant. Rotations of queries and keys are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpu_machine.llama import LLAMA_8B, Llama
from gpu_machine.record import spread
from gpu_machine.timing import capture, seconds

from kernels_gpu.layers import Record, packed_weight, prepared

if TYPE_CHECKING:
    import torch

    from kernels_gpu.layers import Run

TINY = Llama(64, 128, 2, 4, 2, 128)


def model(options: argparse.Namespace) -> int:
    """Time decode steps with dense weights and with each pattern, in turn."""
    import torch

    record = Record("model", options)
    on_gpu = options.device == "cuda"
    sizes = TINY if options.tiny else LLAMA_8B
    rows: list[dict[str, Any]] = []
    record.body |= {"sizes": asdict(sizes), "context": options.context, "rows": rows, "weights": "random, bfloat16"}
    kernel = "triton" if on_gpu else "packed"
    for pattern in options.patterns:
        if record.left_s < 30:
            record.not_run(f"model {pattern}", f"the budget is spent: {record.left_s:.0f} s left")
            continue
        layers = [_layer(sizes, pattern, kernel, options.device) for _ in range(sizes.layers)]
        why = next((why for layer in layers for why in layer["why"]), None)
        if why:
            record.not_run(f"model {pattern}", why)
            continue
        head = torch.randn(sizes.vocabulary, sizes.hidden, device=options.device, dtype=torch.bfloat16) / 64
        for tokens in options.tokens:
            steps = {
                name: _step(sizes, [layer[name] for layer in layers], head, tokens, options.context, options.device)
                for name in ("dense", kernel)
            }
            row = _timed(steps, tokens, options.samples, on_gpu)
            row |= {"pattern": pattern, "tokens": tokens}
            row["linear_bytes"] = {name: sum(layer["bytes"][name] for layer in layers) for name in steps}
            if not row["agree"] <= 0.05:
                record.failed(f"model {pattern}, {tokens} tokens", f"logits differ by {row['agree']}, relatively")
            rows.append(row)
            shown = {name: f"{entry['tokens_per_s']['median']:.1f} tokens/s" for name, entry in row["steps"].items()}
            print(f"model {pattern}, batch {tokens}: {shown}, {row['speedup']:.2f}x", flush=True)
            record.write()
        del layers
        if on_gpu:
            torch.cuda.empty_cache()
    return record.close()


def _layer(sizes: Llama, pattern: str, kernel: str, device: str) -> dict[str, Any]:
    """The four products of a layer, dense and by ``kernel``, their bytes, and why the kernel does not take them."""
    from functools import partial

    import torch

    from sparsify.format.packed import decode

    layer: dict[str, Any] = {"dense": [], kernel: [], "why": [], "bytes": {"dense": 0, kernel: 0}}
    for shape in sizes.fused().values():
        packed = packed_weight(shape, pattern, device)
        dense = decode(packed)
        layer["dense"].append(partial(torch.nn.functional.linear, weight=dense))
        layer["bytes"]["dense"] += dense.nbytes
        made = prepared(kernel, packed, device)
        if isinstance(made, str):
            layer["why"].append(made)
            continue
        layer["bytes"][kernel] += made[0]
        layer[kernel].append(made[1])
    return layer


def _step(
    sizes: Llama, layers: list[list[Run]], head: torch.Tensor, tokens: int, context: int, device: str
) -> Callable[[], torch.Tensor]:
    """A function of nothing: the logits of one new token in each of ``tokens`` sequences."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.hidden // sizes.heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)

    start = random(tokens, sizes.hidden)
    # One cache for all layers, which share it: attention costs the same in every variant.
    keys, values = random(tokens, kv_heads, context, size), random(tokens, kv_heads, context, size)
    norm = torch.ones(sizes.hidden, device=device, dtype=torch.bfloat16)
    functional = torch.nn.functional

    def step() -> torch.Tensor:
        x = start
        for qkv, out, gate_up, down in layers:
            normed = functional.rms_norm(x, norm.shape, norm)
            query, key, value = torch.split(qkv(normed), [heads * size, kv_heads * size, kv_heads * size], dim=-1)
            keys[:, :, -1] = key.view(tokens, kv_heads, size)
            values[:, :, -1] = value.view(tokens, kv_heads, size)
            attended = functional.scaled_dot_product_attention(
                query.view(tokens, heads, 1, size), keys, values, enable_gqa=True
            )
            x = x + out(attended.reshape(tokens, heads * size))
            gate, up = gate_up(functional.rms_norm(x, norm.shape, norm)).chunk(2, dim=-1)
            x = x + down(functional.silu(gate) * up)
        return functional.linear(functional.rms_norm(x, norm.shape, norm), head)

    return step


def _timed(steps: dict[str, Callable[[], torch.Tensor]], tokens: int, samples: int, on_gpu: bool) -> dict[str, Any]:
    logits = {name: step().float() for name, step in steps.items()}
    first, second = logits.values()
    ready: dict[str, Callable[[], Any]] = {
        name: capture(step)[0].replay if on_gpu else step for name, step in steps.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for run in ready.values():
        run()
    for _ in range(samples):
        for name, run in ready.items():
            taken[name].append(seconds(run, on_gpu))
    entries: dict[str, dict[str, Any]] = {
        name: {"samples_ms": [1e3 * s for s in values], "tokens_per_s": spread([tokens / s for s in values])}
        for name, values in taken.items()
    }
    dense, sparse = (entry["tokens_per_s"]["median"] for entry in entries.values())
    return {"steps": entries, "speedup": sparse / dense, "agree": float((first - second).norm() / first.norm())}
