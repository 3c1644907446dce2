"""The export targets by name. Each writes into a staging folder and returns what the manifest should add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.extras import require
from sparsify.progress import Progress


@dataclass(frozen=True)
class Options:
    """What a user may choose about an export; a default is what a target does by itself.

    Attributes:
        dense: target vllm: the plain checkpoint, which needs no plugin.
        layout: target onnx: genai, standard or auto.
        precision: targets onnx (fp32) and tensorrt (fp16): of weights and arithmetic; target vllm: int8 rounds the
            values of packed weights.
        provider: target onnx: execution provider that the graph is for.
        opset: targets onnx (layout standard) and tensorrt.
        compress: target onnx: pruned weights packed in the file.
        engine: target tensorrt: KEY=VALUE pairs of ``EngineOptions``.
        require_sparse: target tensorrt: fail unless a sparse tactic was chosen.
    """

    dense: bool = False
    layout: str = "auto"
    precision: str | None = None
    provider: str | None = None
    opset: int | None = None
    compress: bool = False
    engine: tuple[str, ...] = ()
    require_sparse: bool = False


Writer = Callable[[Path, Path, dict[str, Any], Options, bool, Progress], dict[str, Any]]


def _hf(
    checkpoint: Path, out: Path, body: dict[str, Any], options: Options, trust: bool, progress: Progress
) -> dict[str, Any]:
    from sparsify.exporters.hf import export_hf

    export_hf(checkpoint, out)
    return {}


def _vllm(
    checkpoint: Path, out: Path, body: dict[str, Any], options: Options, trust: bool, progress: Progress
) -> dict[str, Any]:
    from sparsify.exporters.hf import export_hf
    from sparsify.exporters.vllm_compressed import export_compressed

    if options.dense:
        export_hf(checkpoint, out)
        return {}
    int8 = options.precision == "int8"
    return export_compressed(checkpoint, out, body["linears"], int8=int8, trust_remote_code=trust)


def _onnx(
    checkpoint: Path, out: Path, body: dict[str, Any], options: Options, trust: bool, progress: Progress
) -> dict[str, Any]:
    from sparsify.exporters.onnx_forms import choose
    from sparsify.onnx_target import write_onnx

    forms = choose(options.layout, options.precision or "fp32", options.provider, options.opset)
    return write_onnx(
        checkpoint, out, body, forms, compress=options.compress, trust_remote_code=trust, progress=progress
    )


def _tensorrt(
    checkpoint: Path, out: Path, body: dict[str, Any], options: Options, trust: bool, progress: Progress
) -> dict[str, Any]:
    from sparsify.exporters.onnx_forms import choose
    from sparsify.exporters.tensorrt_options import EngineOptions
    from sparsify.tensorrt_target import write_tensorrt

    return write_tensorrt(
        checkpoint,
        out,
        body,
        choose("standard", options.precision or "fp16", "tensorrt", options.opset),
        EngineOptions.parse(options.engine),
        require_sparse=options.require_sparse,
        trust_remote_code=trust,
        progress=progress,
    )


@dataclass(frozen=True)
class Target:
    """A row of the table.

    Attributes:
        write: fills the artifact's folder; arguments are checkpoint, folder, manifest, options, whether the model's
            own code may load, and whom to tell of progress.
        options: those of ``Options`` that mean something here.
        extra: the packages it needs, if any.
    """

    write: Writer
    options: frozenset[str] = frozenset()
    extra: str | None = None


TARGETS = {
    "hf": Target(_hf),
    "vllm": Target(_vllm, frozenset({"dense", "precision"})),
    "onnx": Target(_onnx, frozenset({"layout", "precision", "provider", "opset", "compress"}), "onnx"),
    "tensorrt": Target(_tensorrt, frozenset({"precision", "opset", "engine", "require_sparse"}), "onnx"),
}


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


def check_options(options: Options, targets: Sequence[str]) -> None:
    """Refuse what no target has, and what a target cannot do: also before the hours of work.

    Raises:
        UsageError: an option that none of ``targets`` has, a value or combination that means nothing, or a build that
            this machine cannot do.
        MissingExtraError: target tensorrt without the TensorRT that it is to use.
    """
    known = frozenset[str]().union(*(TARGETS[target].options for target in targets))
    for field in fields(Options):
        if getattr(options, field.name) != field.default and field.name not in known:
            owners = [name for name, target in TARGETS.items() if field.name in target.options]
            raise UsageError(
                f"--{field.name.replace('_', '-')} is about target {' and '.join(owners)}, not {', '.join(targets)}; "
                "leave it out"
            )
    if "onnx" in targets or "tensorrt" in targets:
        from sparsify.exporters.onnx_forms import OPSET, choose

        if "onnx" in targets:
            choose(options.layout, options.precision or "fp32", options.provider, options.opset)
        if "tensorrt" in targets:
            from sparsify.exporters.tensorrt_api import check_gpu, check_opset, load_tensorrt
            from sparsify.exporters.tensorrt_options import EngineOptions

            choose("standard", options.precision or "fp16", "tensorrt", options.opset)
            chosen = EngineOptions.parse(options.engine)
            api = load_tensorrt(chosen.runtime)
            check_opset(api, options.opset or OPSET)
            check_gpu(api, refit=chosen.refit)
    # Where another target is exported too, what vllm has not is about that one.
    if options.precision is not None and not {"onnx", "tensorrt"} & set(targets):
        if options.precision != "int8":
            raise UsageError(
                f"--precision {options.precision} is unknown to target vllm; int8 rounds packed weights to 8 bits, "
                "leave it out to keep them as they are"
            )
        if options.dense:
            raise UsageError("--precision int8 is for packed weights, and --dense packs none; leave one of them out")
    if options.compress and options.provider == "tensorrt":
        raise UsageError("--compress is for ONNX Runtime's own providers; TensorRT reads dense weights, leave it out")
    if options.compress and options.precision in ("int8", "int4"):
        raise UsageError("--compress is for float weights; int8 and int4 are small already, leave one of them out")


def options_for(options: Options, target: str) -> Options:
    """``options`` without those that ``target`` has not, for one of several targets."""
    own = {name: getattr(options, name) for name in TARGETS[target].options}
    if target == "vllm" and (options.dense or options.precision != "int8"):
        del own["precision"]
    return Options(**own)
