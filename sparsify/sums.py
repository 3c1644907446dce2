"""Sums over the calibration tokens of one input.

Sums, never running means: they do not depend on how tokens were split into calls, beyond rounding. They are taken shard
by shard of the text, each by itself and then added in order, so that one process and several end in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsify.chunks import CHUNK_BYTES, strips
from sparsify.errors import NumericsError
from sparsify.offload import zeros
from sparsify.stats import InputStats, Wanted


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one call, [n, in]; in the dense model; and by how much its residual stream differs, [n, width]."""

    x: torch.Tensor
    dense: torch.Tensor | None
    shift: torch.Tensor | None


class Accumulator:
    """Running sums of the tokens of one input.

    Tokens are held until their shard is over (``flush``), where the matrices need them: so a shard's own product takes
    the memory of a strip, and not that of a second matrix.

    Attributes:
        n_in: channels.
        n_tokens: that were added.
    """

    def __init__(self, n_in: int, device: torch.device | str = "cpu", wanted: Wanted | None = None) -> None:
        wanted = wanted or Wanted()
        self.n_in, self.n_tokens = n_in, 0
        self._sq_norm = torch.zeros(n_in, dtype=torch.float64, device=device)
        self._total = torch.zeros(n_in, dtype=torch.float64, device=device) if wanted.mean else None
        # Of the shard at hand.
        self._part_sq_norm = torch.zeros_like(self._sq_norm)
        self._part_total = None if self._total is None else torch.zeros_like(self._total)
        # float32 like the products they sum; one of 28k x 28k is 3 GB as it is.
        self._gram = zeros(n_in, n_in, device) if wanted.gram else None
        self._drift = zeros(n_in, n_in, device) if wanted.drift else None
        self._shift: torch.Tensor | None = None
        self._held: list[_Tokens] = []

    def add(self, x: torch.Tensor, dense: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> None:
        """Add the tokens of ``x`` [..., in].

        ``dense`` are the same tokens in the dense model, and ``shift`` [..., width] is by how much its residual stream
        differs.
        """
        rows = x.reshape(-1, self.n_in)
        tokens = rows.float()
        self.n_tokens += len(tokens)
        if self._part_total is None:
            self._part_sq_norm += torch.linalg.vector_norm(tokens, dim=0).double().square()
        else:
            # In float64 from the start: the scatter is a small difference where a channel's mean is large.
            self._part_sq_norm += tokens.double().square().sum(dim=0)
            self._part_total += tokens.sum(dim=0, dtype=torch.float64)
        if self._drift is not None and (dense is None or dense.shape != x.shape):
            self._drift = None
        if self._gram is None and self._drift is None and shift is None:
            return
        # Copies: what runs next may work in place.
        self._held.append(
            _Tokens(
                rows.clone(),
                None if self._drift is None or dense is None else dense.reshape(rows.shape).clone(),
                None if shift is None else shift.reshape(len(rows), -1).clone(),
            )
        )

    def flush(self) -> None:
        """The tokens since the last call were a shard: add their sums to those of the shards before."""
        self._sq_norm += self._part_sq_norm
        self._part_sq_norm.zero_()
        if self._total is not None and self._part_total is not None:
            self._total += self._part_total
            self._part_total.zero_()
        if self._gram is not None:
            self._add_products(self._gram, lambda tokens: tokens.x.float(), symmetric=True)
        if self._drift is not None:
            # The difference first: Σ d xᵀ − Σ x xᵀ would lose its digits to a few very large activations.
            self._add_products(self._drift, _drifted)
        width = next((tokens.shift.shape[1] for tokens in self._held if tokens.shift is not None), 0)
        if width:
            if self._shift is None:
                self._shift = zeros(width, self.n_in, self.device)
            self._add_products(self._shift, _shifted)
        self._held.clear()

    def _add_products(
        self, into: torch.Tensor, left: Callable[[_Tokens], torch.Tensor], *, symmetric: bool = False
    ) -> None:
        """Add Σ leftᵀ x over the tokens held, strips of rows at a time; of a symmetric sum the upper ones."""
        left_over = list(strips(len(into)))
        while left_over:
            batch = [left_over.pop(0)]
            while left_over and 4 * self.n_in * sum(b - a for a, b in (*batch, left_over[0])) <= CHUNK_BYTES:
                batch.append(left_over.pop(0))
            parts = [into.new_zeros(b - a, self.n_in - (a if symmetric else 0)) for a, b in batch]
            for tokens in self._held:
                x, rows = tokens.x.float(), left(tokens)
                for part, (a, b) in zip(parts, batch, strict=True):
                    part.addmm_(rows[:, a:b].t(), x[:, a if symmetric else 0 :])
            for part, (a, b) in zip(parts, batch, strict=True):
                into[a:b, a if symmetric else 0 :] += part

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._sq_norm.device

    # --- in pieces -------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the sums are made of, by name, for ``merge``; of a Gram matrix its upper strips."""
        self.flush()
        yield "sq_norm", self._sq_norm
        if self._total is not None:
            yield "total", self._total
        if self._gram is not None:
            for i, (a, b) in enumerate(strips(self.n_in)):
                yield f"gram.{i}", self._gram[a:b, a:]
        if self._drift is not None:
            yield "drift", self._drift
        if self._shift is not None:
            yield "shift", self._shift

    def merge(self, n_tokens: int, read: Callable[[str], torch.Tensor | None]) -> None:
        """Add the sums of another accumulator, as if its shards had come next.

        Args:
            n_tokens: of those.
            read: a piece by its name, None where there is none.
        """
        self.n_tokens += n_tokens
        device = self.device
        for name, into in (("sq_norm", self._sq_norm), ("total", self._total)):
            piece = read(name)
            if into is not None and piece is not None:
                into += piece.to(device)
        if self._gram is not None:
            for i, (a, b) in enumerate(strips(self.n_in)):
                piece = read(f"gram.{i}")
                assert piece is not None
                self._gram[a:b, a:] += piece.to(device)
        if self._drift is not None:
            piece = read("drift")
            self._drift = None if piece is None else self._drift.add_(piece.to(device))
        piece = read("shift")
        if piece is not None:
            if self._shift is None:
                self._shift = zeros(piece.shape[0], piece.shape[1], device)
            self._shift += piece.to(device)

    def result(self, name: str) -> InputStats:
        """The sums as float32.

        Raises:
            NumericsError: a channel is NaN or Inf; ``name`` says where.
        """
        self.flush()
        sq_norm = self._sq_norm.float()
        bad = (~torch.isfinite(sq_norm)).nonzero()
        if len(bad):
            raise NumericsError(
                f"{name}: the activations of input channel {int(bad[0])} are NaN or Inf ({len(bad)} such channels); "
                "try --compute-dtype float32 or check the source model"
            )
        total = scatter = None
        if self._total is not None:
            total = self._total.float()
            scatter = (self._sq_norm - self._total.square() / max(self.n_tokens, 1)).clamp_min(0).float()
        if self._gram is not None:
            for a, b in strips(self.n_in):
                corner = self._gram[a:b, a:b].triu_()
                corner += corner.triu(1).t()
                self._gram[b:, a:b] = self._gram[a:b, b:].t()
        return InputStats(sq_norm, self.n_tokens, total, self._gram, self._drift, self._shift, scatter)


def _drifted(tokens: _Tokens) -> torch.Tensor:
    assert tokens.dense is not None
    return tokens.dense.float() - tokens.x.float()


def _shifted(tokens: _Tokens) -> torch.Tensor:
    assert tokens.shift is not None
    return tokens.shift.float()
