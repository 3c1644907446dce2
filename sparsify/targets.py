"""The export targets by name. Each writes into a staging folder and returns what the manifest should add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError, VerificationError
from sparsify.extras import require


@dataclass(frozen=True)
class Options:
    """What a user may choose about an export.

    Attributes:
        trust_remote_code: let the model's own code load.
        dense: target vllm: the plain checkpoint, which needs no plugin.
    """

    trust_remote_code: bool = False
    dense: bool = False


Writer = Callable[[Path, Path, dict[str, Any], Options], dict[str, Any]]


def _hf(checkpoint: Path, out: Path, body: dict[str, Any], options: Options) -> dict[str, Any]:
    from sparsify.exporters.hf import export_hf

    export_hf(checkpoint, out)
    return {}


def _vllm(checkpoint: Path, out: Path, body: dict[str, Any], options: Options) -> dict[str, Any]:
    from sparsify.exporters.hf import export_hf
    from sparsify.exporters.vllm_compressed import export_compressed

    if options.dense:
        export_hf(checkpoint, out)
        return {}
    return export_compressed(checkpoint, out, body["linears"], trust_remote_code=options.trust_remote_code)


def _onnx(checkpoint: Path, out: Path, body: dict[str, Any], options: Options) -> dict[str, Any]:
    """Export, then run both models: what the manifest calls parity was measured on the files that are delivered."""
    from dataclasses import asdict

    from sparsify.bench.parity import check_parity
    from sparsify.exporters.onnx_standard import OPSET, export_onnx
    from sparsify.exporters.onnx_weights import find_weights
    from sparsify.naming import linear_weights
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
    from sparsify.runtimes.torch_session import TorchSession

    trust_remote_code = options.trust_remote_code
    export_onnx(checkpoint, out, trust_remote_code=trust_remote_code)
    pruned = {row["name"] for row in body["linears"]}
    weights = (
        (spec.name, weight.numpy())
        for spec, weight in linear_weights(checkpoint, trust_remote_code=trust_remote_code)
        if spec.name in pruned
    )
    places = find_weights(out / "model.onnx", weights)
    for name, place in places.items():
        if place is None:
            raise VerificationError(f"{out / 'model.onnx'}: the weight of {name} is not in the graph bit for bit")
    with (
        TorchSession(checkpoint, trust_remote_code=trust_remote_code) as reference,
        OnnxRuntimeSession(out) as candidate,
    ):
        parity = check_parity(reference, candidate, vocab_size=reference.vocab_size)
    located = {name: asdict(place) for name, place in places.items() if place is not None}
    return {
        "onnx": {"layout": "standard", "precision": "float32", "opset": OPSET, "weights": located},
        "parity": {**asdict(parity), "max_abs_diff": parity.max_abs_diff},
    }


@dataclass(frozen=True)
class Target:
    """A row of the table: ``write`` fills the artifact's folder, with the packages of ``extra`` where it needs any."""

    write: Writer
    extra: str | None = None


TARGETS = {"hf": Target(_hf), "vllm": Target(_vllm), "onnx": Target(_onnx, "onnx")}


def find_target(name: str) -> Writer:
    """The writer of target ``name``, which can run: asked before the hours of work that come before it.

    Raises:
        UsageError: there is none; the message lists them.
        MissingExtraError: a package that it needs is not installed.
    """
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is unknown; choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if target.extra:
        require(target.extra, f"target {name}")
    return target.write


def check_dense(dense: bool, targets: Sequence[str]) -> None:
    """Refuse ``--dense`` where no target has a plain and a compressed form (``UsageError``)."""
    if dense and "vllm" not in targets:
        raise UsageError(f"--dense is about target vllm; target {', '.join(targets)} has one form, leave it out")
