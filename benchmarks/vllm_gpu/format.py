"""The storage format on the GPU against the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpu_machine.weights import describe, random_packed, same_bits

if TYPE_CHECKING:
    from sparsify.format.packed import Packed


def check_format(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The storage format on the device against the CPU, bit for bit."""
    import torch

    from sparsify.format.packed import columns, decode, encode, rows, stack, unstructured
    from sparsify.format.record import from_tensors, to_tensors
    from sparsify.types import NofM

    device = arguments["device"]

    def equal(one: Packed, other: Packed) -> bool:
        pairs = [(one.values, other.values), (one.mask, other.mask)]
        if one.perm is not None and other.perm is not None:
            pairs.append((one.perm, other.perm))
        alike = (one.shape, one.pattern, one.perm is None) == (other.shape, other.pattern, other.perm is None)
        return alike and all(same_bits(a, b) for a, b in pairs)

    patterns = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(2, 8), None]
    shapes = [(64, 96), (33, 136)] if arguments["tiny"] else [(64, 96), (33, 136), (512, 4096), (4096, 1024)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for (n_out, n_in), pattern, dtype, perm in itertools.product(shapes, patterns, dtypes, (False, True)):
        # Unstructured weights may have any width.
        shape = (n_out, n_in + 5) if pattern is None else (n_out, n_in)
        host = random_packed(shape, pattern, dtype, perm=perm)
        weight = decode(host)
        there = host.to(device)
        again = encode(weight.to(device), pattern, host.perm)
        read = from_tensors("x", to_tensors(there))
        found = {
            "decode": same_bits(decode(there), weight),
            "encode": equal(again, host),
            "read back": equal(read, host),
            "rows": equal(rows(there, 3, n_out - 5), rows(host, 3, n_out - 5)),
            "stack": equal(stack([rows(there, 0, 7), rows(there, 7, n_out)]), host),
            "without pattern": equal(unstructured(there), unstructured(host)),
        }
        if not perm:
            found["columns"] = equal(columns(there, 8, 48), columns(host, 8, 48))
        wrong = [name for name, right in found.items() if not right]
        yield {"case": describe(host), "ok": not wrong, "wrong": wrong}
