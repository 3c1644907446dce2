"""Which kernels an engine runs for each linear: the proof of its build held against what the loaded engine says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_engine import PROOF
from sparsify.exporters.tensorrt_evidence import inspected_layers, is_sparse, kernels_of
from sparsify.exporters.tensorrt_header import EngineHeader
from sparsify.exporters.tensorrt_proof import SHARED, LinearProof, Proof, read_proof, sparse_in


def engaged(engine: Path, header: EngineHeader, inspection: str) -> dict[str, str]:
    """Per linear ``sparse in PROFILE (TACTIC)``, ``dense`` or ``unknown (WHY)``; the proof names the linears.

    ``sparse`` needs the loaded engine to name the tactic: the proof beside it is a file that anybody can edit. Without
    a proof of this engine no linear is known by name, and the one row is the engine's own.

    Args:
        engine: the engine file.
        header: its header.
        inspection: the inspector's JSON of the loaded engine.
    """
    try:
        proof = read_proof(engine.with_name(PROOF), header.plan_sha256)
    except ModelError as error:
        return {engine.name: f"unknown ({error})"}
    try:
        layers = inspected_layers(inspection)
    except ValueError as error:
        return {row.linear: f"unknown (the inspector's answer cannot be read: {error})" for row in proof.linears}
    kernels = kernels_of(layers, [profile.name for profile in header.profiles])
    return {row.linear: _kernel(row, proof, header, kernels.get(row.node, {})) for row in proof.linears}


def _kernel(row: LinearProof, proof: Proof, header: EngineHeader, kernels: Mapping[str, str]) -> str:
    sparse = sparse_in(kernels)
    if sparse:
        return f"{sparse} ({next(filter(is_sparse, kernels.values()))})" if row.eligible else SHARED
    if kernels or not header.sparse or not row.eligible:
        return "dense"
    if row.sparse:
        return "unknown (the build reported a sparse kernel, the loaded engine names none)"
    return "dense" if proof.status == "dense" else f"unknown ({row.why or proof.reason})"
