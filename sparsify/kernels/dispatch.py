"""Which kernel multiplies by a weight: the one that was asked for, or the fastest that was measured, dense included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsify.errors import UsageError
from sparsify.format.packed import Packed
from sparsify.kernels import native
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.plans import decide
from sparsify.kernels.semi_structured import CUSPARSELT, CUSPARSELT_FP8, CUTLASS
from sparsify.kernels.table import NAMES, Entry, table_for, wanted
from sparsify.kernels.triton_decode import TRITON

DENSE = "dense"
AUTO = "auto"
# What a weight is prepared for depends on measurements: ``choose`` gives the kernel with its plan.
NATIVE = native.native(native.SLICES)
KERNELS = {kernel.name: kernel for kernel in (PACKED, NATIVE, TRITON, CUSPARSELT, CUSPARSELT_FP8, CUTLASS)}
# Those that ``auto`` may choose on a GPU: exact, and measured by ``sparsify tune``.
GPU_KERNELS = (TRITON, CUSPARSELT, CUTLASS)
NOT_MEASURED = "not measured on this device with this number of threads; run sparsify tune"


@dataclass(frozen=True)
class Choice:
    """What will multiply by a weight.

    Attributes:
        kernel: None: dense.
        reason: why it is not what was asked for, or what was not known about it; else empty.
        plan: of the native kernel, which way takes how many tokens.
    """

    kernel: Kernel | None
    reason: str = ""
    plan: str = ""

    @property
    def name(self) -> str:
        """For reports: the kernel's name, with the numbers of tokens that it multiplies densely, or ``dense``."""
        return self.kernel.reported if self.kernel else DENSE


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


def choose(packed: Packed, requested: str, x_dtype: torch.dtype | None = None) -> Choice:
    """The kernel for ``packed`` on the device where it lies.

    ``auto`` takes what the device's table shows to be no slower than dense by more than noise, and dense where there
    is no such table. ``native`` by name follows the table too, without its dense steps, and an unmeasured plan where
    there is none. A kernel that was asked for by name and cannot take this weight gives dense, with the reason.

    Args:
        packed: on the device where it is to run.
        requested: ``auto``, ``dense`` or a name in ``KERNELS``.
        x_dtype: of the inputs; None: that of the weight.

    Raises:
        UsageError: see ``check_request``.
    """
    device = packed.values.device
    check_request(requested, device)
    if requested == DENSE:
        return Choice(None)
    x = x_dtype or packed.dtype
    if requested == AUTO:
        if device.type == "cpu":
            return _on_cpu(packed, x)
        return _on_gpu(packed, x) if device.type == "cuda" else Choice(None, f"no kernel runs on {device.type}")
    kernel = KERNELS[requested]
    why = kernel.refuse(packed) or (_no_way(packed, x) if kernel is NATIVE else None)
    if why:
        return Choice(None, f"{requested} cannot take it: {why}")
    return _native_by_name(packed, x) if kernel is NATIVE else Choice(kernel)


def _no_way(packed: Packed, x: torch.dtype) -> str | None:
    if native.ways(packed.values.dtype, x, 1, packed.shape[1]):
        return None
    return f"it has no product of {packed.values.dtype} values with {x} inputs"


def _measured(packed: Packed, x: torch.dtype) -> Entry | str:
    """The entry that stands for the product, or why there is none."""
    table = table_for(packed.values.device)
    if table is None:
        return NOT_MEASURED
    found = table.nearest(wanted(packed, x)) if packed.values.numel() and x in NAMES else None
    if found is None:
        size = f"{packed.shape[0]}x{packed.shape[1]}"
        return f"nothing like it was measured on this device; run sparsify tune --shape {size}"
    return found


def _on_cpu(packed: Packed, x: torch.dtype) -> Choice:
    why = NATIVE.absent(packed.values.device) or NATIVE.refuse(packed) or _no_way(packed, x)
    if why:
        return Choice(None, f"{NATIVE.name}: {why}")
    entry = _measured(packed, x)
    if isinstance(entry, str):
        return Choice(None, entry)
    made = decide(entry, _ways(packed, x), permuted=packed.perm is not None)
    return Choice(native.native(made.plan), plan=made.plan) if made.plan else Choice(None, made.reason)


def _native_by_name(packed: Packed, x: torch.dtype) -> Choice:
    entry = _measured(packed, x)
    if isinstance(entry, Entry) and (plan := decide(entry, _ways(packed, x), packed_only=True).plan):
        return Choice(native.native(plan), plan=plan)
    plan = native.plan_without_measurements(packed.values.dtype)
    return Choice(native.native(plan), entry if isinstance(entry, str) else NOT_MEASURED, plan)


def _ways(packed: Packed, x: torch.dtype) -> Callable[[int], tuple[str, ...]]:
    return lambda tokens: native.ways(packed.values.dtype, x, tokens, packed.shape[1])


def _only(kernel: Kernel) -> Callable[[int], tuple[str, ...]]:
    return lambda tokens: (kernel.name,)


def _on_gpu(packed: Packed, x: torch.dtype) -> Choice:
    """One kernel for all numbers of tokens: none of them takes turns with dense."""
    device = packed.values.device
    able = [kernel for kernel in GPU_KERNELS if not kernel.absent(device) and not kernel.refuse(packed)]
    if not able:
        return Choice(None, "no kernel of this GPU takes it")
    entry = _measured(packed, x)
    if isinstance(entry, str):
        return Choice(None, entry)
    permuted = packed.perm is not None
    made = {kernel.name: decide(entry, _only(kernel), permuted=permuted) for kernel in able}
    whole = [name for name, decision in made.items() if decision.plan == name]
    if whole:
        return Choice(KERNELS[max(whole, key=lambda name: made[name].gain)])
    best = max(made, key=lambda name: made[name].gain)
    return Choice(None, f"{best}: {made[best].reason or 'dense is faster for some numbers of tokens'}")
