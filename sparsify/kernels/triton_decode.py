"""Products with a weight that stays packed, for few tokens on a GPU, in Triton.

Not yet run on a GPU: the tests run the device code in Triton's interpreter and compile it.

``linear_cuda`` is what the operator ``sparsify::linear`` runs on CUDA. The weight is read as stored; for anything but
2:4 in whole words of the mask a table says where the values of each chunk of 512 columns of a row begin, 4 bytes each
(8 from 2**31 values on). Where there are more than 64 tokens the weight is expanded and multiplied by the library that
multiplies dense weights; the expanded weight exists for that long.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sparsify.format.bits import count_bits
from sparsify.format.packed import Packed
from sparsify.kernels import packed_reference
from sparsify.kernels.gpu_timing import timed_us
from sparsify.kernels.kernel import Kernel, State, check_columns
from sparsify.kernels.linear import Operands, linear
from sparsify.kernels.native import DENSE, way_for
from sparsify.kernels.operators import implement
from sparsify.kernels.triton_config import (
    BITS,
    CHUNK,
    MAX_TOKENS,
    PAIRS,
    Config,
    candidates,
    configure,
    multiprocessors,
    remember,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLAN = "triton"
HALVES = (torch.bfloat16, torch.float16)
# Of an address, so that values are read 16 bytes at a time.
_ALIGNMENT = 16
# Elements that a program of the last pass adds up.
_REDUCE = 512
# A product and a sum in one instruction, which versions of Triton do or do not unless told.
_FUSED = {"enable_fp_fusion": True}


def chunk_starts(mask: torch.Tensor) -> torch.Tensor:
    """Where the values of each chunk of a row begin: int32 or int64 [out, ceil(in / 512)] of a mask [out, bytes]."""
    counts = count_bits(mask)
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[1] % (CHUNK // 8)))
    counts = counts.view(mask.shape[0], -1, CHUNK // 8).sum(dim=2)
    flat = counts.flatten()
    starts = (flat.cumsum(dim=0) - flat).view(counts.shape)
    # From the mask's size, not from the number of values: that would have to be fetched from the GPU.
    return starts if mask.numel() * 8 >= 1 << 31 else starts.int()


def kind_of(n_in: int, n: int, m: int) -> str:
    """How a weight with that pattern (n = m = 0: none) is read."""
    return PAIRS if (n, m) == (2, 4) and n_in % 16 == 0 else BITS


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def linear_cuda(x: torch.Tensor, weight: Operands) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    Args:
        x: [..., in], bfloat16 or float16.
        weight: values of the dtype of ``x``. Where ``starts`` is not the table of ``chunk_starts``, as in a layer that
            was prepared for another device, one is made anew at every call, which is slow.

    Returns:
        [..., out] in the dtype of ``x``.

    Raises:
        RuntimeError: ``x`` does not have ``in`` columns, dtypes are not read here, or the plan multiplies so many
            tokens with a dense weight that is not there.
        UsageError: the plan is malformed.
    """
    check_columns(x, weight.n_in)
    values, mask, starts, scale, dense, bias, n_out, n_in, n, m, *_ = weight
    shape, tokens = (*x.shape[:-1], n_out), x.numel() // n_in
    # Of a layer that was prepared for a CPU; which packed way takes how many tokens there changes nothing here.
    if weight.plan != _PLAN and way_for(weight.plan, tokens) == DENSE:
        if dense is None:
            raise RuntimeError(f"plan {weight.plan} multiplies with the dense weight, which is not there")
        return torch.nn.functional.linear(x, dense, bias)
    if scale is not None or x.dtype not in HALVES or values.dtype != x.dtype:
        raise RuntimeError(
            f"input is {x.dtype} and the weight's values are {values.dtype}; on a GPU both must be bfloat16 or float16"
        )
    if not tokens or not n_out:
        return x.new_empty(shape)
    kind = kind_of(n_in, n, m)
    if kind == BITS and starts.dim() != 2:
        starts = chunk_starts(mask)
    stored = (values, mask, starts)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        flat = _aligned(x.reshape(-1, n_in))
        if tokens > MAX_TOKENS:
            return torch.nn.functional.linear(flat, expanded(stored, kind, (n_out, n_in)), bias).view(shape)
        config = configure(x.device, kind, (n_out, n_in), tokens)
        return multiply(flat, stored, bias, kind, (n_out, n_in), config).view(shape)


def _cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    weight = Operands(*rest)
    if weight.plan != packed_reference.PLAN:
        return linear_cuda(x, weight)
    check_columns(x, weight.n_in)
    return packed_reference.multiply(x, weight)


implement("linear", _cuda, "CUDA")


Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _words(weight: Weight, kind: str) -> Weight:
    """Values, mask and starts as the device code wants them."""
    values, mask, starts = weight
    if kind == PAIRS:
        return _aligned(values).view(torch.int32), _aligned(mask).view(torch.int16), starts
    return values.contiguous().flatten(), mask.contiguous(), starts.contiguous()


def multiply(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, kind: str, shape: tuple[int, int], config: Config
) -> torch.Tensor:
    """The product [tokens, out] of aligned ``x`` [tokens, in], launched as ``config`` says."""
    from sparsify.kernels import triton_kernels

    code: Any = triton_kernels
    (tokens, _), (n_out, n_in) = x.shape, shape
    values, mask, starts = _words(weight, kind)
    result = x.new_empty((tokens, n_out))
    final = config.split == 1
    partial_sums = result if final else x.new_empty((config.split, tokens, n_out), dtype=torch.float32)
    grid = (math.ceil(n_out / config.rows), config.split)
    has_bias, half = bias is not None, x.dtype == torch.float16
    # Something has to stand for a bias that is not there; it is not read.
    ends = (x if bias is None else bias.contiguous(), partial_sums, n_out, n_in, tokens)
    if config.tensor_cores:
        share = math.ceil(math.ceil(n_in / CHUNK) / config.split) * CHUNK
        code.tiles[grid](
            x, values, mask, starts, *ends, share, PAIRS=kind == PAIRS, T=max(16, 1 << (tokens - 1).bit_length()),
            B=config.rows, K=config.columns, WIDE=code.INTERPRETED, BIAS=has_bias, FINAL=final, num_warps=config.warps,
            num_stages=config.stages, **_FUSED,
        )  # fmt: skip
    elif kind == PAIRS:
        code.pairs_rows[grid](
            x.view(torch.int64), values, mask, *ends, T=tokens, R=config.rows, C=config.columns // 16, HALF=half,
            BIAS=has_bias, FINAL=final, num_warps=config.warps, **_FUSED,
        )  # fmt: skip
    else:
        # A byte of the mask belongs to eight columns, also the last one.
        x = torch.nn.functional.pad(x, (0, -n_in % 8)) if n_in % 8 else x
        code.bits_rows[grid](
            x.view(torch.int64), values.view(torch.int16), mask, starts, *ends, T=tokens, R=config.rows, HALF=half,
            BIAS=has_bias, FINAL=final, num_warps=config.warps, **_FUSED,
        )  # fmt: skip
    if not final:
        total = result.numel()
        code.reduce[(math.ceil(total / _REDUCE),)](
            partial_sums, ends[0], result, n_out, total, SPLIT=config.split, BIAS=has_bias, B=_REDUCE, **_FUSED
        )
    return result


def expanded(weight: Weight, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight, columns in the stored order."""
    from sparsify.kernels import triton_kernels

    code: Any = triton_kernels
    values, mask, starts = _words(weight, kind)
    result = torch.empty(shape, dtype=weight[0].dtype, device=values.device)
    grid = (math.ceil(shape[0] / 32), math.ceil(shape[1] / CHUNK))
    code.expand[grid](values, mask, starts, result, *shape, PAIRS=kind == PAIRS, B=32, K=128, **_FUSED)
    return result


def tune(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    configs: Sequence[Config] | None = None,
    repeats: int = 15,
) -> list[tuple[Config, float]]:
    """Time ways to launch a product on a GPU, with a cold L2 cache, and use the fastest from now on.

    A configuration that does not compile or needs more than the GPU has is left out.

    Args:
        x: [tokens, in]; no more than 64 tokens.
        tensors: of a ``State`` of this kernel; so is ``sizes``.
        sizes: see ``tensors``.
        configs: None tries those of the GPU's architecture.
        repeats: of each.

    Returns:
        Each configuration that ran with its median in microseconds, the fastest first.

    Raises:
        RuntimeError: none ran.
    """
    shape = (sizes["n_out"], sizes["n_in"])
    kind = kind_of(shape[1], sizes["n"], sizes["m"])
    weight = (tensors["values"], tensors["mask"], tensors["starts"])
    x = _aligned(x)
    if configs is None:
        capability = torch.cuda.get_device_capability(x.device)
        configs = candidates(kind, shape, x.shape[0], multiprocessors(x.device), capability)
    found, failures = [], []
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        for config in configs:
            try:
                run = partial(multiply, x, weight, None, kind, shape, config)
                found.append((config, statistics.median(timed_us(run, x.device, repeats))))
            except Exception as error:  # Triton's own errors have no common class
                failures.append(f"{config}: {type(error).__name__}: {error}")
    if not found:
        raise RuntimeError(f"no configuration of the Triton kernel ran; {failures[:1]}")
    found.sort(key=lambda pair: pair[1])
    remember(x.device, kind, shape, x.shape[0], found[0][0], us=found[0][1])
    return found


def absent(device: torch.device) -> str | None:
    """Why the kernel cannot run on ``device``; None if it can."""
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "it was written for NVIDIA GPUs, and this is a ROCm build of torch"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def _refuse(packed: Packed) -> str | None:
    if packed.values.dtype not in HALVES:
        return f"its values are {packed.values.dtype}, not bfloat16 or float16"
    return None


def _prepare(packed: Packed) -> State:
    n_out, n_in = packed.shape
    n, m = (packed.pattern.n, packed.pattern.m) if packed.pattern else (0, 0)
    pairs = kind_of(n_in, n, m) == PAIRS
    starts = torch.empty(0, dtype=torch.int32, device=packed.mask.device) if pairs else chunk_starts(packed.mask)
    tensors = {"values": _aligned(packed.values), "mask": _aligned(packed.mask), "starts": starts}
    if packed.perm is not None:
        tensors["perm"] = packed.perm
    return State(tensors, {"n_out": n_out, "n_in": n_in, "n": n, "m": m})


TRITON = Kernel(
    "triton",
    "any pattern in 16 bits on NVIDIA GPUs from Ampere on: few tokens, read from the packed weight",
    absent=absent,
    refuse=_refuse,
    prepare=_prepare,
    linear=partial(linear, plan=_PLAN),
    densely=f"+expanded:{MAX_TOKENS + 1}-",
)
