"""What was measured on a device, kept as JSON in the user's cache folder: one file per device and kind of knowledge."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from sparsify.files import temporary_beside


def cache_folder() -> Path:
    """``$SPARSIFY_CACHE``, else ``sparsify`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    if own := os.environ.get("SPARSIFY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify"


def device_name(device: torch.device) -> str:
    """What the driver calls a GPU; the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_file(kind: str, name: str) -> Path:
    """Where ``kind`` of knowledge about a device of that name lies."""
    return cache_folder() / "kernels" / f"{kind}-{re.sub(r'[^0-9A-Za-z.]+', '-', name)}.json"


def read(kind: str, name: str) -> dict[str, Any]:
    """Everything known; empty where nothing is, or nothing that can be read."""
    try:
        found = json.loads(cache_file(kind, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add(kind: str, name: str, entries: dict[str, Any]) -> None:
    """Add ``entries`` to what is known; a reader sees the file before or after, never half of it.

    Of two who add at once, one may not see what the other adds, and that is then measured again.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = cache_file(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        temporary.write_text(json.dumps({**read(kind, name), **entries}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
