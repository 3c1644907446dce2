"""Statistics of a linear's inputs, as ``sums`` adds them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputStats:
    """Sums over the calibration tokens that reached a linear.

    Attributes:
        sq_norm: [in] float32, sum of x_j^2.
        n_tokens: number of tokens.
        total: [in] float32, sum of x_j; None unless means were asked for.
        scatter: [in] float32, sum of (x_j - mean)^2; as ``total``.
        gram: [in, in] float32, sum of x xᵀ; None unless asked for.
        drift: [in, in] float32, sum of (d − x) xᵀ, d the input of the same linear in the dense model; None unless asked
            for, or where dense and pruned tokens are not the same ones (experts, to which they are routed differently).
        shift: [width, in] float32, sum of (e − r) xᵀ, r the residual stream that the linear's output is added to and e
            that of the dense model; None unless asked for, or where the output is added to no stream.
    """

    sq_norm: torch.Tensor
    n_tokens: int
    total: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    scatter: torch.Tensor | None = None

    @property
    def silent(self) -> bool:
        """Whether no token arrived, or nothing but zeros did."""
        return not bool(self.sq_norm.any())

    @property
    def rms(self) -> torch.Tensor:
        """[in] float32: sqrt(sq_norm / n_tokens).

        Ones where ``silent`` (an expert that was never routed to): without data, every input counts the same.
        """
        if self.silent:
            return torch.ones_like(self.sq_norm)
        return (self.sq_norm / self.n_tokens).sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """[in] float32: total / n_tokens, zeros without tokens; needs ``total``."""
        if self.total is None:
            raise ValueError("means were not collected")
        return self.total / max(self.n_tokens, 1)

    @property
    def variance(self) -> torch.Tensor:
        """[in] float32: scatter / n_tokens, over all tokens; ones without tokens."""
        if self.n_tokens == 0:
            return torch.ones_like(self.sq_norm)
        if self.scatter is None:
            raise ValueError("means were not collected")
        return self.scatter / self.n_tokens

    def permuted(self, perm: torch.Tensor) -> InputStats:
        """The sums [in] of the inputs in the order ``perm``; its matrices are left to whoever can do without a copy."""
        return InputStats(
            self.sq_norm[perm],
            self.n_tokens,
            None if self.total is None else self.total[perm],
            scatter=None if self.scatter is None else self.scatter[perm],
        )


@dataclass(frozen=True)
class Wanted:
    """Which sums to collect beside the squares, by the names in ``InputStats``."""

    mean: bool = False
    gram: bool = False
    drift: bool = False
    shift: bool = False
