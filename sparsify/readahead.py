"""Has the system read tensors from disk while something else is computed. Only a hint: nothing waits for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from sparsify.checkpoint import TensorInfo

# A header that is longer is damaged, which whoever reads the file will say.
_MOST_HEADER_BYTES = 100 << 20


def read_ahead(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Begin to read ``names`` among ``tensors`` into the page cache, on systems that can be asked to.

    What cannot be found or read is left to the read that follows, and to its errors.
    """
    if not hasattr(os, "posix_fadvise"):
        return
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
                os.posix_fadvise(file.fileno(), 8 + size + start, end - start, os.POSIX_FADV_WILLNEED)
