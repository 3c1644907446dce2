"""2:4 on NVIDIA GPUs through torch's operators: cuSPARSELt, and on GPUs of compute capability 8.x also CUTLASS.

CuSPARSELt runs with the algorithm that ``cusparselt_search`` found, where it has searched. With 8-bit floats it also
runs twice as fast as with 16 bits, and rounds weights and inputs to 4 bits of precision: that kernel is there to be
asked for, and is never a choice of ours. Not yet run on a GPU. The layout of the CUTLASS metadata, scales and the
shapes of the operators are tested without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from sparsify.format.packed import Packed, decode
from sparsify.kernels.cusparselt_search import DEFAULT, Algorithm, Problem, algorithm
from sparsify.kernels.kernel import Kernel, State, gathered
from sparsify.kernels.operators import define
from sparsify.types import NofM

# Sparse tensor cores came with this compute capability.
_AMPERE = (8, 0)
# Those of 8-bit floats, and the version of cuSPARSELt from which torch offers them.
_ADA, _FP8_VERSION = (8, 9), 602
FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
# Each nibble of a mask -> the two 2-bit positions of its ones, low position first.
_INDICES = {0b0011: 0x4, 0b0101: 0x8, 0b1001: 0xC, 0b0110: 0x9, 0b1010: 0xD, 0b1100: 0xE}


def _no_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs only, and this is a ROCm build of torch"
    if torch.cuda.get_device_capability(device) >= _AMPERE:
        return None
    return f"it needs compute capability 8.0, this GPU has {_capability(device)}"


def _no_cusparselt(device: torch.device) -> str | None:
    return _no_gpu(device) or (
        None if torch.backends.cusparselt.is_available() else "this build of torch has no cuSPARSELt"
    )


def _no_fp8(device: torch.device) -> str | None:
    why = _no_cusparselt(device)
    if why is None and torch.cuda.get_device_capability(device) < _ADA:
        return f"8-bit floats need compute capability 8.9, this GPU has {_capability(device)}"
    if why is None and (torch.backends.cusparselt.version() or 0) < _FP8_VERSION:
        return f"8-bit floats need cuSPARSELt 0.6.2, this build of torch has {torch.backends.cusparselt.version()}"
    return why


def _no_cutlass(device: torch.device) -> str | None:
    why = _no_gpu(device)
    if why is None and torch.cuda.get_device_capability(device)[0] != _AMPERE[0]:
        # torch's operator checks it at every call.
        return f"torch has it for compute capability 8.x only, this GPU has {_capability(device)}"
    return why


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _refuse(packed: Packed, min_rows: int, min_columns: int, multiple: int) -> str | None:
    n_out, n_in = packed.shape
    if packed.pattern != NofM(2, 4):
        return f"its pattern is {packed.pattern or 'unstructured'}, not 2:4"
    if packed.values.itemsize != 2:
        return f"its values are {packed.values.dtype}, not 16 bits"
    if n_out < min_rows or n_in < min_columns or n_out % multiple or n_in % multiple:
        return f"its shape {n_out} x {n_in} is below {min_rows} x {min_columns} or no multiple of {multiple}"
    return None


def _padded(x: torch.Tensor, n_in: int, multiple: int = 8) -> torch.Tensor:
    """Tokens as rows [tokens, in], with rows of zeros up to a multiple of 8, which both libraries ask for."""
    flat = x.reshape(-1, n_in)
    missing = -flat.shape[0] % multiple
    # The padding of nothing would be a copy.
    return torch.nn.functional.pad(flat, (0, 0, 0, missing)) if missing else flat.contiguous()


def _check_dtype(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """CuSPARSELt is told one dtype for all and would take the bytes of another for it."""
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        given = f"{x.dtype}" if bias is None else f"{x.dtype} and bias {bias.dtype}"
        raise RuntimeError(f"input is {given}, the weight was prepared as {weight.dtype}")


def _fast_product(blob: torch.Tensor, flat: torch.Tensor, problem: Problem, **options: Any) -> torch.Tensor:
    """CuSPARSELt's product [tokens, out] by the algorithm that was found, or by the default where that is refused."""
    found: Algorithm = algorithm(flat.device, problem)
    try:
        return torch._cslt_sparse_mm(blob, flat.t(), transpose_result=True, **options, **found.options())
    except RuntimeError:
        # It was found for another number of tokens.
        if found == DEFAULT:
            raise
        return torch._cslt_sparse_mm(blob, flat.t(), transpose_result=True, **options)


def _cusparselt_linear(
    x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor | None, n_out: int, n_in: int
) -> torch.Tensor:
    _check_dtype(x, blob, bias)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], n_out))
    flat = _padded(x, n_in)
    problem = Problem(n_out, n_in, flat.shape[0], str(x.dtype).removeprefix("torch."), bias is not None)
    result = _fast_product(blob, flat, problem, bias=bias)
    return result[: x.numel() // n_in].view(*x.shape[:-1], n_out)


def to_fp8(tensor: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``tensor`` in 8-bit floats, and what to multiply it by: float32, per slice along ``dim`` or one for all."""
    wide = tensor.float()
    largest = wide.abs().amax() if dim is None else wide.abs().amax(dim=dim, keepdim=True)
    # Zeros stay zeros by any scale.
    scale = torch.where(largest > 0, largest / _FP8_MAX, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale).clamp(-_FP8_MAX, _FP8_MAX).to(FP8), scale


def _cusparselt_fp8_linear(
    x: torch.Tensor, blob: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n_out: int, n_in: int
) -> torch.Tensor:
    if x.dtype.itemsize != 2:
        raise RuntimeError(f"input is {x.dtype}; this product gives bfloat16 or float16")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], n_out))
    flat, of_input = to_fp8(_padded(x, n_in, 16), None)
    problem = Problem(n_out, n_in, flat.shape[0], str(FP8).removeprefix("torch."))
    # A scale per row of the weight: with a single one torch would fetch it from the GPU, which no graph can hold.
    result = _fast_product(blob, flat, problem, alpha=scale * of_input, out_dtype=x.dtype)
    result = result[: x.numel() // n_in]
    result = result if bias is None else result + bias
    return result.view(*x.shape[:-1], n_out)


def _cutlass_linear(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, bias: torch.Tensor | None, n_out: int, n_in: int
) -> torch.Tensor:
    _check_dtype(x, values, bias)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], n_out))
    flat = _padded(x, n_in)
    # The operator computes weight @ input: the product comes out transposed.
    result = torch._sparse_semi_structured_mm(values, meta, flat.t()).t()
    result = result[: x.numel() // n_in].contiguous()
    result = result if bias is None else result + bias
    return result.view(*x.shape[:-1], n_out)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Of the operators, whose last two arguments are n_out and n_in."""
    return x.new_empty((*x.shape[:-1], rest[-2]))


_CUSPARSELT_OP = define(
    "cusparselt_linear(Tensor x, Tensor blob, Tensor? bias, SymInt n_out, SymInt n_in) -> Tensor",
    _cusparselt_linear,
    _fake,
    "CUDA",
)
_CUSPARSELT_FP8_OP = define(
    "cusparselt_fp8_linear(Tensor x, Tensor blob, Tensor scale, Tensor? bias, SymInt n_out, SymInt n_in) -> Tensor",
    _cusparselt_fp8_linear,
    _fake,
    "CUDA",
)
_CUTLASS_OP = define(
    "cutlass_linear(Tensor x, Tensor values, Tensor meta, Tensor? bias, SymInt n_out, SymInt n_in) -> Tensor",
    _cutlass_linear,
    _fake,
    "CUDA",
)


def cutlass_meta(mask: torch.Tensor) -> torch.Tensor:
    """CUTLASS metadata int16 [out, in / 16] of a 2:4 ``mask`` uint8 [out, in / 8], for 16-bit values.

    The nibble of a group names the two kept positions, two bits each; four groups make an int16, and the int16 values
    are then stored in the order the tensor cores read them, which is torch's own permutation.
    """
    table = torch.zeros(256, dtype=torch.uint8)
    for low, a in _INDICES.items():
        for high, b in _INDICES.items():
            table[low | high << 4] = a | b << 4
    n_out, width = mask.shape
    packed = table.to(mask.device)[mask.int()].view(torch.int16)
    offsets = _calculate_meta_reordering_scatter_offsets(  # type: ignore[no-untyped-call]
        n_out, width // 2, torch.int16, mask.device
    )
    meta = torch.empty(n_out * (width // 2), dtype=torch.int16, device=mask.device)
    meta.scatter_(0, offsets.long(), packed.reshape(-1))
    return meta.view(n_out, width // 2)


def _perm(packed: Packed) -> dict[str, torch.Tensor]:
    return {} if packed.perm is None else {"perm": packed.perm}


def _prepare_cusparselt(packed: Packed) -> State:
    # The library's own layout is not documented; one dense weight exists for as long as it takes to compress it.
    blob = torch._cslt_compress(decode(replace(packed, perm=None)))
    return State({"blob": blob, **_perm(packed)}, {"n_out": packed.shape[0], "n_in": packed.shape[1]})


def _prepare_fp8(packed: Packed) -> State:
    values, scale = to_fp8(decode(replace(packed, perm=None)), 1)
    tensors = {"blob": torch._cslt_compress(values), "scale": scale.flatten(), **_perm(packed)}
    return State(tensors, {"n_out": packed.shape[0], "n_in": packed.shape[1]})


def _prepare_cutlass(packed: Packed) -> State:
    tensors = {"values": packed.values.contiguous(), "meta": cutlass_meta(packed.mask), **_perm(packed)}
    return State(tensors, {"n_out": packed.shape[0], "n_in": packed.shape[1]})


def _run_cusparselt(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bias: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = _CUSPARSELT_OP(gathered(x, tensors), tensors["blob"], bias, sizes["n_out"], sizes["n_in"])
    return result


def _run_fp8(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bias: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = _CUSPARSELT_FP8_OP(
        gathered(x, tensors), tensors["blob"], tensors["scale"], bias, sizes["n_out"], sizes["n_in"]
    )
    return result


def _run_cutlass(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bias: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = _CUTLASS_OP(
        gathered(x, tensors), tensors["values"], tensors["meta"], bias, sizes["n_out"], sizes["n_in"]
    )
    return result


CUSPARSELT = Kernel(
    "cusparselt",
    "2:4 on NVIDIA GPUs from Ampere on, through cuSPARSELt",
    absent=_no_cusparselt,
    refuse=lambda packed: _refuse(packed, 16, 16, 16),
    prepare=_prepare_cusparselt,
    linear=_run_cusparselt,
)
CUSPARSELT_FP8 = Kernel(
    "cusparselt_fp8",
    "2:4 on NVIDIA GPUs from Ada on, through cuSPARSELt, weights and inputs rounded to 8-bit floats: not exact",
    absent=_no_fp8,
    refuse=lambda packed: _refuse(packed, 32, 32, 32),
    prepare=_prepare_fp8,
    linear=_run_fp8,
)
CUTLASS = Kernel(
    "cutlass",
    "2:4 on NVIDIA GPUs of compute capability 8.x, through CUTLASS",
    absent=_no_cutlass,
    refuse=lambda packed: _refuse(packed, 32, 64, 32),
    prepare=_prepare_cutlass,
    linear=_run_cutlass,
)
