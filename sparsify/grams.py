"""Gram matrices of a group of linears; what is derived from one serves all linears that share an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparsify.offload import zeros
from sparsify.solvers.factor import reorder_
from sparsify.solvers.quadratic import Gram
from sparsify.stats import InputStats

# Tokens per channel below which a solver is said to have little to go by.
_TOKENS_PER_CHANNEL = 4


class Grams:
    """Statistics -> their Gram matrix.

    Args:
        damping: for all of them.
        length: tokens of a calibration window, for advice.
        tell: receives a notice and its kind where there are few tokens for the width.
    """

    def __init__(self, damping: float, length: int = 1, tell: Callable[[str, str], None] | None = None) -> None:
        self.damping = damping
        self.length = length
        self.tell = tell
        # By identity of the statistics, which are kept beside their matrix so that it stays theirs.
        self._made: dict[int, tuple[InputStats, Gram]] = {}

    def of(self, stats: InputStats | None, name: str) -> Gram | None:
        """The matrix, None where none was collected; without a token, or with zeros only, all inputs count the same.

        Raises:
            NumericsError: NaN or Inf in it.
        """
        if stats is None or stats.gram is None:
            return None
        if id(stats) not in self._made:
            matrix = stats.gram
            if stats.silent:
                matrix = zeros(len(matrix), len(matrix), matrix.device).fill_diagonal_(1)
            elif self.tell is not None and stats.n_tokens < _TOKENS_PER_CHANNEL * len(matrix):
                wanted = -(-10 * len(matrix) // self.length)
                self.tell(
                    f"{name}: {stats.n_tokens} calibration tokens for {len(matrix)} inputs, which fits them and "
                    f"little else; ten times as many as inputs are advised (--windows {wanted})",
                    f"tokens for {len(matrix)}",
                )
            self._made[id(stats)] = stats, Gram(matrix, stats.n_tokens, self.damping)
        return self._made[id(stats)][1]

    def forget(self, stats: InputStats) -> None:
        """Let go of the matrix of ``stats`` and what was derived from it."""
        self._made.pop(id(stats), None)

    def without_drift(self, stats: InputStats) -> InputStats:
        """``stats`` without what only targets are made of, ``drift`` and ``shift``, with the same matrix.

        They are as large as the matrix and a weight: once the last target is made, nobody should hold ``stats``.
        """
        lean = replace(stats, drift=None, shift=None)
        if id(stats) in self._made:
            self._made[id(lean)] = lean, self._made.pop(id(stats))[1]
        return lean

    def reordered(self, stats: InputStats, perm: torch.Tensor) -> InputStats:
        """``stats`` with inputs in the order ``perm``, whose matrix takes over what is known of theirs.

        It takes their matrix over as well, in the same storage: ``stats`` are of no more use. What only targets are
        made of (``without_drift``) stays behind.
        """
        _, made = self._made.pop(id(stats), (None, None))
        after = None if made is None else made.permuted(perm, in_place=True)
        # A silent input's matrix is not the one that was collected.
        if stats.gram is not None and (made is None or made.matrix is not stats.gram):
            reorder_(stats.gram, perm)
        moved = replace(stats.permuted(perm), gram=stats.gram)
        if after is not None:
            self._made[id(moved)] = moved, after
        return moved
