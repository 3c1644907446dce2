"""Layers to solve, references in float64 from the definitions, and measures of error: what tests of solvers share."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st

from sparsify.masks import keep_mask
from sparsify.solvers.exact import exact
from sparsify.solvers.mrp import mrp
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import NofM, Pattern, Unstructured, parse_pattern

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Solver = Callable[[torch.Tensor, Gram, Pattern], Solution]
SolverOnMask = Callable[[torch.Tensor, Gram, torch.Tensor], Solution]
# Of a mask, for the weights and inverse that it was chosen from.
Check = Callable[[Array, Array, Mask], None]

HALF = Unstructured(Fraction(1, 2))
ROWS = Unstructured(Fraction(1, 2), "row")

# Every direct solver, from a weight, a Gram matrix and a pattern.
DIRECT: dict[str, Solver] = {
    "sparsegpt": sparsegpt,
    "mrp": mrp,
    "mrp-right": lambda w, g, p: mrp(w, g, p, free="right"),
    "mrp-SM-4": lambda w, g, p: mrp(w, g, p, variant="SM", block=4, free="right"),
    "exact": lambda w, g, p: exact(w, g, by_magnitude(w, p)),
    "refit": lambda w, g, p: refit(w, g, by_magnitude(w, p)),
}
# The same with the mask given; weights are compared with references.
DIRECT_ON_MASK: dict[str, SolverOnMask] = {
    "sparsegpt": lambda w, g, keep: sparsegpt(w, g, HALF, keep=keep),
    "mrp": lambda w, g, keep: mrp(w, g, HALF, keep=keep),
    "mrp-right-3": lambda w, g, keep: mrp(w, g, HALF, keep=keep, free="right", block=3),
    "exact": exact,
    "refit": lambda w, g, keep: refit(w, g, keep, n_iter=300, tolerance=1e-6),
}

seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 14), st.integers(1, 40))

CASES = [("0.5", "layer"), ("0.5", "row"), ("0.6", "layer"), ("0.6", "row"), ("2:4", ""), ("1:4", ""), ("4:8", "")]
each_pattern = pytest.mark.parametrize(("text", "group"), CASES)
# Inputs of every kind, made from usual ones.
INPUT_KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x,
    "few tokens": lambda x: x[:5],
    "dead inputs": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
    "all zero": torch.zeros_like,
    "one live": lambda x: x * (torch.arange(x.shape[1]) == 6),
    "duplicated": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "constant": torch.ones_like,
}


def by_magnitude(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return keep_mask(weight.abs(), pattern)


def pattern_of(text: str, group: str) -> Pattern:
    return parse_pattern(text, "row" if group == "row" else "layer" if group == "layer" else None)


def assert_exact(keep: torch.Tensor, text: str, group: str) -> None:
    n_out, n_in = keep.shape
    if ":" in text:
        n, m = map(int, text.split(":"))
        assert (keep.reshape(n_out, -1, m).sum(dim=2) == n).all()
    elif group == "row":
        assert ((~keep).sum(dim=1) == int(Fraction(text) * n_in)).all()
    else:
        assert int((~keep).sum()) == int(Fraction(text) * keep.numel())


# --- problems ----------------------------------------------------------------------------------------------------


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, n_tokens: int, n_in: int) -> torch.Tensor:
    """Correlated inputs of unequal size, [n_tokens, n_in] float64."""
    x = random(seed, n_tokens, n_in) + random(seed + 1, n_tokens, 1)
    return x * (0.3 + random(seed + 2, n_in).abs())


def gram_of(x: torch.Tensor, damping: float = 0.01) -> Gram:
    return Gram((x.T @ x).float(), len(x), damping)


def problem(seed: int, n_out: int, n_in: int, n_tokens: int = 60) -> tuple[torch.Tensor, Gram]:
    """A weight, and the Gram matrix of ``inputs``."""
    return random(seed + 3, n_out, n_in).float(), gram_of(inputs(seed, n_tokens, n_in))


def random_keep(seed: int, n_out: int, n_in: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(seed)) < share


def activations(seed: int, n_in: int, n_tokens: int) -> torch.Tensor:
    """Tokens [n_tokens, in] float64 whose channels share three directions and differ in size, as activations do."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randn(n_in, generator=g).mul(0.5).exp()
    common = torch.randn(n_tokens, 3, generator=g) @ torch.randn(3, n_in, generator=g)
    return ((torch.randn(n_tokens, n_in, generator=g) + common + 0.3) * size).double()


def weights(seed: int, n_out: int, n_in: int) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1000 + seed))


def layer_problem(seed: int, n_out: int = 8, n_in: int = 16, n_tokens: int = 64, damping: float = 0.01) -> tuple[
    torch.Tensor, Gram
]:  # fmt: skip
    """A weight, and the Gram matrix of ``activations``."""
    return weights(seed, n_out, n_in), gram_of(activations(seed, n_in, n_tokens), damping)


# --- errors ------------------------------------------------------------------------------------------------------


def array(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def energy(delta: Array, h: Array) -> float:
    return float(np.trace(delta @ h @ delta.T))


# float32 rounding at the conditioning that 1 % of damping leaves.
CLOSE = 2e-5


def gap(a: torch.Tensor | Array, b: torch.Tensor | Array, gram: Gram, weight: torch.Tensor) -> float:
    """||(a - b) X|| / ||W X|| with damping, float64."""
    h = array(gram.damped)
    whole = energy(array(gram.live(weight)), h)
    first, second = (array(v) if isinstance(v, torch.Tensor) else v for v in (a, b))
    return float(np.sqrt(energy(first - second, h) / whole)) if whole else float(np.abs(first - second).max())


def loss(weight: torch.Tensor, solution: torch.Tensor, gram: Gram) -> float:
    """1/2 tr(d H dᵀ), H damped, float64."""
    return 0.5 * energy(array(solution) - array(gram.live(weight)), array(gram.damped))


def error(weight: torch.Tensor, pruned: torch.Tensor, matrix: torch.Tensor) -> float:
    """1/2 tr(D G Dᵀ) in float64."""
    delta = (pruned - weight).double()
    return 0.5 * float(((delta @ matrix.double()) * delta).sum())


# --- references --------------------------------------------------------------------------------------------------


def optimum(weight: Array, h: Array, keep: Mask) -> Array:
    """The definition by lstsq: min ||Lᵀ (v − w)|| over v supported on K, with H = L Lᵀ."""
    root = np.linalg.cholesky(h).T
    result = np.zeros_like(weight)
    for row, w, kept in zip(result, weight, keep, strict=True):
        row[kept] = np.linalg.lstsq(root[:, kept], root @ w, rcond=None)[0]
    return result


def on_mask(weight: torch.Tensor, matrix: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The least squares optimum of every row on its mask, by normal equations in float64."""
    w, g, k = weight.double().numpy(), matrix.double().numpy(), keep.numpy()
    result = np.zeros_like(w)
    for i, on in enumerate(k):
        result[i, on] = np.linalg.solve(g[np.ix_(on, on)], (w[i] @ g)[on])
    return torch.from_numpy(result)


def rounded(weight: torch.Tensor, gram: Gram, pattern: Pattern, scaled: bool) -> torch.Tensor:
    """H(weight), by the size of weights or that of weights times input norms."""
    size = weight.double().abs() * (gram.damped.double().diagonal().sqrt() if scaled else 1)
    keep = torch.ones_like(size, dtype=torch.bool)
    groups = size.reshape(-1, pattern.m) if isinstance(pattern, NofM) else size.reshape(1, -1)
    if not isinstance(pattern, NofM) and pattern.group == "row":
        groups = size
    n_remove = int(pattern.sparsity * groups.shape[1])
    keep.reshape(groups.shape).scatter_(1, groups.argsort(dim=1)[:, :n_remove], False)
    return weight * keep


def naive_sparsegpt(weight: Array, h: Array, keep: Mask, width: int, check: Check | None = None) -> Array:
    """Algorithm 1 as prose: one column at a time, the inverse of what is left downdated by elimination.

    ``check`` gets the updated columns of a block of ``width``, the pivots these will meet (a diagonal), and its mask.
    """
    w, n_in = weight.copy(), len(h)
    # inverses[j] = inverse of H[j:, j:]
    inverses = [np.linalg.inv(h)]
    for _ in range(n_in - 1):
        g = inverses[-1]
        inverses.append(g[1:, 1:] - np.outer(g[1:, 0], g[0, 1:]) / g[0, 0])
    for j in range(n_in):
        if check is not None and j % width == 0:
            end = min(j + width, n_in)
            check(w[:, j:end], np.diag([inverses[k][0, 0] for k in range(j, end)]), keep[:, j:end])
        for row, kept in zip(w, keep[:, j], strict=True):
            if not kept:
                row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return w


def naive_right_only(weight: Array, h: Array, keep: Mask, width: int, check: Check | None = None) -> Array:
    """Section 3.2: blocks of ``width`` with the inverse of the trailing matrix; ``check`` gets its corner."""
    w, n_in = weight.copy(), len(h)
    for a in range(0, n_in, width):
        b = min(a + width, n_in)
        g = np.linalg.inv(h[a:, a:])
        if check is not None:
            check(w[:, a:b], g[: b - a, : b - a], keep[:, a:b])
        for row, kept in zip(w, keep[:, a:b], strict=True):
            gone = np.flatnonzero(~kept)
            row[a:] -= np.linalg.solve(g[np.ix_(gone, gone)], row[a:b][gone]) @ g[gone]
            row[a:b][gone] = 0
    return w


def check_lowest(w: Array, g: Array, kept: Mask, n_remove: int) -> None:
    """The mask removes the ``n_remove`` lowest single-weight scores w² / g, up to float32's idea of a tie."""
    assert int((~kept).sum()) == n_remove
    root = np.abs(w) / np.sqrt(np.diag(g))
    if 0 < n_remove < kept.size:
        assert root[~kept].max() <= root[kept].min() + 1e-4 * root.max()


def singles(n: int, m: int) -> Check:
    """N:M by single-weight scores."""

    def check(w: Array, g: Array, keep: Mask) -> None:
        for a in range(0, w.shape[1], m):
            part = slice(a, a + m)
            for row, kept in zip(w[:, part], keep[:, part], strict=True):
                check_lowest(row, g[part, part], kept, m - n)

    return check


def shares(pattern: Unstructured, group: str) -> Check:
    """The share of every block that keeps the running total exact."""
    done = 0

    def check(w: Array, g: Array, keep: Mask) -> None:
        nonlocal done
        start, done = done, done + w.shape[1]
        groups = [(w, keep)] if group == "layer" else list(zip(w[:, None], keep[:, None], strict=True))
        for part, kept in groups:
            before, after = (int(pattern.sparsity * len(part) * end) for end in (start, done))
            check_lowest(part, g, kept, after - before)

    return check
