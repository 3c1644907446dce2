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


def define(
    schema: str,
    run: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    device: str = "CompositeExplicitAutograd",
) -> Any:
    """The operator of ``schema``; ``run`` computes it where the dispatch key ``device`` applies, ``fake`` its shape."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"sparsify::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sparsify, name).default


def implement(name: str, run: Callable[..., torch.Tensor], device: str) -> None:
    """Compute the operator ``name`` by ``run`` where the dispatch key ``device`` applies."""
    _LIBRARY.impl(name, run, device)
