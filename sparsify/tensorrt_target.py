"""Target ``tensorrt``: a standard ONNX export, the engines that TensorRT builds of it, and whether they compute it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ModelError, SparsifyError
from sparsify.progress import Progress

if TYPE_CHECKING:
    from sparsify.exporters.onnx_forms import Form
    from sparsify.exporters.tensorrt_options import EngineOptions


def write_tensorrt(
    checkpoint: Path,
    out: Path,
    body: dict[str, Any],
    forms: list[Form],
    options: EngineOptions,
    *,
    require_sparse: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Fill ``out`` with the ONNX artifact and its engines; returns what the manifest adds.

    Args:
        checkpoint: pruned checkpoint.
        out: existing folder.
        body: its manifest.
        forms: of the ONNX export.
        options: of the build.
        require_sparse: fail unless a sparse tactic was chosen.
        trust_remote_code: let the model's own code load.
        progress: told of the stages.

    Raises:
        SparsifyError: as ``write_onnx``, ``build_engine`` and ``engine_parity``; the log of the build is kept beside
            ``out``.
    """
    from sparsify.exporters.tensorrt_engine import LOG, build_engine
    from sparsify.onnx_target import write_onnx

    extra = write_onnx(checkpoint, out, body, forms, trust_remote_code=trust_remote_code, progress=progress)
    try:
        built = build_engine(out / "model.onnx", out, options, require_sparse=require_sparse, progress=progress)
        parity = engine_parity(checkpoint, out, trust_remote_code=trust_remote_code)
    except SparsifyError as error:
        # The folder goes with the failure; what TensorRT said about it is worth keeping.
        log = out.with_name(f"{out.name.removesuffix('.partial')}.{LOG}")
        if (out / LOG).exists():
            shutil.copyfile(out / LOG, log)
            raise type(error)(f"{error}; the log is {log}") from error
        raise
    facts = {
        "kind": built.header.kind,
        "version": built.header.version,
        "options": dict(built.header.options),
        "status": built.proof.status,
        "reason": built.proof.reason,
        "twin": built.proof.twin,
    }
    return {**extra, "tensorrt": {**facts, "parity": parity}}


def engine_parity(
    checkpoint: Path, artifact: Path, *, trust_engine: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """How far the engine in ``artifact`` is from PyTorch, on the GPU it is for; or why that was not run.

    Raises:
        VerificationError: further than its precision explains.
        SparsifyError: as ``TensorRtSession``.
    """
    import torch

    from sparsify.bench.engine_parity import check_engine
    from sparsify.exporters.tensorrt_engine import ENGINE
    from sparsify.exporters.tensorrt_header import read_header
    from sparsify.runtimes.tensorrt_session import TensorRtSession
    from sparsify.runtimes.torch_session import TorchSession

    if not torch.cuda.is_available():
        return {"not_run": "no CUDA device that torch can use"}
    header = read_header(artifact / ENGINE)
    # TensorRT-RTX captures no graph where weights are streamed.
    graphs = not (header.kind == "tensorrt-rtx" and header.weight_streaming)
    try:
        session = TensorRtSession(artifact, trust_engine=trust_engine, cuda_graphs=graphs)
    except ModelError as error:
        if header.kind == "tensorrt-rtx":  # built for other GPUs than the one here
            return {"not_run": str(error)}
        raise
    with session as engine, TorchSession(checkpoint, trust_remote_code=trust_remote_code) as reference:
        return asdict(check_engine(reference, engine, vocab_size=reference.vocab_size, precision=header.precision))
