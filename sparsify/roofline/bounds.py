"""Bytes and operations of kernels, and the least time a device needs for them: arithmetic, nothing measured.

A kernel takes at least the longer of what its bytes take at full bandwidth and what its operations take at full rate;
kernels run one after the other, so several take at least the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sparsify.roofline.devices import DTYPE_BYTES, Device
from sparsify.types import NofM, Pattern

Limit = Literal["bandwidth", "compute"]


class Work(NamedTuple):
    """What one kernel does: bytes through memory, operations, type of the inputs, on sparse tensor cores or not."""

    n_bytes: float
    flops: float
    dtype: str
    sparse: bool = False


class Bound(NamedTuple):
    """The least time for some work, and what sets it."""

    seconds: float
    limited_by: Limit


@dataclass(frozen=True)
class Storage:
    """How a weight is stored.

    Attributes:
        density: share of values that are kept; 1 for dense.
        mask: one bit a weight says which. Bitmask and index of sparse tensor cores take the same.
        sparse_cores: a 2:4 weight that sparse tensor cores take.
    """

    density: float = 1.0
    mask: bool = False
    sparse_cores: bool = False

    def n_bytes(self, n_out: int, n_in: int, value_bytes: int) -> float:
        """Bytes of a weight [out, in]: its values, and rows of a mask padded to whole bytes."""
        return n_out * n_in * self.density * value_bytes + (n_out * -(-n_in // 8) if self.mask else 0)


DENSE = Storage()


def storage_of(pattern: Pattern | None) -> Storage:
    """How a weight pruned by ``pattern`` is stored; None for dense."""
    if pattern is None:
        return DENSE
    return Storage(float(1 - pattern.sparsity), mask=True, sparse_cores=pattern == NofM(2, 4))


def bound(work: Work, device: Device) -> Bound:
    """The least time that ``device`` needs for ``work``.

    Raises:
        UsageError: the device has no known peak for the type.
    """
    memory, compute = work.n_bytes / device.bytes_per_s, work.flops / device.peak(work.dtype, sparse=work.sparse)
    return Bound(memory, "bandwidth") if memory >= compute else Bound(compute, "compute")


def linear_work(
    n_out: int, n_in: int, tokens: float, dtype: str, storage: Storage = DENSE, stored_bytes: float | None = None
) -> Work:
    """One product ``x @ weight.T`` by itself: the weight, ``tokens`` inputs and results through memory.

    Args:
        n_out: rows of the weight.
        n_in: columns.
        tokens: rows of x.
        dtype: of weight and inputs; results are in 16 bits at least.
        storage: of the weight.
        stored_bytes: of the weight, where they are known better than by ``storage``.
    """
    size = DTYPE_BYTES[dtype]
    weight = storage.n_bytes(n_out, n_in, size) if stored_bytes is None else stored_bytes
    moved = weight + tokens * (n_in * size + n_out * max(2, size))
    return Work(moved, 2.0 * tokens * n_out * n_in, dtype, storage.sparse_cores)


def total(works: Iterable[Work], device: Device) -> Bound:
    """The least time for kernels that run one after the other; the limit is what sets most of it."""
    parts: dict[Limit, float] = {"bandwidth": 0.0, "compute": 0.0}
    for work in works:
        seconds, limit = bound(work, device)
        parts[limit] += seconds
    return Bound(sum(parts.values()), "bandwidth" if parts["bandwidth"] >= parts["compute"] else "compute")
