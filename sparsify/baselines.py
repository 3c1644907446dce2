"""Dense graphs to compare exported graphs with: a model's own weights, exported the way the artifact was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsify import manifest
from sparsify.bench.subjects import Subject, identify
from sparsify.errors import VerificationError
from sparsify.pipeline import export
from sparsify.progress import Progress, Silent
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source, resolve
from sparsify.targets import Options

# Nothing is removed, so that weights stay as they are and the graph is the dense one.
_NOTHING = Recipe(pattern="0", method="magnitude")


def dense_graphs(
    candidates: Sequence[Subject],
    baselines: Sequence[Subject],
    work: Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Subject]:
    """A dense ONNX artifact for each form of the ONNX candidates that no baseline has.

    They are exported from the first baseline that is a model, into ``work``; those that are there already are taken.

    Args:
        candidates: of any kinds.
        baselines: of any kinds; without a model among them nothing is made.
        work: folder that may exist.
        trust_remote_code: let the model's own code load.
        progress: told of stages.

    Raises:
        SparsifyError: whatever ``prune`` and ``export`` raise.
    """
    progress = progress or Silent()
    model = next((each for each in baselines if each.kind == "model"), None)
    wanted = {each.like(): each for each in candidates if each.kind == "onnx"}
    made = []
    for form, candidate in wanted.items():
        if model is None or any(each.like() == form for each in baselines):
            continue
        assert candidate.body is not None
        graph = candidate.body["onnx"]
        name = "-".join(["dense", *(str(graph[key]) for key in ("layout", "precision", "provider"))])
        folder = work / name
        if not _fits(folder, model):
            checkpoint = work / "dense-checkpoint"
            if not _fits(checkpoint, model):
                source = Source(model.path, model.folder, resolve(model.path).origin)
                prune(
                    source, _NOTHING, checkpoint, overwrite=True, trust_remote_code=trust_remote_code, progress=progress
                )
            options = Options(layout=graph["layout"], precision=graph["precision"], provider=graph["provider"])
            export(
                checkpoint, "onnx", folder, overwrite=True, options=options, trust_remote_code=trust_remote_code,
                progress=progress,
            )  # fmt: skip
        made.append(str(folder))
    return identify(made, progress) if made else []


def _fits(folder: Path, model: Subject) -> bool:
    """Whether what lies there is undamaged and of this model."""
    try:
        body = manifest.read(folder)
        return not manifest.damaged_files(folder, body) and model.source == frozenset(
            (body["source"].get("files") or {}).values()
        )
    except VerificationError:
        return False
