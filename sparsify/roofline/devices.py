"""Devices and their peaks as the vendor publishes them; ``ceilings`` measures those of the machine at hand.

A roof is meant to be out of reach, so the highest dense rate is taken that a vendor gives for inputs of a type,
whatever sums are kept in. Rates printed "with sparsity" are halved here, and come back as ``sparse_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsify.errors import UsageError

# Bytes of a weight of each type that is understood.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
_SHORT = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp8": "float8"}
HERE = "here"


@dataclass(frozen=True)
class Device:
    """Ceilings of one device.

    Attributes:
        name: what a user types.
        full_name: for people.
        bytes_per_s: memory bandwidth.
        flops: type of the inputs -> dense operations per second; a multiply and an add are two.
        sparse_factor: type -> how much faster its sparse tensor cores multiply by 2:4 weights; 1 where not named.
        memory_bytes: memory of the device.
        source: where the figures are from.
        known_as: names under which drivers and records know it.
        kind: ``cuda`` or ``cpu``.
        how: ``published`` or ``measured``.
        threads: that were measured; 0 where that says nothing.
        cache_bytes: last-level cache of a measured device; weights that fit in it can beat this bandwidth.
        cores: of the machine of a measured CPU; 0 where that says nothing.
    """

    name: str
    full_name: str
    bytes_per_s: float
    flops: Mapping[str, float]
    sparse_factor: Mapping[str, float]
    memory_bytes: int
    source: str
    known_as: tuple[str, ...] = ()
    kind: Literal["cuda", "cpu"] = "cuda"
    how: Literal["published", "measured"] = "published"
    threads: int = 0
    cache_bytes: int = 0
    cores: int = 0

    def peak(self, dtype: str, *, sparse: bool = False) -> float:
        """Operations per second with inputs of ``dtype``; ``sparse``: by 2:4 weights on sparse tensor cores.

        Raises:
            UsageError: no peak is known for it.
        """
        if dtype not in self.flops:
            raise UsageError(f"--dtype {dtype}: no peak of {self.name} is known for it; choose {', '.join(self.flops)}")
        return self.flops[dtype] * (self.sparse_factor.get(dtype, 1.0) if sparse else 1.0)

    def to_record(self) -> dict[str, Any]:
        """The ``ceilings`` of a record."""
        return {
            "device": self.full_name,
            "how": self.how,
            "bytes_per_s": self.bytes_per_s,
            "flops": dict(self.flops),
            "source": self.source,
        }


def dtype_name(text: str) -> str:
    """The full name of a type: ``bf16`` and ``bfloat16`` are ``bfloat16``.

    Raises:
        UsageError: none of those known.
    """
    name = _SHORT.get(text, text)
    if name not in DTYPE_BYTES:
        raise UsageError(f"--dtype {text!r} is unknown; choose {', '.join(DTYPE_BYTES)}")
    return name


def find_device(name: str) -> Device:
    """The published device of that name.

    Raises:
        UsageError: lists those there are.
    """
    if name.lower() not in DEVICES:
        raise UsageError(f"--device {name!r} is unknown; choose {HERE}, {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def published_as(device: Device) -> Device | None:
    """The published device that this is by one of its names, which the one at hand may be."""
    return next((known for known in DEVICES.values() if set(known.known_as) & set(device.known_as)), None)


def completed(device: Device) -> Device:
    """A measured device with the types that were not measured: as much above bfloat16 as its data sheet says."""
    known = published_as(device)
    if known is None or device.how == "published" or "bfloat16" not in device.flops:
        return device
    scale = device.flops["bfloat16"] / known.flops["bfloat16"]
    added = {dtype: scale * peak for dtype, peak in known.flops.items() if dtype not in device.flops}
    if not added:
        return device
    source = f"{device.source}; {', '.join(added)} not measured, in proportion to bfloat16 as in {known.source}"
    factors = {**known.sparse_factor, **device.sparse_factor}
    return replace(device, flops={**device.flops, **added}, sparse_factor=factors, source=source)


_TERA = 1e12
_GB = 10**9


def _gpu(
    name: str, full_name: str, terabytes_per_s: float, gigabytes: int, peaks: Mapping[str, float], source: str,
    *known_as: str,
) -> Device:  # fmt: skip
    """``peaks``: type -> dense teraflop/s. All but float32 go through tensor cores, which take 2:4 at twice."""
    flops = {dtype: peak * _TERA for dtype, peak in peaks.items()}
    factors = {dtype: 2.0 for dtype in peaks if dtype != "float32"}
    return Device(name, full_name, terabytes_per_s * _TERA, flops, factors, gigabytes * _GB, source, known_as)


_AMPERE = {"float32": 19.5, "bfloat16": 312, "float16": 312, "int8": 624}
_HOPPER_SXM = {"float32": 67, "bfloat16": 989.5, "float16": 989.5, "float8": 1979, "int8": 1979}
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_ADA = "NVIDIA Ada GPU architecture white paper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper"

DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40gb", "NVIDIA A100 SXM 40 GB", 1.555, 40, _AMPERE, _A100, "NVIDIA A100-SXM4-40GB"),
        _gpu("a100-80gb", "NVIDIA A100 SXM 80 GB", 2.039, 80, _AMPERE, _A100, "NVIDIA A100-SXM4-80GB"),
        _gpu(
            "h100-pcie", "NVIDIA H100 PCIe", 2.0, 80,
            {"float32": 51, "bfloat16": 756.5, "float16": 756.5, "float8": 1513, "int8": 1513},
            _H100, "NVIDIA H100 PCIe",
        ),
        _gpu("h100-sxm", "NVIDIA H100 SXM", 3.35, 80, _HOPPER_SXM, _H100, "NVIDIA H100 80GB HBM3"),
        _gpu("h200", "NVIDIA H200 SXM", 4.8, 141, _HOPPER_SXM, "NVIDIA H200 Tensor Core GPU data sheet", "NVIDIA H200"),
        _gpu(
            "b200", "NVIDIA B200 (HGX)", 8.0, 180,
            {"float32": 80, "bfloat16": 2250, "float16": 2250, "float8": 4500, "int8": 4500},
            "NVIDIA Blackwell architecture technical brief, HGX B200; memory as in DGX B200", "NVIDIA B200",
        ),
        _gpu(
            "l4", "NVIDIA L4", 0.3, 24,
            {"float32": 30.3, "bfloat16": 121, "float16": 121, "float8": 242.5, "int8": 242.5},
            "NVIDIA L4 Tensor Core GPU data sheet", "NVIDIA L4",
        ),
        _gpu(
            "l40s", "NVIDIA L40S", 0.864, 48,
            {"float32": 91.6, "bfloat16": 366.5, "float16": 366.5, "float8": 733, "int8": 733},
            "NVIDIA L40S data sheet", "NVIDIA L40S",
        ),
        _gpu(
            "rtx4090", "NVIDIA GeForce RTX 4090", 1.008, 24,
            {"float32": 82.6, "bfloat16": 165.2, "float16": 330.3, "float8": 660.6, "int8": 660.6},
            _ADA, "NVIDIA GeForce RTX 4090",
        ),
        _gpu(
            "rtx5080", "NVIDIA GeForce RTX 5080", 0.96, 16,
            {"float32": 56.3, "bfloat16": 112.6, "float16": 225.1, "float8": 450.2, "int8": 450.2},
            _BLACKWELL, "NVIDIA GeForce RTX 5080",
        ),
    )
}  # fmt: skip
