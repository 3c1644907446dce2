"""The layer problem: minimise f(V) = 1/2 tr((V - W) G (V - W)^T) over V with support in a pattern.

G is the Gram matrix of the inputs, Σ x xᵀ. Rows of V are independent given their supports and share G, so everything
that only depends on G (damping, dead inputs, factorisations) is computed once per input and used by every linear that
reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.errors import NumericsError

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

    Args:
        matrix: [in, in] float32, symmetric positive semidefinite, not damped.
        n_tokens: tokens in the sum.
        damping: share of the mean diagonal that ``damped`` adds; ``damping_used`` is what factorising needed.

    Raises:
        NumericsError: NaN or Inf in the matrix.
    """

    def __init__(self, matrix: torch.Tensor, n_tokens: int, damping: float = DAMPING) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise NumericsError("the Gram matrix of the inputs holds NaN or Inf; try --compute-dtype float32")
        self.matrix = matrix
        self.n_tokens = n_tokens
        self.damping = damping
        self.dead = matrix.diagonal() <= 0
        self.damping_used = damping
        self._damped: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None
        self._upper: torch.Tensor | None = None
        self._scaled: tuple[torch.Tensor, torch.Tensor] | None = None
        self._spectrum: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def n_in(self) -> int:
        """Width."""
        return int(self.matrix.shape[0])

    @property
    def damped(self) -> torch.Tensor:
        """[in, in] float32: G + damping_used * mean(diag G) * I, the mean over live inputs; positive definite.

        A dead input (never non-zero) has no row in G and gets the addend alone, or 1 where that is 0.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self._damped is None:
            self._reversed_factor()
        assert self._damped is not None
        return self._damped

    def _damp(self, share: float) -> torch.Tensor:
        live = self.matrix.diagonal()[~self.dead]
        extra = share * float(live.double().mean()) if len(live) else 1.0
        damped = self.matrix.clone()
        # Where all damping is off, a dead input still needs a pivot; its weight does not matter.
        damped.diagonal().add_(extra).masked_fill_(self.dead, extra or 1.0)
        return damped

    def _reversed_factor(self) -> torch.Tensor:
        """L, lower, in float64, of J ``damped`` J = L Lᵀ with J the reversal.

        Damping grows tenfold while the matrix is not positive definite, and is settled here, before anything is
        derived: all linears that share an input see the same one. ``inverse`` and ``inverse_upper`` both come from this
        one factor: near singularity one order may factorise where the other does not.
        """
        share = self.damping_used
        for _ in range(_STEPS):
            damped = self._damp(share)
            factor: torch.Tensor
            factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1).double())
            if int(info) == 0:
                if share != self.damping_used:
                    # Another order of the inputs got by with less.
                    self._inverse = self._scaled = self._spectrum = None
                self._damped, self.damping_used = damped, share
                return factor
            share = 10 * (share or 1e-6)
        raise NumericsError(
            f"the Gram matrix of {self.n_in} inputs stays singular at a damping of {share / 10:g} of its mean "
            "diagonal; the activations are not usable"
        )

    @property
    def inverse(self) -> torch.Tensor:
        """[in, in] float64, inverse of ``damped``.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self._inverse is None:
            self._inverse = torch.cholesky_inverse(self._reversed_factor()).flip(0, 1)
        return self._inverse

    @property
    def inverse_upper(self) -> torch.Tensor:
        """[in, in] float64, U upper triangular with Uᵀ U = ``inverse``.

        U[a:, a:]ᵀ U[a:, a:] is the inverse of ``damped``[a:, a:], which is why SparseGPT and MRP work with U.

        Raises:
            NumericsError: singular in spite of damping.
        """
        if self._upper is None:
            # damped = (JLJ)(JLJ)ᵀ with JLJ upper; U = (JLJ)⁻¹ is upper too, and one factorisation is enough.
            factor = self._reversed_factor()
            eye = torch.eye(self.n_in, dtype=torch.float64, device=factor.device)
            self._upper = torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1).contiguous()
        return self._upper

    @property
    def scaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale s [in] = sqrt of the damped diagonal, and damped G with unit diagonal, s⁻¹ G s⁻¹; both float32.

        In variables V_ij s_j the size of a weight is its Wanda score, and one step length fits every input.
        """
        if self._scaled is None:
            scale = self.damped.diagonal().sqrt()
            self._scaled = scale, self.damped / scale / scale[:, None]
        return self._scaled

    @property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues [in] and eigenvectors [in, in] (columns) of the scaled matrix, float32."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.scaled[1].double())
            self._spectrum = values.clamp_min(0).float(), vectors.float()
        return self._spectrum

    def live(self, weight: torch.Tensor) -> torch.Tensor:
        """A float32 copy of ``weight`` [out, in] with 0 for dead inputs, whose weights nothing can be said about."""
        return weight.detach().float().masked_fill(self.dead, 0)

    def permuted(self, perm: torch.Tensor) -> Gram:
        """The Gram matrix of the inputs in the order ``perm``, with what is known of this one that follows an order."""
        moved = Gram(self.matrix[perm][:, perm].contiguous(), self.n_tokens, self.damping)
        moved.damping_used = self.damping_used
        if self._damped is not None:
            moved._damped = moved._damp(self.damping_used)
        if self._inverse is not None:
            moved._inverse = self._inverse[perm][:, perm]
        if self._spectrum is not None:
            moved._spectrum = self._spectrum[0], self._spectrum[1][perm]
        return moved


def retarget(
    weight: torch.Tensor,
    gram: Gram,
    drift: torch.Tensor,
    share: float = 1.0,
    shift: torch.Tensor | None = None,
    shift_share: float = 1.0,
) -> torch.Tensor:
    """The dense weights that bring the dense model's output about from the inputs the pruned model has.

    With X the inputs seen, D those of the dense model, R and E the residual streams that the output is added to in
    either, and A = XᵀX damped,

        T = W + (share · W (D − X)ᵀX + shift_share · (E − R)ᵀX) A⁻¹

    minimises ||X Tᵀ − (X + share (D − X)) Wᵀ − shift_share (E − R)||² plus the damping times ||T − W||². Minimising
    tr((V − T) A (V − T)ᵀ) over V is then the same as minimising the error against that target, up to a constant, so
    every solver of the layer problem gets dense targets by solving for T in the place of W.

    Args:
        weight: [out, in], W.
        gram: of the inputs seen.
        drift: [in, in], (D − X)ᵀX.
        share: how far targets move from the output on the inputs seen (0) to the dense output (1).
        shift: [out, in], (E − R)ᵀX, where the linear writes to the residual stream.
        shift_share: the share of the stream's error so far that this linear should make up for.

    Returns:
        T, [out, in] float32.

    Raises:
        NumericsError: A is singular in spite of damping.
    """
    moved = share * (weight.float() @ drift)
    if shift is not None:
        moved += shift_share * shift
    return weight.float() + (moved.double() @ gram.inverse).float()


def value(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """1/2 tr(delta G deltaᵀ), summed in float64; ``delta`` [out, in]."""
    return 0.5 * float((delta.float() @ gram).mul_(delta).sum(dtype=torch.float64))


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """||X(V - W)ᵀ||² / ||XWᵀ||² over the calibration tokens; 0 where the dense output is 0."""
    whole = value(weight, gram)
    return value(pruned.float() - weight.float(), gram) / whole if whole > 0 else 0.0


def lipschitz(gram: torch.Tensor, *, n_iter: int = 50) -> float:
    """An upper bound of the largest eigenvalue of ``gram`` that is close to it.

    Power iteration converges from below, slowly where the spectrum is dense at its top, so twice the norm of its
    residual is added, and 2 % of the sum. The start is fixed; only an eigenvector (almost) orthogonal to it could be
    missed.
    """
    vector = torch.ones(gram.shape[0], dtype=gram.dtype, device=gram.device)
    vector += torch.linspace(-0.5, 0.5, len(vector), dtype=gram.dtype, device=gram.device)
    size = 0.0
    for _ in range(n_iter):
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(gram.dtype).tiny)
        image = gram @ vector
        rayleigh = image @ vector
        size = float(rayleigh + 2 * torch.linalg.vector_norm(image - rayleigh * vector))
        vector = image
    return 1.02 * size
