"""The one place that knows how TensorRT's versions differ: 8.6, 10.x, 11.x and TensorRT-RTX.

Enum members are looked up by name: their numbers move between versions. Networks are strongly typed wherever
TensorRT can (10 and later), so the data types of the ONNX file decide the precision.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import MissingExtraError, ModelError, UsageError
from sparsify.exporters.tensorrt_log import BuildLog, failure, listening, native_logger, native_monitor
from sparsify.progress import Progress

# The kinds of TensorRT, the modules that hold one (first found wins), and how to get it.
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
INSTALL = {
    "tensorrt": "pip install tensorrt-cu13",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}
OLDEST = (8, 6)
# The version that reads what opset 23 brought, and that opset.
_FUSED, _FUSED_OPSET = (10, 15), 23
_WITHOUT_GPU = "TensorRT-RTX builds without (--engine runtime=tensorrt-rtx)"
# What TensorRT-RTX builds for without a GPU: the architectures of its own default.
_TARGETS = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its marketing name and its compute capability as text, as 9.0."""

    name: str
    compute_capability: str


def find_gpu(index: int = 0) -> Gpu | None:
    """The CUDA device ``index`` as the driver numbers it, or None without driver or device; needs no CUDA build."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")


class TensorRt:
    """One installed TensorRT.

    Attributes:
        module: the Python module, for the calls that are the same in every version.
        kind: ``tensorrt`` or ``tensorrt-rtx``.
        version: as the module states it, ``11.4.0.106``.
    """

    def __init__(self, module: Any, kind: str) -> None:
        self.module = module
        self.kind = kind
        self.version = str(module.__version__)

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """The version as numbers, as far as they are numbers."""
        return version_tuple(self.version)

    @property
    def label(self) -> str:
        """Kind and version for messages and reports."""
        return f"{self.kind} {self.version}"

    @property
    def strongly_typed(self) -> bool:
        """Whether the data types of the ONNX file decide the precision; False on 8.x, which has a flag for FP16."""
        return "STRONGLY_TYPED" in self.module.NetworkDefinitionCreationFlag.__members__

    @property
    def chooses_tactics_at_build(self) -> bool:
        """Whether a build decides which kernels run; TensorRT-RTX leaves that to the device that runs the engine."""
        return self.kind == "tensorrt"

    def logger(self, log: BuildLog) -> Any:
        """An ``ILogger`` that writes every message to ``log``; keep it alive as long as what was made with it."""
        return native_logger(self.module.ILogger, log)

    def builder(self, logger: Any, log: BuildLog) -> Any:
        """A ``Builder``.

        Raises:
            UsageError: it cannot be made; TensorRT needs a GPU for it, TensorRT-RTX does not.
        """
        return self._make("Builder", logger, log)

    def _make(self, what: str, logger: Any, log: BuildLog) -> Any:
        why = "it is null"
        try:
            made = getattr(self.module, what)(logger)
        except Exception as error:  # pybind's TypeError for a null pointer, or RuntimeError, by version
            made, why = None, str(error)
        if made is None:
            remedy = "a CUDA device and a driver that fits are needed"
            raise UsageError(f"{self.label}: no {what.lower()}: {log.last_error()} ({why}); {remedy}")
        return made

    def network(self, builder: Any) -> Any:
        """An empty network: strongly typed where the version can, else with an explicit batch."""
        flags = self.module.NetworkDefinitionCreationFlag.__members__
        wanted = ("STRONGLY_TYPED",) if self.strongly_typed else ("EXPLICIT_BATCH",)
        return builder.create_network(sum(1 << int(flags[name]) for name in wanted))

    def has_flag(self, name: str) -> bool:
        """Whether this version has the builder flag ``name``."""
        return name in self.module.BuilderFlag.__members__

    def set_flags(self, config: Any, names: Iterable[str]) -> None:
        """Set builder flags by name.

        Raises:
            UsageError: this version has no such flag.
        """
        for name in names:
            if not self.has_flag(name):
                raise UsageError(f"{self.label} has no builder flag {name}; leave its option out")
            config.set_flag(self.module.BuilderFlag.__members__[name])

    def set_workspace(self, config: Any, limit_bytes: int) -> None:
        """Limit the scratch memory that a kernel may ask for, in bytes."""
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, limit_bytes)

    def set_detailed(self, config: Any) -> None:
        """Have the engine keep what the inspector needs to name tactics."""
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED

    def set_hardware_compatibility(self, config: Any, level: str) -> None:
        """Let the engine run on other GPUs: ``AMPERE_PLUS`` or ``SAME_COMPUTE_CAPABILITY``.

        Raises:
            UsageError: this version, or this kind, has no such level.
        """
        levels = self.module.HardwareCompatibilityLevel.__members__
        if self.kind != "tensorrt" or level not in levels:
            raise UsageError(f"{self.label} has no hardware compatibility level {level}; leave hardware= out")
        config.hardware_compatibility_level = levels[level]

    def set_targets(self, config: Any, capabilities: Sequence[str]) -> tuple[str, ...]:
        """TensorRT-RTX: the compute capabilities (``8.0``) to build for, on a machine that need not have them.

        Without any it is the GPU that is here, or else those of ``_TARGETS``; the choice is returned.

        Raises:
            UsageError: not TensorRT-RTX, or it does not know the capability.
        """
        known = self.module.ComputeCapability.__members__ if self.kind == "tensorrt-rtx" else {}
        if not known:
            raise UsageError(f"{self.label} builds for the GPU it runs on; leave targets= out")
        gpu = find_gpu()
        if not capabilities and gpu is not None:
            members, capabilities = [known["CURRENT"]], [gpu.compute_capability]
        else:
            capabilities = capabilities or _TARGETS
            members = [known.get("SM" + capability.replace(".", "")) for capability in capabilities]
        config.num_compute_capabilities = len(members)
        for index, (member, capability) in enumerate(zip(members, capabilities, strict=True)):
            if member is None or not config.set_compute_capability(member, index):
                choices = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name.startswith("SM"))
                raise UsageError(f"{self.label} cannot build for compute capability {capability}; choose of {choices}")
        return tuple(capabilities)

    def set_tactic_sources(self, config: Any, names: Sequence[str]) -> None:
        """Choose kernels from these libraries only, as JIT_CONVOLUTIONS.

        Raises:
            UsageError: this version has no such library, or refuses the choice.
        """
        sources = self.module.TacticSource.__members__
        for name in names:
            if name not in sources:
                raise UsageError(f"{self.label} has no tactic source {name}; choose of {', '.join(sources)}")
        if not config.set_tactic_sources(sum(1 << int(sources[name]) for name in names)):
            raise UsageError(f"{self.label} refuses tactic-sources={','.join(names)}; leave it out")

    def allow_decomposition(self, network: Any) -> None:
        """Let attention run as ordinary kernels where no fused one fits: without this such a build fails."""
        kind = getattr(self.module.LayerType, "ATTENTION_INPUT", None)
        for index in range(network.num_layers) if kind is not None else ():
            layer = network.get_layer(index)
            if layer.type == kind:
                # The bindings hand out the base class; this is their own way to the derived one.
                layer.__class__ = self.module.IAttentionInputLayer
                attention = layer.attention
                attention.decomposable = True

    def monitor(self, config: Any, log: BuildLog, progress: Progress) -> Any:
        """Report the build to ``progress`` and let a reason in ``log`` cancel it; nothing of the kind on 8.x.

        Keep what is returned alive during the build: the configuration holds no reference.
        """
        base: Any = getattr(self.module, "IProgressMonitor", None)
        if base is None:
            return None
        native = native_monitor(base, log, progress)
        config.progress_monitor = native
        return native

    def runtime(self, logger: Any, log: BuildLog, *, host_code: bool) -> Any:
        """A ``Runtime``.

        Args:
            logger: of ``log``.
            log: what TensorRT said.
            host_code: allow engines that hold code for the CPU, as those for several versions do; only for bytes that
                are trusted.

        Raises:
            UsageError: it cannot be made, as without a GPU.
        """
        runtime = self._make("Runtime", logger, log)
        runtime.engine_host_code_allowed = host_code
        return runtime

    def deserialize(self, runtime: Any, plan: Any, path: Path, log: BuildLog) -> Any:
        """The engine of the bytes ``plan`` from ``path``; check its header and trust first.

        Raises:
            ModelError: TensorRT refuses the bytes.
            SparsifyError: not enough GPU memory.
        """
        with listening(log):
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise failure(log, f"{path}: {self.label} refuses the engine", ModelError)
        return engine

    def inspect(self, engine: Any) -> str:
        """What the engine consists of, as TensorRT's own JSON text."""
        inspector = engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))

    def device_memory_bytes(self, engine: Any) -> int:
        """Activation memory of an execution context in bytes, the largest over all profiles."""
        return int(
            engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
        )

    def streamable_bytes(self, engine: Any) -> int:
        """Bytes of weights that may stay in host memory; 0 unless built with weight streaming."""
        return int(getattr(engine, "streamable_weights_size", 0))


def version_tuple(version: str) -> tuple[int, ...]:
    """``11.4.0.106`` -> (11, 4, 0, 106); stops at the first part that is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def load_tensorrt(kind: str | None = None) -> TensorRt:
    """The installed TensorRT of ``kind`` (``tensorrt`` or ``tensorrt-rtx``), or whichever is found, in this order.

    One that is installed and cannot be loaded is an error, not a reason to take the other kind.

    Raises:
        UsageError: no such kind, or a version before 8.6.
        MissingExtraError: not installed, or its libraries cannot be loaded.
    """
    if kind is not None and kind not in MODULES:
        raise UsageError(f"TensorRT kind {kind!r}: choose one of {', '.join(MODULES)}")
    kinds = list(MODULES) if kind is None else [kind]
    for candidate in kinds:
        broken: list[str] = []
        for name in MODULES[candidate]:
            if importlib.util.find_spec(name) is None:
                continue
            try:
                found = TensorRt(importlib.import_module(name), candidate)
            except (ImportError, OSError, AttributeError) as error:
                broken.append(f"{name} is installed but cannot be loaded ({' '.join(str(error).split())[:200]})")
                continue
            if candidate == "tensorrt" and found.version_tuple < OLDEST:
                raise UsageError(f"{found.label} is too old; 8.6 or newer is needed: {INSTALL[candidate]}")
            return found
        if broken:
            others = [f"choose --engine runtime={other}" for other in kinds if other != candidate]
            remedy = " or ".join([f"run: {INSTALL[candidate]}", *others])
            raise MissingExtraError(f"{'; '.join(broken)}; {remedy}")
    install = " or ".join(INSTALL[candidate] for candidate in kinds)
    raise MissingExtraError(f"{' and '.join(kinds)} not found; run: {install}")


def check_opset(api: TensorRt, opset: int) -> None:
    """Refuse an opset of the export that this TensorRT does not read; asked before the hours of work.

    Raises:
        UsageError: with the opset to take instead.
    """
    if api.kind == "tensorrt" and opset >= _FUSED_OPSET and api.version_tuple < _FUSED:
        raise UsageError(
            f"{api.label} does not read opset {opset}, whose Attention came in 10.14, RMSNormalization and "
            "RotaryEmbedding in 10.15; pass --opset 18 or install a newer TensorRT"
        )


def check_gpu(api: TensorRt, *, refit: bool = False) -> None:
    """Refuse a build, with ``refit=on`` or without, that this machine cannot do; asked before the hours of work.

    Raises:
        UsageError: it needs a CUDA device and there is none.
    """
    if find_gpu() is not None or (api.kind == "tensorrt-rtx" and not refit):
        return
    what = "for refit=on" if api.kind == "tensorrt-rtx" else f"to build; {_WITHOUT_GPU}"
    raise UsageError(f"{api.label}: no CUDA device, and it needs one {what}")
