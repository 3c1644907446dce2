"""New weights, with a mask of the same pattern, put into an engine that was built with ``refit=on``.

Kernels that were chosen for 2:4 weights compute nonsense on others, so every linear that ran on a sparse kernel has to
be 2:4 again; which two of four survive may differ.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError, VerificationError
from sparsify.exporters.tensorrt_api import TensorRt, find_gpu, load_tensorrt
from sparsify.exporters.tensorrt_engine import PROOF, describe
from sparsify.exporters.tensorrt_header import EngineHeader, check, read_header, write_header
from sparsify.exporters.tensorrt_log import BuildLog, failure, listening
from sparsify.exporters.tensorrt_proof import Proof, linear_name, read_proof
from sparsify.exporters.tensorrt_source import Source, read_source
from sparsify.exporters.tensorrt_trust import load_plan, remember, was_built_here
from sparsify.files import write_atomic, write_json


def check_refit(engine: Path) -> tuple[EngineHeader, TensorRt]:
    """Header of an engine that can be refitted on this machine, and the TensorRT for it; asked before an export.

    Raises:
        UsageError: not refittable, no GPU, or a TensorRT that cannot refit.
        ModelError: the engine or its header cannot be used here.
        MissingExtraError: TensorRT is absent.
    """
    header = read_header(engine)
    if not header.refit:
        raise UsageError(f"{engine}: was built without --engine refit=on; export it again with it")
    api, gpu = load_tensorrt(header.kind), find_gpu()
    if gpu is None:
        raise UsageError(f"{engine}: {api.label} needs a CUDA device to refit")
    if not hasattr(api.module, "OnnxParserRefitter"):
        raise UsageError(f"{api.label} cannot refit from ONNX; use TensorRT 10 or newer, or build again")
    check(engine, header, kind=api.kind, version=api.version, compute_capability=gpu.compute_capability)
    return header, api


def refit_engine(engine: Path, onnx_path: Path, *, trust_engine: bool = False) -> EngineHeader:
    """Replace the weights in ``engine`` by those of ``onnx_path``; returns the new header, which is also written.

    The file is replaced at once, after TensorRT accepted every weight. The proof beside it is brought up to date: it
    stays true, since kernels do not change. What was built here stays built here, and what was not does not become so.

    Args:
        engine: built with ``refit=on``; ``tensorrt.json`` lies beside it.
        onnx_path: the same graph with other weights.
        trust_engine: as ``load_plan``.

    Raises:
        UsageError: as ``check_refit``, or not built here and not vouched for.
        ModelError: a file that cannot be used.
        VerificationError: another graph, a layer that is not 2:4 where the engine needs it, or weights that TensorRT
            does not accept.
        OutputError: the engine cannot be written.
    """
    header, api = check_refit(engine)
    proof = read_proof(engine.with_name(PROOF), header.plan_sha256)
    source = read_source(onnx_path)
    if header.sparse:
        check_pattern(onnx_path, source, proof)
    ours = was_built_here(header.plan_sha256)
    plan = load_plan(engine, header, trust_engine=trust_engine)
    log = BuildLog()
    view = memoryview(_refitted(api, plan, header, engine, onnx_path, log))
    digest = hashlib.sha256(view).hexdigest()
    header = replace(header, source_sha256=source.sha256, plan_bytes=view.nbytes, plan_sha256=digest)
    write_atomic(engine, lambda temporary: temporary.write_bytes(view))
    write_header(engine, header)
    write_json(engine.with_name(PROOF), replace(proof, plans={**proof.plans, engine.name: digest}).to_json())
    if ours:
        remember(digest)
    return header


def _refitted(api: TensorRt, plan: bytes, header: EngineHeader, engine: Path, onnx_path: Path, log: BuildLog) -> Any:
    """The bytes of the engine with the weights of ``onnx_path``."""
    logger = api.logger(log)
    # The runtime has to outlive its engine.
    runtime = api.runtime(logger, log, host_code=header.version_compatible)
    loaded = api.deserialize(runtime, plan, engine, log)
    with listening(log):
        refitter = api.module.Refitter(loaded, logger)
        parser = api.module.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(onnx_path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise VerificationError(f"{onnx_path}: its weights do not fit {engine.name}: {describe(errors)}")
        missing = refitter.get_missing_weights()
        if missing:
            raise VerificationError(f"{onnx_path}: lacks weights that {engine.name} needs: {', '.join(missing[:3])}")
        if not refitter.refit_cuda_engine():
            raise failure(log, f"{engine}: {api.label} cannot refit it", VerificationError)
        return loaded.serialize()


def check_pattern(onnx_path: Path, source: Source, proof: Proof) -> None:
    """Refuse weights that an engine's sparse kernels cannot take.

    Every linear of the new graph has to be known to the proof. It has to be 2:4 unless it was not when the engine was
    built, or TensorRT named a dense kernel for it.

    Raises:
        VerificationError: the graphs differ, or a linear that the engine runs, or may run, on a sparse kernel is not
            2:4 now.
    """
    rows = {linear_name(row.weight): row for row in source.layout}
    known = {linear.linear: linear for linear in proof.linears}
    for name in sorted(rows.keys() ^ known.keys()):
        raise VerificationError(f"{onnx_path}: {name} is not in both this model and the engine's; build it again")
    for name, row in rows.items():
        linear = known[name]
        # Where TensorRT names no kernel, a linear that was eligible may run on a sparse one.
        if (linear.sparse or (linear.eligible and not linear.kernels)) and not row.eligible:
            raise VerificationError(f"{onnx_path}: {name}: {row.why}, and the engine needs it 2:4")
