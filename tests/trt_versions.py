"""The stand-in for TensorRT as other versions: 8.6 and TensorRT-RTX."""

from __future__ import annotations

import types
import weakref
from typing import Any

from tests import trt_double
from tests.trt_double import Context, Engine, ExecutionContextAllocationStrategy, ILogger, Runtime


class OldEngine(Engine):
    """As of TensorRT 8: one context at a time in a profile, and memory handed over as an attribute."""

    def __init__(self, value: dict[str, Any], logger: ILogger) -> None:
        super().__init__(value, logger)
        self.device_memory_size = self.device_memory_size_v2
        del self.device_memory_size_v2, self.streamable_weights_size
        self.living: weakref.WeakSet[OldContext] = weakref.WeakSet()

    def create_execution_context_without_device_memory(self) -> OldContext:
        context = OldContext(self)
        self.living.add(context)
        return context


class OldContext:
    def __init__(self, engine: OldEngine) -> None:
        self._context = Context(engine)
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "set_device_memory":
            raise AttributeError(name)
        return getattr(self._context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "device_memory":
            self._context.memory = value, self._engine.device_memory_size
        else:
            super().__setattr__(name, value)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if any(other is not self and other._context.profile == profile for other in self._engine.living):
            self._context._refuse(f"Profile {profile} has been chosen by another IExecutionContext")
            raise RuntimeError("Error in set optimization profile async.")
        return self._context.set_optimization_profile_async(profile, stream)


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: str = "LAZY"

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        capturable: bool = self.engine.value.get("capturable", True)
        return capturable


class RtxEngine(Engine):
    """As of TensorRT-RTX: a context comes with a configuration."""

    def __init__(self, value: dict[str, Any], logger: ILogger) -> None:
        super().__init__(value, logger)
        self.specialised: list[str] = []
        self.context = RtxContext

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, config: Any) -> Context | None:
        assert isinstance(config, _RuntimeConfig)
        self.specialised.append(config.dynamic_shapes_kernel_specialization_strategy)
        return super().create_execution_context(config.strategy)


def module(version: str, engine: type[Engine], **changes: Any) -> types.SimpleNamespace:
    """The stand-in as another version: its engines are ``engine``, and attributes of ``changes`` differ.

    An attribute that is to be absent is given as None.
    """

    class OtherRuntime(Runtime):
        kind = engine

    names = ("ILogger", "TensorIOMode", "DataType", "ExecutionContextAllocationStrategy", "LayerInformationFormat")
    attributes = {name: getattr(trt_double, name) for name in names} | {"Runtime": OtherRuntime, "__version__": version}
    attributes |= changes
    return types.SimpleNamespace(**{name: value for name, value in attributes.items() if value is not None})


def old() -> types.SimpleNamespace:
    """As of TensorRT 8.6."""
    return module("8.6.1", OldEngine, ExecutionContextAllocationStrategy=None)


def rtx() -> types.SimpleNamespace:
    """As of TensorRT-RTX."""
    strategies = types.SimpleNamespace(EAGER="EAGER", LAZY="LAZY")
    return module("1.7.1.116", RtxEngine, DynamicShapesKernelSpecializationStrategy=strategies)
