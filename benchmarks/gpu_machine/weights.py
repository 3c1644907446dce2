"""Random pruned weights, how far a product is from the exact one, and whether two tensors are the same."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sparsify.format.packed import Packed
    from sparsify.types import NofM


# A product's error against float64 may be this many times that of F.linear in the same dtype, or of one rounding.
ERROR_FACTOR = 3.0


def pruned(weight: torch.Tensor, pattern: NofM | None) -> torch.Tensor:
    """``weight``, changed in place to keep its largest values by ``pattern``, or half of them where that is None."""
    from sparsify.masks import keep_mask
    from sparsify.types import Unstructured

    # Not a product with the mask: that makes negative zeros, which count as values.
    return weight.masked_fill_(~keep_mask(weight.abs(), pattern or Unstructured(Fraction(1, 2))), 0)


def random_packed(
    shape: tuple[int, int],
    pattern: NofM | None,
    dtype: torch.dtype,
    *,
    perm: bool = False,
    device: str = "cpu",
) -> Packed:
    """A random weight, made on ``device``; half its values are zero where ``pattern`` is None.

    Some groups are all zero, and one zero is negative, which counts as a value.
    """
    import torch

    from sparsify.format.packed import encode

    generator = torch.Generator(device=device).manual_seed(0)
    stored = pruned(torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[1]), pattern)
    stored[shape[0] // 2, : shape[1] // 2] = 0
    stored = stored.to(dtype)
    place = int((stored[-1] != 0).nonzero()[0, 0])
    stored[-1, place] = -0.0
    if not perm:
        return encode(stored, pattern)
    order = torch.randperm(shape[1], generator=generator, device=device)
    weight = torch.empty_like(stored)
    weight[:, order] = stored
    return encode(weight, pattern, order)


def describe(packed: Packed) -> str:
    """A weight's shape, pattern, dtype and order, as a case of a check."""
    shape, order = " x ".join(map(str, packed.shape)), "" if packed.perm is None else " permuted"
    return f"{shape} {packed.pattern or 'unstructured'} {packed.dtype}{order}"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, wherever they lie."""
    import torch

    as_bytes = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*as_bytes)


def errors(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[float, float, bool]:
    """Relative errors against float64 of ``result`` and of F.linear, and whether the first is acceptable in every row.

    A row is that of the weight, over all tokens: in the error of all of them together a value that is missing from
    one drowns. What is acceptable is measured by the largest error of a row of F.linear. Errors of a row are relative
    to its results and to the size that sums of such terms have, since a single result may be near 0.
    """
    import torch

    linear = torch.nn.functional.linear
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = float(exact.norm()) or 1.0
    terms = linear(x.double().square(), weight.double().square())
    of_rows = (exact.square() + terms).flatten(0, -2).sum(dim=0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)

    def compared(product: torch.Tensor) -> tuple[float, float]:
        off = product.double() - exact
        return float(off.norm()) / size, float((off.flatten(0, -2).norm(dim=0) / of_rows).amax())

    (error, worst), (dense, worst_dense) = compared(result), compared(linear(x, weight, bias))
    # A NaN compares false.
    return error, dense, worst <= ERROR_FACTOR * max(worst_dense, torch.finfo(x.dtype).eps / 4)


def poison(n_values: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaNs in the memory that the allocator hands out next: an element that is never written shows."""
    import torch

    torch.full((n_values,), math.nan, dtype=dtype, device=device)
