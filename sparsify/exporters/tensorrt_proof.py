"""Proof of sparse kernels: what TensorRT's build log and engine inspector say of every linear layer.

Sources, in the order in which they are believed: the tactic names of the finished engine (inspector), then the last
report of tactic selection in the build log. A linear is called sparse only where one of them names a sparse kernel for
it and its weight is one that a sparse kernel can take. The log is worded as by 8.x (``Layers eligible for sparse
math``) or by 10 and later (``Found N layer(s)``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_evidence import EngineLayer, SparsityReport, is_sparse, kernels_of, onnx_nodes
from sparsify.exporters.tensorrt_layout import LinearLayout
from sparsify.files import read_json

FORMAT = "sparsify-tensorrt-proof/1"
STATUSES = ("sparse", "dense", "unknown")
SHARED = "unknown (kernel is shared)"
_CONTRADICTION = "the build log's selections contradict each other and the engine names no kernel"


@dataclass(frozen=True)
class LinearProof:
    """One linear of the ONNX graph.

    Attributes:
        linear: its name in the checkpoint where the initializer carries it.
        node: name of the ONNX node.
        eligible: whether the graph allows a sparse kernel.
        kernels: profile -> tactic that runs it there, where TensorRT names one.
        sparse: whether a sparse kernel runs it, in one profile at least.
        why: where it is sparse, or why it is not, in one phrase.
    """

    linear: str
    node: str
    eligible: bool
    kernels: Mapping[str, str]
    sparse: bool
    why: str


@dataclass(frozen=True)
class Proof:
    """Whether an engine uses sparse kernels, and where.

    Attributes:
        status: ``sparse``, ``dense``, or ``unknown`` where TensorRT does not tell.
        reason: what the status rests on, in one line.
        reports: of the build log, one for each tactic selection; the last one counts.
        linears: every layer with a weight, in the order of the graph.
        plans: engine file -> SHA-256 of the engines that this is about: the one it proves, and its twin.
        twin: what became of the dense twin, where there is none: ``not asked for`` or ``failed (WHY)``.
    """

    status: str
    reason: str
    reports: tuple[SparsityReport, ...]
    linears: tuple[LinearProof, ...]
    plans: Mapping[str, str] = field(default_factory=dict)
    twin: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ``read_proof`` reads them."""
        return {"format": FORMAT, **asdict(self)}


def sparse_in(kernels: Mapping[str, str]) -> str:
    """``sparse in PROFILE`` with all the profiles whose kernel is sparse, and ``dense in`` the others; empty for none.

    Args:
        kernels: profile -> tactic.
    """
    sparse = [profile for profile, tactic in kernels.items() if is_sparse(tactic)]
    dense = [profile for profile in kernels if profile not in sparse]
    parts = [f"{what} in {' and '.join(names)}" for what, names in (("sparse", sparse), ("dense", dense)) if names]
    return ", ".join(parts) if sparse else ""


def linear_name(initializer: str) -> str:
    """The linear that an initializer of ours belongs to; other names stay as they are."""
    return initializer.removesuffix(".transposed").removesuffix(".weight")


def make_proof(
    layout: Sequence[LinearLayout],
    reports: tuple[SparsityReport, ...],
    layers: Sequence[EngineLayer],
    profiles: Sequence[str],
    *,
    sparse_allowed: bool,
    chosen_later: str = "",
) -> Proof:
    """Bring together what is known of an engine.

    Args:
        layout: what ``check_layout`` said of its ONNX file.
        reports: of its build log.
        layers: of its inspector, else of its log; empty where neither lists any.
        profiles: names of its profiles, in order.
        sparse_allowed: whether it was built with ``SPARSE_WEIGHTS``.
        chosen_later: why its kernels are not known yet; empty where the build chose them.
    """
    last = reports[-1] if reports else SparsityReport(0, 0, (), ())
    listed = {node for name in last.eligible for node in onnx_nodes(name)}
    picks = [{node for name in report.chosen for node in onnx_nodes(name)} for report in reports] or [set()]
    kernels = kernels_of(layers, profiles)
    linears = []
    for row in layout:
        own = kernels.get(row.node, {})
        # The finished engine overrules the log.
        sparse = row.eligible and (bool(sparse_in(own)) if own else all(row.node in pick for pick in picks))
        if sparse:
            why = sparse_in(own) or "sparse by the build log, which names no profile"
        elif row.eligible and not own and any(row.node in pick for pick in picks):
            why = _CONTRADICTION
        else:
            why = _why(row, own, row.node in listed, sparse_allowed, chosen_later)
        linears.append(LinearProof(linear_name(row.weight), row.node, row.eligible, own, sparse, why))
    status, reason = _status(linears, reports, sparse_allowed, chosen_later)
    return Proof(status, reason, reports, tuple(linears))


def _why(row: LinearLayout, kernels: Mapping[str, str], listed: bool, sparse_allowed: bool, chosen_later: str) -> str:
    if not row.eligible:
        return f"{SHARED}; {row.why}" if sparse_in(kernels) else row.why
    if not sparse_allowed:
        return "built without sparse tactics"
    if chosen_later:
        return chosen_later
    small = f" ({row.why})" if row.why else ""
    names = ", ".join(dict.fromkeys(kernels.values()))
    if listed:
        return f"a dense kernel was faster{f': {names}' if names else ''}{small}"
    if names:
        return f"no sparse kernel was faster than {names}{small}"
    return f"inside a block whose kernels TensorRT does not name; compare with the dense twin{small}"


def _status(
    linears: Sequence[LinearProof], reports: Sequence[SparsityReport], sparse_allowed: bool, chosen_later: str
) -> tuple[str, str]:
    if not sparse_allowed:
        return "dense", "built without sparse tactics"
    sparse = [row for row in linears if row.sparse]
    if sparse:
        return "sparse", f"sparse kernels run {len(sparse)} of {len(linears)} linears{_by_profile(sparse)}"
    if chosen_later:
        return "unknown", chosen_later
    shared = sum(bool(sparse_in(row.kernels)) for row in linears)
    if shared:
        return "unknown", f"sparse kernels run only layers that share them with weights that are not 2:4 ({shared})"
    named = sum(bool(row.kernels) for row in linears)
    eligible = sum(row.eligible for row in linears)
    if named == len(linears):
        return "dense", f"TensorRT chose a dense kernel for all {named} linears, {eligible} of them 2:4"
    if len({bool(report.n_chosen) for report in reports}) > 1:
        return "unknown", _CONTRADICTION
    if reports and reports[-1].n_chosen and not named:
        n_chosen = reports[-1].n_chosen
        return "sparse", f"the build log reports {n_chosen} layers with sparse tactics, without naming linears"
    if reports and not reports[-1].n_chosen and reports[-1].n_eligible >= eligible > 0:
        return "dense", f"TensorRT kept dense kernels for all {reports[-1].n_eligible} layers that it found eligible"
    # What TensorRT compiles as a block (Myelin) may be missing from its report (NVIDIA/TensorRT #2271).
    return "unknown", "TensorRT does not name the kernels of all linears; time the engine against its dense twin"


def _by_profile(sparse: Sequence[LinearProof]) -> str:
    """How many linears are sparse in each profile, in brackets; empty where only the log tells."""
    counts: dict[str, int] = {}
    for row in sparse:
        for profile, tactic in row.kernels.items():
            counts[profile] = counts.get(profile, 0) + is_sparse(tactic)
    return f" ({', '.join(f'{n} in {profile}' for profile, n in counts.items())})" if counts else ""


def read_proof(path: Path, plan_sha256: str) -> Proof:
    """The proof in a ``tensorrt.json`` that is about the engine with this SHA-256, or about its dense twin.

    Raises:
        ModelError: missing, malformed or about other engines.
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
                kernels=_texts(r["kernels"]),
                sparse=r["sparse"] is True,
                why=str(r["why"]),
            )
            for r in value["linears"]
        )
        plans = _texts(value["plans"])
        proof = Proof(value["status"], str(value["reason"]), reports, linears, plans, str(value["twin"]))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: is not a proof of sparse kernels: {type(error).__name__}: {error}") from error
    if plan_sha256 not in plans.values():
        raise ModelError(f"{path}: is about other engines than the one beside it; build it again")
    return proof


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"want a table, got {type(value).__name__}")
    return {str(key): str(text) for key, text in value.items()}
