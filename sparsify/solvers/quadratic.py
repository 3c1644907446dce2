"""The layer problem: minimise f(V) = 1/2 tr((V - W) G (V - W)^T) over V with support in a pattern.

G is the Gram matrix of the inputs, Σ x xᵀ. Rows of V are independent given their supports and share G, so everything
that only depends on G (damping, dead inputs, factorisations) is computed once per input and used by every linear that
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparsify.chunks import WIDE, chunks, strips
from sparsify.errors import NumericsError, SingularError
from sparsify.finite import all_finite
from sparsify.offload import zeros
from sparsify.solvers.factor import factorise_, invert_, reorder_, times_inverse_

# Share of the mean diagonal that is added to it before factorising (SparseGPT's default, and everybody's since).
DAMPING = 0.01
# Tenfold steps of damping before a Gram matrix that will not factorise is given up.
_STEPS = 6


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        weight: [out, in] float32, exact zeros where ``keep`` is False.
        keep: [out, in] bool.
        n_iter: iterations of its outer loop; 0 for a direct solver.
        status: ``exact`` (a direct solver), ``converged``, ``max_iter``, or a sentence that begins with ``fallback``.
    """

    weight: torch.Tensor
    keep: torch.Tensor
    n_iter: int = 0
    status: str = "exact"


class Gram:
    """Σ x xᵀ of one input, and what is derived from it, each computed at most once.

    A ``wide`` one (more than ``WIDE`` inputs) keeps no more than one derived matrix, in float32: the last one asked for
    takes the storage of the one before. Others keep factors and inverses in float64 and all that was asked for. In
    bytes of ``matrix``, that is a working set of 2 where wide, and of up to 12 else.

    Args:
        matrix: [in, in] float32, symmetric positive semidefinite, not damped.
        n_tokens: tokens in the sum.
        damping: share of the mean diagonal that ``damped`` adds; ``damping_used`` is what factorising needed.

    Raises:
        NumericsError: NaN or Inf in the matrix.
    """

    def __init__(self, matrix: torch.Tensor, n_tokens: int, damping: float = DAMPING) -> None:
        if not all_finite(matrix):
            raise NumericsError("the Gram matrix of the inputs holds NaN or Inf; try --compute-dtype float32")
        self.matrix = matrix
        self.n_tokens = n_tokens
        self.damping = damping
        self.dead = matrix.diagonal() <= 0
        self.damping_used = damping
        self.wide = len(matrix) > WIDE
        # The diagonal of ``damped``, once damping is settled.
        self._diagonal: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None
        self._upper: torch.Tensor | None = None
        self._scaled: tuple[torch.Tensor, torch.Tensor] | None = None
        self._spectrum: tuple[torch.Tensor, torch.Tensor] | None = None
        # Where wide: the derived matrix that is kept, and its name.
        self._only: tuple[str, torch.Tensor] | None = None

    @property
    def n_in(self) -> int:
        """Width."""
        return int(self.matrix.shape[0])

    # --- damping ---------------------------------------------------------------------------------------------------

    @property
    def damped(self) -> torch.Tensor:
        """[in, in] float32, a copy: G + damping_used * mean(diag G) * I, the mean over live inputs; positive definite.

        A dead input (never non-zero) has no row in G and gets the addend alone, or 1 where that is 0.

        Raises:
            NumericsError: singular in spite of damping.
        """
        with self.loaded() as matrix:
            return matrix.clone()

    @contextmanager
    def loaded(self) -> Iterator[torch.Tensor]:
        """``damped`` without a copy: ``matrix`` itself, with another diagonal while the context lasts.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self._diagonal is None:
            self._factor()
        assert self._diagonal is not None
        own = self.matrix.diagonal().clone()
        self.matrix.diagonal().copy_(self._diagonal)
        try:
            yield self.matrix
        finally:
            self.matrix.diagonal().copy_(own)

    def _damp(self, share: float) -> torch.Tensor:
        live = self.matrix.diagonal()[~self.dead]
        extra = share * float(live.double().mean()) if len(live) else 1.0
        # Where all damping is off, a dead input still needs a pivot; its weight does not matter.
        return self.matrix.diagonal().add(extra).masked_fill_(self.dead, extra or 1.0)

    def _factor(self) -> torch.Tensor:
        """L, lower, in float64, of J ``damped`` J = L Lᵀ with J the reversal; where wide J L J instead, float32, kept.

        Damping grows tenfold while the matrix is not positive definite, and is settled here, before anything is
        derived: all linears that share an input see the same one. ``inverse`` and ``inverse_upper`` both come from this
        one factor: near singularity one order may factorise where the other does not.
        """
        share = self.damping_used
        for _ in range(_STEPS):
            diagonal = self._damp(share)
            factor: torch.Tensor
            if self.wide:
                factor = self._room("factor").copy_(self.matrix)
                factor.diagonal().copy_(diagonal)
                definite = factorise_(factor)
            else:
                reversed_ = self.matrix.flip(0, 1).double()
                reversed_.diagonal().copy_(diagonal.flip(0))
                factor, info = torch.linalg.cholesky_ex(reversed_)
                definite = int(info) == 0
            if definite:
                if share != self.damping_used:
                    # Another order of the inputs got by with less.
                    self._inverse = self._scaled = self._spectrum = None
                self._diagonal, self.damping_used = diagonal, share
                return factor
            share = 10 * (share or 1e-6)
        raise NumericsError(
            f"the Gram matrix of {self.n_in} inputs stays singular at a damping of {share / 10:g} of its mean "
            "diagonal; the activations are not usable"
        )

    # --- derived matrices ------------------------------------------------------------------------------------------

    def _kept(self, name: str) -> torch.Tensor | None:
        return self._only[1] if self._only is not None and self._only[0] == name else None

    def _room(self, name: str) -> torch.Tensor:
        """Storage for the derived matrix ``name`` of a wide one; the one there is loses its content."""
        room = zeros(self.n_in, self.n_in, self.matrix.device) if self._only is None else self._only[1]
        self._only = name, room
        return room

    @property
    def inverse(self) -> torch.Tensor:
        """[in, in] float64, inverse of ``damped``; kept unless wide, for which ``times_inverse`` needs less memory.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self.wide:
            upper = self.inverse_upper.double()
            return upper.t() @ upper
        if self._inverse is None:
            self._inverse = torch.cholesky_inverse(self._factor()).flip(0, 1)
        return self._inverse

    @property
    def inverse_diagonal(self) -> torch.Tensor:
        """[in] float32, the diagonal of ``inverse``.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if not self.wide:
            return self.inverse.diagonal().float()
        upper = self.inverse_upper
        total = torch.zeros(self.n_in, dtype=torch.float64, device=upper.device)
        for rows in chunks(self.n_in, 2 * self.n_in):
            total += upper[rows].double().square_().sum(dim=0)
        return total.float()

    def times_inverse(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [rows, in] times ``inverse``, computed in float64; float32.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self.wide:
            return times_inverse_(rows.double(), self.inverse_upper).float()
        return (rows.double() @ self.inverse).float()

    @property
    def inverse_upper(self) -> torch.Tensor:
        """[in, in], U upper triangular with Uᵀ U = ``inverse``; float64, or float32 where wide.

        U[a:, a:]ᵀ U[a:, a:] is the inverse of ``damped``[a:, a:], which is why SparseGPT and MRP work with U.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self.wide:
            upper = self._kept("upper")
            if upper is None:
                upper = self._kept("factor")
                upper = self._factor() if upper is None else upper
                invert_(upper)
                self._only = "upper", upper
            return upper
        if self._upper is None:
            # damped = (JLJ)(JLJ)ᵀ with JLJ upper; U = (JLJ)⁻¹ is upper too, and one factorisation is enough.
            factor = self._factor()
            eye = torch.eye(self.n_in, dtype=torch.float64, device=factor.device)
            self._upper = torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1).contiguous()
        return self._upper

    @property
    def scaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale s [in] = sqrt of the damped diagonal, and damped G with unit diagonal, s⁻¹ G s⁻¹; both float32.

        In variables V_ij s_j the size of a weight is its Wanda score, and one step length fits every input.
        """
        if self._scaled is None:
            with self.loaded() as matrix:
                scale = matrix.diagonal().sqrt()
                kept = self._kept("scaled")
                if kept is not None:
                    return scale, kept
                whole = self._room("scaled") if self.wide else torch.empty_like(matrix)
                torch.div(matrix, scale, out=whole).div_(scale[:, None])
            if self.wide:
                return scale, whole
            self._scaled = scale, whole
        return self._scaled

    @property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues [in] and eigenvectors [in, in] (columns) of the scaled matrix, float32."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.scaled[1].double())
            self._spectrum = values.clamp_min(0).float(), vectors.float()
        return self._spectrum

    def resolvent(self, rho: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """The product of rows [rows, in] float32, which it may overwrite, with (G' + ρI)⁻¹, G' the scaled matrix.

        One eigendecomposition serves every ρ: (G' + ρI)⁻¹ = Q (Λ + ρ)⁻¹ Qᵀ. It takes 20 times the memory of a wide
        matrix and its time, so these are factorised for each; that product is good until another matrix is derived.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if not self.wide:
            values, vectors = self.spectrum
            inverse = (vectors / (values + rho)) @ vectors.t()
            return lambda rows: rows @ inverse
        whole = self.scaled[1]
        self._only = "resolvent", whole
        whole.diagonal().add_(rho)
        if not factorise_(whole):
            raise SingularError("the scaled Gram matrix is singular up to rounding at this damping")
        invert_(whole)
        return lambda rows: times_inverse_(rows, whole)

    # --- the inputs ------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of what was derived of a wide matrix, before something else needs the memory; it can be had again."""
        self._only = None

    def live(self, weight: torch.Tensor) -> torch.Tensor:
        """A float32 copy of ``weight`` [out, in] with 0 for dead inputs, whose weights nothing can be said about."""
        return weight.detach().to(torch.float32, copy=True).masked_fill_(self.dead, 0)

    def permuted(self, perm: torch.Tensor, *, in_place: bool = False) -> Gram:
        """The Gram matrix of the inputs in the order ``perm``, with what is known of this one that follows an order.

        ``in_place`` takes the storage of this one, which is of no more use.
        """
        own = self.matrix if in_place else zeros(self.n_in, self.n_in, self.matrix.device).copy_(self.matrix)
        matrix = reorder_(own, perm)
        moved = Gram(matrix, self.n_tokens, self.damping)
        moved.damping_used = self.damping_used
        if self._diagonal is not None:
            moved._diagonal = moved._damp(self.damping_used)
        if self._inverse is not None:
            moved._inverse = self._inverse[perm][:, perm]
        if self._spectrum is not None:
            moved._spectrum = self._spectrum[0], self._spectrum[1][perm]
        return moved


def value(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """1/2 tr(delta G deltaᵀ), summed in float64; ``delta`` [out, in]."""
    return sum(_value(delta[rows].float(), gram) for rows in chunks(*delta.shape))


def distance(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """``value`` of ``pruned`` - ``weight``, both [out, in]."""
    return sum(_value(pruned[rows].float() - weight[rows].float(), gram) for rows in chunks(*weight.shape))


def removal(weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor) -> float:
    """``value`` of what ``keep`` [out, in] bool takes from ``weight``, the others staying as they are."""
    return sum(_value(weight[rows].float().masked_fill(keep[rows], 0), gram) for rows in chunks(*weight.shape))


def _value(delta: torch.Tensor, gram: torch.Tensor) -> float:
    total = 0.0
    for a, b in strips(len(gram)):
        products = (delta[:, a:b] @ gram[a:b, a:]).mul_(delta[:, a:])
        # What is right of the diagonal block stands for what is left of it as well.
        for part, weight in ((products[:, : b - a], 0.5), (products[:, b - a :], 1.0)):
            total += weight * float(part.sum(dtype=torch.float64))
    return total


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor, whole: float | None = None) -> float:
    """||X(V - W)ᵀ||² / ||XWᵀ||² over the calibration tokens; 0 where the dense output is 0.

    ``whole`` is ``value`` of ``weight``, where that is known.
    """
    if whole is None:
        whole = value(weight, gram)
    return distance(weight, pruned, gram) / whole if whole > 0 else 0.0
