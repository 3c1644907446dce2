"""Proof of sparse kernels: what TensorRT's build log and engine inspector say of every linear layer.

Sources, in the order in which they are believed: the tactic names of the finished engine (inspector), then the report
at the end of tactic selection in the build log. An engine is called sparse only where one of them names a sparse
kernel. The log is worded as by 8.x (``Layers eligible for sparse math``) or by 10 and later (``Found N layer(s)``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_evidence import EngineLayer, SparsityReport, onnx_nodes
from sparsify.exporters.tensorrt_layout import LinearLayout
from sparsify.files import read_json

FORMAT = "sparsify-tensorrt-proof/1"
STATUSES = ("sparse", "dense", "unknown")
_SPARSE_TACTIC = re.compile(r"sparse|sptensor", re.IGNORECASE)


@dataclass(frozen=True)
class LinearProof:
    """One linear of the ONNX graph.

    Attributes:
        linear: its name in the checkpoint where the initializer carries it.
        node: name of the ONNX node.
        eligible: whether the graph allows a sparse kernel.
        kernel: tactic that runs it, the sparse one where profiles differ; empty where TensorRT names none.
        sparse: whether that is a sparse kernel.
        why: why it is not, in one phrase.
    """

    linear: str
    node: str
    eligible: bool
    kernel: str
    sparse: bool
    why: str


@dataclass(frozen=True)
class Proof:
    """Whether an engine uses sparse kernels, and where.

    Attributes:
        status: ``sparse``, ``dense``, or ``unknown`` where TensorRT does not tell.
        reason: what the status rests on, in one line.
        reports: of the build log, one for each tactic selection.
        linears: every layer with a weight, in the order of the graph.
    """

    status: str
    reason: str
    reports: tuple[SparsityReport, ...]
    linears: tuple[LinearProof, ...]

    def engaged(self) -> dict[str, str]:
        """Per linear the sparse kernel, ``dense``, or ``unknown`` where the engine does not name its kernel."""
        return {row.linear: _engaged(row, self.status) for row in self.linears}

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ``read_proof`` reads them."""
        return {"format": FORMAT, **asdict(self)}


def _engaged(row: LinearProof, status: str) -> str:
    if row.sparse:
        return row.kernel or "sparse"
    return "dense" if row.kernel or not row.eligible or status == "dense" else "unknown"


def linear_name(initializer: str) -> str:
    """The linear that an initializer of ours belongs to; other names stay as they are."""
    return initializer.removesuffix(".transposed").removesuffix(".weight")


def make_proof(
    layout: Sequence[LinearLayout],
    reports: tuple[SparsityReport, ...],
    layers: Sequence[EngineLayer],
    *,
    sparse_allowed: bool,
    chosen_later: str = "",
) -> Proof:
    """Bring together what is known of an engine.

    Args:
        layout: what ``check_layout`` said of its ONNX file.
        reports: of its build log.
        layers: of its inspector, else of its log; empty where neither lists any.
        sparse_allowed: whether it was built with ``SPARSE_WEIGHTS``.
        chosen_later: why its kernels are not known yet; empty where the build chose them.
    """
    listed = {node for report in reports for name in report.eligible for node in onnx_nodes(name)}
    picked = {node for report in reports for name in report.chosen for node in onnx_nodes(name)}
    kernels: dict[str, list[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            if layer.tactic:
                kernels.setdefault(node, []).append(layer.tactic)
    linears = []
    for row in layout:
        tactics = kernels.get(row.node, [])
        sparse = [tactic for tactic in tactics if _SPARSE_TACTIC.search(tactic)]
        # The finished engine overrules the log, which reports on every selection, also on ones that are redone.
        is_sparse = bool(sparse) if tactics else row.node in picked
        kernel = (sparse or tactics or [""])[0]
        why = "" if is_sparse else _why(row, kernel, row.node in listed, sparse_allowed, chosen_later)
        linears.append(LinearProof(linear_name(row.weight), row.node, row.eligible, kernel, is_sparse, why))
    status, reason = _status(linears, reports, sparse_allowed, chosen_later)
    return Proof(status, reason, reports, tuple(linears))


def _why(row: LinearLayout, kernel: str, listed: bool, sparse_allowed: bool, chosen_later: str) -> str:
    if not row.eligible:
        return row.why
    if not sparse_allowed:
        return "built without sparse tactics"
    if chosen_later:
        return chosen_later
    small = f" ({row.why})" if row.why else ""
    if listed:
        return f"a dense kernel was faster{f': {kernel}' if kernel else ''}{small}"
    if kernel:
        return f"no sparse kernel was faster than {kernel}{small}"
    return f"inside a block whose kernels TensorRT does not name; compare with the dense twin{small}"


def _status(
    linears: Sequence[LinearProof], reports: Sequence[SparsityReport], sparse_allowed: bool, chosen_later: str
) -> tuple[str, str]:
    n_sparse = sum(row.sparse for row in linears)
    n_chosen = max((report.n_chosen for report in reports), default=0)
    n_found = max((report.n_eligible for report in reports), default=0)
    named = sum(bool(row.kernel) for row in linears)
    if not sparse_allowed:
        return "dense", "built without sparse tactics"
    if n_sparse:
        return "sparse", f"sparse kernels run {n_sparse} of {len(linears)} linears"
    if chosen_later:
        return "unknown", chosen_later
    if n_chosen and not named:
        return "sparse", f"the build log reports {n_chosen} layers with sparse tactics, without naming linears"
    if named and named == len(linears):
        return (
            "dense",
            f"TensorRT chose a dense kernel for all {named} linears, {n_found} of them eligible for a sparse one",
        )
    if reports and not n_chosen:
        kept = f"and kept dense kernels for all of the {n_found} eligible" if n_found else "and found none eligible"
        return "dense", f"TensorRT looked for layers with 2:4 weights {kept}"
    return "unknown", "TensorRT names neither eligible layers nor kernels; time the engine against its dense twin"


def read_proof(path: Path) -> Proof:
    """The proof in a ``tensorrt.json``.

    Raises:
        ModelError: missing or malformed.
    """
    try:
        value = read_json(path)
        if value["format"] != FORMAT or value["status"] not in STATUSES:
            raise ValueError(f"want format {FORMAT} and one of {', '.join(STATUSES)}")
        reports = tuple(
            SparsityReport(
                int(r["n_eligible"]),
                int(r["n_chosen"]),
                tuple(map(str, r["eligible"])),
                tuple(map(str, r["chosen"])),
            )
            for r in value["reports"]
        )
        linears = tuple(
            LinearProof(
                linear=str(r["linear"]),
                node=str(r["node"]),
                eligible=r["eligible"] is True,
                kernel=str(r["kernel"]),
                sparse=r["sparse"] is True,
                why=str(r["why"]),
            )
            for r in value["linears"]
        )
        return Proof(value["status"], str(value["reason"]), reports, linears)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: is not a proof of sparse kernels: {type(error).__name__}: {error}") from error
