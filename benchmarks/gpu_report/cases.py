"""What is measured, the most important first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_machine.llama import LLAMA_8B, LLAMA_70B, Llama

SIZES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
TINY = Llama(64, 128, 2, 4, 2, 128)
PATTERNS = ("2:4", "0.5", "0.6", "0.7")
# Those of most interest first, then the numbers between.
DECODE, PREFILL = ((1, 8, 64), (32, 16, 4, 2)), ((2048,), (8192, 512, 1024, 4096))
TINY_DECODE, TINY_PREFILL = ((1, 4), ()), ((16,), ())


@dataclass(frozen=True)
class Product:
    """Products with a weight of one linear.

    Attributes:
        linear: its name; q, k and v, and gate and up, are also timed in one, as inference engines run them.
        linears: of this shape in the model.
        shape: of the weight, [out, in].
        pattern: ``2:4``, or a share of zeros.
        tokens: rows of the input.
    """

    linear: str
    linears: int
    shape: tuple[int, int]
    pattern: str
    tokens: int

    @property
    def multiplied(self) -> tuple[int, ...]:
        """Numbers of tokens that linears are given."""
        return (self.tokens,)

    @property
    def kind(self) -> tuple[str, float]:
        """Cases that take about as long, and seconds that the first may take."""
        return "product", 5.0

    @property
    def what(self) -> str:
        """In records and on the screen."""
        return f"{self.linear} {self.shape[0]}x{self.shape[1]}, {self.pattern}, {self.tokens} tokens"


@dataclass(frozen=True)
class Generation:
    """A whole model: prompts of ``prompt`` tokens, ``new`` further ones, in ``batch`` sequences."""

    pattern: str
    batch: int
    prompt: int
    new: int

    @property
    def multiplied(self) -> tuple[int, ...]:
        """Numbers of tokens that linears are given."""
        return (self.batch * self.prompt, self.batch)

    @property
    def kind(self) -> tuple[str, float]:
        """Cases that take about as long, and seconds that the first may take, which builds the models."""
        return "generation", 90.0

    @property
    def what(self) -> str:
        """In records and on the screen."""
        return f"model, {self.pattern}, {self.prompt}+{self.new} tokens x {self.batch}"


@dataclass(frozen=True)
class Search:
    """For cuSPARSELt's fastest algorithms with one shape, for all numbers of tokens in one process.

    Attributes:
        shape: of the weight, [out, in].
        tokens: rows of the inputs, those of most interest first.
    """

    shape: tuple[int, int]
    tokens: tuple[int, ...]

    @property
    def kind(self) -> tuple[str, float]:
        """Cases that take about as long, and seconds that the first may take."""
        return "search", 20.0

    @property
    def what(self) -> str:
        """In records and on the screen."""
        return f"search {self.shape[0]}x{self.shape[1]}"


Case = Product | Generation


def linears(sizes: Llama) -> dict[str, tuple[int, tuple[int, int]]]:
    """Name of a linear -> how many of its shape, and the shape: as engines fuse them, then others as stored."""
    found = {name: (sizes.layers, shape) for name, shape in sizes.fused().items()}
    shapes = list(sizes.linears.values())
    for name, shape in sizes.linears.items():
        if shape not in [known for _, known in found.values()]:
            found[name] = (sizes.layers * shapes.count(shape), shape)
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything that was asked for, in the order of its importance."""
    decode, prefill = (TINY_DECODE, TINY_PREFILL) if options.tiny else (DECODE, PREFILL)
    first = [pattern for pattern in options.patterns if pattern in ("2:4", "0.5")]
    rest = [pattern for pattern in options.patterns if pattern not in first]
    found = list(_products(options, decode[0], first))
    found += _products(options, prefill[0], first[:1])
    if options.size == "8b":
        found += _generations(options, first)
    found += _products(options, prefill[1], first[:1])
    found += _products(options, decode[1], first)
    found += _products(options, (*decode[0], *decode[1]), rest)
    found += _products(options, (*prefill[0], *prefill[1]), first[1:])
    return found


def searches(left: Sequence[Case], sizes: Llama) -> Iterator[Case | Search]:
    """``left``, each case behind a search for every shape that it is the first to multiply by with 2:4 zeros."""
    tokens: dict[tuple[int, int], list[int]] = {}
    for case in left:
        for shape in _two_of_four(case, sizes):
            tokens.setdefault(shape, []).extend(case.multiplied)
    for case in left:
        for shape in _two_of_four(case, sizes):
            if found := tokens.pop(shape, None):
                yield Search(shape, tuple(dict.fromkeys(found)))
        yield case


def _two_of_four(case: Case, sizes: Llama) -> list[tuple[int, int]]:
    if case.pattern != "2:4":
        return []
    return [case.shape] if isinstance(case, Product) else list(sizes.fused().values())


def _products(options: argparse.Namespace, tokens: tuple[int, ...], patterns: list[str]) -> Iterator[Case]:
    sizes = TINY if options.tiny else SIZES[options.size]
    # Kernels are compiled for a number of tokens and a kind of weight, and searched for together.
    for count in tokens:
        for pattern in patterns:
            for name, (n, shape) in linears(sizes).items():
                yield Product(name, n, shape, pattern, count)


def _generations(options: argparse.Namespace, patterns: list[str]) -> Iterator[Case]:
    for pattern in patterns:
        for batch, prompt, new in ((2, 8, 3),) if options.tiny else ((1, 2048, 33), (8, 1024, 33), (1, 8192, 9)):
            yield Generation(pattern, batch, prompt, new)
