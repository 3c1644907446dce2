"""Which kernels an engine runs for each linear: the proof of its build held against what the loaded engine says."""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_engine import PROOF
from sparsify.exporters.tensorrt_evidence import inspected_layers
from sparsify.exporters.tensorrt_header import EngineHeader
from sparsify.exporters.tensorrt_proof import LinearProof, Proof, read_proof


def engaged(engine: Path, header: EngineHeader, inspection: str) -> dict[str, str]:
    """Per linear ``sparse (TACTIC)``, ``dense`` or ``unknown (WHY)``; the proof beside the engine names the linears.

    ``sparse`` needs the loaded engine to name the tactic: a proof lies in a file that may belong to another build.
    Without a readable proof no linear is known by name, and the one row is the engine's own.

    Args:
        engine: the engine file.
        header: its header.
        inspection: the inspector's JSON of the loaded engine.
    """
    try:
        proof = read_proof(engine.with_name(PROOF))
    except ModelError as error:
        return {engine.name: f"unknown ({error})"}
    try:
        layers = inspected_layers(inspection)
    except ValueError as error:
        return {row.linear: f"unknown (the inspector's answer cannot be read: {error})" for row in proof.linears}
    tactics: dict[str, list[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            if layer.tactic:
                tactics.setdefault(node, []).append(layer.tactic)
    return {row.linear: _kernel(row, proof, header, tactics.get(row.node, [])) for row in proof.linears}


def _kernel(row: LinearProof, proof: Proof, header: EngineHeader, tactics: list[str]) -> str:
    # One layer has a tactic per profile; a sparse one in any of them is worth the name.
    sparse = [tactic for tactic in tactics if "sparse" in tactic.lower() or "sptensor" in tactic.lower()]
    if sparse:
        return f"sparse ({sparse[0]})"
    if tactics or not header.sparse or not row.eligible:
        return "dense"
    if row.sparse:
        return "unknown (the build reported a sparse kernel, the loaded engine names none)"
    return "dense" if proof.status == "dense" else f"unknown ({row.why or proof.reason})"
