"""Packed weights of an ONNX file: the record that describes them, the checks, and reading them dense.

The record lies in the model's metadata under ``sparsify.packed``, as JSON::

    {"format": 1, "weights": {NAME: {"shape": [in, out], "type": 1, "pattern": "2:4" or null, "axis": 0,
                                     "n_values": 1234, "gap_bits": 0, "crc": [of values, of mask or gaps]}}}

A CRC-32 is that of the tensor's bytes, started from the CRC-32 of the ASCII text ``sparsify 1 NAME`` and the entry's
other fields, so that a changed entry and swapped tensors are noticed like a changed byte.
"""

from __future__ import annotations

import json
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import ModelError
from sparsify.exporters.onnx_functions import DOMAIN, MAX_OPSET, MIN_OPSET, PREFIX, load_peak_bytes, scaffold
from sparsify.exporters.onnx_packed_codec import bit_type, decode
from sparsify.exporters.onnx_packed_files import load_proto, raw_bytes
from sparsify.exporters.onnx_packed_layout import ITEM_BYTES, Layout, part_names
from sparsify.types import NofM

RECORD = "sparsify.packed"
FORMAT = 1


def checksum(data: NDArray[Any], name: str, layout: Layout) -> int:
    """CRC-32 of ``data`` as a part of the packed weight ``name``."""
    fields = [layout.shape, layout.data_type, layout.pattern, layout.axis, layout.n_values, layout.gap_bits]
    header = f"sparsify {FORMAT} {name} {' '.join(str(field) for field in fields)}"
    return zlib.crc32(data.reshape(-1).view(np.uint8).data, zlib.crc32(header.encode()))


def record_text(layouts: dict[str, Layout], checksums: dict[str, tuple[int, int]]) -> str:
    """The record as it stands in the model's metadata."""
    weights = {
        name: {
            "shape": list(x.shape),
            "type": x.data_type,
            "pattern": None if x.pattern is None else str(x.pattern),
            "axis": x.axis,
            "n_values": x.n_values,
            "gap_bits": x.gap_bits,
            "crc": list(checksums[name]),
        }
        for name, x in layouts.items()
    }
    return json.dumps({"format": FORMAT, "weights": weights}, separators=(",", ":"))


def opset_of(model: Any) -> int:
    """Version of the standard operator set that the model uses; 0 where it names none."""
    return next((int(x.version) for x in model.opset_import if x.domain in ("", "ai.onnx")), 0)


def is_packed(model: Any) -> bool:
    """Whether a ModelProto says that it holds packed weights."""
    return any(entry.key == RECORD for entry in model.metadata_props)


def _natural(value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise ValueError(f"{str(value)[:40]!r} is not a number from 0 to {limit - 1}")
    return value


def _layout(entry: Any) -> tuple[Layout, tuple[int, int]]:
    shape = tuple(_natural(dim, 1 << 31) for dim in entry["shape"])
    if entry["type"] not in ITEM_BYTES or len(shape) not in (2, 3):
        raise ValueError(f"type {entry['type']!r}, shape {list(shape)}")
    pattern = None
    if entry["pattern"] is not None:
        n, m = (_natural(int(part), 9) for part in str(entry["pattern"]).split(":"))
        if not 0 < n < m:
            raise ValueError(f"pattern {n}:{m}")
        pattern = NofM(n, m)
    axis = _natural(entry["axis"], len(shape))
    gap_bits = _natural(entry["gap_bits"], 9)
    if gap_bits not in ((0,) if pattern else (4, 8)):
        raise ValueError(f"gap_bits {gap_bits}")
    layout = Layout(shape, entry["type"], pattern, axis, _natural(entry["n_values"], 1 << 31), gap_bits)
    if pattern and layout.n_values != prod(layout.values_shape):
        raise ValueError(f"n_values {layout.n_values} of {list(shape)}")
    obstacle = layout.obstacle
    if obstacle is not None:
        raise ValueError(obstacle)
    values, mask = entry["crc"]
    return layout, (_natural(values, 1 << 32), _natural(mask, 1 << 32))


class PackedWeights:
    """The packed weights of one ONNX file, checked against the graph; values stay on disk until one is read.

    What the graph does to unpack them is compared with what this version writes, so that a weight read here is the one
    that ONNX Runtime computes.

    Attributes:
        layouts: weight name -> layout, in the order of the file.

    Raises:
        MissingExtraError: the onnx package is absent.
        ModelError: the file is missing, truncated, not packed, or its record, tensors and nodes disagree.
    """

    def __init__(self, model_path: Path) -> None:
        self.path = model_path
        self._model = load_proto(model_path)
        record = next((x.value for x in self._model.metadata_props if x.key == RECORD), None)
        if record is None:
            raise ModelError(f"{model_path}: holds no packed weights")
        self.layouts: dict[str, Layout] = {}
        self._checksums: dict[str, tuple[int, int]] = {}
        try:
            content = json.loads(record)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
            for name, entry in content["weights"].items():
                self.layouts[name], self._checksums[name] = _layout(entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ModelError(f"{model_path}: {RECORD} is malformed ({line}); export the model again") from None
        self._tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._check_tensors()
        self._check_graph()

    @property
    def names(self) -> tuple[str, ...]:
        """The packed weights' names, those of the dense initializers."""
        return tuple(self.layouts)

    @property
    def load_peak_bytes(self) -> int:
        """Predicted peak while plain ONNX Runtime loads the file, see ``onnx_functions.load_peak_bytes``."""
        parts = {part for name, layout in self.layouts.items() for part in part_names(name, layout)}
        others = (x for name, x in self._tensors.items() if name not in parts and not name.startswith(PREFIX))
        return load_peak_bytes(self.layouts, sum(raw_bytes(self.path, x).nbytes for x in others))

    def _check_tensors(self) -> None:
        for name, layout in self.layouts.items():
            values, places = part_names(name, layout)
            wanted = (
                (values, layout.data_type, layout.values_shape),
                (places, layout.places_type, layout.places_shape),
            )
            for part, data_type, shape in wanted:
                tensor = self._tensors.get(part)
                if tensor is None or tensor.data_type != data_type or tuple(tensor.dims) != shape:
                    found = "is missing" if tensor is None else f"is of type {tensor.data_type}, {list(tensor.dims)}"
                    raise ModelError(
                        f"{self.path}: initializer {part} {found}, want type {data_type}, {list(shape)}; "
                        "export the model again"
                    )
            # Before the graph is rebuilt from the record: a shape that nothing fills must not cost memory.
            sizes = (layout.packed_bytes - layout.places_bytes, layout.places_bytes)
            for part, size in zip((values, places), sizes, strict=True):
                self._stored(part, size)

    def _check_graph(self) -> None:
        opset = opset_of(self._model)
        if not MIN_OPSET <= opset <= MAX_OPSET:
            raise ModelError(f"{self.path}: opset {opset}, this version unpacks {MIN_OPSET} to {MAX_OPSET}")
        wanted = scaffold(self.layouts, opset)
        graph = self._model.graph
        own = set(self.layouts)
        found = (
            [node for node in graph.node if node.domain == DOMAIN or _is_own(node, own)],
            [tensor for tensor in graph.initializer if tensor.name.startswith(PREFIX) or tensor.name in own],
            [function for function in self._model.functions if function.domain == DOMAIN],
        )
        for what, have, want in zip(
            ("nodes", "tables", "functions"), found, (wanted.nodes, wanted.initializers, wanted.functions), strict=True
        ):
            if [x.SerializeToString() for x in have] != [x.SerializeToString() for x in want]:
                raise ModelError(
                    f"{self.path}: its unpacking {what} are not those that this version writes; export the model again"
                )

    def _stored(self, part: str, expected_bytes: int) -> NDArray[np.uint8]:
        data = raw_bytes(self.path, self._tensors[part])
        if data.nbytes != expected_bytes:
            raise ModelError(
                f"{self.path}: initializer {part} has {data.nbytes} bytes, not {expected_bytes}; export the model again"
            )
        return data

    def _part(self, name: str, part: str, expected_bytes: int, expected_crc: int) -> NDArray[np.uint8]:
        data = self._stored(part, expected_bytes)
        if checksum(data, name, self.layouts[name]) != expected_crc:
            raise ModelError(f"{self.path}: initializer {part} differs from its checksum; export the model again")
        return data

    def read_bits(self, name: str) -> NDArray[Any]:
        """One dense weight's bit patterns, uint32 or uint16 in the initializer's shape.

        Raises:
            ModelError: no such weight, or its values or mask are missing, truncated or differ from their checksums.
        """
        layout = self.layouts.get(name)
        if layout is None:
            raise ModelError(f"{self.path}: has no packed weight {name!r}")
        values_name, places_name = part_names(name, layout)
        crc_values, crc_places = self._checksums[name]
        places = self._part(name, places_name, layout.places_bytes, crc_places)
        values = self._part(name, values_name, layout.packed_bytes - layout.places_bytes, crc_values)
        places = places.reshape(layout.places_shape) if layout.pattern else places
        try:
            return decode(values.view(bit_type(layout.data_type)).reshape(layout.values_shape), places, layout, name)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def read(self, name: str) -> NDArray[Any]:
        """One dense weight: float32, float16 or ``ml_dtypes.bfloat16`` (a dependency of onnx), in its stored shape.

        Raises:
            ModelError: as ``read_bits``.
        """
        from onnx import helper

        bits = self.read_bits(name)
        return bits.view(helper.tensor_dtype_to_np_dtype(self.layouts[name].data_type))

    def dense_model(self) -> Any:
        """A ModelProto without anything packed, in which the weights are external initializers of no location yet."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        own = set(self.layouts)
        parts = {part for name, layout in self.layouts.items() for part in part_names(name, layout)}
        graph = model.graph
        _keep(graph.node, lambda x: x.domain != DOMAIN and not _is_own(x, own))
        _keep(graph.initializer, lambda x: x.name not in parts and not x.name.startswith(PREFIX))
        _keep(graph.value_info, lambda x: x.name not in own)
        _keep(model.functions, lambda x: x.domain != DOMAIN)
        _keep(model.opset_import, lambda x: x.domain != DOMAIN)
        _keep(model.metadata_props, lambda x: x.key != RECORD)
        for name, layout in self.layouts.items():
            graph.initializer.add(
                name=name, data_type=layout.data_type, dims=layout.shape, data_location=onnx.TensorProto.EXTERNAL
            )
        return model


def _is_own(node: Any, own: set[str]) -> bool:
    return any(output in own or output.startswith(PREFIX) for output in node.output)


def _keep(items: Any, wanted: Any) -> None:
    kept = [item for item in items if wanted(item)]
    del items[:]
    items.extend(kept)
