"""Where the weights of a checkpoint lie inside an ONNX file, found by content and never by name alone.

Exporters store most linear weights transposed ([in, out]), fuse some with their neighbours (query, key and value) and
split others (gate from up), and give constants names of their own, so a name is a hint and the bits decide. Quantised
weights have other bits: ``onnx_quantized`` finds them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import ModelError
from sparsify.exporters.onnx_places import MOST_PIECES, WeightLocation
from sparsify.exporters.onnx_quantized import QuantizedFinder
from sparsify.exporters.onnx_reader import FLOATS, OnnxWeights, dtype_of


def weight_at(weights: OnnxWeights, places: Sequence[WeightLocation]) -> NDArray[Any]:
    """The weight [out, in] that lies in ``places``, in its stored float dtype, or float32 where it is quantised.

    Raises:
        ModelError: as ``OnnxWeights.read``, or a place does not fit its initializer.
    """
    pieces = []
    for place in places:
        name = place.initializer
        try:
            stored = weights.dequantized(name) if name in weights.quantized else weights.read(name)
            pieces.append(place.view(stored))
        except (IndexError, ValueError):
            raise ModelError(f"{weights.path}: {place} does not fit the initializer") from None
    try:
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    except ValueError:
        raise ModelError(f"{weights.path}: the pieces {list(places)} do not fit together") from None


def find_weights(
    model_path: Path, checkpoint_weights: Iterable[tuple[str, NDArray[np.float32]]]
) -> dict[str, tuple[WeightLocation, ...]]:
    """Where each linear's weight lies in the ONNX file: its pieces in the order of its rows, mostly one; () if nowhere.

    A float weight is found where the graph holds the checkpoint's, cast to the graph's dtype, bit for bit; a quantised
    one where every value is within a step of the checkpoint's and every zero exactly zero. Both sides are read one
    tensor at a time (pass a generator; quantised weights one decoder block at a time), floats compared row by row by
    hash. Where several places hold the same bits, the one that carries the linear's name is taken, then one not
    yet taken.

    Args:
        model_path: the ``.onnx`` file; its external data file lies beside it.
        checkpoint_weights: linear name, with or without a trailing ``.weight`` (``model.layers.0.mlp.down_proj``),
            and weight [out, in]; a fused expert parameter is [experts, out, in], and one expert of it [out, in].

    Raises:
        ModelError: the ONNX file or its external data is missing or truncated.
        MissingExtraError: the onnx package is absent.
    """
    weights = OnnxWeights(model_path)
    quantized = QuantizedFinder(weights)
    matrices = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if len(tensor.dims) in (2, 3) and min(tensor.dims) > 0 and tensor.data_type in FLOATS.values()
    }
    types = sorted({tensor.data_type for tensor in matrices.values()})
    wanted: dict[tuple[int, str], list[bytes]] = {}
    found: dict[str, tuple[WeightLocation, ...]] = {}
    for linear, weight in checkpoint_weights:
        found[linear] = quantized.places(linear, weight)
        for data_type in types:
            wanted[data_type, linear] = _row_hashes(weight.astype(dtype_of(data_type), copy=False))
    stored = [_Stored.read(weights, name, t) for name in matrices for t in (False, True)]
    for linear, place in _choose(_whole(wanted, stored)).items():
        found[linear] = found[linear] or (() if place is None else (place,))
    for (data_type, linear), rows in wanted.items():
        found[linear] = found[linear] or _cover(rows, [each for each in stored if each.data_type == data_type])
    return found


def _row_hashes(matrix: NDArray[Any]) -> list[bytes]:
    """A hash for each row of [..., rows, columns], which counts the columns too.

    Of the bytes, not the values: -0.0 and 0.0 count as different, so equality means recovered bit for bit.
    """
    contiguous = np.ascontiguousarray(matrix).reshape(-1, matrix.shape[-1]).view(np.uint8)
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in contiguous]


@dataclass(frozen=True)
class _Stored:
    """The rows of one initializer, a matrix or a stack of them, read one way round."""

    name: str
    data_type: int
    transposed: bool
    dims: tuple[int, ...]
    hashes: list[bytes]

    @classmethod
    def read(cls, weights: OnnxWeights, name: str, transposed: bool) -> Self:
        values, tensor = weights.read(name), weights.tensors[name]
        hashes = _row_hashes(values.swapaxes(-1, -2) if transposed else values)
        return cls(name, tensor.data_type, transposed, tuple(tensor.dims), hashes)

    @property
    def out(self) -> int:
        return self.dims[-1] if self.transposed else self.dims[-2]

    def place(self, start: int, count: int) -> WeightLocation | None:
        """``count`` rows from ``start``, unless they lie across two matrices of the stack."""
        if len(self.dims) == 3 and count == len(self.hashes) > self.out:
            return WeightLocation(self.name, self.transposed)
        expert, first = divmod(start, self.out)
        if first + count > self.out:
            return None
        rows = None if count == self.out else (first, first + count)
        return WeightLocation(self.name, self.transposed, expert if len(self.dims) == 3 else None, rows)


def _whole(wanted: Mapping[tuple[int, str], list[bytes]], stored: Iterable[_Stored]) -> dict[str, list[WeightLocation]]:
    """Every place that holds all rows of a linear."""
    firsts: dict[tuple[int, bytes], list[str]] = {}
    for (data_type, linear), rows in wanted.items():
        firsts.setdefault((data_type, rows[0]), []).append(linear)
    places: dict[str, list[WeightLocation]] = {linear: [] for _, linear in wanted}
    for each in stored:
        for start, first in enumerate(each.hashes):
            for linear in firsts.get((each.data_type, first), ()):
                rows = wanted[each.data_type, linear]
                if each.hashes[start : start + len(rows)] == rows:
                    place = each.place(start, len(rows))
                    places[linear] += [place] if place else []
    return places


def _cover(rows: list[bytes], stored: Sequence[_Stored]) -> tuple[WeightLocation, ...]:
    """Pieces that hold the rows of a linear one behind the other, each as long as it can be; () if there are none."""
    pieces: list[WeightLocation] = []
    done = 0
    while done < len(rows) and len(pieces) < MOST_PIECES:
        best: tuple[int, WeightLocation | None] = (0, None)
        for each in stored:
            for start in (i for i, row in enumerate(each.hashes) if row == rows[done]):
                end = min(len(rows) - done, each.out - start % each.out)
                pairs = zip(each.hashes[start : start + end], rows[done : done + end], strict=True)
                run = next((i for i, (one, other) in enumerate(pairs) if one != other), end)
                best = max(best, (run, each.place(start, run)), key=lambda pair: pair[0])
        if best[1] is None:
            return ()
        pieces.append(best[1])
        done += best[0]
    return tuple(pieces) if done == len(rows) else ()


def _choose(places: Mapping[str, list[WeightLocation]]) -> dict[str, WeightLocation | None]:
    taken: set[WeightLocation] = set()
    found: dict[str, WeightLocation | None] = {}
    for linear, candidates in places.items():
        stem = linear.removesuffix(".weight")
        named = [p for p in candidates if p.initializer == stem or p.initializer.startswith(stem + ".")]
        free = [p for p in candidates if p not in taken]
        found[linear] = next(iter(named or free or candidates), None)
        taken.update(p for p in [found[linear]] if p is not None)
    return found
