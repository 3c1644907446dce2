"""Device memory of a decoder engine: inputs, logits and two copies of the key/value cache, allocated once.

TensorRT's Concat writes the whole cache anew in each step, so that past and present need memory of their own: halves A
and B. The cache tensors of one shape lie in one allocation, a fixed distance apart, so that one operation moves all
layers' entries instead of two per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_interface import Interface, Limits

# What TensorRT asks of the address of a tensor.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Group:
    """Cache tensors of one shape.

    Attributes:
        places: index of each among the engine's cache tensors.
        heads: key/value heads.
        dim: of a head.
        stride: elements from one tensor to the next.
        halves: A and B, flat.
    """

    places: tuple[int, ...]
    heads: int
    dim: int
    stride: int
    halves: tuple[torch.Tensor, torch.Tensor]

    def view(self, half: int, batch: int, length: int) -> torch.Tensor:
        """All tensors of a half for ``length`` tokens, [tensors, batch, heads, length, dim]."""
        row = length * self.dim
        shape = (len(self.places), batch, self.heads, length, self.dim)
        return self.halves[half].as_strided(shape, (self.stride, self.heads * row, row, self.dim, 1))

    def addresses(self, half: int) -> Iterator[tuple[int, int]]:
        """(place, address) of each tensor of a half."""
        flat = self.halves[half]
        for i, place in enumerate(self.places):
            yield place, flat.data_ptr() + i * self.stride * flat.element_size()


class Buffers:
    """All device memory of a session besides weights and activations.

    Attributes:
        groups: the cache.
        ids, mask, positions, logits: flat, for the profiles' maxima.
        slot: [1] int64, where the cache entry of the next token goes.
    """

    def __init__(self, device: Device, interface: Interface, limits: Limits) -> None:
        batch, prompt, tokens = limits.max_batch, limits.max_prompt, limits.max_tokens
        dtypes = interface.dtypes
        widest = max(prompt, tokens)
        self.ids = device.zeros(batch * prompt, dtypes["input_ids"])
        self.mask = device.zeros(batch * widest, dtypes["attention_mask"])
        self.positions = device.zeros(batch * prompt, dtypes.get("position_ids", torch.int64))
        self.logits = device.zeros(batch * prompt * interface.vocab_size, dtypes["logits"])
        self.slot = device.zeros(1, torch.int64)
        self.staging = {
            "ids": device.staging(self.ids.numel(), self.ids.dtype),
            "mask": device.staging(self.mask.numel(), self.mask.dtype),
            "positions": device.staging(self.positions.numel(), self.positions.dtype),
        }
        shapes: dict[tuple[int, int, torch.dtype], list[int]] = {}
        for place, name in enumerate(interface.past):
            shapes.setdefault((*interface.cache[name], dtypes[name]), []).append(place)
        groups = []
        for (heads, dim, dtype), places in shapes.items():
            step = max(ALIGNMENT_BYTES // dtype.itemsize, 1)
            stride = -(-batch * heads * widest * dim // step) * step
            a, b = (device.zeros(len(places) * stride, dtype) for _ in range(2))
            groups.append(Group(tuple(places), heads, dim, stride, (a, b)))
        self.groups = tuple(groups)

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        flat = [self.ids, self.mask, self.positions, self.logits, self.slot]
        flat += [half for group in self.groups for half in group.halves]
        return sum(tensor.nbytes for tensor in flat)
