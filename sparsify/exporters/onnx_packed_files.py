"""Reading tensors of an ONNX file where they lie, with checks, and writing external data one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import MissingExtraError, ModelError

# Smaller tensors stay in the model file: shape inference reads shapes there, and a page for each would be waste.
INLINE_BYTES = 1024
_ALIGNMENT = 4096
_BLOCK = 16 << 20


def load_proto(model_path: Path) -> Any:
    """The ModelProto of ``model_path`` without its external data.

    Raises:
        MissingExtraError: the onnx package is absent.
        ModelError: the file is missing, truncated or not ONNX.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError('ONNX needs: pip install "sparsify-toolkit[onnx]"') from error
    try:
        model = onnx.load(model_path, load_external_data=False)
    except Exception as error:  # protobuf's error type differs between its implementations
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"{model_path}: missing, truncated or not an ONNX file: {line}") from error
    check_text(model_path, model)
    if not model.graph.node:
        raise ModelError(f"{model_path}: has no nodes; export the model again")
    return model


def check_text(model_path: Path, message: Any) -> None:
    """Refuse names that are no text: protobuf gives them as bytes, which are no name that anything else bears.

    Raises:
        ModelError: names the field.
    """
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                check_text(model_path, part)
        elif field.type == field.TYPE_STRING:
            texts = [value] if isinstance(value, str | bytes) else value
            if any(isinstance(text, bytes) for text in texts):
                raise ModelError(f"{model_path}: damaged: {field.full_name} is no text; export the model again")


def inner_nodes(model: Any) -> Iterator[Any]:
    """Every NodeProto of the graph, its subgraphs and the functions."""
    owners = [model.graph, *model.functions]
    while owners:
        for node in owners.pop().node:
            yield node
            for attribute in node.attribute:
                owners += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def inner_tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto but the graph's own initializers: attributes of nodes and initializers of subgraphs."""
    for node in inner_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graph.initializer


def is_external(tensor: Any) -> bool:
    """Whether the values of ``tensor`` lie in another file."""
    return bool(tensor.data_location == tensor.EXTERNAL)


def location(tensor: Any) -> str:
    """Name of the file that holds an external tensor's values, as the model says it."""
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")


def raw_bytes(model_path: Path, tensor: Any) -> NDArray[np.uint8]:
    """The values of ``tensor`` as little-endian bytes; those in another file as a read-only memory map.

    Raises:
        ModelError: the external file is not beside the model, missing or too short, or the entry is malformed.
    """
    from onnx import helper, numpy_helper

    try:
        dims = [int(dim) for dim in tensor.dims]
        expected = prod(dims) * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        if min(dims, default=1) < 0:
            raise ValueError(f"dimensions {dims}")
        if not is_external(tensor):
            raw = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            return np.frombuffer(raw, np.uint8)
        where = {entry.key: entry.value for entry in tensor.external_data}
        name = where.get("location", "")
        if not name or Path(name).name != name:
            raise ValueError(f"names the external file {name!r}, not a file beside it")
        path = model_path.parent / name
        size = path.stat().st_size if path.is_file() else -1
        offset, length = int(where.get("offset", 0)), int(where.get("length", expected))
        if size < 0 or offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"wants bytes {offset} to {offset + length} of {name}, which has {max(size, 0)}")
        if length == 0:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r", offset, (length,))
    except (OSError, ValueError, TypeError, OverflowError, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"{model_path}: initializer {tensor.name}: {line}; export the model again") from error


class DataWriter:
    """Appends the values of tensors to one external data file.

    Args:
        file: opened for writing, empty.
        name: of the file as the model will say it.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._end = 0
        self._places: dict[tuple[str, str, str], tuple[int, int]] = {}

    def put(self, tensor: Any, data: NDArray[Any]) -> None:
        """Write ``data`` (C-contiguous) and make ``tensor`` point to it; small ones are kept in the model file."""
        flat = data.reshape(-1).view(np.uint8)
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        del tensor.external_data[:]
        if flat.size < INLINE_BYTES:
            tensor.data_location = tensor.DEFAULT
            tensor.raw_data = flat.tobytes()
            return
        padding = -self._end % _ALIGNMENT
        self._file.write(bytes(padding))
        for start in range(0, flat.size, _BLOCK):
            self._file.write(flat[start : start + _BLOCK].data)
        self._point(tensor, self._end + padding, flat.size)
        self._end += padding + flat.size

    def move(self, model_path: Path, tensor: Any) -> None:
        """Copy the values of ``tensor`` of the model at ``model_path``; what several tensors share is copied once.

        Raises:
            ModelError: as ``raw_bytes``.
        """
        if not is_external(tensor):
            if len(tensor.raw_data) >= INLINE_BYTES:
                self.put(tensor, np.frombuffer(tensor.raw_data, np.uint8))
            return
        where = {entry.key: entry.value for entry in tensor.external_data}
        key = (where.get("location", ""), where.get("offset", "0"), where.get("length", ""))
        if key in self._places:
            self._point(tensor, *self._places[key])
            return
        self.put(tensor, raw_bytes(model_path, tensor))
        if is_external(tensor):
            length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            self._places[key] = (self._end - length, length)

    def _point(self, tensor: Any, offset: int, length: int) -> None:
        del tensor.external_data[:]
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", self._name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
