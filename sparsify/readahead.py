"""Has the system read tensors from disk while something else is computed. Only a hint: nothing waits for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from sparsify.checkpoint import TensorInfo

# A header that is longer is damaged, which whoever reads the file will say.
_MOST_HEADER_BYTES = 100 << 20


def read_ahead(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Begin to read ``names`` among ``tensors`` into the page cache, on systems that can be asked to.

    What cannot be found or read is left to the read that follows, and to its errors.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(tensors[name].file, []).append(name)
    for path, wanted in by_file.items():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MOST_HEADER_BYTES:
                continue
            header = json.loads(file.read(size))
            for name in set(wanted) & header.keys():
                start, end = header[name]["data_offsets"]
                advise(file, 8 + size + start, end - start)


def advise(file: IO[bytes], start: int, n_bytes: int) -> None:
    """Begin to read ``n_bytes`` of an open file from ``start`` on, where the system can be asked to and agrees."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), start, n_bytes, os.POSIX_FADV_WILLNEED)
