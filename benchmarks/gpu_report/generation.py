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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_machine.llama import Llama
from gpu_machine.weights import ERROR_FACTOR
from kernels_gpu.layers import packed_weight, prepared
from torch.nn import functional

from gpu_report.cases import Generation
from gpu_report.report import Report
from sparsify.bench.host import gpu
from sparsify.bench.latency import latency_record
from sparsify.bench.product_times import DENSE
from sparsify.format.packed import decode
from sparsify.kernels.dispatch import GPU_KERNELS
from sparsify.kernels.gpu_timing import captured
from sparsify.kernels.triton_config import MAX_TOKENS
from sparsify.kernels.triton_decode import TRITON

Run = Callable[[torch.Tensor], torch.Tensor]
_NAMES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
# Logits may differ from those of dense, relatively, by ERROR_FACTOR times what those of dense with its sums in another
# order do, which is measured and for random weights is some 2 % over 32 layers; or by this where that is less.
_LEAST_TOLERANCE = 0.02


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


@dataclass
class Linears:
    """The linears of all blocks, dense and by each kernel.

    Attributes:
        pattern: of their zeros.
        runs: dense or the name of a kernel -> a product for each linear of each block.
        n_bytes: the same -> of all weights.
    """

    pattern: str
    runs: dict[str, list[list[Run]]]
    n_bytes: dict[str, int]


def build_linears(report: Report, pattern: str) -> Linears:
    """Random weights for a whole model in the form of each kernel; what does not take them is recorded."""
    device = report.device
    names = [name for name in _variants(device) if f"model, {pattern}: {name}" not in report.done]
    built = Linears(pattern, {DENSE: [], **{name: [] for name in names}}, dict.fromkeys([DENSE, *names], 0))
    for _ in range(report.sizes.layers):
        for products in built.runs.values():
            products.append([])
        for shape in report.sizes.fused().values():
            packed = packed_weight(shape, pattern, device.type)
            dense = decode(packed)
            built.runs[DENSE][-1].append(partial(functional.linear, weight=dense))
            built.n_bytes[DENSE] += dense.nbytes
            for name in [name for name in names if name in built.runs]:
                what = f"model, {pattern}: {name}"
                # Should the process not come back, the next one leaves out this kernel.
                report.begin(what)
                with _guarded(report, what):
                    made = prepared(name, packed, device.type)
                    if not isinstance(made, str):
                        built.n_bytes[name] += made[0]
                        built.runs[name][-1].append(made[1])
                        continue
                    report.not_run(what, made)
                del built.runs[name]
    return built


def _variants(device: torch.device) -> list[str]:
    return [kernel.name for kernel in GPU_KERNELS] if device.type == "cuda" else ["packed"]


@contextmanager
def _guarded(report: Report, what: str) -> Iterator[None]:
    """What is raised inside is recorded as a failure of ``what``, unless it leaves the GPU unusable."""
    try:
        yield
    except Exception as error:  # Triton's own have no common class
        if report.device.type == "cuda":
            torch.cuda.synchronize()
        report.failed(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def measure_generation(report: Report, case: Generation, linears: Linears) -> None:
    """Time a generation with dense linears and with those of each kernel that takes them, and record it."""
    device = report.device
    model = Model(report.sizes, case, device)
    with torch.inference_mode():
        steps = _steps(report, case, model, linears.runs)
        report.begin(case.what)
        rounds = _rounds(model, steps, case, report.options.rounds)
    state = gpu()
    other = model.embedding.nbytes + model.head.nbytes
    # Its weights have the pattern's zeros, which it multiplies like any other value.
    base = report.artifact(f"dense beside {case.pattern}", None, linears.n_bytes[DENSE] + other)
    reference = rounds[DENSE][0]["tokens"]
    for name in steps:
        dense = name == DENSE
        label = base
        if not dense:
            label = report.artifact(f"{case.pattern} {name}", case.pattern, linears.n_bytes[name] + other)
        ran = {
            f"model.layers.{i}.{linear}": "dense" if dense else engaged(name, case)
            for i in range(report.sizes.layers)
            for linear in _NAMES
        }
        report.out.write(
            "latency", artifact=label, runtime="torch", baseline=None if dense else base, asked_sparse=not dense,
            session=f"torch {device.type} bfloat16, written out{', CUDA graphs' if device.type == 'cuda' else ''}",
            engaged=ran, roof=None, gpu=state,
            scenario={"prompt_tokens": case.prompt, "new_tokens": case.new, "batch": case.batch, "load": "batch"},
            **latency_record(rounds[name], case.batch, case.new, None if dense else reference),
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()


def engaged(name: str, case: Generation) -> str:
    """What runs: for many tokens this kernel writes the dense weight and has torch multiply by it."""
    return TRITON.reported if name == TRITON.name and max(case.multiplied) > MAX_TOKENS else name


Steps = tuple[Callable[[], Any], Callable[[], Any]]


def _steps(report: Report, case: Generation, model: Model, runs: dict[str, list[list[Run]]]) -> dict[str, Steps]:
    """For dense and each kernel whose logits are right, the two steps: of the prompt, and of one more token."""
    newest = model.prompt[:, -1:].clone()
    cache = model.keys.clone(), model.values.clone()

    def logits(layers: list[list[Run]]) -> list[torch.Tensor]:
        found = []
        for ids in (model.prompt, newest):
            # What another variant left there is not compared.
            model.keys.copy_(cache[0])
            model.values.copy_(cache[1])
            found.append(model.step(layers, ids).float())
        return found

    def steps(layers: list[list[Run]]) -> Steps:
        first, further = partial(model.step, layers, model.prompt), partial(model.step, layers, model.last)
        if report.device.type == "cuda":
            return captured(first)[0].replay, captured(further)[0].replay
        return first, further

    wanted = logits(runs[DENSE])
    # The same sums in another order.
    turned = logits([[partial(_turned, run) for run in block] for block in runs[DENSE]])
    limits = [max(_LEAST_TOLERANCE, ERROR_FACTOR * _apart(*pair)) for pair in zip(turned, wanted, strict=True)]
    found: dict[str, Steps] = {DENSE: steps(runs[DENSE])}
    for name in [name for name in runs if name != DENSE]:
        what = f"{case.what}: {name}"
        if what in report.done:
            continue
        report.begin(what)
        with _guarded(report, what):
            errors = [_apart(*pair) for pair in zip(logits(runs[name]), wanted, strict=True)]
            # A NaN compares false.
            wrong = [i for i in range(2) if not errors[i] <= limits[i]]
            if not wrong:
                found[name] = steps(runs[name])
            for i in wrong[:1]:
                step = ("the prompt", "a further token")[i]
                why = f"logits of {step} differ from those of dense by {errors[i]:.3f}, relatively"
                report.failed(what, f"{why}; {limits[i]:.3f} is allowed")
    return found


def _turned(run: Run, x: torch.Tensor) -> torch.Tensor:
    """``run``, a dense product, with its columns in the reverse order."""
    assert isinstance(run, partial)
    return functional.linear(x.flip(-1), run.keywords["weight"].flip(-1))


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


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
