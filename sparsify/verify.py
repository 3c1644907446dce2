"""Does an artifact hold what its manifest says? Files by hash, linears by pattern and by their exact zeros."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsify import manifest
from sparsify.checkpoint import read_permutations
from sparsify.errors import SparsifyError, UsageError, VerificationError
from sparsify.masks import satisfies
from sparsify.naming import linear_weights
from sparsify.progress import Progress, Silent
from sparsify.types import Group, parse_pattern

if TYPE_CHECKING:
    from sparsify.exporters.onnx_places import WeightLocation


def verify(
    folder: Path, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The manifest of the artifact in ``folder`` and what is wrong with it, a sentence each (empty if nothing is).

    Weights are read one block at a time.

    Raises:
        VerificationError: the manifest itself cannot be used.
    """
    progress = progress or Silent()
    body = manifest.read(folder)
    problems = manifest.verify_files(folder, body)
    if problems:
        return body, problems
    if body["kind"] in ("onnx", "tensorrt") and not isinstance(body.get("onnx"), dict):
        return body, [f"{folder / manifest.NAME}: key onnx is missing; export the artifact again"]
    onnx = body["kind"] in ("onnx", "tensorrt")
    # Rounding to fewer bits adds zeros where weights were tiny, and takes none away.
    rounded = body["onnx"] if onnx else body.get("rounded")
    counts = rounded.get("zeros") if isinstance(rounded, dict) else None
    weights = _onnx_linears(folder, body) if onnx else _checkpoint_linears(folder, trust_remote_code)
    rows = {row["name"]: row for row in body["linears"]}
    orders: dict[str, torch.Tensor] = {}
    if any(row.get("permuted") == "recorded" for row in body["linears"]):
        try:
            orders = read_permutations(folder / manifest.PERMUTATIONS)
        except SparsifyError as error:
            return body, [str(error)]
    progress.stage("verifying", len(rows))
    try:
        for name, weight in weights:
            if name in rows:
                _compare(rows.pop(name), weight, orders.get(name), problems, counts)
                progress.advance()
    except SparsifyError as error:
        problems.append(str(error))
        return body, problems
    problems.extend(f"{name}: in the manifest, not in the model" for name in rows)
    return body, problems


def _checkpoint_linears(folder: Path, trust_remote_code: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for spec, weight in linear_weights(folder, trust_remote_code=trust_remote_code):
        yield spec.name, weight


def _onnx_linears(folder: Path, body: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    from sparsify.exporters.onnx_reader import OnnxWeights
    from sparsify.exporters.onnx_weights import weight_at

    weights = OnnxWeights(folder / "model.onnx")
    located = body["onnx"].get("weights")
    for name, places in located.items() if isinstance(located, dict) else ():
        try:
            # Earlier versions wrote one place, not a list.
            found = [_location(place) for place in (places if isinstance(places, list) else [places])]
            if not found:
                raise ValueError(name)
        except (KeyError, TypeError, IndexError, ValueError, OverflowError):
            raise VerificationError(
                f"{folder / manifest.NAME}: key onnx.weights of {name} is malformed; export the artifact again"
            ) from None
        yield name, torch.from_numpy(np.array(weight_at(weights, found), dtype=np.float32))


def _location(place: dict[str, Any]) -> WeightLocation:
    from sparsify.exporters.onnx_places import WeightLocation

    rows = place["rows"] and (int(place["rows"][0]), int(place["rows"][1]))
    expert = place["expert"] if place["expert"] is None else int(place["expert"])
    return WeightLocation(str(place["initializer"]), bool(place["transposed"]), expert, rows)


def _compare(
    row: dict[str, Any], weight: torch.Tensor, order: torch.Tensor | None, problems: list[str], counts: Any
) -> None:
    name = row["name"]
    if list(weight.shape) != row["shape"]:
        problems.append(f"{name}: has shape {list(weight.shape)}, the manifest says {row['shape']}")
        return
    zeros = int((weight == 0).sum())
    wanted = counts.get(name, row["zeros"]) if isinstance(counts, dict) else row["zeros"]
    if zeros != wanted or zeros < row["zeros"]:
        problems.append(f"{name}: has {zeros} zeros, the manifest says {wanted}")
    group: Group | None = "row" if row.get("group") == "row" else None
    try:
        pattern = parse_pattern(row["pattern"], None if ":" in row["pattern"] else group, f"{name}: pattern")
    except UsageError as error:
        problems.append(str(error))
        return
    if row.get("permuted") == "recorded":
        if order is None or len(order) != weight.shape[1]:
            problems.append(f"{name}: its order of inputs is missing from {manifest.PERMUTATIONS}")
            return
        weight = weight[:, order]
    if not satisfies(weight, pattern):
        problems.append(f"{name}: its zeros do not form the pattern {row['pattern']}")
