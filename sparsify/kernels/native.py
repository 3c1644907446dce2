"""Products on CPUs with AVX-512: the compiled module, and which of its ways multiplies how many tokens.

Values and masks are read as they are stored. A *way* is one implementation:

- ``avx512``, ``bf16``, ``vnni``: row by row, each register of values expanded once for up to eight tokens;
- ``amx``: in tile registers, for many tokens;
- ``slices``: rows expanded into a buffer and multiplied by torch;
- ``dense``: torch with the dense weight, which the state then holds beside the packed one.

A *plan* says which way takes how many tokens: ``bf16<=4,amx<=512,slices``. ``dispatch`` makes plans from measurements.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sparsify.errors import UsageError
from sparsify.format.bits import count_bits
from sparsify.format.packed import Packed, decode
from sparsify.kernels import packed_reference
from sparsify.kernels.kernel import Kernel, State, check_columns
from sparsify.kernels.linear import Operands, linear
from sparsify.kernels.operators import implement

try:
    from sparsify import _kernels
except ImportError as error:
    _kernels = None  # type: ignore[assignment]
    _WHY_NOT = f"this install of sparsify has no compiled kernels ({error}); install it where there is a C++ compiler"
else:
    _WHY_NOT = ""

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
SLICES, DENSE = "slices", "dense"
COMPILED = ("avx512", "bf16", "vnni", "amx")
# Weights expanded at a time for torch to multiply with: what it does again for each slice has to be paid for.
_SLICE = 1 << 22
# Tokens up to which tiles multiply in bytes, and columns up to which sums of bytes stay below 2**31.
_FEW_TOKENS, _MOST_TILES, _MOST_VNNI = 32, 1 << 16, 1 << 20


def missing() -> str | None:
    """Why there is no compiled module; None if there is."""
    return _WHY_NOT or None


@functools.cache
def features() -> frozenset[str]:
    """Those of ``COMPILED`` that this processor and this build have."""
    return frozenset(_kernels.features()) if _kernels else frozenset()


def pool() -> str:
    """File of the OpenMP runtime whose threads are used; empty where only the calling thread is."""
    return _kernels.pool() if _kernels else ""


def ways(values: torch.dtype, x: torch.dtype, tokens: int, n_in: int) -> tuple[str, ...]:
    """The ways without a dense weight that this machine has for a product of such types."""
    have = features()
    if "avx512" not in have or x not in (torch.float32, torch.bfloat16):
        return ()
    if values == torch.int8:
        tiles = n_in <= _MOST_TILES if tokens <= _FEW_TOKENS else x == torch.bfloat16
        found = [
            *(["vnni"] if "vnni" in have and n_in <= _MOST_VNNI else []),
            *(["amx"] if "amx" in have and tiles else []),
        ]
    elif values == x == torch.bfloat16:
        found = [way for way in ("bf16", "amx", "avx512") if way in have]
    elif values == x:
        found = ["avx512"]
    else:
        return ()
    return (*found, SLICES)


@functools.cache
def parse_plan(plan: str) -> tuple[tuple[int | None, str], ...]:
    """Steps of a plan: the most tokens of each (None: any number) and its way.

    Raises:
        UsageError: it is malformed.
    """
    steps: list[tuple[int | None, str]] = []
    parts = plan.split(",")
    for part in parts:
        way, bound, most = part.partition("<=")
        last = len(steps) == len(parts) - 1
        rising = not bound or (most.isdecimal() and int(most) > (steps[-1][0] or 0 if steps else 0))
        if way not in (*COMPILED, SLICES, DENSE) or bool(bound) == last or not rising:
            raise UsageError(f"plan {plan!r} is none like bf16<=4,amx<=512,slices")
        steps.append((int(most) if bound else None, way))
    return tuple(steps)


@functools.cache
def tokens_of(plan: str, way: str) -> str:
    """Numbers of tokens that ``plan`` multiplies by ``way``, as in ``2-32,513-``; empty: none."""
    ranges, first = [], 1
    for most, each in parse_plan(plan):
        if each == way:
            ranges.append(f"{first}-{'' if most is None else most}")
        first = (most or 0) + 1
    return ",".join(ranges)


@functools.lru_cache(maxsize=1024)
def way_for(plan: str, tokens: int) -> str:
    """The way that ``plan`` takes for that many tokens."""
    return next(way for most, way in parse_plan(plan) if most is None or tokens <= most)


def plan_without_measurements(values: torch.dtype) -> str:
    """What this processor's instructions suggest; ``dispatch`` says that nothing was measured."""
    have = features()
    if values == torch.int8:
        return "vnni<=4,amx<=32,slices" if "amx" in have else "vnni<=8,slices" if "vnni" in have else SLICES
    if values == torch.bfloat16 and "bf16" in have:
        return "bf16<=4,amx<=512,slices" if "amx" in have else "bf16<=8,slices"
    return "avx512<=8,slices"


def multiply(x: torch.Tensor, weight: Operands, way: str) -> torch.Tensor:
    """``x @ weight.T + bias`` [..., out] by a compiled way or by ``slices``.

    Args:
        x: [..., in], contiguous; bfloat16 or float32.
        weight: its tensors contiguous, with the ``starts`` of steps of this module.
        way: of ``ways``.

    Raises:
        RuntimeError: there is no compiled module, or dtypes and sizes do not belong together.
    """
    if _WHY_NOT:
        raise RuntimeError(_WHY_NOT)
    _check(x, weight)
    values, mask, starts, scale, _, bias, n_out, n_in, n, m, *_ = weight
    stored = (
        TYPES[values.dtype], values.data_ptr(), values.numel(), mask.data_ptr(), 0 if m else starts.data_ptr(),
        0 if scale is None else scale.data_ptr(), n_out, n_in, n, m,
    )  # fmt: skip
    threads, tokens = torch.get_num_threads(), x.numel() // n_in
    # A plan's step covers numbers of tokens at which sums of so many columns would overflow.
    if way == SLICES or (n_in > _MOST_TILES and way not in ways(values.dtype, x.dtype, tokens, n_in)):
        return _slices(x.view(-1, n_in), stored, bias, threads).view(*x.shape[:-1], n_out)
    # Of the shape that is wanted: a reshape of x and of the result takes as long as a small product.
    result = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype)
    _kernels.linear(
        *stored, way, TYPES[x.dtype], x.data_ptr(), tokens, 0 if bias is None else bias.data_ptr(), result.data_ptr(),
        threads,
    )  # fmt: skip
    return result


def _check(x: torch.Tensor, weight: Operands) -> None:
    """Sizes and dtypes, in constant time: from them the compiled module computes addresses."""
    values, mask, starts, scale, _, bias, n_out, n_in, _, m, *_ = weight
    if x.dtype not in (torch.float32, torch.bfloat16) or values.dtype not in (x.dtype, torch.int8):
        raise RuntimeError(f"input is {x.dtype}, the weight was prepared as {values.dtype}")
    if bias is not None and (bias.dtype != x.dtype or bias.numel() != n_out or not bias.is_contiguous()):
        raise RuntimeError(f"bias is {bias.dtype} {list(bias.shape)}, want {x.dtype} [{n_out}]")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != n_out or not scale.is_contiguous()):
        raise RuntimeError(f"scale is {scale.dtype} {list(scale.shape)}, want float32 [{n_out}]")
    whole = starts.dtype == torch.int64 and starts.numel() == (0 if m else n_out + 1)
    if not whole or mask.dtype != torch.uint8 or mask.numel() != n_out * -(-n_in // 8):
        raise RuntimeError("mask or starts do not have the size of the weight")
    if not (x.is_contiguous() and values.is_contiguous() and mask.is_contiguous() and starts.is_contiguous()):
        raise RuntimeError("tensors must be contiguous")


def _slices(
    x: torch.Tensor, stored: tuple[str, int, int, int, int, int, int, int, int, int], bias: torch.Tensor | None,
    threads: int,
) -> torch.Tensor:  # fmt: skip
    n_out, n_in = stored[6:8]
    step = min(n_out, max(16, _SLICE // n_in))
    buffer = torch.empty((step, n_in), dtype=x.dtype)

    def rows(start: int, stop: int) -> torch.Tensor:
        _kernels.expand(*stored, TYPES[x.dtype], buffer.data_ptr(), start, stop, threads)
        part = None if bias is None else bias[start:stop]
        return torch.nn.functional.linear(x, buffer[: stop - start], part)

    if step == n_out:
        return rows(0, n_out)
    result = torch.empty((x.shape[0], n_out), dtype=x.dtype)
    for start in range(0, n_out, step):
        stop = min(n_out, start + step)
        result[:, start:stop] = rows(start, stop)
    return result


def _cpu(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What the operator ``sparsify::linear`` runs on a CPU."""
    weight = Operands(*rest)
    check_columns(x, weight.n_in)
    if weight.plan == packed_reference.PLAN:
        return packed_reference.multiply(x, weight)
    tokens = x.numel() // weight.n_in
    if not tokens:
        return x.new_empty((*x.shape[:-1], weight.n_out))
    way = way_for(weight.plan, tokens)
    if way != DENSE:
        return multiply(x.contiguous(), weight, way)
    if weight.dense is None:
        raise RuntimeError(f"plan {weight.plan} multiplies with the dense weight, which is not there")
    return torch.nn.functional.linear(x, weight.dense, weight.bias)


implement("linear", _cpu, "CPU")


def row_starts(mask: torch.Tensor) -> torch.Tensor:
    """Where the values of each row begin, and where the last ones end: int64 [out + 1]."""
    counts = count_bits(mask).sum(dim=1)
    return torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(dim=0)))


def _absent(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on CPUs only"
    if _WHY_NOT:
        return _WHY_NOT
    return None if "avx512" in features() else "it needs AVX-512 with VBMI2, which this processor or this build lacks"


def _refuse(packed: Packed) -> str | None:
    return None if packed.values.dtype in TYPES else f"its values are {packed.values.dtype}, which CPUs do not multiply"


def prepare_with(packed: Packed, plan: str) -> State:
    """``packed`` for ``plan``: its own tensors, contiguous, and what follows from them."""
    n_out, n_in = packed.shape
    n, m = (packed.pattern.n, packed.pattern.m) if packed.pattern else (0, 0)
    empty = torch.empty(0, dtype=torch.int64, device=packed.mask.device)
    tensors = {
        "values": packed.values.contiguous(),
        "mask": packed.mask.contiguous(),
        "starts": empty if m else row_starts(packed.mask),
    }
    if packed.scale is not None:
        tensors["scale"] = packed.scale.contiguous()
    if packed.perm is not None:
        tensors["perm"] = packed.perm
    if tokens_of(plan, DENSE):
        # In the stored order, as x comes.
        tensors["dense"] = decode(replace(packed, perm=None))
    return State(tensors, {"n_out": n_out, "n_in": n_in, "n": n, "m": m})


@functools.cache
def native(plan: str) -> Kernel:
    """The kernel that follows ``plan``.

    It is reported as ``native+dense:513-`` where it multiplies with the dense weight from 513 tokens on, and as
    ``native+expanded:513-`` where it makes a dense weight of the packed one for so many.

    Raises:
        UsageError: the plan is malformed.
    """
    kinds = {"dense": tokens_of(plan, DENSE), "expanded": tokens_of(plan, SLICES)}
    return Kernel(
        "native",
        "any pattern, bfloat16, float32 and int8, on CPUs with AVX-512: reads packed weights at the memory's speed",
        absent=_absent,
        refuse=_refuse,
        prepare=partial(prepare_with, plan=plan),
        linear=partial(linear, plan=plan),
        densely="".join(f"+{kind}:{tokens}" for kind, tokens in kinds.items() if tokens),
    )
