"""Loading a packed ONNX file into a session without a writable disk and without the memory peak of folding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.exporters.onnx_functions import PREFIX
from sparsify.exporters.onnx_packed_layout import BFLOAT16
from sparsify.exporters.onnx_packed_reader import PackedWeights

_FLOATS = {4: np.float32, 2: np.float16}


@dataclass(frozen=True)
class DenseModel:
    """What an ONNX Runtime session needs to load a packed model without folding.

    Attributes:
        proto: the model; give it to ``InferenceSession`` in place of a path.
        folder: where its other external data lie; the session option
            ``session.model_external_initializers_file_folder_path`` wants it.
        names: initializers to hand over by ``SessionOptions.add_external_initializers``.
        arrays: their values, float32, float16 or, for bfloat16, uint16 bit patterns. They must live until the session
            is made, which copies them, and take memory until they are dropped.
        data_types: their onnx.TensorProto data types, for ``OrtValue.ortvalue_from_numpy_with_onnx_type``.
    """

    proto: bytes
    folder: Path
    names: tuple[str, ...]
    arrays: tuple[NDArray[Any], ...]
    data_types: tuple[int, ...]


def dense_for_session(model_path: Path) -> DenseModel:
    """Unpack a packed model in memory, one weight at a time, for a session that folds nothing.

    Needs the dense size and one packed weight, and the session as much again until the arrays are dropped. With room on
    a disk, ``unpack_onnx`` into a temporary folder, a session on its model and removing the folder need half of that.

    Args:
        model_path: the packed ``.onnx`` file.

    Raises:
        MissingExtraError: the onnx package is absent.
        ModelError: as ``PackedWeights``.
    """
    weights = PackedWeights(model_path)
    model = weights.dense_model()
    for tensor in model.graph.initializer:
        if tensor.name in weights.layouts:
            # A name for the field's sake: the values are handed over before anything is read from it.
            tensor.external_data.add(key="location", value=f"{PREFIX}unpacked")
    types = tuple(weights.layouts[name].data_type for name in weights.names)
    arrays = []
    for name, data_type in zip(weights.names, types, strict=True):
        bits = weights.read_bits(name)
        arrays.append(bits if data_type == BFLOAT16 else bits.view(_FLOATS[bits.itemsize]))
    return DenseModel(model.SerializeToString(), model_path.parent, weights.names, tuple(arrays), types)
