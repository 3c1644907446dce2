"""A stand-in for TensorRT's Python module: an engine that runs its ONNX file in ONNX Runtime, at given addresses.

As TensorRT it refuses a shape outside the profile, an execution without a profile, shape, address or activation
memory, and bytes that are no engine; more strictly, it refuses an address that is not aligned, and memory that is too
small or was never allocated (see ``MEMORY``). The names of tensors and methods are TensorRT's.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__ = "11.4.0.106"
MAGIC = b"double\n"
# (address, bytes) of every allocation that the code under test may hand over; None checks nothing.
MEMORY: list[tuple[int, int]] | None = None


class _Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 3


class ILogger:
    Severity = _Severity

    def log(self, severity: _Severity, message: str) -> None: ...


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BF16 = 7
    INT64 = 8


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int8)": (DataType.INT8, np.int8),
}
Bounds = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def plan(onnx: Path, profiles: list[Bounds], **changes: Any) -> bytes:
    """An engine file: where the ONNX file lies, the profiles, and what differs from an ordinary engine.

    Args:
        onnx: the graph.
        profiles: input -> (min, opt, max) shape, each.
        changes: ``layers`` (what the inspector says), ``streamable``, ``int32`` (ids and masks as TensorRT 8 has them),
            ``no_memory`` (message with which the call of that name fails), ``host_code`` (an engine for several
            versions), ``budgets`` (the only weight budgets that are taken), ``capturable``.
    """
    return MAGIC + json.dumps({"onnx": str(onnx), "profiles": profiles, **changes}).encode()


class Runtime:
    kind: type[Engine]

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
        if not serialized.startswith(MAGIC):
            self.logger.log(_Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag)")
            return None
        value = json.loads(serialized[len(MAGIC) :])
        if value.get("host_code") and not self.engine_host_code_allowed:
            self.logger.log(_Severity.ERROR, "IRuntime::deserializeCudaEngine: host code is not allowed")
            return None
        return self.kind(value, self.logger)


class _Inspector:
    def __init__(self, layers: Any) -> None:
        self.layers = layers

    def get_engine_information(self, kind: LayerInformationFormat) -> str:
        assert kind is LayerInformationFormat.JSON
        return json.dumps({"Layers": self.layers})


class Engine:
    context: type[Context]

    def __init__(self, value: dict[str, Any], logger: ILogger) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session: Any = onnxruntime.InferenceSession(value["onnx"], options, providers=["CPUExecutionProvider"])
        self.value, self.logger = value, logger
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.profiles: list[Bounds] = value["profiles"]
        self.contexts = 0
        self.device_memory_size_v2 = 4096
        self.streamable_weights_size = value.get("streamable", 0)
        self._budget = self.streamable_weights_size

    @property
    def weight_streaming_budget_v2(self) -> int:
        budget: int = self._budget
        return budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        # As the bindings: TensorRT's answer is dropped.
        if budget in self.value.get("budgets", [budget]):
            self._budget = budget

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        name: str = self.names[index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def numpy_type(self, name: str) -> Any:
        narrow = self.value.get("int32") and name in ("input_ids", "attention_mask", "position_ids")
        return np.int32 if narrow else _TYPES[(self.inputs | self.outputs)[name].type][1]

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(kind for kind, of in _TYPES.values() if of == self.numpy_type(name))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = (self.inputs | self.outputs)[name].shape
        return tuple(-1 if isinstance(size, str) or size is None else size for size in shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context | None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if message := self.value.get("no_memory"):
            self.logger.log(_Severity.ERROR, message)
            return None
        self.contexts += 1
        return self.context(self)

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self.value.get("layers", []))


Runtime.kind = Engine


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(_Severity.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({message})")
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < len(self.engine.profiles):
            self._refuse(f"profile {profile}")
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = profile
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            return self._refuse("no profile")
        low, _, high = self.engine.profiles[self.profile][name]
        inside = len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
        if not inside:
            return self._refuse(f"Set dimension {list(shape)} for tensor {name} does not satisfy {low} .. {high}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.names or not address or address % 64:
            return self._refuse(f"address {address:#x} of {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        missing = [name for name in engine.inputs if name not in self.shapes]
        missing += [name for name in engine.names if name not in self.addresses]
        if self.profile is None or missing or self.memory is None:
            return self._refuse(f"not set: {', '.join(missing) or 'profile or activation memory'}")
        feeds = {name: self._read(name, self.shapes[name]) for name in engine.inputs}
        outputs = dict(zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True))
        for name, array in outputs.items():
            self._owned(name, array.nbytes)
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        # Reading and writing one place in a step would work here and not on a GPU.
        spans = [(self.addresses[n], a.nbytes, n) for n, a in {**feeds, **outputs}.items() if a.nbytes]
        spans.sort()
        for (start, size, one), (following, _, other) in itertools.pairwise(spans):
            assert start + size <= following, f"{one} overlaps {other}"
        return True

    def _owned(self, name: str, n_bytes: int) -> None:
        if MEMORY is None or not n_bytes:
            return
        start, end = self.addresses[name], self.addresses[name] + n_bytes
        assert any(at <= start and end <= at + size for at, size in MEMORY), f"{name}: {n_bytes} bytes do not fit"

    def _read(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        kind = np.dtype(self.engine.numpy_type(name))
        n_bytes = int(np.prod(shape)) * kind.itemsize
        self._owned(name, n_bytes)
        raw = ctypes.string_at(self.addresses[name], n_bytes)
        array = np.frombuffer(raw, dtype=kind).reshape(shape)
        return array.astype(_TYPES[self.engine.inputs[name].type][1])


Engine.context = Context
