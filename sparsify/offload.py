"""Large matrices in files instead of memory, for inputs so wide that their sums do not fit.

Such a file is mapped, so that the system keeps of it in memory what there is room for and writes the rest to disk; what
is computed with it is the same to the bit. It has no name: it goes when the matrix does, or the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsify.chunks import LARGE_BYTES
from sparsify.files import writing

_folder: Path | None = None


@contextmanager
def offloaded(folder: Path | None) -> Iterator[None]:
    """Within the context ``zeros`` puts large matrices into files in ``folder``; None: nothing changes."""
    # Solvers far below ask for room, and know nothing of a run.
    global _folder
    before = _folder
    _folder = folder or before
    try:
        yield
    finally:
        _folder = before


def zeros(n_rows: int, n_columns: int, device: torch.device | str) -> torch.Tensor:
    """Zeros [n_rows, n_columns] float32: on a CPU, where they are large and a folder was given, in a file there.

    Raises:
        OutputError: the disk has no room for it.
    """
    n_bytes = 4 * n_rows * n_columns
    if _folder is None or n_bytes < LARGE_BYTES or torch.device(device).type != "cpu":
        return torch.zeros(n_rows, n_columns, device=device)
    with writing(_folder), tempfile.NamedTemporaryFile(dir=_folder, prefix="matrix.", suffix=".tmp") as file:
        # All of it now: a page that finds the disk full later ends the process.
        _allocate(file.fileno(), n_bytes)
        return torch.from_file(file.name, shared=True, size=n_rows * n_columns).reshape(n_rows, n_columns)


def _allocate(descriptor: int, n_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)
