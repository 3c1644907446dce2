"""Rows of a large matrix a few at a time, so that what is derived from them is never there for all at once."""

from __future__ import annotations

from collections.abc import Iterator

# Bytes of one float32 array of the rows of a chunk. A function of the shape alone, whatever memory is free: a product
# with another number of rows may come out with other bits.
CHUNK_BYTES = 1 << 26
# Fewer rows than these would leave matrix products waiting for memory.
_LEAST = 64


def chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Consecutive slices of ``n_rows`` rows of ``n_columns`` each, of ``CHUNK_BYTES`` in float32 or a few rows."""
    size = max(CHUNK_BYTES // (4 * max(n_columns, 1)), _LEAST)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))
