"""What is large, and how it is cut: matrices into rows a few at a time, the calibration text into shards.

None of it depends on what memory is free, since bits do on how sums are cut. Imports nothing: budgets count by it too.
"""

from __future__ import annotations

from collections.abc import Iterator

# Inputs beyond which a Gram matrix is wide (``solvers.quadratic.Gram``): in float64, 28672 would take 6.6 GB a matrix.
WIDE = 4096
# Matrices from this size on can lie in files (``offload``).
LARGE_BYTES = 1 << 28
# Parts of the text that are summed by themselves, by one process or by several: what is summed does not depend on it.
SHARDS = 8
# Bytes of one float32 array of the rows of a chunk. A function of the shape alone, whatever memory is free: a product
# with another number of rows may come out with other bits.
CHUNK_BYTES = 1 << 26
# Fewer rows than these would leave matrix products waiting for memory.
_LEAST = 64
# A symmetric matrix is worked on in strips of rows, each from its diagonal block on: 9/16 of the work of a whole one.
_STRIPS, _LEAST_ROWS = 8, 256


def chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Consecutive slices of ``n_rows`` rows of ``n_columns`` each, of ``CHUNK_BYTES`` in float32 or a few rows."""
    size = max(CHUNK_BYTES // (4 * max(n_columns, 1)), _LEAST)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def strips(n: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of each strip of a symmetric matrix of ``n`` rows."""
    rows = max(-(-n // _STRIPS), min(n, _LEAST_ROWS))
    for a in range(0, n, rows):
        yield a, min(a + rows, n)
