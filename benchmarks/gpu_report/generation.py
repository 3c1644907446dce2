"""A whole model of random weights: time to the first token and for each further one, dense and by every kernel in turn.

Written out here so that nothing but the linears differs: embedding, norms, attention, the gate and the output
projection, which stays dense, are torch's in every variant. Rotations of queries and keys are left out, and all layers
and variants share one cache of keys and values, whose whole length a new token attends to: what is generated means
nothing, and costs the same everywhere. Both steps run as CUDA graphs.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_machine.llama import Llama
from kernels_gpu.layers import packed_weight, prepared
from torch.nn import functional

from gpu_report.cases import Generation
from gpu_report.report import Report
from sparsify.bench.latency import latency_record
from sparsify.bench.product_times import DENSE
from sparsify.format.packed import decode
from sparsify.kernels.dispatch import GPU_KERNELS
from sparsify.kernels.gpu_timing import captured

Run = Callable[[torch.Tensor], torch.Tensor]
_NAMES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
# Logits that differ by more, relatively, are those of another model.
_TOLERANCE = 0.05


class Model:
    """What all variants share: everything but the linears of the blocks.

    Args:
        sizes: of the model.
        case: batch and lengths.
        device: where it runs.

    Attributes:
        prompt: ids [batch, prompt].
        last: ids [batch, 1], the newest of each sequence.
    """

    def __init__(self, sizes: Llama, case: Generation, device: torch.device) -> None:
        self.sizes, self.total = sizes, case.prompt + case.new
        generator = torch.Generator(device=device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

        self.prompt = torch.randint(sizes.vocabulary, (case.batch, case.prompt), generator=generator, device=device)
        self.last = torch.zeros((case.batch, 1), dtype=torch.int64, device=device)
        self.embedding = random(sizes.vocabulary, sizes.hidden)
        self.head = random(sizes.vocabulary, sizes.hidden) / math.sqrt(sizes.hidden)
        self.norm = torch.ones(sizes.hidden, dtype=torch.bfloat16, device=device)
        cache = (case.batch, sizes.kv_heads, self.total, sizes.hidden // sizes.heads)
        self.keys, self.values = random(*cache), random(*cache)

    def step(self, layers: list[list[Run]], ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] behind ``ids`` [batch, n]; the most likely tokens go to ``last``.

        More than one token attend to themselves and those before them, one to the whole cache.
        """
        sizes, n = self.sizes, ids.shape[1]
        heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.hidden // sizes.heads
        at = slice(0, n) if n > 1 else slice(self.total - 1, self.total)
        x = functional.embedding(ids, self.embedding)
        for qkv, out, gate_up, down in layers:
            made = qkv(functional.rms_norm(x, self.norm.shape, self.norm))
            made = made.view(*ids.shape, heads + 2 * kv_heads, size).transpose(1, 2)
            query, key, value = torch.split(made, [heads, kv_heads, kv_heads], dim=1)
            self.keys[:, :, at], self.values[:, :, at] = key, value
            if n == 1:
                key, value = self.keys, self.values
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=n > 1, enable_gqa=True)
            x = x + out(attended.transpose(1, 2).flatten(2))
            gate, up = gate_up(functional.rms_norm(x, self.norm.shape, self.norm)).chunk(2, dim=-1)
            x = x + down(functional.silu(gate) * up)
        logits = functional.linear(functional.rms_norm(x[:, -1], self.norm.shape, self.norm), self.head)
        self.last.copy_(logits.argmax(dim=-1, keepdim=True))
        return logits


def measure_generation(report: Report, case: Generation) -> None:
    """Time a generation with dense linears and with those of each kernel that takes them, and record it."""
    device = report.device
    linears, n_bytes, refused = _linears(report.sizes, case.pattern, device)
    for name, why in refused.items():
        report.not_run(f"{case.what}: {name}", why)
    model = Model(report.sizes, case, device)
    with torch.inference_mode():
        steps = _steps(report, case, model, linears)
        rounds = _rounds(model, steps, case, report.options.rounds)
    other = model.embedding.nbytes + model.head.nbytes
    # Its weights have the pattern's zeros, which it multiplies like any other value.
    base = report.artifact(f"dense beside {case.pattern}", None, n_bytes[DENSE] + other)
    reference = rounds[DENSE][0]["tokens"]
    for name in steps:
        dense = name == DENSE
        label = base if dense else report.artifact(f"{case.pattern} {name}", case.pattern, n_bytes[name] + other)
        ran = {
            f"model.layers.{i}.{linear}": "dense" if dense else name
            for i in range(report.sizes.layers)
            for linear in _NAMES
        }
        report.out.write(
            "latency", artifact=label, runtime="torch", baseline=None if dense else base, asked_sparse=not dense,
            session=f"torch {device.type} bfloat16, written out{', CUDA graphs' if device.type == 'cuda' else ''}",
            engaged=ran, roof=None,
            scenario={"prompt_tokens": case.prompt, "new_tokens": case.new, "batch": case.batch, "load": "batch"},
            **latency_record(rounds[name], case.batch, case.new, None if dense else reference),
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _linears(
    sizes: Llama, pattern: str, device: torch.device
) -> tuple[dict[str, list[list[Run]]], dict[str, int], dict[str, str]]:
    """Products of every block, dense and by each kernel; bytes of their weights; why a kernel is not among them."""
    names = [kernel.name for kernel in GPU_KERNELS] if device.type == "cuda" else ["packed"]
    linears: dict[str, list[list[Run]]] = {DENSE: [], **{name: [] for name in names}}
    n_bytes: dict[str, int] = dict.fromkeys(linears, 0)
    refused: dict[str, str] = {}
    for _ in range(sizes.layers):
        for products in linears.values():
            products.append([])
        for shape in sizes.fused().values():
            packed = packed_weight(shape, pattern, device.type)
            dense = decode(packed)
            linears[DENSE][-1].append(partial(functional.linear, weight=dense))
            n_bytes[DENSE] += dense.nbytes
            for name in names:
                made = refused.get(name) or prepared(name, packed, device.type)
                if isinstance(made, str):
                    refused[name] = made
                    continue
                n_bytes[name] += made[0]
                linears[name][-1].append(made[1])
    return {name: each for name, each in linears.items() if name not in refused}, n_bytes, refused


Steps = tuple[Callable[[], Any], Callable[[], Any]]


def _steps(report: Report, case: Generation, model: Model, linears: dict[str, list[list[Run]]]) -> dict[str, Steps]:
    """For each variant that is right, its two steps: of the prompt, and of one more token."""
    wanted = model.step(linears[DENSE], model.prompt).float()
    found: dict[str, Steps] = {}
    for name, layers in linears.items():
        logits = model.step(layers, model.prompt).float()
        error = float((logits - wanted).norm() / wanted.norm())
        if not error <= _TOLERANCE:
            report.failed(f"{case.what}: {name}", f"logits differ from those of dense by {error:.3f}, relatively")
            continue
        first, further = partial(model.step, layers, model.prompt), partial(model.step, layers, model.last)
        if report.device.type == "cuda":
            found[name] = (captured(first)[0].replay, captured(further)[0].replay)
        else:
            found[name] = (first, further)
    return found


def _rounds(model: Model, steps: dict[str, Steps], case: Generation, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every variant in turn, dense first and last, every second round the other way round."""
    trace = hashlib.sha256(model.prompt.cpu().numpy().tobytes()).hexdigest()
    slots = [*((name, False) for name in steps), (DENSE, True)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for name in steps:
        _generate(model, steps[name], case)
    for number in range(rounds):
        for position, (name, again) in enumerate(slots if number % 2 == 0 else slots[::-1]):
            times = _generate(model, steps[name], case)
            found[name].append({"round": number, "position": position, "again": again, "trace_sha256": trace, **times})
    return found


def _generate(model: Model, steps: Steps, case: Generation) -> dict[str, Any]:
    """One generation; clocks are read when a step's tokens are on the host."""
    tokens: list[list[int]] = []
    at = [time.perf_counter()]
    for i in range(case.new):
        steps[bool(i)]()
        tokens.append(model.last.flatten().tolist())
        at.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(at[1:])]
    return {
        "ttft_s": [at[1] - at[0]] * case.batch,
        "gaps_s": [gaps] * case.batch,
        "total_s": at[-1] - at[0],
        "tokens": [list(row) for row in zip(*tokens, strict=True)],
    }
