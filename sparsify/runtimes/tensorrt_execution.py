"""Execution contexts: one profile, shapes and addresses set, run on the device's stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import ModelError, SparsifyError, UsageError
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_log import BuildLog, out_of_memory
from sparsify.runtimes.tensorrt_device import REMEDY, WITHOUT_GRAPHS, Device

# What the automatic weight budget leaves free: for graphs, kernels that are loaded later, and torch's temporaries.
_RESERVE_BYTES = 512 << 20


class Engine:
    """A deserialised engine with the memory that its contexts share.

    A CUDA graph holds the state of the context that it was captured from, so each graph needs a context of its own.
    They run one after another, so that one allocation serves the activations of all.

    Attributes:
        path: of the engine file.
        api: the TensorRT that runs it.
        native: TensorRT's object.
        device: where it runs.
        log: what TensorRT said.
        activation_bytes: of the shared memory.
    """

    def __init__(self, path: Path, api: TensorRt, native: Any, device: Device, log: BuildLog) -> None:
        self.path, self.api, self.native, self.device, self.log = path, api, native, device, log
        self.activation_bytes = max(api.device_memory_bytes(native), 1)
        self._memory = torch.empty(self.activation_bytes, dtype=torch.uint8, device=device.torch)

    @property
    def shares_profiles(self) -> bool:
        """Whether a profile serves several contexts at a time; TensorRT 8 has a context per profile."""
        return self.api.kind != "tensorrt" or self.api.version_tuple >= (10,)

    def refused(self, what: str) -> SparsifyError:
        """The error for a call that TensorRT refused, in its own words."""
        line = self.log.last_error()
        if out_of_memory(line):
            return SparsifyError(f"{self.path}: {what}: out of GPU memory; {REMEDY}: {line}")
        return ModelError(f"{self.path}: {what}: {line}")

    def context(self, profile: int, *, fixed: bool) -> Any:
        """A context in ``profile``; ``fixed`` says that its shapes will not change.

        Raises:
            SparsifyError: TensorRT gives none, or has no memory for it.
        """
        engine, trt = self.native, self.api.module
        if self.api.kind == "tensorrt-rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            # By default kernels for the shape are compiled in the background while others run, and a graph that is
            # captured meanwhile would keep those.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if fixed else strategies.LAZY
            context = engine.create_execution_context(config)
        elif hasattr(trt, "ExecutionContextAllocationStrategy"):
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            raise self.refused("no execution context")
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._memory.data_ptr(), self.activation_bytes)
        else:
            context.device_memory = self._memory.data_ptr()
        try:
            accepted = context.set_optimization_profile_async(profile, self.device.handle)
        except RuntimeError as error:  # the bindings raise this in place of TensorRT's False
            raise self.refused(f"profile {profile} cannot be used") from error
        if not accepted:
            raise self.refused(f"profile {profile} cannot be used")
        return context


class Execution:
    """A context in one profile.

    Args:
        owner: whose context it is.
        profile: its number.
        fixed: whether ``bind`` is called once.

    Raises:
        SparsifyError: as ``Engine.context``.
    """

    def __init__(self, owner: Engine, profile: int, *, fixed: bool = False) -> None:
        self._owner = owner
        self._context = owner.context(profile, fixed=fixed)

    def bind(self, inputs: Mapping[str, tuple[Sequence[int], int]], outputs: Mapping[str, int]) -> None:
        """Set shape and address of each input, and the address of each output.

        Raises:
            SparsifyError: TensorRT refuses one.
        """
        context = self._context
        for name, (shape, address) in inputs.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise self._owner.refused(f"{name} {list(shape)} is refused")
            if not context.set_tensor_address(name, address):
                raise self._owner.refused(f"no address for {name}")
        for name, address in outputs.items():
            if not context.set_tensor_address(name, address):
                raise self._owner.refused(f"no address for {name}")

    def check_capturable(self) -> None:
        """Refuse what cannot become part of a CUDA graph, where the version tells (TensorRT-RTX).

        Raises:
            SparsifyError: names the switch that does without.
        """
        context, owner = self._context, self._owner
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(owner.device.handle):
            raise SparsifyError(f"{owner.path}: decoding cannot be captured as a CUDA graph; {WITHOUT_GRAPHS}")

    def run(self) -> None:
        """Enqueue one execution.

        Raises:
            SparsifyError: TensorRT refuses.
        """
        context = self._context
        if not context.execute_async_v3(self._owner.device.handle):
            raise self._owner.refused("a step failed")


def set_weight_budget(api: TensorRt, engine: Any, budget_bytes: int | None, device: Device, path: Path) -> int:
    """Keep at most ``budget_bytes`` of the streamable weights on the GPU; before any context is made.

    Without a budget, and where weights can be streamed, it is what the device has free beyond activations and a
    reserve: TensorRT's own default streams nothing, and the bindings cut its automatic one to 32 bits.

    Returns:
        Bytes of weights that stay in host memory.

    Raises:
        UsageError: the engine was built without weight streaming, or the budget means nothing or is refused.
    """
    streamable = api.streamable_bytes(engine)
    if not streamable:
        if budget_bytes is None:
            return 0
        raise UsageError(
            f"{path}: weights cannot be streamed; build with weight-streaming=on, or leave --weight-budget out"
        )
    if budget_bytes is None:
        # With nothing on the device, activations and what streaming takes beside them are at their largest.
        _set_budget(engine, 0, path)
        spare = device.free_bytes() - api.device_memory_bytes(engine) - _RESERVE_BYTES
        budget_bytes = min(max(spare, 0), streamable)
    if not 0 <= budget_bytes <= streamable:
        raise UsageError(f"{path}: --weight-budget of {budget_bytes} bytes: want 0 to {streamable}")
    _set_budget(engine, budget_bytes, path)
    return streamable - budget_bytes


def _set_budget(engine: Any, budget_bytes: int, path: Path) -> None:
    refused = f"{path}: --weight-budget of {budget_bytes} bytes is refused"
    try:
        if hasattr(engine, "weight_streaming_budget_v2"):
            engine.weight_streaming_budget_v2 = budget_bytes
            taken = engine.weight_streaming_budget_v2
        else:
            engine.weight_streaming_budget = budget_bytes
            taken = engine.weight_streaming_budget
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{refused}: {error}") from error
    # The bindings drop TensorRT's answer.
    if taken != budget_bytes:
        raise UsageError(f"{refused}; the engine keeps {taken}")
