"""Which kernel multiplies by a weight: the one that was asked for, or dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.errors import UsageError
from sparsify.format.packed import Packed
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.semi_structured import CUSPARSELT, CUTLASS

DENSE = "dense"
AUTO = "auto"
KERNELS = {kernel.name: kernel for kernel in (PACKED, CUSPARSELT, CUTLASS)}


@dataclass(frozen=True)
class Choice:
    """What will multiply by a weight: ``kernel`` (None: dense), and in ``reason`` why it is not what was asked for."""

    kernel: Kernel | None
    reason: str = ""

    @property
    def name(self) -> str:
        """For reports: the kernel's name, or ``dense``."""
        return self.kernel.name if self.kernel else DENSE


def check_request(requested: str, device: torch.device) -> None:
    """Refuse a kernel that does not exist or cannot run on ``device`` at all.

    Raises:
        UsageError: says why, and what there is.
    """
    if requested in (AUTO, DENSE):
        return
    if requested not in KERNELS:
        raise UsageError(f"kernel {requested!r} is unknown; choose {AUTO}, {DENSE}, {', '.join(KERNELS)}")
    why = KERNELS[requested].absent(device)
    if why:
        raise UsageError(f"kernel {requested} cannot run on {device.type}: {why}; choose {AUTO} or {DENSE}")


def choose(packed: Packed, requested: str) -> Choice:
    """The kernel for ``packed`` on the device where it lies.

    ``auto`` is dense for now on every device: no kernel here has been measured to be faster than dense. A kernel that
    was asked for by name and cannot take this weight gives dense, with the reason.
    """
    check_request(requested, packed.values.device)
    if requested in (AUTO, DENSE):
        return Choice(None)
    kernel = KERNELS[requested]
    why = kernel.refuse(packed)
    return Choice(None, f"{requested} cannot take it: {why}") if why else Choice(kernel)
