"""Frozen values that travel between the stages of a pruning run. Nothing here imports torch.

Vocabulary: ``weight`` is [out, in]; ``keep`` is True where a weight survives; N:M means N *kept* in every M
consecutive inputs; ``sparsity`` is a fraction of zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import Literal

from sparsify.errors import UsageError

Group = Literal["layer", "row"]

_DECIMAL = re.compile(r"-?(\d{1,9}(\.\d{0,18})?|\.\d{1,18})(e-\d\d?)?")
_NM = re.compile(r"(\d{1,4}):(\d{1,4})")


@dataclass(frozen=True)
class Unstructured:
    """Exactly ``floor(sparsity * count)`` zeros in every comparison group.

    Attributes:
        sparsity: the fraction to remove, exact (``0.6`` of 10 weights is 6, whatever binary floats make of 0.6).
        group: ``layer`` compares all weights of a linear, ``row`` those of one output row; ``None`` leaves the
            choice to the method (Wanda compares rows, RIA and magnitude the layer).
    """

    sparsity: Fraction
    group: Group | None = None

    def __str__(self) -> str:
        return str(float(self.sparsity))


@dataclass(frozen=True)
class NofM:
    """``n`` kept in every group of ``m`` consecutive inputs of every output row."""

    n: int
    m: int

    @property
    def sparsity(self) -> Fraction:
        """The fraction removed."""
        return 1 - Fraction(self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NofM

# More masks a group than this (8:16 has 12870) would cost more to try than they can bring.
MAX_MASKS = 512


def n_masks(pattern: Pattern) -> int:
    """Number of masks of one group; 0 for unstructured patterns, whose groups are too large to count them."""
    return comb(pattern.m, pattern.n) if isinstance(pattern, NofM) else 0


def check_enumerable(pattern: Pattern) -> None:
    """Refuse patterns whose masks cannot be tried one by one.

    Raises:
        UsageError: an unstructured pattern, or more than ``MAX_MASKS`` masks a group.
    """
    if n_masks(pattern) == 0:
        raise UsageError(f"mrp: masks can be tried one by one for N:M only, not for {pattern}; set mrp.variant=SM")
    if n_masks(pattern) > MAX_MASKS:
        raise UsageError(
            f"mrp: {pattern} has {n_masks(pattern)} masks a group, more than {MAX_MASKS}; set mrp.variant=SM"
        )


def parse_sparsity(text: str | float, where: str = "sparsity") -> Fraction:
    """The exact fraction that ``text`` writes in decimal, in [0, 1).

    Raises:
        UsageError: not a number, or outside [0, 1).
    """
    # Through str: a YAML 0.6 arrives as the nearest double, and users mean the decimal they typed.
    if not _DECIMAL.fullmatch(str(text)):
        raise UsageError(f"{where}: {str(text)[:40]!r} is not a sparsity; write a decimal such as 0.5")
    value = Fraction(str(text))
    if not 0 <= value < 1:
        raise UsageError(f"{where}: {text} is outside [0, 1); it is the fraction of weights to remove, such as 0.5")
    return value


def parse_pattern(text: str | float, group: Group | None = None, where: str = "pattern") -> Pattern:
    """The pattern that ``text`` names: ``N:M`` (N kept of M, ``2:4``) or a sparsity (``0.5``).

    This is the one place where the polarity of N:M is decided.

    Raises:
        UsageError: neither form, N >= M, N = 0, or a sparsity outside [0, 1).
    """
    match = _NM.fullmatch(str(text).strip())
    if match is None:
        if ":" in str(text):
            raise UsageError(f"{where}: {text!r} is not N:M with whole numbers; write for example 2:4")
        return Unstructured(parse_sparsity(text, where), group)
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise UsageError(f"{where}: {text} keeps {n} of {m}; N:M needs 0 < N < M, such as 2:4")
    if group is not None:
        raise UsageError(f"{where}: group {group!r} has no meaning for {text}, whose groups are its runs of {m} inputs")
    return NofM(n, m)


@dataclass(frozen=True)
class LinearSpec:
    """One prunable linear map of a decoder block.

    Attributes:
        name: where it stands in the model, for example ``model.layers.0.mlp.down_proj``; an expert of a fused
            mixture has its index and part in the name (``model.layers.0.mlp.experts.3.gate_proj``).
        parameter: full name of the parameter that holds it.
        out_features: rows of ``weight``.
        in_features: columns of ``weight``.
        transposed: the parameter stores [in, out] (GPT-2's Conv1D).
        expert: index along dimension 0 of a fused 3-D parameter, else None.
        row_start: first row within the parameter (gate and up share one fused parameter).
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool = False
    expert: int | None = None
    row_start: int = 0

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class PrunedLinear:
    """What was done to one linear.

    Attributes:
        name: as in ``LinearSpec``.
        shape: [out, in].
        pattern: as written by the user, ``2:4`` or ``0.5``.
        group: comparison group that was used; ``m`` consecutive inputs for N:M.
        zeros: zeros in the weight as stored.
        relative_error: ||X(V - W)ᵀ||² / ||XWᵀ||² over the calibration tokens that reached this linear; where only input
            norms were collected (``objective`` is None) as if inputs were uncorrelated, without data by weights alone.
        n_tokens: calibration tokens that reached this linear.
        aim: what the output was compared with: ``own``, ``dense`` or ``residual``, see ``methods.PARTS``.
        objective_before: error of the target weights on the final mask, before any was updated, relative to the
            target output; None without a Gram matrix.
        objective: the same for the weights that were written, up to their rounding.
        n_iter: iterations of solver and mask refinement.
        status: ``exact``, ``converged``, ``max_iter``, or a sentence about the fallback that was used.
        permuted: ``no``; ``folded`` (inputs were reordered and the neighbouring weights follow); ``recorded`` (weights
            are in the model's order, and the pattern holds in the order of ``sparsify.perm``).
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    group: str
    zeros: int
    relative_error: float
    n_tokens: int
    aim: str = "own"
    objective_before: float | None = None
    objective: float | None = None
    n_iter: int = 0
    status: str = "exact"
    permuted: str = "no"
