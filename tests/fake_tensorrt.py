"""A stand-in for TensorRT with a GPU: the calls that our code makes, and answers that follow from the ONNX file.

It parses with onnx, calls a MatMul eligible where its own loop finds 2:4, chooses a sparse tactic for those that are
large enough, and reports both in the words of the version it plays. ``test_tensorrt_api`` holds its classes against
the real bindings: it may offer nothing that they do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

SPARSE, DENSE = "sm90_xmma_sparse_gemm_f16f16_tilesize128x128x64", "sm90_xmma_gemm_f16f16_tilesize128x64x64"


@dataclass
class Behaviour:
    """What the stand-in does: ``chosen_above`` is the smallest dimension from which a sparse tactic wins."""

    version: str = "11.4.0.106"
    chosen_above: int = 0
    sparse_profiles: tuple[int, ...] = (0, 1)
    errors: list[str] = field(default_factory=list)
    detailed: bool = True
    report: bool = True
    refit_accepts: bool = True
    twin_errors: list[str] = field(default_factory=list)
    takes_sources: bool = True
    builds: list[dict[str, Any]] = field(default_factory=list)


def _enum(name: str, members: list[str]) -> Any:
    return IntEnum(name, {member: number for number, member in enumerate(members)})


class ILogger:
    Severity = _enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor: ...


def _two_four(weight: Any) -> bool:
    for column in weight.T:
        for start in range(0, len(column), 4):
            if sum(float(value) != 0 for value in column[start : start + 4]) > 2:
                return False
    return len(weight) % 4 == 0


def make_tensorrt(behaviour: Behaviour) -> Any:
    """The module ``tensorrt`` of ``behaviour``."""
    old = behaviour.version.startswith("8")
    severity = ILogger.Severity

    class INetworkDefinition:
        num_layers = 0

        def __init__(self, flags: int) -> None:
            self.flags = flags
            self.graph: Any = None

        @property
        def num_inputs(self) -> int:
            return len(self.graph.input)

        def get_input(self, index: int) -> Any:
            value = self.graph.input[index]
            shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            return SimpleNamespace(name=value.name, shape=shape)

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            self.num_errors = 0

        def parse_from_file(self, model: str) -> bool:
            import onnx

            self._network.graph = onnx.load(model).graph
            return True

        def get_error(self, index: int) -> Any:
            raise IndexError(index)

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.shapes[input] = (min, opt, max)

    class ITimingCache:
        def __init__(self, entries: set[str]) -> None:
            self.entries = entries

        def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
            self.entries |= input_cache.entries
            return True

        def serialize(self) -> bytes:
            return json.dumps(sorted(self.entries)).encode()

    class IBuilderConfig:
        def __init__(self) -> None:
            self.profiling_verbosity = 0
            self.builder_optimization_level = 3
            self.hardware_compatibility_level = 0
            self.progress_monitor: Any = None
            self.flags: set[str] = set()
            self._cache: Any = None
            self._pools: dict[Any, int] = {}
            self._profiles: list[Any] = []

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool.name] = pool_size

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            return behaviour.takes_sources

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(set(json.loads(serialized_timing_cache or b"[]")))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int = 0) -> Any:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            say: Callable[[Any, str], None] = self.logger.log
            behaviour.builds.append({"flags": config.flags, "network": network.flags, "profiles": config._profiles})
            behaviour.builds[-1] |= {"pools": config._pools, "level": config.builder_optimization_level}
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building engine", None, 2)
                for step in range(2):
                    if not config.progress_monitor.step_complete("Building engine", step):
                        return None
                config.progress_monitor.phase_finish("Building engine")
            errors = behaviour.errors or ([] if "SPARSE_WEIGHTS" in config.flags else behaviour.twin_errors)
            if errors:
                for message in errors:
                    say(severity.ERROR, message)
                return None
            layers = _layers(network.graph, behaviour, "SPARSE_WEIGHTS" in config.flags)
            if behaviour.report:
                for line in _report(layers, old):
                    say(severity.INFO, line)
            if config._cache is not None:
                config._cache.entries |= {layer["Name"] for layer in layers}
            plan: dict[str, Any] = {"flags": sorted(config.flags), "layers": layers if behaviour.detailed else []}
            plan["weights"] = {tensor.name: tensor.raw_data.hex()[:64] for tensor in network.graph.initializer}
            return json.dumps(plan).encode()

    class EngineInspector:
        def __init__(self, plan: Any) -> None:
            self._plan = plan

        def get_engine_information(self, format: Any) -> str:
            return json.dumps({"Layers": self._plan["layers"], "Bindings" if old else "I/O Tensors": []})

    class ICudaEngine:
        def __init__(self, plan: Any) -> None:
            self._plan = plan

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self._plan)

        def serialize(self) -> bytes:
            return json.dumps(self._plan).encode()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            plan = json.loads(serialized_engine)
            if "VERSION_COMPATIBLE" in plan["flags"] and not self.engine_host_code_allowed:
                self.logger.log(severity.ERROR, "host code is not allowed")
                return None
            return ICudaEngine(plan)

    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            self._engine = engine
            self._weights: dict[str, str] = {}

        def get_missing_weights(self) -> list[str]:
            return sorted(set(self._engine._plan["weights"]) - set(self._weights))

        def refit_cuda_engine(self) -> bool:
            self._engine._plan["weights"] = self._weights
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Any, logger: Any) -> None:
            self._refitter = refitter
            self.num_errors = 0

        def refit_from_file(self, model: str) -> bool:
            import onnx

            graph = onnx.load(model).graph
            self._refitter._weights = {tensor.name: tensor.raw_data.hex()[:64] for tensor in graph.initializer}
            return behaviour.refit_accepts

        def get_error(self, index: int) -> Any:
            raise IndexError(index)

    common = ["SPARSE_WEIGHTS", "TF32", "REFIT", "VERSION_COMPATIBLE"]
    module = SimpleNamespace(
        __version__=behaviour.version,
        ILogger=ILogger,
        Builder=Builder,
        INetworkDefinition=INetworkDefinition,
        IBuilderConfig=IBuilderConfig,
        IOptimizationProfile=IOptimizationProfile,
        ITimingCache=ITimingCache,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        ICudaEngine=ICudaEngine,
        EngineInspector=EngineInspector,
        NetworkDefinitionCreationFlag=_enum("F", ["EXPLICIT_BATCH"] if old else ["STRONGLY_TYPED"]),
        BuilderFlag=_enum("B", [*(["FP16", "INT8"] if old else ["WEIGHT_STREAMING"]), *common]),
        MemoryPoolType=_enum("M", ["WORKSPACE"]),
        ProfilingVerbosity=_enum("P", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"]),
        HardwareCompatibilityLevel=_enum("H", ["NONE", "AMPERE_PLUS"]),
        TacticSource=_enum("T", ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]),
        LayerInformationFormat=_enum("L", ["ONELINE", "JSON"]),
        LayerType=_enum("LayerType", ["MATRIX_MULTIPLY"]),
    )
    if not old:
        module.IProgressMonitor = IProgressMonitor
        module.Refitter = Refitter
        module.OnnxParserRefitter = OnnxParserRefitter
    return module


def _layers(graph: Any, behaviour: Behaviour, allowed: bool) -> list[dict[str, Any]]:
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    layers: list[dict[str, Any]] = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in tensors:
            continue
        weight = np.asarray(onnx.numpy_helper.to_array(tensors[node.input[1]]), dtype=np.float32)
        eligible = allowed and _two_four(weight)
        for profile, suffix in enumerate(("", " [profile 1]")):
            chosen = eligible and min(weight.shape) > behaviour.chosen_above and profile in behaviour.sparse_profiles
            layer = {"Name": f"{node.name}{suffix}_myl3_{len(layers)}", "LayerType": "gemm", "Eligible": eligible}
            metadata = f"[ONNX Layer: {node.name}]"
            layers.append({**layer, "TacticName": SPARSE if chosen else DENSE, "Metadata": metadata, "Node": node.name})
    return layers


def _report(layers: list[dict[str, Any]], old: bool) -> list[str]:
    eligible = list(dict.fromkeys(layer["Node"] for layer in layers if layer["Eligible"]))
    chosen = list(dict.fromkeys(layer["Node"] for layer in layers if layer["TacticName"] == SPARSE))
    if old:
        return [
            f"(Sparsity) Layers eligible for sparse math: {', '.join(eligible)}",
            f"(Sparsity) TRT inference plan picked sparse implementation for layers: {', '.join(chosen)}",
        ]
    return [
        f"(Sparsity) Found {len(eligible)} layer(s) eligible to use sparse tactics: {', '.join(eligible)}",
        f"(Sparsity) Chose {len(chosen)} layer(s) using sparse tactics: {', '.join(chosen)}",
    ]
