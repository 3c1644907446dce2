"""Operators of the ``sparsify`` namespace: defined once, on every device, with a fake for tracing.

``torch.library.Library`` is used directly: the checks that ``custom_op`` adds to every call cost as much as a small
product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# torch does not annotate the class.
_LIBRARY: Any = torch.library.Library("sparsify", "FRAGMENT")  # type: ignore[no-untyped-call]


def declare(schema: str, fake: Callable[..., torch.Tensor]) -> Any:
    """The operator of ``schema``, which nothing computes yet; ``fake`` says the shape of its result."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"sparsify::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sparsify, name).default


def implement(name: str, run: Callable[..., torch.Tensor], device: str) -> None:
    """Compute the operator ``name`` by ``run`` where the dispatch key ``device`` applies."""
    _LIBRARY.impl(name, run, device)


def define(schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor], device: str) -> Any:
    """The operator of ``schema``, computed by ``run`` where the dispatch key ``device`` applies."""
    operator = declare(schema, fake)
    implement(schema.partition("(")[0], run, device)
    return operator
