"""Statistics of a linear's inputs.

Sums, never running means: they do not depend on how tokens were split into calls, beyond rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.errors import NumericsError

# Strips in which a Gram matrix is summed, each from its diagonal block on: 5/8 of the work.
_PANELS = 4


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
        """The sums of the inputs in the order ``perm``, in the dense model too."""
        return InputStats(
            self.sq_norm[perm],
            self.n_tokens,
            None if self.total is None else self.total[perm],
            None if self.gram is None else self.gram[perm][:, perm],
            None if self.drift is None else self.drift[perm][:, perm],
            None if self.shift is None else self.shift[:, perm],
            None if self.scatter is None else self.scatter[perm],
        )


@dataclass(frozen=True)
class Wanted:
    """Which sums to collect beside the squares, by the names in ``InputStats``."""

    mean: bool = False
    gram: bool = False
    drift: bool = False
    shift: bool = False


class Accumulator:
    """Running sums of the tokens of one input."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu", wanted: Wanted | None = None) -> None:
        wanted = wanted or Wanted()
        self.sq_norm = torch.zeros(n_in, dtype=torch.float64, device=device)
        self.total = torch.zeros(n_in, dtype=torch.float64, device=device) if wanted.mean else None
        # float32 like the products they sum; one of 28k x 28k is 3 GB as it is.
        self.gram = torch.zeros(n_in, n_in, device=device) if wanted.gram else None
        self.drift = torch.zeros(n_in, n_in, device=device) if wanted.drift else None
        self.shift: torch.Tensor | None = None
        self.n_tokens = 0

    def add(self, x: torch.Tensor, dense: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> None:
        """Add the tokens of ``x`` [..., in].

        ``dense`` are the same tokens in the dense model, and ``shift`` [..., width] is by how much its residual stream
        differs.
        """
        tokens = x.reshape(-1, x.shape[-1]).float()
        if self.total is None:
            self.sq_norm += torch.linalg.vector_norm(tokens, dim=0).double().square()
        else:
            # In float64 from the start: the scatter is a small difference where a channel's mean is large.
            self.sq_norm += tokens.double().square().sum(dim=0)
        self.n_tokens += tokens.shape[0]
        if self.total is not None:
            self.total += tokens.sum(dim=0, dtype=torch.float64)
        if self.gram is not None:
            # Symmetric: what is left of the diagonal blocks follows in ``result``.
            width = -(-self.gram.shape[0] // _PANELS)
            for a in range(0, self.gram.shape[0], width):
                self.gram[a : a + width, a:].addmm_(tokens[:, a : a + width].t(), tokens[:, a:])
        if self.drift is not None:
            if dense is None or dense.shape != x.shape:
                self.drift = None
            else:
                # The difference first: Σ d xᵀ − Σ x xᵀ would lose its digits to a few very large activations.
                self.drift.addmm_((dense.reshape(tokens.shape).float() - tokens).t(), tokens)
        if shift is not None:
            shift = shift.reshape(len(tokens), -1).float()
            if self.shift is None:
                self.shift = torch.zeros(shift.shape[1], tokens.shape[1], device=x.device)
            self.shift.addmm_(shift.t(), tokens)

    def result(self, name: str) -> InputStats:
        """The sums as float32.

        Raises:
            NumericsError: a channel is NaN or Inf; ``name`` says where.
        """
        sq_norm = self.sq_norm.float()
        bad = (~torch.isfinite(sq_norm)).nonzero()
        if len(bad):
            raise NumericsError(
                f"{name}: the activations of input channel {int(bad[0])} are NaN or Inf ({len(bad)} such channels); "
                "try --compute-dtype float32 or check the source model"
            )
        total = scatter = None
        if self.total is not None:
            total = self.total.float()
            scatter = (self.sq_norm - self.total.square() / max(self.n_tokens, 1)).clamp_min(0).float()
        if self.gram is not None:
            self.gram = self.gram.triu_()
            self.gram += self.gram.triu(1).t()
        return InputStats(sq_norm, self.n_tokens, total, self.gram, self.drift, self.shift, scatter)
