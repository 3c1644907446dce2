"""Target ``onnx``: export, prove that the graph is the pruned model, and say what its arithmetic costs."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ModelError, VerificationError
from sparsify.progress import Progress, Silent

if TYPE_CHECKING:
    from sparsify.exporters.onnx_forms import Form
    from sparsify.exporters.onnx_weights import WeightLocation
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.types import NofM


def write_onnx(
    checkpoint: Path,
    out: Path,
    body: dict[str, Any],
    forms: list[Form],
    *,
    compress: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export ``checkpoint`` in the first of ``forms`` that knows its architecture; returns what the manifest adds.

    The delivered file is checked, not the process that made it: every pruned weight is found in it, and the graph's
    float32 twin computes what PyTorch computes with the same weights. Then the file itself runs where a CPU can run
    it, and the difference that its own arithmetic makes is recorded.

    Args:
        checkpoint: pruned checkpoint.
        out: existing folder.
        body: its manifest.
        forms: as ``choose`` gives them.
        compress: store pruned weights packed.
        trust_remote_code: let the model's own code load.
        progress: told when the first form does not know the architecture.

    Raises:
        SparsifyError: as the exporters, ``check_parity`` and ``pack_onnx``.
    """
    from sparsify.bench.delivered import open_delivered
    from sparsify.bench.parity import RELATIVE, RELATIVE_16
    from sparsify.exporters.onnx_reader import OnnxWeights

    form = _export(checkpoint, out, forms, trust_remote_code, progress or Silent())
    model = out / "model.onnx"
    located = _locate(checkpoint, model, {row["name"] for row in body["linears"]}, trust_remote_code)
    facts: dict[str, Any] = {
        **asdict(form),
        "opset": OnnxWeights(model).opset,
        "weights": {name: [asdict(place) for place in places] for name, places in located.items()},
    }
    narrow = "fp16" if form.precision.startswith("int") and form.provider == "cuda" else form.precision
    with open_delivered(checkpoint, model, located, form.precision, trust_remote_code=trust_remote_code) as reference:
        parity = _check_twin(reference, model, RELATIVE_16.get(narrow, RELATIVE))
    if compress:
        facts["storage"] = _pack(model, body["linears"], located)
        _locate(checkpoint, model, {row["name"] for row in body["linears"]}, trust_remote_code)
    return {"onnx": facts, "parity": parity, "rounding": _rounding(checkpoint, out, form, trust_remote_code)}


def _export(checkpoint: Path, out: Path, forms: list[Form], trust_remote_code: bool, progress: Progress) -> Form:
    from sparsify.exporters.onnx_genai import UnsupportedError, export_genai
    from sparsify.exporters.onnx_standard import export_onnx

    for form in forms:
        if form.layout == "standard":
            export_onnx(
                checkpoint, out, precision=form.precision, opset=form.opset, trust_remote_code=trust_remote_code
            )
            return form
        try:
            export_genai(checkpoint, out, form, trust_remote_code=trust_remote_code)
        except UnsupportedError as error:
            if form is forms[-1]:
                raise
            progress.notice(f"{error}; exporting in layout standard")
        else:
            return form
    raise ModelError(f"{checkpoint}: no form to export in")


def _locate(
    checkpoint: Path, model: Path, pruned: set[str], trust_remote_code: bool
) -> dict[str, tuple[WeightLocation, ...]]:
    from sparsify.exporters.onnx_weights import find_weights
    from sparsify.naming import linear_weights

    weights = (
        (spec.name, weight.numpy()) for spec, weight in linear_weights(checkpoint, trust_remote_code=trust_remote_code)
    )
    places = find_weights(model, weights)
    for name in pruned:
        if not places.get(name):
            raise VerificationError(
                f"{model}: the pruned weight of {name} is not in the graph, zeros in place; take another --layout"
            )
    return {name: pieces for name, pieces in places.items() if pieces}


def _check_twin(reference: TorchSession, model: Path, relative: float) -> dict[str, Any]:
    from sparsify.bench.parity import check_parity
    from sparsify.exporters.onnx_twin import write_float32_twin
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession

    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".twin-") as scratch:
        twin = write_float32_twin(model, Path(scratch))
        if twin != model:
            for name in ("config.json", "genai_config.json"):
                if (model.parent / name).exists():
                    shutil.copyfile(model.parent / name, twin.parent / name)
        with OnnxRuntimeSession(twin.parent) as candidate:
            parity = check_parity(reference, candidate, vocab_size=reference.vocab_size, relative=relative)
        return {**asdict(parity), "max_abs_diff": parity.max_abs_diff, "float32_twin": twin != model}


def _pack(model: Path, linears: list[dict[str, Any]], located: dict[str, tuple[WeightLocation, ...]]) -> dict[str, Any]:
    """Pack the pruned weights of ``model``; returns what the manifest says of it."""
    from sparsify.exporters.onnx_packed import PackAs, pack_onnx
    from sparsify.exporters.onnx_reader import OnnxWeights

    tensors = OnnxWeights(model).tensors
    pruned = {row["name"]: row for row in linears}
    holders: dict[str, list[tuple[str, WeightLocation]]] = {}
    for name, places in located.items():
        for place in places:
            holders.setdefault(place.initializer, []).append((name, place))
    wanted = {}
    for initializer, rows in holders.items():
        if any(name in pruned for name, _ in rows):
            n_axes = len(tensors[initializer].dims)
            axis = n_axes - 2 if rows[0][1].transposed else n_axes - 1
            wanted[initializer] = PackAs(_shared_pattern(rows, pruned, list(tensors[initializer].dims)), axis)
    report = pack_onnx(model, wanted)
    return {
        "packed": len(report.packed),
        "dense": dict(report.dense),
        "packed_bytes": report.packed_bytes,
        "dense_bytes": report.dense_bytes,
        "load_peak_bytes": report.load_peak_bytes,
    }


def _shared_pattern(
    holders: list[tuple[str, WeightLocation]], pruned: dict[str, dict[str, Any]], dims: list[int]
) -> NofM | None:
    """The N:M that every row of an initializer is known to keep to; None where it differs or is unknown."""
    from sparsify.types import NofM, parse_pattern

    patterns, n_weights = set(), 0
    for name, _ in holders:
        row = pruned.get(name)
        if row is None or row.get("permuted") == "recorded":  # the pattern holds in another order of inputs
            return None
        pattern = parse_pattern(row["pattern"], None if ":" in row["pattern"] else "layer", name)
        patterns.add(pattern)
        n_weights += row["shape"][0] * row["shape"][1]
    pattern = patterns.pop()
    return pattern if not patterns and isinstance(pattern, NofM) and n_weights == math.prod(dims) else None


def _rounding(checkpoint: Path, out: Path, form: Form, trust_remote_code: bool) -> dict[str, Any] | None:
    """What the file's own arithmetic changes, or why that is not known here; None where it is float32."""
    from sparsify.bench.parity import measure_rounding
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
    from sparsify.runtimes.torch_session import TorchSession

    if form.precision == "fp32":
        return None
    try:
        candidate = OnnxRuntimeSession(out)
    except ModelError as error:
        if form.provider == "cpu":
            raise
        return {"not_run": f"ONNX Runtime's CPU provider cannot run this graph for {form.provider}: {error}"[:300]}
    with candidate, TorchSession(checkpoint, trust_remote_code=trust_remote_code) as reference:
        return asdict(measure_rounding(reference, candidate, vocab_size=reference.vocab_size))
