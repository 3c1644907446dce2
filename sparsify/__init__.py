"""Sparsify: prune language models without retraining, and take them to the runtimes that serve them.

With this package imported, ``transformers`` opens the compressed checkpoints that ``sparsify export`` writes.
``compress_``, ``decompress_`` and ``engaged`` (``sparsify.compress``) are for models in memory; they import torch.
"""

from importlib import import_module
from typing import Any

from sparsify.hooks import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in ("compress_", "decompress_", "engaged"):
        return getattr(import_module("sparsify.compress"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
