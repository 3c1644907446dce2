"""New weights of the same pattern put into built engines, in a fraction of the time of a build."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.errors import UsageError, VerificationError
from sparsify.files import staging_folder
from sparsify.progress import Progress, Silent


def refit(
    artifact: Path,
    checkpoint: Path,
    out: Path,
    *,
    overwrite: bool = False,
    trust_engine: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write to ``out`` the engines of ``artifact`` with the weights of ``checkpoint``; returns the new manifest.

    Args:
        artifact: of kind tensorrt, built with ``refit=on``.
        checkpoint: the same model pruned again, 2:4 where the artifact's engine runs sparse kernels.
        out: folder to create.
        overwrite: replace an earlier output.
        trust_engine: load engines that were not built here.
        trust_remote_code: let the model's own code load.
        progress: told of the stages.

    Raises:
        UsageError: not such an artifact, no GPU (asked before anything is exported), or an engine that may not be
            loaded.
        VerificationError: artifact or checkpoint are not what their manifests say, or the weights do not fit.
        OutputError: ``out`` cannot be written.
    """
    from sparsify.exporters.onnx_forms import choose
    from sparsify.exporters.tensorrt_engine import ENGINE, TWIN
    from sparsify.exporters.tensorrt_refit import check_refit, refit_engine
    from sparsify.onnx_target import write_onnx
    from sparsify.tensorrt_target import engine_parity

    progress = progress or Silent()
    body, new = manifest.read(artifact), manifest.read(checkpoint)
    if body["kind"] != "tensorrt" or not all(isinstance(body.get(key), dict) for key in ("onnx", "tensorrt")):
        raise UsageError(f"{artifact}: is of kind {body['kind']}; refit is for what --target tensorrt wrote")
    for folder, described in ((artifact, body), (checkpoint, new)):
        damage = manifest.damaged_files(folder, described)
        if damage:
            raise VerificationError(f"{folder}: {damage[0]} ({len(damage)} problems); make it again")
    check_refit(artifact / ENGINE)
    forms = choose("standard", body["onnx"].get("precision"), "tensorrt", body["onnx"].get("opset"))
    with staging_folder(out, {"command": "refit"}, overwrite=overwrite, inputs=[artifact, checkpoint]) as staging:
        progress.stage("refitting", 3)
        kept = [name for name in body["files"] if not name.startswith("model.onnx")]
        for name in kept:
            shutil.copyfile(artifact / name, staging.path / name)
        extra = write_onnx(checkpoint, staging.path, new, forms, trust_remote_code=trust_remote_code, progress=progress)
        progress.advance()
        for engine in (ENGINE, TWIN):
            if engine in kept:
                refit_engine(staging.path / engine, staging.path / "model.onnx", trust_engine=trust_engine)
            progress.advance()
        parity = engine_parity(checkpoint, staging.path, trust_engine=trust_engine, trust_remote_code=trust_remote_code)
        facts = {**body["tensorrt"], "parity": parity}
        rest = {key: value for key, value in new.items() if key not in ("format", "files", "storage")}
        manifest.write(staging.path, {**rest, "kind": "tensorrt", **extra, "tensorrt": facts})
        staging.commit()
    return manifest.read(out)
