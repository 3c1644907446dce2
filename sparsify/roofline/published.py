"""Speed-ups that others have published, dense time / sparse time on the same device, each with its source.

Nothing measured by Sparsify is in here, and nothing whose number of tokens is not known. ``stands_for`` names devices
for which a row is used although it was measured on another; what it then says is said with the device that it was
measured on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Half as many tokens as the least that were measured, or twice the most, are still near.
_REACH = 2.0
# With so many tokens products are limited by arithmetic, and more change nothing.
_MANY = 4096
# Of values kept, in all rows.
_DENSITY, _NEAR_DENSITY = 0.5, 0.02

_Range = tuple[float, float]


@dataclass(frozen=True)
class Kernels:
    """Ratios of single products with half of the weights, 2:4 or unstructured.

    Attributes:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        structured: 2:4, else unstructured.
        ratios: tokens -> (low, high) of the ratio over shapes.
        source: who measured what where.
        stands_for: other devices.
        stands_up_to: the most tokens for which it stands for them.
    """

    device: str
    dtype: str
    structured: bool
    ratios: Mapping[int, _Range]
    source: str
    stands_for: tuple[str, ...] = ()
    stands_up_to: int | None = None

    def ratios_for(self, device: str) -> Mapping[int, _Range]:
        """What it says of ``device``; nothing of a device that it is not about."""
        if device == self.device:
            return self.ratios
        most = self.stands_up_to
        found = {tokens: ratio for tokens, ratio in self.ratios.items() if most is None or tokens <= most}
        return found if device in self.stands_for else {}


@dataclass(frozen=True)
class EndToEnd:
    """Ratios of a whole model's prefill or decode, FP8 2:4 against FP8 dense.

    Attributes:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        phase: ``prefill`` (keys are tokens of all prompts) or ``decode`` (keys are sequences at once).
        sizes: number of weights -> tokens or sequences -> (low, high) of the ratio.
        source: who measured what where.
    """

    device: str
    dtype: str
    phase: str
    sizes: Mapping[float, Mapping[int, _Range]]
    source: str


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
    "geometric means over the 8 linear shapes of Qwen2.5-7B and -14B; from 16384 tokens on least and greatest of them, "
    "with fewer the single shapes that are known (0.54 to 2.07 at 64 tokens on H100 PCIe), others lie around the mean"
)


def _slide(
    device: str, dtype: str, means: tuple[float, ...], *last: float, singles: Mapping[int, _Range] | None = None,
    stands_for: tuple[str, ...] = (), stands_up_to: int | None = None,
) -> Kernels:  # fmt: skip
    """A row of the data set: geometric means by tokens, widened by what is known of single shapes.

    Args:
        device: that was measured.
        dtype: of weights.
        means: one for each of ``_TOKENS``.
        last: least and greatest over shapes at the last of them.
        singles: tokens -> least and greatest of the single shapes that are known there.
        stands_for: see ``Kernels``.
        stands_up_to: see there.
    """
    known = {**(singles or {}), _TOKENS[-1]: last}
    around = {tokens: (mean, *known.get(tokens, ())) for tokens, mean in zip(_TOKENS, means, strict=True)}
    ratios = {tokens: (min(each), max(each)) for tokens, each in around.items()}
    return Kernels(device, dtype, True, ratios, _SLIDE, stands_for, stands_up_to)


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
        singles={64: (0.54, 0.54)}, **_LIKE_SXM,
    ),
    _slide(
        "h100-pcie", "float8", (1.24, 1.15, 1.14, 1.33, 1.43, 1.62, 1.65, 1.67), 1.37, 1.85,
        singles={64: (0.87, 2.07), 256: (0.95, 0.95)}, **_LIKE_SXM,
    ),
    _slide("h100-pcie", "int8", (2.13, 2.10, 1.94, 1.50, 1.51, 1.49, 1.64, 1.61), 1.27, 2.93),
    _slide("b200", "bfloat16", (1.40, 1.31, 1.31, 1.34, 1.48, 1.55, 1.61, 1.76), 1.64, 1.88),
    _slide("b200", "float8", (1.30, 1.29, 1.27, 1.26, 1.38, 1.49, 1.60, 1.75), 1.56, 1.87),
    _slide("rtx4090", "float8", (1.08, 1.45, 1.34, 1.69, 1.82, 1.88, 2.00, 2.07), 2.02, 2.11),
    _slide("rtx5080", "float8", (1.34, 1.51, 1.62, 1.67, 1.72, 1.75, 1.74, 1.72), 1.69, 1.75),
    *(
        # The type is not said. One shape was measured: others are taken to gain nothing at worst.
        Kernels(
            "h100-sxm", dtype, True, {8192: (1.0, 1.22)},
            "NVIDIA/CUDALibrarySamples#203: cuSPARSELt, H100 SXM, 1.20 to 1.22 at 8192 x 8192 x 8192 alone, by "
            "maintainer and user; NVIDIA/cutlass#2229 has at most 1.2 for CUTLASS",
            stands_for=("h200",),
        )
        for dtype in ("bfloat16", "float16", "float8")
    ),
    Kernels(
        "rtx4090", "float16", False, {1: (1.2, 1.5)},
        "MACKO, 2025: 1.2 to 1.5 times cuBLAS at 50 % on RTX 2080, 3090 and 4090, one token",
    ),
)  # fmt: skip

_SLIDE_E2E = "SlideSparse, arXiv 2603.05232: 2:4 against dense of the same type in one fork of vLLM"
_B, _PROMPTS, _SEQUENCES = 1e9, (512, 1024, 2048, 4096, 16384), (64, 128, 256, 512)


def _by(keys: tuple[int, ...], *values: float) -> dict[int, _Range]:
    return {key: (value, value) for key, value in zip(keys, values, strict=True)}


# Both published as one range over all numbers of sequences.
_FEW_WEIGHTS = dict.fromkeys(_SEQUENCES, (0.96, 1.03))


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
        {
            1.2 * _B: _FEW_WEIGHTS,
            3.2 * _B: _FEW_WEIGHTS,
            7.6 * _B: _by(_SEQUENCES, 1.09, 1.10, 1.13, 1.09),
            14.8 * _B: _by(_SEQUENCES, 1.30, 1.21, 1.13, 1.18),
        },
        f"{_SLIDE_E2E}, Llama-3.2-1B and -3B (0.96 to 1.03), Qwen2.5-7B and -14B, H100 PCIe",
    ),
)  # fmt: skip

# Where weights are few, other things than products take the time.
SMALL_MODEL, SMALL_SOURCE = (
    3.3e9,
    f"{_SLIDE_E2E}, H100 PCIe, FP8: Llama-3.2-1B prefill 0.81 to 1.13, decode of 1B and 3B 0.96 to 1.03",
)
# FP8 dense against 16 bits dense, end to end, at batch 1, 8 and 64.
FP8_SOURCE = (
    "NVIDIA ModelOpt, examples/benchmark.md: TensorRT-LLM 0.15 on H200, 2048 prompt and 128 new tokens, FP8 against "
    "16 bits: 1.41, 1.31, 1.30 times for Llama-3.1-8B, 1.90, 1.99, 2.10 for 70B; MMLU lower by 1.5 and 0.4 %"
)


def kernel_ratio(device: str, dtype: str, density: float, *, structured: bool, tokens: int) -> Found | None:
    """The published range for products; None if nothing near was published.

    Args:
        device: a name in ``devices.DEVICES``.
        dtype: of weights.
        density: share of values kept.
        structured: the pattern is 2:4.
        tokens: rows of x.
    """
    found = [
        (row, near)
        for row in KERNELS
        if (row.dtype, row.structured) == (dtype, structured)
        and (near := _between(row.ratios_for(device), tokens)) is not None
    ]
    if not found or abs(density - _DENSITY) > _NEAR_DENSITY:
        return None
    # A row that is this device's own before one that stands for it.
    row, (low, high) = min(found, key=lambda each: each[0].device != device)
    return Found(low, high, row.source, row.device)


def end_to_end_ratio(device: str, dtype: str, phase: str, n_weights: float, count: int) -> Found | None:
    """The published range for a whole model: of those sizes between which ``n_weights`` lies; None if none is near."""
    for row in END_TO_END:
        if (row.device, row.dtype, row.phase) != (device, dtype, phase):
            continue
        at = [
            (size, near) for size, ratios in sorted(row.sizes.items()) if (near := _between(ratios, count)) is not None
        ]
        below = [near for size, near in at if n_weights / 1.5 <= size <= n_weights][-1:]
        above = [near for size, near in at if n_weights <= size <= 2 * n_weights][:1]
        if below or above:
            lows, highs = zip(*below, *above, strict=True)
            return Found(min(lows), max(highs), row.source, row.device)
    return None


def _between(ratios: Mapping[int, _Range], tokens: int) -> _Range | None:
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
