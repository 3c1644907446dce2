"""Target ``onnx``: export, prove that the graph is the pruned model, and say what its arithmetic costs."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ModelError, VerificationError
from sparsify.progress import Progress, Silent

if TYPE_CHECKING:
    from sparsify.exporters.onnx_forms import Form
    from sparsify.exporters.onnx_places import WeightLocation
    from sparsify.runtimes.torch_session import TorchSession


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

    What is delivered is checked, not the process that made it: every linear's weight is found in the file, and the
    graph's float32 twin computes what PyTorch computes with the same weights. Then the file itself runs where it can,
    and the difference that its own arithmetic makes is recorded.

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
    from sparsify.exporters.onnx_reader import OnnxWeights
    from sparsify.onnx_packing import pack_and_check

    form = _export(checkpoint, out, forms, trust_remote_code, progress or Silent())
    model = out / "model.onnx"
    located = _locate(checkpoint, model, trust_remote_code)
    facts: dict[str, Any] = {
        **asdict(form),
        "opset": OnnxWeights(model).opset,
        "weights": {name: [asdict(place) for place in places] for name, places in located.items()},
        "zeros": _count_zeros(model, located, {row["name"] for row in body["linears"]}),
    }
    with open_delivered(checkpoint, model, located, form.precision, trust_remote_code=trust_remote_code) as reference:
        parity = _check_twin(reference, model, _tolerance(form, checkpoint))
    if compress:
        facts["storage"] = pack_and_check(model, body["linears"], located)
        _locate(checkpoint, model, trust_remote_code)
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


def _locate(checkpoint: Path, model: Path, trust_remote_code: bool) -> dict[str, tuple[WeightLocation, ...]]:
    """Where every linear of the decoder blocks lies in the graph.

    Raises:
        VerificationError: one is not there, with its zeros in place.
    """
    from sparsify.exporters.onnx_weights import find_weights
    from sparsify.naming import linear_weights

    weights = (
        (spec.name, weight.numpy()) for spec, weight in linear_weights(checkpoint, trust_remote_code=trust_remote_code)
    )
    places = find_weights(model, weights)
    for name, pieces in places.items():
        if not pieces:
            raise VerificationError(
                f"{model}: the weight of {name} is not in the graph, zeros in place; take another --layout"
            )
    return places


def _count_zeros(model: Path, located: dict[str, tuple[WeightLocation, ...]], pruned: set[str]) -> dict[str, int]:
    """Exact zeros of each pruned linear in the graph: rounding to few bits adds some to those of the mask."""
    from sparsify.exporters.onnx_reader import OnnxWeights
    from sparsify.exporters.onnx_weights import weight_at

    weights = OnnxWeights(model)
    return {name: int((weight_at(weights, located[name]) == 0).sum()) for name in located if name in pruned}


def _tolerance(form: Form, checkpoint: Path) -> float:
    """Of logits, per unit of the largest: float32 rounding, but where a graph holds rounded tables and constants."""
    from sparsify.bench.parity import RELATIVE, RELATIVE_16
    from sparsify.checkpoint import read_config

    # Gemma scales its embeddings by a constant in the dtype of the model.
    scaled = str(read_config(checkpoint).get("model_type", "")).startswith("gemma")
    if form.layout == "standard" and not scaled:
        return RELATIVE
    if form.precision.startswith("int"):
        return RELATIVE_16["fp16"] if form.provider == "cuda" else RELATIVE
    return RELATIVE_16.get(form.precision, RELATIVE)


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
            if candidate.vocab_size != reference.vocab_size:
                raise VerificationError(
                    f"{model}: has logits for {candidate.vocab_size} tokens, the model for {reference.vocab_size}"
                )
            parity = check_parity(reference, candidate, vocab_size=reference.vocab_size, relative=relative)
        return {**asdict(parity), "max_abs_diff": parity.max_abs_diff, "float32_twin": twin != model}


def _rounding(checkpoint: Path, out: Path, form: Form, trust_remote_code: bool) -> dict[str, Any] | None:
    """What the file's own arithmetic changes, or why that is not known here; None where it is float32."""
    from sparsify.bench.parity import measure_rounding
    from sparsify.runtimes.onnxruntime_errors import MissingKernelError
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
    from sparsify.runtimes.onnxruntime_settings import OrtSettings
    from sparsify.runtimes.torch_session import TorchSession

    if form.precision == "fp32":
        return None
    try:
        # The graph's own provider where this ONNX Runtime has it, else the CPU, which runs most of what is for a GPU.
        candidate = OnnxRuntimeSession(out, OrtSettings("auto" if form.provider != "cpu" else "cpu"))
    except MissingKernelError as error:
        if form.provider == "cpu":
            raise
        return {"not_run": f"no provider here runs this graph for {form.provider}: {error}"[:300]}
    with candidate, TorchSession(checkpoint, trust_remote_code=trust_remote_code) as reference:
        measured = asdict(measure_rounding(reference, candidate, vocab_size=reference.vocab_size))
        return {**measured, "runtime": candidate.name}
