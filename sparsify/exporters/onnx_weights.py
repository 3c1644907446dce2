"""Where the weights of a checkpoint lie inside an ONNX file, found by content and never by name alone.

The graph optimiser stores most linear weights transposed ([in, out]) and gives folded constants names of its own,
so a name is a hint and the bits decide.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import MissingExtraError, ModelError

# onnx.TensorProto.FLOAT, the only type that export_onnx writes weights in.
_FLOAT = 1


@dataclass(frozen=True)
class WeightLocation:
    """One linear's weight inside an ONNX file.

    Attributes:
        initializer: name of the ONNX initializer.
        transposed: whether it is stored [in, out] instead of [out, in] (last two axes).
        expert: index along the first axis, for the per-expert weight of a fused [experts, ...] initializer.
        rows: (start, stop) of the output features, for a linear fused with another along them (gate with up).
    """

    initializer: str
    transposed: bool
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The linear's weight ([out, in], or [experts, out, in] for a fused one) as a view of the initializer."""
        weight = stored if self.expert is None else stored[self.expert]
        if self.transposed:
            weight = weight.swapaxes(-1, -2)
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]


class OnnxWeights:
    """The initializers of one ONNX file by name; external data stay on disk until one of them is read.

    Attributes:
        tensors: name -> TensorProto, with its values only where they lie inside the file.

    Raises:
        MissingExtraError: the onnx package is absent.
        ModelError: the file, or the external data file it names, is missing, truncated or not ONNX.
    """

    def __init__(self, model_path: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingExtraError('ONNX needs: pip install "sparsify-toolkit[onnx]"') from error
        self._onnx = onnx
        self._path = model_path
        try:
            graph = onnx.load(model_path, load_external_data=False).graph
        except Exception as error:  # protobuf's error type differs between its implementations
            raise ModelError(f"{model_path}: missing, truncated or not an ONNX file: {error}") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}

    def read(self, name: str) -> NDArray[Any]:
        """One initializer's float32 values in their stored shape; external data as a read-only memory map.

        Raises:
            ModelError: no such initializer, one of another type, or its external data is missing or truncated.
        """
        if name not in self.tensors:
            raise ModelError(f"{self._path}: has no initializer {name!r}")
        tensor = self.tensors[name]
        if tensor.data_type != _FLOAT:
            raise ModelError(f"{self._path}: initializer {name!r} has data type {tensor.data_type}, not float32")
        if tensor.data_location != self._onnx.TensorProto.EXTERNAL:
            try:
                values: NDArray[Any] = self._onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError, OverflowError) as error:
                raise ModelError(f"{self._path}: initializer {name!r} cannot be read: {error}") from error
            return values
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        # A location from the file must not lead out of the artifact's folder.
        if not location or Path(location).name != location:
            raise ModelError(
                f"{self._path}: initializer {name} names the external file {location!r}, not a file beside it"
            )
        data_path = self._path.parent / location
        try:
            return np.memmap(data_path, np.float32, "r", int(where.get("offset", 0)), tuple(tensor.dims))
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{data_path}: initializer {name} cannot be read: {error}") from error

    def weight(self, location: WeightLocation) -> NDArray[Any]:
        """The weight [out, in] at ``location``, as a view.

        Raises:
            ModelError: as ``read``, or the location does not fit the initializer.
        """
        try:
            return location.view(self.read(location.initializer))
        except (IndexError, ValueError):
            raise ModelError(f"{self._path}: {location} does not fit the initializer") from None


def _digest(weight: NDArray[Any]) -> bytes:
    # The bytes, not the values: -0.0 and 0.0 count as different, so equality here means recovered bit for bit.
    contiguous = np.ascontiguousarray(weight)
    digest = hashlib.sha256(repr(contiguous.shape).encode())
    digest.update(contiguous.data)
    return digest.digest()


def _candidates(name: str, shape: tuple[int, ...], wanted: set[tuple[int, ...]]) -> Iterator[WeightLocation]:
    """Every way in which an initializer of this shape can hold a weight of one of the wanted shapes."""
    experts = shape[0] if len(shape) == 3 else 0
    for transposed in (False, True):
        out, inner = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        if (*shape[:-2], out, inner) in wanted:
            yield WeightLocation(name, transposed)
        for expert in range(experts):
            if (out, inner) in wanted:
                yield WeightLocation(name, transposed, expert)
            if out % 2 == 0 and (out // 2, inner) in wanted:
                yield WeightLocation(name, transposed, expert, (0, out // 2))
                yield WeightLocation(name, transposed, expert, (out // 2, out))


def find_weights(
    model_path: Path, checkpoint_weights: Iterable[tuple[str, NDArray[np.float32]]]
) -> dict[str, WeightLocation | None]:
    """Where each linear's weight lies in the ONNX file: bit-for-bit equal to the checkpoint's, or None.

    Both sides are read once and one tensor at a time (pass a generator), and compared by SHA-256 of shape and bytes.
    Where several initializers hold the same bits, the one that carries the linear's name is taken, then one not yet
    taken.

    Args:
        model_path: the ``.onnx`` file; its external data file lies beside it.
        checkpoint_weights: linear name, with or without a trailing ``.weight`` (``model.layers.0.mlp.down_proj``),
            and weight [out, in]; a fused expert parameter is [experts, out, in], and one expert of it [out, in].

    Raises:
        ModelError: the ONNX file or its external data is missing or truncated.
        MissingExtraError: the onnx package is absent.
    """
    digests: dict[str, bytes] = {}
    wanted: set[tuple[int, ...]] = set()
    for linear, weight in checkpoint_weights:
        digests[linear] = _digest(weight)
        wanted.add(weight.shape)
    needed = set(digests.values())
    holders: dict[bytes, list[WeightLocation]] = {}
    weights = OnnxWeights(model_path)
    for name, tensor in weights.tensors.items():
        places = list(_candidates(name, tuple(tensor.dims), wanted)) if len(tensor.dims) in (2, 3) else []
        if not places or tensor.data_type != _FLOAT:
            continue
        stored = weights.read(name)
        for place in places:
            digest = _digest(place.view(stored))
            if digest in needed:
                holders.setdefault(digest, []).append(place)
    taken: set[WeightLocation] = set()
    found: dict[str, WeightLocation | None] = {}
    for linear, digest in digests.items():
        stem = linear.removesuffix(".weight")
        places = holders.get(digest, [])
        by_name = [p for p in places if p.initializer == stem or p.initializer.startswith(stem + ".")]
        free = [p for p in places if p not in taken]
        found[linear] = next(iter(by_name or free or places), None)
        taken.update(p for p in [found[linear]] if p is not None)
    return found
