"""The initializers of an ONNX file as arrays: read one at a time, checked before memory is touched.

Float weights come as they are stored, packed ones unpacked; the codes of ``MatMulNBits`` (com.microsoft) come as the
weights they stand for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import MissingExtraError, ModelError
from sparsify.exporters.onnx_packed_files import check_text
from sparsify.exporters.onnx_packed_reader import PackedWeights, is_packed

# onnx.TensorProto.DataType
FLOAT, UINT8, INT8, FLOAT16, BFLOAT16, FLOAT8 = 1, 2, 3, 10, 16, 17
FLOATS = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}


def dtype_of(data_type: int) -> np.dtype[Any]:
    """The NumPy dtype of an ONNX data type this reader knows (``ml_dtypes.bfloat16`` for bfloat16)."""
    import ml_dtypes

    known: dict[int, Any] = {
        FLOAT: np.float32,
        UINT8: np.uint8,
        INT8: np.int8,
        FLOAT16: np.float16,
        BFLOAT16: ml_dtypes.bfloat16,
        FLOAT8: ml_dtypes.float8_e4m3fn,
    }
    dtype: np.dtype[Any] = np.dtype(known[data_type])
    return dtype


@dataclass(frozen=True)
class Quantized:
    """Where a ``MatMulNBits`` node keeps its weight [out, in]: codes in blocks along ``in``, a scale for each block.

    Attributes:
        codes: initializer, uint8 [out, blocks, block_size * bits / 8]; low nibble first.
        scales: initializer, float [out, blocks] (stored flat by some versions).
        zero_points: initializer of packed uint8 codes of zero, or None where zero is the middle of the range.
        bits: 4 or 8.
        block_size: inputs that share a scale.
        shape: (out, in).
    """

    codes: str
    scales: str
    zero_points: str | None
    bits: int
    block_size: int
    shape: tuple[int, int]


class OnnxWeights:
    """The initializers of one ONNX file by name; external data stay on disk until one of them is read.

    Attributes:
        tensors: name -> TensorProto, with its values only where they lie inside the file; a packed weight as if it were
            a dense one.
        nodes: the nodes of the main graph.
        quantized: initializer of codes -> what they mean.
        opset: version of the standard's operators.

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
        self.path = model_path
        try:
            model = onnx.load(model_path, load_external_data=False)
        except Exception as error:  # protobuf's error type differs between its implementations
            raise ModelError(f"{model_path}: missing, truncated or not an ONNX file: {error}") from error
        check_text(model_path, model)
        self._last: tuple[str, NDArray[Any]] | None = None
        self._packed: PackedWeights | None = None
        if is_packed(model):
            self._packed = PackedWeights(model_path)
            model = self._packed.dense_model()
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = list(model.graph.node)
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self.quantized = {q.codes: q for q in (self._quantized(n) for n in self.nodes if n.op_type == "MatMulNBits")}

    def _quantized(self, node: Any) -> Quantized:
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        names = [*node.input, "", "", ""]
        try:
            bits, block = numbers.get("bits", 4), numbers["block_size"]
            found = Quantized(names[1], names[2], names[3] or None, bits, block, (numbers["N"], numbers["K"]))
        except KeyError as error:
            raise ModelError(f"{self.path}: node {node.name!r}: MatMulNBits lacks {error}; export it again") from None
        if bits not in (4, 8) or block < 16 or min(found.shape) < 1:
            raise ModelError(
                f"{self.path}: node {node.name!r}: MatMulNBits of {bits} bits, blocks of {block} and shape "
                f"{list(found.shape)} cannot be read; export it again"
            )
        return found

    def read(self, name: str) -> NDArray[Any]:
        """One initializer in its stored shape: float32, float16, uint8, int8, or bfloat16 and float8 of ``ml_dtypes``.

        External data come as a read-only memory map.

        Raises:
            ModelError: no such initializer, one of another type, or its external data is missing or truncated.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.path}: has no initializer {name!r}")
        if self._packed is not None and name in self._packed.layouts:
            return self._remembered(name, self._packed.read)
        tensor = self.tensors[name]
        if tensor.data_type not in (*FLOATS.values(), UINT8, INT8, FLOAT8):
            raise ModelError(
                f"{self.path}: initializer {name!r} has data type {tensor.data_type}, not a float or 8 bits"
            )
        if tensor.data_location != self._onnx.TensorProto.EXTERNAL:
            try:
                values: NDArray[Any] = self._onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError, OverflowError) as error:
                raise ModelError(f"{self.path}: initializer {name!r} cannot be read: {error}") from error
            return values
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        # A location from the file must not lead out of the artifact's folder.
        if location in ("", ".", "..") or Path(location).name != location:
            raise ModelError(
                f"{self.path}: initializer {name} names the external file {location!r}, not a file beside it"
            )
        data_path = self.path.parent / location
        try:
            dtype, offset = dtype_of(tensor.data_type), int(where.get("offset", 0))
            return np.memmap(data_path, dtype, "r", offset, tuple(tensor.dims))
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{data_path}: initializer {name} cannot be read: {error}") from error

    def dequantized(self, name: str) -> NDArray[np.float32]:
        """The weight [out, in] float32 that the codes in initializer ``name`` stand for: (code - zero) x scale.

        Raises:
            ModelError: codes, scales or zero points are missing or of another size than the node says.
        """
        return self._remembered(name, self._dequantize)

    def _remembered(self, name: str, make: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
        """What ``make`` gives for ``name``: experts of one stack are asked for one by one, and it is made once."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, make(name))
        return self._last[1]

    def _dequantize(self, name: str) -> NDArray[np.float32]:
        q = self.quantized[name]
        out, inner = q.shape
        blocks = math.ceil(inner / q.block_size)
        codes = _unpack(self._sized(q.codes, out * blocks * q.block_size * q.bits // 8), q.bits)
        centred = codes.reshape(out, blocks, q.block_size).astype(np.float32)
        if q.zero_points is None:
            centred -= np.float32(2 ** (q.bits - 1))
        else:
            width = math.ceil(blocks * q.bits / 8)
            zeros = _unpack(self._sized(q.zero_points, out * width).reshape(out, width), q.bits)[:, :blocks]
            centred -= zeros.astype(np.float32)[:, :, None]
        centred *= self._sized(q.scales, out * blocks).astype(np.float32).reshape(out, blocks, 1)
        values: NDArray[np.float32] = centred.reshape(out, blocks * q.block_size)[:, :inner]
        return values

    def _sized(self, name: str, size: int) -> NDArray[Any]:
        values = self.read(name)
        if values.size != size:
            raise ModelError(f"{self.path}: initializer {name!r} has {values.size} values, its node wants {size}")
        return values


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
