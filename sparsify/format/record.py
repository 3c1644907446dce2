"""The tensors that hold one packed weight in a checkpoint, and the checks before any of them is believed.

A weight ``<module>.weight`` is stored as

========================  =======================================  =====================================================
``<module>.weight``       [out, in * n / m], or [nnz]              values, under the ordinary name: a loader that knows
                                                                   nothing of the format fails on the shape
``<module>.weight_mask``  uint8 [out, ceil(in / 8)]                what is kept
``<module>.weight_check`` int64 [8], or [10] with a scale          format, out, in, n, m, CRC-32 of values, mask, perm
``<module>.weight_perm``  int32 [in], only where columns moved     ``stored[:, k] = weight[:, perm[k]]``
``<module>.weight_scale`` float32 [out], only with int8 values     ``weight[i, j] = scale[i] * value``
========================  =======================================  =====================================================

Bit j of byte b of a row of the mask is column 8b + j; values are stored row by row in the order of columns. n and m are
0 for unstructured, and the last check is -1 where columns did not move. A CRC-32 is that of the tensor's bytes as
safetensors stores them, started from the CRC-32 of the ASCII text ``sparsify 1 <out> <in> <n> <m> <dtype>`` (dtype of
the values: BF16, F16 or F32), so that a changed header is noticed like a changed byte.

Values in 8 bits are format 2: the check goes on with the CRC-32 of the scale and the dtype of the dense weight as its
place in BF16, F16, F32, counted from 1; the text is ``sparsify 2 <out> <in> <n> <m> I8 <dtype>``.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping

import torch

from sparsify.errors import ModelError
from sparsify.format.bits import count_bits, count_groups, mask_bytes
from sparsify.format.packed import DTYPES, Packed
from sparsify.types import NofM

FORMAT, INT8_FORMAT = 1, 2
VALUES, MASK, CHECK, PERM, SCALE = "weight", "weight_mask", "weight_check", "weight_perm", "weight_scale"
PARTS = (VALUES, MASK, CHECK, PERM, SCALE)
# Numbers in the check tensor of each format, and the place of one that both have.
SIZES = {FORMAT: 8, INT8_FORMAT: 10}
_PERM_AT = 7
_NO_PERM = -1
_Refuse = Callable[[str, str], ModelError]
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def _crc(tensor: torch.Tensor, header: str) -> int:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data.data, zlib.crc32(header.encode()))


def _header(shape: tuple[int, int], pattern: tuple[int, int], dtype: torch.dtype, quantised: bool) -> str:
    version, values = (INT8_FORMAT, "I8 ") if quantised else (FORMAT, "")
    return f"sparsify {version} {shape[0]} {shape[1]} {pattern[0]} {pattern[1]} {values}{DTYPE_NAMES[dtype]}"


def to_tensors(packed: Packed) -> dict[str, torch.Tensor]:
    """The tensors of ``packed`` by their names within the module (``PARTS``)."""
    pattern = (0, 0) if packed.pattern is None else (packed.pattern.n, packed.pattern.m)
    header = _header(packed.shape, pattern, packed.dtype, packed.scale is not None)
    numbers = [FORMAT, *packed.shape, *pattern, _crc(packed.values, header), _crc(packed.mask, header)]
    numbers.append(_NO_PERM if packed.perm is None else _crc(packed.perm, header))
    tensors = {VALUES: packed.values, MASK: packed.mask}
    if packed.perm is not None:
        tensors[PERM] = packed.perm
    if packed.scale is not None:
        tensors[SCALE] = packed.scale
        numbers = [INT8_FORMAT, *numbers[1:], _crc(packed.scale, header), DTYPES.index(packed.dtype) + 1]
    return {**tensors, CHECK: torch.tensor(numbers, dtype=torch.int64)}


def is_complete(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether no part is missing; where the check tensor is malformed, ``from_tensors`` says so."""
    if not {VALUES, MASK, CHECK} <= tensors.keys():
        return False
    check = tensors[CHECK]
    if check.dtype != torch.int64 or check.numel() not in SIZES.values():
        return True
    has_perm = int(check.flatten()[_PERM_AT]) != _NO_PERM
    has_scale = check.numel() == SIZES[INT8_FORMAT]
    return (PERM in tensors or not has_perm) and (SCALE in tensors or not has_scale)


def read_header(check: torch.Tensor) -> tuple[tuple[int, int], torch.dtype | None] | None:
    """Shape of the dense weight as its check tensor says, and its dtype where that is not that of the values.

    None where the tensor is malformed; what it says is to be checked before anything is computed from it.
    """
    if check.dtype != torch.int64 or check.dim() != 1 or len(check) not in SIZES.values():
        return None
    numbers = check.tolist()
    if min(numbers[1:3]) < 1 or (len(numbers) == SIZES[INT8_FORMAT] and not 0 < numbers[-1] <= len(DTYPES)):
        return None
    return (numbers[1], numbers[2]), DTYPES[numbers[-1] - 1] if len(numbers) == SIZES[INT8_FORMAT] else None


def from_tensors(name: str, tensors: Mapping[str, torch.Tensor], *, where: object = "") -> Packed:
    """The packed weight that ``tensors`` hold, checked against itself; nothing is computed from what is not checked.

    Args:
        name: of the module, for messages.
        tensors: by the names of ``PARTS``.
        where: file or folder, for messages.

    Raises:
        ModelError: a part is missing, of another dtype or shape, differs from its checksum, or holds what no encoder
            writes; names the tensor.
    """

    def refuse(part: str, what: str) -> ModelError:
        place = f"{where}: " if str(where) else ""
        return ModelError(f"{place}tensor {name}.{part} {what}; download or export the model again")

    for part in (CHECK, MASK, VALUES):
        if part not in tensors:
            raise refuse(part, "is missing")
    values, mask, perm, scale = tensors[VALUES], tensors[MASK], tensors.get(PERM), tensors.get(SCALE)
    size, pattern, checks, scaled_dtype = _read_check(tensors[CHECK], refuse)
    if scaled_dtype is None and values.dtype not in DTYPES:
        raise refuse(VALUES, f"is {values.dtype}, want a 16-bit or 32-bit float")
    if scaled_dtype is not None and values.dtype != torch.int8:
        raise refuse(VALUES, f"is {values.dtype}, want int8")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (size[0], mask_bytes(size[1])):
        raise refuse(MASK, f"is {mask.dtype} {list(mask.shape)}, want uint8 {[size[0], mask_bytes(size[1])]}")
    if values.dim() != 1 if pattern is None else tuple(values.shape) != (size[0], size[1] // pattern.m * pattern.n):
        raise refuse(VALUES, f"has shape {list(values.shape)}, which does not belong to {tensors[CHECK].tolist()[1:5]}")
    if perm is not None and (perm.dtype != torch.int32 or tuple(perm.shape) != (size[1],)):
        raise refuse(PERM, f"is {perm.dtype} {list(perm.shape)}, want int32 {[size[1]]}")
    if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (size[0],)):
        raise refuse(SCALE, f"is {scale.dtype} {list(scale.shape)}, want float32 {[size[0]]}")
    if (scale is None) != (scaled_dtype is None):
        raise refuse(SCALE, "is missing" if scale is None else f"is there, and a check of format {FORMAT} knows none")
    dtype = scaled_dtype or values.dtype
    header = _header(size, (0, 0) if pattern is None else (pattern.n, pattern.m), dtype, scaled_dtype is not None)
    parts = ((VALUES, values), (MASK, mask), (PERM, perm), (SCALE, scale))
    for (part, tensor), expected in zip(parts, checks, strict=True):
        if tensor is None and expected != _NO_PERM:
            raise refuse(part, "is missing")
        if tensor is not None and _crc(tensor, header) != expected:
            raise refuse(part, "differs from its checksum")
    if scale is not None:
        _check_scaled(values, scale, refuse)
    check_bits(mask, size[1], pattern, len(values), refuse)
    if perm is not None and not torch.equal(perm.sort().values.cpu(), torch.arange(size[1], dtype=torch.int32)):
        raise refuse(PERM, "is not a permutation")
    return Packed(size, pattern, values, mask, perm, scale, scaled_dtype or torch.float32)


_Check = tuple[tuple[int, int], NofM | None, list[int], torch.dtype | None]


def _read_check(check: torch.Tensor, refuse: _Refuse) -> _Check:
    """Shape, pattern, checksums of values, mask, perm and scale, and dtype of a weight that is scaled."""
    if check.dtype != torch.int64 or check.dim() != 1 or len(check) not in SIZES.values():
        raise refuse(CHECK, f"is {check.dtype} {list(check.shape)}, want int64 [8] or [10]")
    version, n_out, n_in, n, m, *checks = check.tolist()
    if SIZES.get(version) != len(check):
        raise refuse(CHECK, f"of {len(check)} numbers is of format {version}, this version reads 1 of 8 and 2 of 10")
    scaled_dtype = None
    if version == INT8_FORMAT:
        number = checks.pop()
        if not 0 < number <= len(DTYPES):
            raise refuse(CHECK, f"says the dense weight is of dtype {number}")
        scaled_dtype = DTYPES[number - 1]
    else:
        checks.append(_NO_PERM)
    if not (0 < n_out < 1 << 31 and 0 < n_in < 1 << 31):
        raise refuse(CHECK, f"says the weight is {[n_out, n_in]}")
    if (n, m) != (0, 0) and not (0 < n < m and n_in % m == 0):
        raise refuse(CHECK, f"says the pattern of {n_in} columns is {n}:{m}")
    return (n_out, n_in), NofM(n, m) if m else None, checks, scaled_dtype


def _check_scaled(values: torch.Tensor, scale: torch.Tensor, refuse: _Refuse) -> None:
    if bool((values == torch.iinfo(torch.int8).min).any()):
        raise refuse(VALUES, "holds -128, and codes are -127 to 127")
    if not bool((torch.isfinite(scale) & ~scale.signbit()).all()):
        raise refuse(SCALE, "holds what is negative or not finite")


@functools.cache
def _keeps(pattern: NofM, device: torch.device) -> torch.Tensor:
    """For each byte of a mask whether every group of m columns in it, m 4 or 8, keeps n: bool [256]."""
    bits = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).view(256, -1, pattern.m)
    return (bits.sum(dim=2) == pattern.n).all(dim=1).to(device)


def check_bits(mask: torch.Tensor, n_in: int, pattern: NofM | None, n_values: int, refuse: _Refuse) -> None:
    """A checksum can be forged: what is decoded from must also be what an encoder writes."""
    if n_in % 8 and bool((mask[:, -1] >> (n_in % 8)).any()):
        raise refuse(MASK, "marks columns that the weight does not have")
    if pattern is None:
        n_kept = int(count_bits(mask).sum())
        if n_kept != n_values:
            raise refuse(MASK, f"keeps {n_kept} weights, and {n_values} values are stored")
        return
    if pattern.m in (4, 8) and n_in % 8 == 0:
        # One look-up for a byte of whole groups.
        kept = _keeps(pattern, mask.device)[mask.flatten().int()]
    else:
        kept = count_groups(mask, n_in, pattern.m) == pattern.n
    if not bool(kept.all()):
        raise refuse(MASK, f"does not keep {pattern} in every group")
