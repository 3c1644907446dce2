"""Factors of wide matrices inside their own storage.

A Gram matrix of 28672 inputs is 3.3 GB in float32; factorised the usual way, in float64 and by functions that return
new matrices, it takes six times that. Here the factor, then its inverse, overwrite the matrix panel by panel. They are
stored as the matrix is, while a panel is computed in float64: an entry of the factor is then rounded once, by no more
than the entries of the matrix, which are sums of float32 products, were. Beside the matrix these functions need three
panels of ``PANEL`` columns in float64 and as much as a chunk of rows.
"""

from __future__ import annotations

import torch

from sparsify.chunks import chunks

PANEL = 512


def factorise_(matrix: torch.Tensor) -> bool:
    """Overwrite a symmetric ``matrix`` [n, n] with its factor F, upper triangular, F Fᵀ = matrix.

    Only the upper triangle is read.

    Returns:
        whether the matrix is positive definite; where it is not, its content is lost.
    """
    n = len(matrix)
    for a in range((n - 1) // PANEL * PANEL, -1, -PANEL):
        b = min(a + PANEL, n)
        panel, right = matrix[:b, a:b].double(), matrix[a:b, b:].double()
        for rows in chunks(b, 2 * (n - b)) if b < n else ():
            panel[rows].addmm_(matrix[rows, b:].double(), right.t(), alpha=-1)
        # With J the reversal and J block J = L Lᵀ, the block is (J L J)(J L J)ᵀ, J L J being upper triangular.
        factor, info = torch.linalg.cholesky_ex(panel[a:].flip(0, 1))
        if bool(info.any()):
            return False
        corner = factor.flip(0, 1)
        matrix[a:b, a:b] = corner
        matrix[b:, a:b] = 0
        if a:
            matrix[:a, a:b] = torch.linalg.solve_triangular(corner.t(), panel[:a], upper=False, left=False)
    return True


def invert_(factor: torch.Tensor) -> None:
    """Overwrite an upper triangular ``factor`` [n, n], zeros below its diagonal, with its inverse."""
    n = len(factor)
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        eye = torch.eye(b - a, dtype=torch.float64, device=factor.device)
        corner = torch.linalg.solve_triangular(factor[a:b, a:b].double(), eye, upper=True)
        part = factor[:a, a:b].double() @ corner
        # What stands left of the panel is inverted already, and its rows from a chunk on need no earlier ones.
        for rows in chunks(a, 2 * a):
            factor[rows, a:b] = (factor[rows, rows.start : a].double() @ part[rows.start :]).neg_()
        factor[a:b, a:b] = corner


def times_inverse_(rows: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Overwrite ``rows`` [rows, n] with rows @ Uᵀ U, U = ``upper`` [n, n] triangular, and return them.

    Computed in the dtype of ``rows``.
    """
    n = len(upper)
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        rows[:, a:b] = rows[:, a:] @ upper[a:b, a:].to(rows.dtype).t()
    for a in range((n - 1) // PANEL * PANEL, -1, -PANEL):
        b = min(a + PANEL, n)
        rows[:, a:b] = rows[:, :b] @ upper[:b, a:b].to(rows.dtype)
    return rows


def reorder_(matrix: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Overwrite ``matrix`` [n, n] with its rows and columns in the order ``perm``, and return it."""
    n = len(matrix)
    for columns in chunks(n, n):
        matrix[:, columns] = matrix[:, columns][perm]
    return reorder_columns_(matrix, perm)


def reorder_columns_(matrix: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Overwrite ``matrix`` [rows, n] with its columns in the order ``perm``, and return it."""
    for rows in chunks(*matrix.shape):
        matrix[rows] = matrix[rows][:, perm]
    return matrix
