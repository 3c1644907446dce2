"""The stages put together: export one target, or prune, export, evaluate and report in one go."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.bench.report import render_markdown
from sparsify.data import Windows, load_windows
from sparsify.errors import UsageError, VerificationError
from sparsify.files import folder_bytes, staging_folder, stamps, write_atomic, write_json, write_text
from sparsify.memory import peak_memory_bytes
from sparsify.progress import Progress, Silent
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.runtimes import Runtime, open_session
from sparsify.source import Source
from sparsify.targets import Options, check_options, find_target, options_for

_CHECKPOINT = "checkpoint"
# Keys of a manifest that describe its own files, not the model.
_OF_ONE_EXPORT = ("format", "files", "onnx", "parity", "rounding", "storage", "tensorrt")


@dataclass(frozen=True)
class Evaluation:
    """What to measure accuracy on.

    Attributes:
        text: source as for calibration, or ``none`` to skip.
        windows: number of windows, taken from the start of the text.
        length: tokens per window.
        stride: tokens between window starts; None means ``length`` (no overlap).
        bos: start every window with BOS; None does what the tokenizer does.
    """

    text: str = "pydoc"
    windows: int = 32
    length: int = 512
    stride: int | None = None
    bos: bool | None = None


def export(
    checkpoint: Path,
    target: str,
    out: Path,
    *,
    overwrite: bool = False,
    options: Options | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a pruned checkpoint for ``target`` into ``out``; checked against the PyTorch model before it appears.

    Returns the manifest of the artifact.

    Raises:
        UsageError: unknown target, or an option that it has not.
        VerificationError: ``checkpoint`` has no manifest or is not what its manifest says, or the artifact computes
            something else than the model.
    """
    progress = progress or Silent()
    write = find_target(target)
    options = options or Options()
    check_options(options, [target])
    body = manifest.read(checkpoint)
    if body["kind"] not in ("checkpoint", "hf", "vllm"):
        raise UsageError(
            f"{checkpoint}: is an artifact of kind {body['kind']}; export from the pruned checkpoint, hf or vllm"
        )
    damage = manifest.damaged_files(checkpoint, body)
    if damage:
        raise VerificationError(f"{checkpoint}: {damage[0]} ({len(damage)} problems); prune again, then export")
    # Nothing in an export is worth resuming: no state is saved, so it starts from an empty folder.
    with staging_folder(out, {"command": "export"}, overwrite=overwrite, inputs=[checkpoint]) as staging:
        progress.stage(f"exporting {target}", 1)
        extra = write(checkpoint, staging.path, body, options, trust_remote_code, progress)
        if (checkpoint / manifest.PERMUTATIONS).exists():
            write_atomic(
                staging.path / manifest.PERMUTATIONS, partial(shutil.copyfile, checkpoint / manifest.PERMUTATIONS)
            )
        progress.advance()
        body = {
            **{key: value for key, value in body.items() if key not in _OF_ONE_EXPORT},
            "kind": target,
            **extra,
        }
        manifest.write(staging.path, body)
        staging.commit()
    return manifest.read(out)


def prune_and_export(
    source: Source,
    recipe: Recipe,
    targets: Sequence[str],
    out: Path,
    *,
    evaluation: Evaluation,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    cluster: str | None = None,
    offload: bool = False,
    worker_bytes: int | None = None,
    options: Options | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune ``source``, export it for every target, measure accuracy, and write the report; returns ``report.json``.

    Everything is built in ``<out>.partial`` and appears at once; the same call resumes an interrupted one at the last
    finished block or artifact.

    Raises:
        SparsifyError: whatever a stage raises; ``out`` is then as it was.
    """
    progress = progress or Silent()
    started = time.monotonic()
    for target in targets:
        find_target(target)
    options = options or Options()
    check_options(options, targets)
    if len(set(targets)) != len(targets):
        raise UsageError(f"target {', '.join(targets)}: each target can be named once")
    if "tensorrt" in targets and evaluation.text != "none":
        _check_profile(options, evaluation)
    # Before hours of pruning: a text that is too short or missing has to be known now.
    windows = None if evaluation.text == "none" else _evaluation_windows(source.folder, evaluation, trust_remote_code)
    text = Path(recipe.calibration.rpartition(":")[0] or recipe.calibration)
    request = {
        "command": "prune-and-export",
        "recipe": recipe.to_dict(),
        "targets": list(targets),
        "model": stamps(sorted(source.folder.glob("*.*"))),
        "calibration": stamps([text] if text.is_file() else []),
        "versions": manifest.versions("torch", "transformers"),
        "device": device,
        "options": {**asdict(options), "engine": list(options.engine)},  # as JSON gives it back
    }
    with staging_folder(out, request, overwrite=overwrite, inputs=[source.folder], check=_damage) as staging:
        resumed = staging.state is not None
        staging.save({})
        checkpoint, hf = staging.path / _CHECKPOINT, staging.path / "hf"
        if not checkpoint.exists() and not hf.exists():
            prune(
                source,
                recipe,
                checkpoint,
                overwrite=overwrite,
                device=device,
                workers=workers,
                cluster=cluster,
                offload=offload,
                worker_bytes=worker_bytes,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        for target in targets:
            if not (staging.path / target).exists():
                origin = hf if hf.exists() else checkpoint
                export(
                    origin,
                    target,
                    staging.path / target,
                    options=options_for(options, target),
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
        # The hf artifact holds the same tensors and manifest; two copies of a model are one too many.
        origin = hf if hf.exists() else checkpoint
        if origin is hf and checkpoint.exists():
            shutil.rmtree(checkpoint)
        report = _report(source, staging.path, origin, targets, evaluation, windows, trust_remote_code, progress)
        report["resumed"] = resumed
        report["seconds"] = round(time.monotonic() - started, 1)
        report["peak_memory_bytes"] = peak_memory_bytes()
        write_json(staging.path / "report.json", report)
        write_text(staging.path / "report.md", render_markdown(report))
        staging.commit()
    return report


def _damage(folder: Path, state: Any) -> str | None:
    """What is wrong with the finished parts of an interrupted run, or None."""
    for part in (entry for entry in folder.iterdir() if (entry / manifest.NAME).exists()):
        if part.suffix == ".partial":
            continue
        try:
            problems = manifest.damaged_files(part, manifest.read(part))
        except VerificationError as error:
            return str(error)
        if problems:
            return f"{part.name}: {problems[0]}"
    return None


def _evaluation_windows(folder: Path, evaluation: Evaluation, trust_remote_code: bool) -> Windows:
    return load_windows(
        evaluation.text,
        folder,
        n_windows=evaluation.windows,
        length=evaluation.length,
        split="evaluation",
        stride=evaluation.stride,
        bos=evaluation.bos,
        trust_remote_code=trust_remote_code,
    )


def evaluate(
    folder: Path,
    windows: Windows,
    *,
    stride: int | None = None,
    against: Path | None = None,
    runtime: Runtime | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of the model or artifact in ``folder``, and its KL divergence from the one in ``against``.

    Returns a plain dict: ``runtime``, ``engaged`` (kernel -> number of linears), what ``Perplexity`` holds as numbers,
    ``reference_perplexity`` and ``kl_to_reference`` (None without ``against``, and where a runtime gives no logits).
    """
    from sparsify.bench.perplexity import compare, perplexity
    from sparsify.bench.scoring import Scorer

    progress = progress or Silent()

    def tick(done: int, total: int) -> None:
        progress.advance()

    runtime = replace(runtime or Runtime(), max_length=windows.ids.shape[1])
    progress.stage(f"perplexity of {folder.name}", windows.ids.shape[0])
    with ExitStack() as sessions:
        session = sessions.enter_context(open_session(folder, runtime, trust_remote_code=trust_remote_code))
        if isinstance(session, Scorer) and against is not None:
            other = sessions.enter_context(open_session(against, trust_remote_code=trust_remote_code))
            measured, kl = perplexity(session, windows.ids, stride=stride, progress=tick), None
            reference = perplexity(other, windows.ids, stride=stride)
        elif against is None:
            measured, reference, kl = perplexity(session, windows.ids, stride=stride, progress=tick), None, None
        else:
            other = sessions.enter_context(open_session(against, trust_remote_code=trust_remote_code))
            reference, measured, kl = compare(other, session, windows.ids, stride=stride, progress=tick)
        kernels = Counter(session.engaged().values())
        notices = list(getattr(session, "notices", ()))
        for text in notices:
            progress.notice(text)
        return {
            **{key: value for key, value in asdict(measured).items() if key not in ("window_nll", "window_tokens")},
            "runtime": session.name,
            "engaged": dict(sorted(kernels.items())),
            "notices": notices,
            "reference_perplexity": reference and reference.perplexity,
            "kl_to_reference": kl and asdict(kl),
        }


def _check_profile(options: Options, evaluation: Evaluation) -> None:
    from sparsify.exporters.tensorrt_options import EngineOptions

    prompt = EngineOptions.parse(options.engine).prompt
    if evaluation.length > prompt:
        raise UsageError(
            f"--eval-length {evaluation.length} is more than the engine's prompt={prompt}; make one fit the other"
        )


def _cannot_run(target: str, body: dict[str, Any]) -> str | None:
    """Why this machine cannot run an artifact that it made, or None: such an artifact is delivered unmeasured."""
    if target == "tensorrt":
        import torch

        # The session's memory is torch's, so a GPU that torch cannot use does not help.
        return None if torch.cuda.is_available() else "not run here: TensorRT needs a CUDA device that torch can use"
    if target == "onnx" and "not_run" in (body.get("rounding") or {}):
        import onnxruntime

        wanted = f"{body['onnx']['provider']}executionprovider"
        if wanted not in [name.lower() for name in onnxruntime.get_available_providers()]:
            return f"not run here: the graph is for provider {body['onnx']['provider']}"
    return None


def _report(
    source: Source,
    staging: Path,
    origin: Path,
    targets: Sequence[str],
    evaluation: Evaluation,
    windows: Windows | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    def measure(folder: Path, against: Path | None = None) -> dict[str, Any]:
        if windows is None:
            return {}
        return evaluate(
            folder,
            windows,
            stride=evaluation.stride,
            against=against,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    body = manifest.read(origin)
    pruned = measure(origin, against=source.folder)
    artifacts = []
    for target in targets:
        missing = _cannot_run(target, manifest.read(staging / target))
        if missing:
            record = {"runtime": missing}
            progress.notice(f"{target}: {missing}")
        else:
            record = pruned if staging / target == origin else measure(staging / target)
        artifacts.append(
            {
                "target": target,
                "path": target,
                "bytes": folder_bytes(staging / target),
                "perplexity": record.get("perplexity"),
                "standard_error": record.get("standard_error"),
                "runtime": record.get("runtime"),
                "engaged": record.get("engaged"),
                "parity": manifest.read(staging / target).get("parity"),
            }
        )
    covered = body["coverage"]
    return {
        "model": source.name,
        "pattern": body["recipe"]["pattern"],
        "method": body["recipe"]["method"],
        "coverage": covered,
        "sparsity": covered["zeros"] / covered["selected"],
        "perplexity": {"dense": pruned.get("reference_perplexity"), "pruned": pruned.get("perplexity")},
        "kl_pruned_to_dense": pruned.get("kl_to_reference"),
        "evaluation": None
        if windows is None
        else {**windows.describe(), "stride": pruned["stride"], "n_tokens": pruned["n_tokens"]},
        "calibration": body["calibration"],
        "artifacts": artifacts,
        "source_bytes": sum(path.stat().st_size for path in source.folder.glob("*.safetensors")),
        "notices": body.get("notices", []),
        "versions": manifest.versions("torch", "transformers", "safetensors", "onnx", "onnxruntime"),
    }
