"""Build of TensorRT engines from an ONNX file: the sparse one, its dense twin, and the proof of what was chosen.

Into the output folder go ``model.engine`` and ``dense.engine`` with their headers, the complete logs of TensorRT
(``build.log``, ``dense.log``) and ``tensorrt.json``, the proof. Every file appears whole or not at all; the logs grow
while the build runs, and stay when it fails. What can be lost after minutes of building is little: folders are tried
before, the engine is written first of all, and a twin that fails is recorded and costs no engine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError, OutputError, SparsifyError, UsageError, VerificationError
from sparsify.exporters.tensorrt_api import Gpu, TensorRt, find_gpu, load_tensorrt
from sparsify.exporters.tensorrt_evidence import EngineLayer, inspected_layers, logged_layers, parse_log
from sparsify.exporters.tensorrt_header import EngineHeader, Profile, header_path, write_header
from sparsify.exporters.tensorrt_layout import summary
from sparsify.exporters.tensorrt_log import BuildLog, failure, listening
from sparsify.exporters.tensorrt_options import EngineOptions, profiles
from sparsify.exporters.tensorrt_proof import Proof, make_proof
from sparsify.exporters.tensorrt_source import Source, read_source
from sparsify.exporters.tensorrt_timing import TimingCache
from sparsify.exporters.tensorrt_trust import open_registry, remember
from sparsify.files import write_atomic, write_json, writing
from sparsify.progress import Progress, Silent

ENGINE, TWIN, PROOF = "model.engine", "dense.engine", "tensorrt.json"
LOG, TWIN_LOG = "build.log", "dense.log"
_LATER = "TensorRT-RTX chooses kernels on the device at run time: the build proves nothing"


@dataclass(frozen=True)
class EngineBuild:
    """What a build made.

    Attributes:
        engine: the engine file.
        header: its header.
        proof: where it uses sparse kernels.
        twin: the dense engine of the same ONNX file; None where ``proof.twin`` says why there is none.
    """

    engine: Path
    header: EngineHeader
    proof: Proof
    twin: Path | None


def build_engine(
    onnx_path: Path,
    out: Path,
    options: EngineOptions | None = None,
    *,
    require_sparse: bool = False,
    twin: bool = True,
    progress: Progress | None = None,
) -> EngineBuild:
    """Build an engine of ``onnx_path`` into the existing folder ``out``, and its dense twin.

    Args:
        onnx_path: a decoder in the ``standard`` layout; external data lies beside it.
        out: existing folder; files of the same names in it are replaced.
        options: of the build; None for the defaults.
        require_sparse: fail where the engine is not proven to use sparse kernels; only its log is then left.
        twin: also build the engine without sparse tactics, to compare with; not where ``options.sparse`` is off.
        progress: told of TensorRT's phases; an exception in it cancels the build.

    Raises:
        UsageError: options that this TensorRT cannot fulfil, or no GPU to build on.
        MissingExtraError: TensorRT or onnx is not installed.
        ModelError: the ONNX file cannot be used.
        OutputError: ``out`` is not a folder, or it, the record of engines or the timing cache cannot be written.
        VerificationError: ``require_sparse`` is not fulfilled.
        SparsifyError: TensorRT gave up, as for want of memory.
    """
    options, progress = options or EngineOptions(), progress or Silent()
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder")
    if require_sparse and not options.sparse:
        raise UsageError("--require-sparse and engine option sparse=off: leave one of them out")
    api = load_tensorrt(options.runtime)
    if require_sparse and not api.chooses_tactics_at_build:
        raise VerificationError(f"--require-sparse: {_LATER}; build with TensorRT, or leave it out")
    source = read_source(onnx_path)
    progress.notice(f"{onnx_path.name}: {summary(source.layout)}")
    if require_sparse and not any(row.eligible for row in source.layout):
        raise VerificationError(f"{onnx_path}: --require-sparse: {summary(source.layout)}")
    open_registry()
    header, proof = _build(api, source, out / ENGINE, options, progress)
    if require_sparse and proof.status != "sparse":
        (out / ENGINE).unlink()
        header_path(out / ENGINE).unlink()
        raise VerificationError(f"{onnx_path}: --require-sparse: {proof.reason}")
    progress.notice(f"{ENGINE}: {proof.status}: {proof.reason}")
    proof = replace(proof, plans={ENGINE: header.plan_sha256}, twin="not asked for")
    write_json(out / PROOF, proof.to_json())
    if twin and options.sparse:
        try:
            dense, _ = _build(api, source, out / TWIN, replace(options, sparse=False), progress)
            proof = replace(proof, plans={**proof.plans, TWIN: dense.plan_sha256}, twin="")
        except SparsifyError as error:
            proof = replace(proof, twin=f"failed ({error})")
            for leftover in (out / TWIN, header_path(out / TWIN)):
                leftover.unlink(missing_ok=True)
            progress.notice(f"{TWIN}: {proof.twin}; there is nothing to compare {ENGINE} with")
        write_json(out / PROOF, proof.to_json())
    return EngineBuild(out / ENGINE, header, proof, out / TWIN if TWIN in proof.plans else None)


def _build(
    api: TensorRt, source: Source, engine: Path, options: EngineOptions, progress: Progress
) -> tuple[EngineHeader, Proof]:
    """One engine: written with its header, remembered as ours, and its kernels looked at."""
    log_path = engine.with_name(LOG if engine.name == ENGINE else TWIN_LOG)
    gpu = find_gpu()
    start = time.monotonic()
    with writing(log_path), log_path.open("w", encoding="utf-8") as file:
        log = BuildLog(file)
        with listening(log):
            logger = api.logger(log)
            builder = api.builder(logger, log)
            network = parse(api, builder, logger, source)
            config = builder.create_builder_config()
            capabilities = _configure(api, config, source, options, gpu)
            shapes = _add_profiles(builder, network, config, options, source, log)
            cache = _timing_cache(api, options, gpu)
            if cache is not None:
                cache.attach(config)
            monitor = api.monitor(config, log, progress)
            plan = builder.build_serialized_network(network, config)
            del monitor
            if plan is None:
                raise failure(log, f"{source.path}: {api.label} cannot build an engine")
        view = memoryview(plan)
        header = EngineHeader(
            kind=api.kind,
            version=api.version,
            gpu=gpu.name if gpu else "",
            compute_capabilities=capabilities,
            hardware_compatibility=options.hardware,
            version_compatible=options.version_compatible,
            sparse=options.sparse,
            precision=source.precision,
            refit=options.refit,
            weight_streaming=options.weight_streaming,
            profiles=shapes,
            source_sha256=source.sha256,
            plan_bytes=view.nbytes,
            plan_sha256=hashlib.sha256(view).hexdigest(),
            options=options.to_json(),
        )
        write_atomic(engine, lambda temporary: temporary.write_bytes(view))
        write_header(engine, header)
        remember(header.plan_sha256)
        progress.notice(f"{engine.name}: {view.nbytes} bytes in {time.monotonic() - start:.1f} s")
        if cache is not None:
            try:
                cache.update(config)
            except SparsifyError as error:
                progress.notice(f"the timing cache was not updated: {error}")
        layers = _inspect(api, plan, logger, log, gpu, options)
    with log_path.open(encoding="utf-8") as written:
        lines = written.readlines()
    return header, make_proof(
        source.layout,
        parse_log(lines),
        layers or logged_layers(lines),
        [profile.name for profile in shapes],
        sparse_allowed=options.sparse,
        chosen_later="" if api.chooses_tactics_at_build else _LATER,
    )


def _add_profiles(
    builder: Any, network: Any, config: Any, options: EngineOptions, source: Source, log: BuildLog
) -> tuple[Profile, ...]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = profiles({tensor.name: tuple(tensor.shape) for tensor in inputs}, options, source.path)
    for wanted in shapes:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in wanted.shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise failure(log, f"{source.path}: {wanted.name} profile", UsageError)
    return shapes


def parse(api: TensorRt, builder: Any, logger: Any, source: Source) -> Any:
    """The network of an ONNX file.

    Raises:
        ModelError: TensorRT's parser refuses it; names the node and the operator.
    """
    network = api.network(builder)
    parser = api.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(source.path)):
        api.allow_decomposition(network)
        return network
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    raise ModelError(f"{source.path}: {api.label} cannot parse it: {describe(errors)}")


def describe(errors: Sequence[Any]) -> str:
    """The first of a parser's errors in one line, with its node where the version tells."""
    if not errors:
        return "the parser gave no reason"
    parser_error = errors[0]
    text = " ".join(str(parser_error.desc()).split())[:300]
    if not hasattr(parser_error, "node_operator") or not parser_error.node_operator():
        return text
    return f"node {parser_error.node_name()} ({parser_error.node_operator()}): {text}"


def _configure(api: TensorRt, config: Any, source: Source, options: EngineOptions, gpu: Gpu | None) -> tuple[str, ...]:
    """Set everything but profiles and timing cache; returns the compute capabilities that the engine is for."""
    flags = [
        name
        for name, wanted in (
            ("SPARSE_WEIGHTS", options.sparse),
            ("VERSION_COMPATIBLE", options.version_compatible),
            ("WEIGHT_STREAMING", options.weight_streaming),
            ("REFIT", options.refit),
        )
        if wanted
    ]
    if not api.strongly_typed:
        if source.precision == "bfloat16":
            raise UsageError(
                f"{source.path}: {api.label} has no bfloat16; export with fp16 or use TensorRT 10 or newer"
            )
        flags += ["FP16"] * (source.precision == "float16") + ["INT8"] * source.quantized
    if api.kind == "tensorrt-rtx":
        if options.version_compatible:
            raise UsageError(f"{api.label} has no engines for several versions; leave version-compatible= out")
        # No CUDA graph can be captured of an engine that may allocate as it runs, which one that streams weights must.
        wanted = api.has_flag("REQUIRE_USER_ALLOCATION") and not options.weight_streaming
        flags += ["REQUIRE_USER_ALLOCATION"] * wanted
    api.set_flags(config, flags)
    api.set_detailed(config)
    if options.workspace_bytes is not None:
        api.set_workspace(config, options.workspace_bytes)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.tactic_sources:
        api.set_tactic_sources(config, options.tactic_sources)
    if options.hardware != "none":
        api.set_hardware_compatibility(config, options.hardware.upper().replace("-", "_"))
    if options.targets or api.kind == "tensorrt-rtx":
        return api.set_targets(config, options.targets)
    return (gpu.compute_capability,) if gpu else ()


def _timing_cache(api: TensorRt, options: EngineOptions, gpu: Gpu | None) -> TimingCache | None:
    if options.timing_cache is None:
        return None
    if api.kind != "tensorrt" or gpu is None:
        raise UsageError(f"{api.label} times no kernels here, so it keeps no timing cache; leave timing-cache= out")
    return TimingCache(options.timing_cache, api, gpu)


def _inspect(
    api: TensorRt, plan: Any, logger: Any, log: BuildLog, gpu: Gpu | None, options: EngineOptions
) -> tuple[EngineLayer, ...]:
    """The layers of the finished engine; none where it cannot be loaded here, and the log then says why."""
    if gpu is None or not api.chooses_tactics_at_build:
        return ()
    try:
        runtime = api.runtime(logger, log, host_code=options.version_compatible)
        engine = api.deserialize(runtime, plan, Path(ENGINE), log)
        return inspected_layers(api.inspect(engine))
    except (SparsifyError, ValueError) as error:
        log.write("ERROR", f"no inspection: {error}")
        return ()
