"""The stored weights of one linear of a runtime, collected as they arrive and cut to what this rank computes.

A runtime may fuse several stored weights into one linear (q, k and v; gate and up) and share it out over ranks. Each
weight arrives in parts, in any order, whole; it is checked, cut, and only the cut is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sparsify.errors import ModelError, UsageError
from sparsify.format import legacy
from sparsify.format.packed import Packed, columns, decode, rows, stack
from sparsify.format.record import VALUES, from_tensors, is_complete

Key = int | str | tuple[int, ...] | None


@dataclass(frozen=True)
class Cut:
    """What this rank computes of a linear.

    Attributes:
        names: of the stored weights that make the linear, for messages.
        rows: rows on this rank of each of them.
        sections: rows of each in the whole model, for a tensor that holds all of them.
        n_in: columns on this rank.
        total_in: columns in the whole model.
        rank, world: of tensor parallelism, as the linear sees it.
        dtype: of the weight when it runs.
        device: where it runs.
    """

    names: list[str]
    rows: list[int]
    sections: list[int]
    n_in: int
    total_in: int
    rank: int
    world: int
    dtype: torch.dtype
    device: torch.device

    def place(self, total: int, part: int, name: str, what: str) -> int:
        """Where this rank's ``part`` of ``total`` rows or columns starts; ranks beyond the number of parts repeat them.

        Raises:
            ModelError: parts do not tile the whole.
        """
        parts = total // part if part else 0
        if not parts or total % part or self.world % parts:
            raise ModelError(
                f"tensor {name}.{VALUES}: {total} {what} do not split into {part} on each of {self.world} ranks; "
                "config.json and the shards do not belong together, or choose another tensor parallel size"
            )
        return self.rank // (self.world // parts) * part


class Shards:
    """Collects the stored weights of one linear.

    Args:
        cut: what to keep.
        index: key of the runtime for a stored weight -> its places among ``cut.names``.
        legacy_format: name of the old format, where the checkpoint has it.
    """

    def __init__(self, cut: Cut, index: Callable[[Key], list[int]], legacy_format: str | None = None) -> None:
        self.cut = cut
        self._index = index
        self._legacy = legacy_format
        self._waiting: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self._done: dict[int, Packed | torch.Tensor] = {}
        self.notes: list[str] = []

    @property
    def empty(self) -> bool:
        """Whether nothing has arrived."""
        return not self._waiting and not self._done

    def add(self, part: str, tensor: torch.Tensor, key: Key = None) -> None:
        """Take one tensor of the checkpoint.

        Raises:
            ModelError: it is damaged or does not belong here; names the tensor.
        """
        places = tuple(self._index(key))
        if part == VALUES and tensor.dim() == 2 and tensor.shape[1] == self.cut.total_in:
            # Packed values have fewer columns, or one axis: this weight is stored dense.
            self._keep(places, tensor, self._name(places))
            return
        parts = self._waiting.setdefault(places, {})
        parts[part] = tensor
        if legacy.is_complete(parts, self._legacy) if self._legacy else is_complete(parts):
            del self._waiting[places]
            self._keep(places, self._read(places, parts), self._name(places))

    def _name(self, places: tuple[int, ...]) -> str:
        return " + ".join(self.cut.names[i] for i in places)

    def _read(self, places: tuple[int, ...], parts: Mapping[str, torch.Tensor]) -> Packed:
        name = self._name(places)
        packed = legacy.from_legacy(name, parts, self._legacy) if self._legacy else from_tensors(name, parts)
        if packed.shape[1] != self.cut.total_in:
            raise ModelError(f"tensor {name}.{VALUES}: has {packed.shape[1]} columns, config.json asks for "
                             f"{self.cut.total_in}; they do not belong together")  # fmt: skip
        return packed

    def _keep(self, places: tuple[int, ...], weight: Packed | torch.Tensor, name: str) -> None:
        """Cut ``weight``, which holds the rows of ``places``, and keep this rank's part of each."""
        sizes = [self.cut.sections[i] for i in places]
        if sum(sizes) != weight.shape[0]:
            raise ModelError(f"tensor {name}.{VALUES}: has {weight.shape[0]} rows, config.json asks for {sum(sizes)}")
        start = 0
        left = self.cut.place(self.cut.total_in, self.cut.n_in, name, "columns")
        for i, size in zip(places, sizes, strict=True):
            top = start + self.cut.place(size, self.cut.rows[i], name, "rows")
            self._done[i] = self._cut(weight, top, top + self.cut.rows[i], left, left + self.cut.n_in)
            start += size

    def _cut(
        self, weight: Packed | torch.Tensor, top: int, bottom: int, left: int, right: int
    ) -> Packed | torch.Tensor:
        if isinstance(weight, Packed):
            # Copied: what a loader hands over may be a view of the file.
            part = rows(weight, top, bottom).to(self.cut.dtype)
            if part.perm is None or (left, right) == (0, part.shape[1]):
                return columns(part, left, right).to(self.cut.device)
            self.notes.append("its inputs are stored in another order, which ranks cannot share out")
            weight, top, bottom = decode(part), 0, bottom - top
        return weight[top:bottom, left:right].to(device=self.cut.device, dtype=self.cut.dtype, copy=True)

    def finish(self) -> Packed | torch.Tensor:
        """The weight [out, in] of this rank: packed if every part of it was, else dense.

        Raises:
            ModelError: a stored weight has not arrived, or not whole; names the first.
        """
        for places, arrived in self._waiting.items():
            self._read(places, arrived)  # says which part is missing
            raise ModelError(f"tensor {self._name(places)}.{VALUES}: lacks a part; download or export the model again")
        for i, name in enumerate(self.cut.names):
            if i not in self._done:
                raise ModelError(f"tensor {name}.{VALUES} is missing from the checkpoint; download or export it again")
        parts = [self._done[i] for i in range(len(self.cut.names))]
        self._done = {}
        packed = [part for part in parts if isinstance(part, Packed)]
        n_scaled = sum(part.scale is not None for part in packed)
        if len(packed) == len(parts) and 0 < n_scaled < len(parts):
            self.notes.append("some of the weights fused into it are stored in 8 bits")
        elif len(packed) == len(parts):
            try:
                return stack(packed)
            except UsageError:
                self.notes.append("the weights fused into it store their inputs in different orders")
        elif packed:
            self.notes.append("some of the weights fused into it are stored dense")
        return torch.cat([decode(part) if isinstance(part, Packed) else part for part in parts])
