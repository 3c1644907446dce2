"""What ``sparsify tune`` is asked to measure, and the random weights it measures with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparsify.errors import UsageError
from sparsify.format.packed import Packed, encode, quantise, rows, stack
from sparsify.kernels import native
from sparsify.kernels.table import NAMES, UNSTRUCTURED, Entry, Times
from sparsify.types import NofM, Pattern, parse_pattern

# What --dtype names -> types of stored values and of inputs.
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "f32": (torch.float32, torch.float32),
    "int8": (torch.int8, torch.bfloat16),
    "int8-f32": (torch.int8, torch.float32),
}
DTYPES, GPU_DTYPES = ("bf16", "int8"), ("bf16",)
PATTERNS = ("2:4", "0.5", "0.6", "0.7")
# Values in 8 bits are measured at the first two, as the others would stand for few weights.
_INT8_PATTERNS = ("2:4", "0.5")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
QUICK_TOKENS = (1, 8, 32, 512)
# SmolLM2-135M, a Llama of 1B, Llama-3.1-8B.
SHAPES = (
    (576, 576), (192, 576), (1536, 576), (576, 1536),
    (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
ROUNDS = 7
# Bytes of copies for --quick, less than large caches hold.
QUICK_BYTES = 1 << 28
# Rows of the random weight that are repeated.
_BLOCK = 64


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        device: a CPU or a GPU.
        dtypes: names in ``KINDS``.
        patterns: ``N:M`` or sparsities.
        shapes: (out, in) of the weights.
        tokens: numbers of tokens.
        rounds: of each way; fewer for many tokens.
        n_bytes: of the copies of a dense weight on a CPU, as memory allows; 0: more than the cache holds.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtypes: tuple[str, ...] = DTYPES
    patterns: tuple[str, ...] = PATTERNS
    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    rounds: int = ROUNDS
    n_bytes: int = 0

    def kinds(self) -> Iterator[tuple[torch.dtype, list[tuple[torch.dtype, str]]]]:
        """Each type of inputs, with the weights that share a dense rival: type of values and pattern."""
        groups: dict[torch.dtype, list[tuple[torch.dtype, str]]] = {}
        for name in self.dtypes:
            values, x = KINDS[name]
            fewer = values == torch.int8 and self.patterns == PATTERNS
            patterns = _INT8_PATTERNS if fewer else self.patterns
            groups.setdefault(x, []).extend((values, pattern) for pattern in patterns)
        yield from groups.items()


def check(request: Request) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: names the option.
    """
    for name in request.dtypes:
        if name not in KINDS:
            raise UsageError(f"--dtype {name!r} is unknown; choose {', '.join(KINDS)}")
    for pattern in request.patterns:
        parsed = parse_pattern(pattern, where="--pattern")
        for n_out, n_in in request.shapes:
            if isinstance(parsed, NofM) and n_in % parsed.m:
                raise UsageError(f"--pattern {pattern} does not divide the {n_in} columns of --shape {n_out}x{n_in}")
    if request.rounds < 1 or min(request.tokens, default=0) < 1 or not request.shapes:
        raise UsageError("--rounds and --tokens are whole numbers above 0, and there is at least one --shape")
    if request.device.type == "cpu":
        why = native.native(native.SLICES).absent(request.device)
        if why:
            raise UsageError(f"there is nothing to measure on this CPU: {why}")
        for name in request.dtypes:
            if not native.ways(*KINDS[name], 1, 1):
                raise UsageError(f"--dtype {name}: this CPU has no kernel for it; choose another")
    elif request.device.type != "cuda":
        raise UsageError(f"--device {request.device}: there are kernels for cpu and cuda")


def random_packed(shape: tuple[int, int], pattern: Pattern, values: torch.dtype, x: torch.dtype) -> Packed:
    """A random weight; what is kept repeats after some rows, which no kernel can make use of."""
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(n_out, _BLOCK), n_in, generator=generator) / math.sqrt(n_in)
    rank = torch.rand(block.shape, generator=generator)
    if isinstance(pattern, NofM):
        keep = rank.view(len(block), -1, pattern.m).argsort(dim=2).argsort(dim=2) < pattern.n
        packed = encode(torch.where(keep.view(block.shape), block, 0).to(x), pattern)
    else:
        packed = encode(torch.where(rank >= float(pattern.sparsity), block, 0).to(x))
    packed = quantise(packed) if values == torch.int8 else packed
    return rows(stack([packed] * math.ceil(n_out / len(block))), 0, n_out)


def times_of(samples_us: Sequence[float]) -> Times:
    """Median and ends, to a hundredth of a microsecond."""
    median, low, high = (
        max(0.01, round(value, 2)) for value in (statistics.median(samples_us), min(samples_us), max(samples_us))
    )
    return Times(median, low, high, len(samples_us))


def entry_of(
    values: torch.dtype,
    x: torch.dtype,
    pattern: str,
    shape: tuple[int, int],
    times: Mapping[int, Mapping[str, Times]],
) -> Entry:
    """The entry of a weight of ``shape`` pruned by ``pattern``."""
    parsed = parse_pattern(pattern)
    name = pattern if isinstance(parsed, NofM) else UNSTRUCTURED
    return Entry(NAMES[values], NAMES[x], name, float(1 - parsed.sparsity), *shape, times)
