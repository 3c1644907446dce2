"""Packing an ONNX artifact, and the proof that ONNX Runtime by itself makes the same model of it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import VerificationError

if TYPE_CHECKING:
    from sparsify.exporters.onnx_places import WeightLocation
    from sparsify.types import NofM


def pack_and_check(
    model: Path, linears: list[dict[str, Any]], located: dict[str, tuple[WeightLocation, ...]]
) -> dict[str, Any]:
    """Pack the pruned weights of ``model`` in place; returns what the manifest says of it.

    ONNX Runtime then loads the file as anybody's program would, and has to give the dense one's logits bit for bit.

    Args:
        model: ``model.onnx`` of an artifact, dense.
        linears: rows of the manifest.
        located: where each linear's weight lies in it.

    Raises:
        VerificationError: ONNX Runtime computes something else from the packed file.
        SparsifyError: as ``pack_onnx``.
    """
    from sparsify.exporters.onnx_packed import PackAs, pack_onnx
    from sparsify.exporters.onnx_reader import OnnxWeights

    tensors = OnnxWeights(model).tensors
    pruned = {row["name"]: row for row in linears}
    holders: dict[str, list[tuple[str, WeightLocation]]] = {}
    for name, places in located.items():
        for place in places:
            holders.setdefault(place.initializer, []).append((name, place))
    wanted = {}
    for initializer, rows in holders.items():
        if any(name in pruned for name, _ in rows):
            n_axes = len(tensors[initializer].dims)
            axis = n_axes - 2 if rows[0][1].transposed else n_axes - 1
            wanted[initializer] = PackAs(_shared_pattern(rows, pruned, list(tensors[initializer].dims)), axis)
    before = _logits(model)
    report = pack_onnx(model, wanted)
    return {
        "packed": len(report.packed),
        "dense": dict(report.dense),
        "packed_bytes": report.packed_bytes,
        "dense_bytes": report.dense_bytes,
        "load_peak_bytes": report.load_peak_bytes,
        "folded": _compare(model, before, report.load_peak_bytes),
    }


def _logits(model: Path, *, unpack: bool = True) -> NDArray[np.float32] | str:
    """Logits of a few tokens on the CPU, or why it gives none."""
    from sparsify.runtimes.onnxruntime_errors import MissingKernelError
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
    from sparsify.runtimes.onnxruntime_settings import OrtSettings

    try:
        with OnnxRuntimeSession(model.parent, OrtSettings(unpack=unpack)) as session:
            return session.logits(np.arange(1, 17, dtype=np.int64).reshape(2, 8) % session.vocab_size)
    except MissingKernelError as error:
        return f"not run: {error}"[:300]


def _compare(model: Path, before: NDArray[np.float32] | str, peak_bytes: int) -> str:
    """``equal`` where ONNX Runtime unpacks the file to the same logits, or why that was not tried."""
    if isinstance(before, str):
        return before
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if peak_bytes > free:
        return f"not run: loading it takes about {peak_bytes / 1e9:.1f} GB, {free / 1e9:.1f} are free"
    after = _logits(model, unpack=False)
    if isinstance(after, str) or after.tobytes() != before.tobytes():
        raise VerificationError(f"{model}: ONNX Runtime unpacks it to other logits than those of the dense weights")
    return "equal"


def _shared_pattern(
    holders: list[tuple[str, WeightLocation]], pruned: dict[str, dict[str, Any]], dims: list[int]
) -> NofM | None:
    """The N:M that every row of an initializer is known to keep to; None where it differs or is unknown."""
    from sparsify.types import NofM, parse_pattern

    patterns, n_weights = set(), 0
    for name, _ in holders:
        row = pruned.get(name)
        if row is None or row.get("permuted") == "recorded":  # the pattern holds in another order of inputs
            return None
        pattern = parse_pattern(row["pattern"], None if ":" in row["pattern"] else "layer", name)
        patterns.add(pattern)
        n_weights += row["shape"][0] * row["shape"][1]
    pattern = patterns.pop()
    return pattern if not patterns and isinstance(pattern, NofM) and n_weights == math.prod(dims) else None
