"""An ONNX artifact with packed weights, written dense: for models too large to be unpacked while they are loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.errors import UsageError, VerificationError
from sparsify.files import staging_folder
from sparsify.progress import Progress, Silent


def decompress(
    artifact: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the artifact in ``artifact`` to ``out`` with dense weights, bit for bit; returns the new manifest.

    One weight is in memory at a time.

    Raises:
        UsageError: ``artifact`` is of another kind, or dense already.
        VerificationError: ``artifact`` is not what its manifest says.
        ModelError: a packed weight is damaged.
        OutputError: ``out`` cannot be written.
    """
    from sparsify.exporters.onnx_packed import unpack_onnx

    progress = progress or Silent()
    body = manifest.read(artifact)
    facts = body.get("onnx")
    if body["kind"] != "onnx" or not isinstance(facts, dict):
        other = "`sparsify export --target hf` writes it dense" if body["kind"] == "vllm" else "nothing in it is packed"
        raise UsageError(f"{artifact}: is of kind {body['kind']}; {other}")
    if "storage" not in facts:
        raise UsageError(f"{artifact}: has dense weights already")
    damage = manifest.damaged_files(artifact, body)
    if damage:
        raise VerificationError(f"{artifact}: {damage[0]} ({len(damage)} problems); export it again")
    with staging_folder(out, {"command": "decompress"}, overwrite=overwrite, inputs=[artifact]) as staging:
        progress.stage("decompressing", 1)
        for name in body["files"]:
            if not name.startswith("model.onnx"):
                shutil.copyfile(artifact / name, staging.path / name)
        unpack_onnx(artifact / "model.onnx", staging.path)
        progress.advance()
        dense = {key: value for key, value in facts.items() if key != "storage"}
        rest = {key: value for key, value in body.items() if key not in ("format", "files")}
        manifest.write(staging.path, {**rest, "onnx": dense})
        staging.commit()
    return manifest.read(out)
