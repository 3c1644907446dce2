"""How long each way takes to multiply by a model's own weights: the ``kernel`` records of a run.

Linears alike in shape and pattern are measured by one of them, with the weight that it really has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify import manifest
from sparsify.bench.product_times import measure
from sparsify.errors import UsageError
from sparsify.format.packed import Packed
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.naming import linear_weights
from sparsify.plugins.sparse_linear import packed_if_sparse
from sparsify.progress import Progress, Silent
from sparsify.roofline.devices import Device


def kernel_records(
    folder: Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    tokens: Sequence[int] = (1, 32),
    rounds: int = 7,
    ceilings: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
    *,
    n_bytes: int = 0,
    trust_remote_code: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure the pruned linears of an artifact, one shape in memory at a time.

    Args:
        folder: a pruned checkpoint, or what the targets hf and vllm write.
        device: ``cpu`` or ``cuda``.
        dtype: of inputs, and of weights that are not in 8 bits: bfloat16, float16 or float32.
        tokens: numbers of rows of the input.
        rounds: samples of each way.
        ceilings: as a ``run`` record has them, of this device, for the roof beside each time; none leave it out.
        progress: a step for each shape and number of tokens; told of what could not be measured.
        n_bytes: see ``product_times.measure``.
        trust_remote_code: let the model's own code load.

    Yields:
        The fields of a ``kernel`` record but ``artifact``.

    Raises:
        UsageError: the artifact has no pruned linears, or is for a runtime with kernels of its own.
        VerificationError: it is no artifact.
        ModelError: its weights cannot be read.
    """
    progress = progress or Silent()
    groups, roof = _groups(folder), _device(ceilings, device)
    progress.stage("timing kernels", len(groups) * len(tokens))
    for group, packed in _weights(folder, groups, getattr(torch, dtype), trust_remote_code):
        if packed is None:
            progress.notice(f"{group.what}: it has too few zeros to be packed, and its products are not timed")
            progress.advance(len(tokens))
            continue
        # A pattern of columns in another order than that in which they are here is none.
        pattern = "unstructured" if packed.pattern is None and ":" in group.pattern else group.pattern
        head = {
            "linear": group.names[0], "linears": len(group.names), "shape": list(group.shape), "pattern": pattern
        }  # fmt: skip
        told = _Told(progress, group.what)
        for fields in measure(packed.to(device), tokens, rounds, roof, told, n_bytes=n_bytes):
            progress.advance()
            yield {**head, **fields}


def _device(ceilings: Sequence[Mapping[str, Any]], device: str) -> Device | None:
    for found in ceilings:
        flops = found["flops"]
        # A record does not say it: tensor cores of every GPU that a kernel takes multiply by 2:4 at twice the rate.
        factors = {dtype: 2.0 for dtype in flops if device != "cpu" and dtype != "float32"}
        return Device(device, found["device"], found["bytes_per_s"], flops, factors, 0, found["source"])
    return None


@dataclass(frozen=True)
class _Group:
    """Linears of one shape and pattern, in the manifest's order."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    pattern: str

    @property
    def what(self) -> str:
        return f"{self.names[0]} ({self.shape[0]}x{self.shape[1]}, {self.pattern})"


@dataclass(frozen=True)
class _Told:
    """Passes on what happened at a linear."""

    progress: Progress
    what: str

    def __call__(self, why: str) -> None:
        self.progress.notice(f"{self.what}: {why}")


def _groups(folder: Path) -> list[_Group]:
    body = manifest.read(folder)
    if body["kind"] not in ("checkpoint", "hf", "vllm"):
        raise UsageError(
            f"{folder}: is for {body['kind']}, whose kernels are its own; give the checkpoint that it was exported from"
        )
    found: dict[tuple[int, int, str], list[str]] = {}
    for row in body["linears"]:
        if row["zeros"]:
            found.setdefault((*row["shape"], row["pattern"]), []).append(row["name"])
    if not found:
        raise UsageError(f"{folder}: has no pruned linears, and so no sparse kernel to time; give a pruned artifact")
    return [_Group(tuple(names), (n_out, n_in), pattern) for (n_out, n_in, pattern), names in found.items()]


def _weights(
    folder: Path, groups: Sequence[_Group], dtype: torch.dtype, trust_remote_code: bool
) -> Iterator[tuple[_Group, Packed | None]]:
    """Each group with the weight of its first linear: as it is stored, or packed as ``compress_`` would, else None."""
    left = {group.names[0]: group for group in groups}
    reader = open_checkpoint(folder)
    if isinstance(reader, CompressedReader):
        for name in [name for name in left if name in reader.packed]:
            yield left.pop(name), reader.read_packed(name).to(dtype)
    if not left:
        return
    for spec, weight in linear_weights(folder, trust_remote_code=trust_remote_code):
        if spec.name in left:
            yield left.pop(spec.name), packed_if_sparse(weight.to(dtype))
            if not left:
                return
