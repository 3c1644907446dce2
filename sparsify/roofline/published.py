"""Speed-ups that others have published, dense time / sparse time on the same device, each with its source.

Nothing measured by Sparsify is in here. ``stands_for`` names devices for which a row is used although it was measured
on another; what it then says is said with the device that it was measured on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Half as many tokens as the least that were measured, or twice the most, are still near.
_REACH = 2.0
# With so many tokens products are limited by arithmetic, and more change nothing.
_MANY = 4096
# Shapes whose sides differ by no more, both ratios multiplied, are near.
_NEAR_SHAPE = math.log(1.5)
# The same for unstructured sparsity.
_NEAR_DENSITY = 0.02


@dataclass(frozen=True)
class Shape:
    """One product of a published table: (out, in), tokens, dense time / sparse time."""

    n_out: int
    n_in: int
    tokens: int
    ratio: float


@dataclass(frozen=True)
class Kernels:
    """Ratios of single products with 2:4 or unstructured weights.

    Attributes:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        density: share of values kept; with ``structured`` the pattern is 2:4.
        structured: 2:4, else unstructured.
        ratios: tokens -> (low, high) of the ratio over shapes.
        source: who measured what where.
        shapes: single products of the same source.
        stands_for: other devices.
        stands_up_to: the most tokens for which it stands for them.
    """

    device: str
    dtype: str
    density: float
    structured: bool
    ratios: Mapping[int, tuple[float, float]]
    source: str
    shapes: tuple[Shape, ...] = ()
    stands_for: tuple[str, ...] = ()
    stands_up_to: int | None = None

    def ratios_for(self, device: str) -> Mapping[int, tuple[float, float]]:
        """What it says of ``device``; nothing of a device that it is not about."""
        if device == self.device:
            return self.ratios
        most = self.stands_up_to
        found = {tokens: ratio for tokens, ratio in self.ratios.items() if most is None or tokens <= most}
        return found if device in self.stands_for else {}


@dataclass(frozen=True)
class EndToEnd:
    """Ratios of a whole model's prefill or decode, FP8 2:4 against FP8 dense and the like.

    Attributes:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        phase: ``prefill`` (keys are tokens of all prompts) or ``decode`` (keys are sequences at once).
        sizes: number of weights -> tokens or sequences -> ratio.
        source: who measured what where.
        stands_for: other devices.
    """

    device: str
    dtype: str
    phase: str
    sizes: Mapping[float, Mapping[int, float]]
    source: str
    stands_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A published range and where it is from."""

    low: float
    high: float
    source: str
    device: str


_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
_SLIDE = (
    "SlideSparse, arXiv 2603.05232, data in bcacdwk/vllmbench: cuSPARSELt against cuBLASLt, both searched, "
    "the 8 linear shapes of Qwen2.5-7B and -14B"
)


def _slide(
    device: str,
    dtype: str,
    means: tuple[float, ...],
    low: float,
    high: float,
    *shapes: Shape,
    stands_for: tuple[str, ...] = (),
    stands_up_to: int | None = None,
) -> Kernels:
    """A row of the data set: geometric means by tokens; the least and greatest ratio over shapes at the last.

    The spread over shapes is published here for the last number of tokens, and taken to be the same for the others.
    """
    below, above = low / means[-1], high / means[-1]
    ratios = {
        tokens: (round(mean * below, 3), round(mean * above, 3)) for tokens, mean in zip(_TOKENS, means, strict=True)
    }
    return Kernels(device, dtype, 0.5, True, ratios, _SLIDE, shapes, stands_for, stands_up_to)


# The same chip with less power and slower memory: up to some hundred tokens, where weights come from memory, a guide to
# the modules. With more tokens power decides, and the card gains more than they do.
_LIKE_SXM: dict[str, Any] = {"stands_for": ("h100-sxm", "h200"), "stands_up_to": 512}

KERNELS = (
    _slide(
        "a100-80gb", "bfloat16", (1.46, 1.42, 1.41, 1.39, 1.35, 1.55, 1.52, 1.49), 1.17, 1.66,
        stands_for=("a100-40gb",),
    ),
    _slide(
        "a100-80gb", "int8", (1.40, 1.46, 1.72, 1.97, 1.78, 2.04, 2.04, 2.08), 2.03, 2.15,
        stands_for=("a100-40gb",),
    ),
    _slide(
        "h100-pcie", "bfloat16", (1.00, 1.05, 1.19, 1.32, 1.51, 1.54, 1.64, 1.63), 1.52, 1.74,
        Shape(4608, 3584, 64, 0.54), **_LIKE_SXM,
    ),
    _slide(
        "h100-pcie", "float8", (1.24, 1.15, 1.14, 1.33, 1.43, 1.62, 1.65, 1.67), 1.37, 1.85,
        Shape(27648, 5120, 64, 1.47), Shape(27648, 5120, 16384, 1.65), Shape(3584, 18944, 64, 2.07),
        Shape(3584, 3584, 64, 0.87), Shape(5120, 5120, 256, 0.95), **_LIKE_SXM,
    ),
    _slide("h100-pcie", "int8", (2.13, 2.10, 1.94, 1.50, 1.51, 1.49, 1.64, 1.61), 1.27, 2.93),
    _slide("b200", "bfloat16", (1.40, 1.31, 1.31, 1.34, 1.48, 1.55, 1.61, 1.76), 1.64, 1.88),
    _slide("b200", "float8", (1.30, 1.29, 1.27, 1.26, 1.38, 1.49, 1.60, 1.75), 1.56, 1.87),
    _slide("rtx4090", "float8", (1.08, 1.45, 1.34, 1.69, 1.82, 1.88, 2.00, 2.07), 2.02, 2.11),
    _slide("rtx5080", "float8", (1.34, 1.51, 1.62, 1.67, 1.72, 1.75, 1.74, 1.72), 1.69, 1.75),
    *(
        Kernels(
            "h100-sxm", dtype, 0.5, True, {4096: (1.20, 1.22), 8192: (1.20, 1.22)},
            "NVIDIA/CUDALibrarySamples#203: cuSPARSELt at 8192 x 8192 x 8192 on H100 SXM, by maintainer and user; "
            "NVIDIA/cutlass#2229 says the same of CUTLASS",
            stands_for=("h200",),
        )
        for dtype in ("bfloat16", "float16", "float8")
    ),
    Kernels(
        "rtx4090", "float16", 0.5, False, {1: (1.2, 1.5)},
        "MACKO, 2025: 1.2 to 1.5 times cuBLAS at 50 % on RTX 2080, 3090 and 4090, one token",
        (Shape(4096, 4096, 1, 1.59),),
    ),
    Kernels(
        "a100-80gb", "float16", 0.3, False, {8: (1.4, 1.4), 64: (1.4, 1.4)},
        "Flash-LLM, VLDB 2024: 1.4 times cuBLAS at 70 %, small batches", stands_for=("a100-40gb",),
    ),
)  # fmt: skip

_SLIDE_E2E = "SlideSparse, arXiv 2603.05232: 2:4 against dense of the same type in one fork of vLLM"
_B, _PROMPTS, _SEQUENCES = 1e9, (512, 1024, 2048, 4096, 16384), (64, 128, 256, 512)


def _by(keys: tuple[int, ...], *values: float) -> dict[int, float]:
    return dict(zip(keys, values, strict=True))


END_TO_END = (
    EndToEnd(
        "h100-pcie", "float8", "prefill",
        {
            1.2 * _B: _by(_PROMPTS, 0.81, 0.83, 0.84, 0.84, 1.13),
            3.2 * _B: _by(_PROMPTS, 0.99, 1.02, 1.04, 1.13, 1.20),
            7.6 * _B: _by(_PROMPTS, 1.02, 1.12, 1.21, 1.24, 1.30),
            14.8 * _B: _by(_PROMPTS, 1.05, 1.18, 1.24, 1.30, 1.31),
        },
        f"{_SLIDE_E2E}, Llama-3.2-1B and -3B, Qwen2.5-7B and -14B, H100 PCIe",
    ),
    EndToEnd(
        "h100-pcie", "float8", "decode",
        {7.6 * _B: _by(_SEQUENCES, 1.09, 1.10, 1.13, 1.09), 14.8 * _B: _by(_SEQUENCES, 1.30, 1.21, 1.13, 1.18)},
        f"{_SLIDE_E2E}, Qwen2.5-7B and -14B, H100 PCIe",
    ),
    EndToEnd(
        "h100-sxm", "float8", "decode", {70 * _B: {32: 1.62, 64: 1.52, 128: 1.35, 896: 1.30}},
        "NVIDIA ModelOpt, examples/benchmark.md: Llama-2-70B FP8 2:4 on one H100 against FP8 dense on two",
        ("h200",),
    ),
)  # fmt: skip

# Where weights are few, other things than products take the time.
SMALL_MODEL, SMALL_SOURCE = (
    3e9,
    f"{_SLIDE_E2E}, H100 PCIe, FP8: Llama-3.2-1B prefill 0.81 to 1.13, decode of 1B and 3B 0.96 to 1.03",
)
# FP8 dense against 16 bits dense, end to end, at batch 1, 8 and 64.
FP8_SOURCE = (
    "NVIDIA ModelOpt, examples/benchmark.md: TensorRT-LLM 0.15 on H200, 2048 prompt and 128 new tokens, FP8 against "
    "16 bits: 1.41, 1.31, 1.30 times for Llama-3.1-8B, 1.90, 1.99, 2.10 for 70B; MMLU lower by 1.5 and 0.4 %"
)


def kernel_ratio(
    device: str, dtype: str, density: float, *, structured: bool, shape: tuple[int, int], tokens: int
) -> Found | None:
    """The published range for a product; None if nothing near was published.

    Args:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        density: share of values kept.
        structured: the pattern is 2:4.
        shape: (out, in).
        tokens: rows of x.
    """
    found = [
        (row, near)
        for row in KERNELS
        if (row.dtype, row.structured) == (dtype, structured)
        and abs(row.density - density) <= _NEAR_DENSITY
        and (near := _between(row.ratios_for(device), tokens)) is not None
    ]
    if not found:
        return None
    # A row that is this device's own before one that stands for it.
    row, (low, high) = min(found, key=lambda each: each[0].device != device)
    singles = [each.ratio for each in row.shapes if _near(each, shape, tokens)]
    return Found(min(low, *singles, high), max(high, *singles, low), row.source, row.device)


def end_to_end_ratio(device: str, dtype: str, phase: str, n_weights: float, count: int) -> Found | None:
    """The published range for a whole model: of those sizes between which ``n_weights`` lies; None if none is near."""
    for row in sorted(END_TO_END, key=lambda each: each.device != device):
        if device not in (row.device, *row.stands_for) or (row.dtype, row.phase) != (dtype, phase):
            continue
        at = [
            (size, near[0])
            for size, ratios in sorted(row.sizes.items())
            if (near := _between({key: (ratio, ratio) for key, ratio in ratios.items()}, count)) is not None
        ]
        below = [ratio for size, ratio in at if n_weights / 1.5 <= size <= n_weights][-1:]
        above = [ratio for size, ratio in at if n_weights <= size <= 2 * n_weights][:1]
        if below or above:
            return Found(min(below + above), max(below + above), row.source, row.device)
    return None


def _near(shape: Shape, wanted: tuple[int, int], tokens: int) -> bool:
    distance = abs(math.log(shape.n_out / wanted[0])) + abs(math.log(shape.n_in / wanted[1]))
    return distance <= _NEAR_SHAPE and max(shape.tokens, tokens) <= _REACH * min(shape.tokens, tokens)


def _between(ratios: Mapping[int, tuple[float, float]], tokens: int) -> tuple[float, float] | None:
    """The range at ``tokens``: that of the neighbours on both sides, or of the nearest end if it is near."""
    counts = sorted(ratios)
    if not counts or tokens < counts[0] / _REACH or (tokens > counts[-1] * _REACH and counts[-1] < _MANY):
        return None
    around = list(_neighbours(counts, tokens))
    return min(ratios[count][0] for count in around), max(ratios[count][1] for count in around)


def _neighbours(counts: list[int], tokens: int) -> Iterator[int]:
    below, above = [c for c in counts if c <= tokens], [c for c in counts if c >= tokens]
    if below:
        yield below[-1]
    if above:
        yield above[0]
