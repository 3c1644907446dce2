"""What ``import sparsify`` does to libraries that are imported beside it, without importing any of them itself.

transformers has no entry point for quantizers: who wants one must register it in the process that opens the checkpoint.
That is done as soon as the module with its tables is imported, which may be before or after ``sparsify``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
# By name: nothing here may depend on what is above it, nor import torch.
_PLUGIN = "sparsify.plugins.transformers_quantizer"


class TablesFinder:
    """Waits on ``sys.meta_path`` for the module ``TABLES``, registers the quantizer once it has run, and is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give for ``TABLES``, its loader extended; None for every other module."""
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            try:
                _then_register(spec.loader)
            except Exception as error:
                _warn(error)
        return spec


def register_with_transformers() -> None:
    """Make transformers open compressed checkpoints: now if it is imported, else when it is. May be called again."""
    if TABLES in sys.modules:
        _register()
    else:
        _wait()


def _wait() -> None:
    # By name: after a reload of this module the finder is of another class.
    if not any(type(finder).__name__ == TablesFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TablesFinder())


def _then_register(loader: Any) -> None:
    """Let ``loader``, which loads one module once, register the quantizer after it. It stays the object it was."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        try:
            run(module)
        except BaseException:
            # It may be imported again when what it lacked is there.
            _wait()
            raise
        _register()

    loader.exec_module = exec_module


def _register() -> None:
    try:
        plugin = importlib.import_module(_PLUGIN)
        # Where the plugin itself is what imports transformers, it is not complete yet, and registers at its end.
        if hasattr(plugin, "register"):
            plugin.register()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [""])[0]
    logging.getLogger("sparsify").warning(
        "transformers cannot open compressed checkpoints: %s: %s", type(error).__name__, reason
    )
