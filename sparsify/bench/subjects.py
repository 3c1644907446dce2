"""What is measured: artifacts and the dense model they are compared with, identified before anything runs.

A comparison is worth something only between files that are known: an artifact that was changed after its export, or a
baseline of another model or tokenizer, is refused here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.checkpoint import read_config
from sparsify.errors import ModelError, UsageError, VerificationError
from sparsify.files import folder_bytes, sha256_file
from sparsify.progress import Progress, Silent
from sparsify.source import resolve
from sparsify.types import parse_pattern

# Kind -> the runtimes that open it. ``model`` is a folder without a manifest.
RUNTIMES_OF = {
    "onnx": ("onnxruntime", "onnxruntime-genai"),
    "tensorrt": ("tensorrt",),
    **dict.fromkeys(("model", "checkpoint", "hf", "vllm"), ("torch", "vllm", "vllm-server")),
}
_WEIGHTS = ("*.safetensors", "*.onnx", "*.data", "*.engine")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
# What tells models apart whose tokenizer is one, by the names that configs have for it.
_SIZES = {
    "model_type": ("model_type",),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class Subject:
    """An artifact or a baseline.

    Attributes:
        label: what records call it; unique in a run.
        path: as the user wrote it.
        folder: where it lies.
        kind: ``model``, or the kind in its manifest.
        body: its manifest; None for a model without one.
        sha256: of the names and hashes of its files.
        source: SHA-256 of each shard of the model it was made from, or of its own; empty where it is not known.
        tokenizer: SHA-256 of each of its tokenizer files.
    """

    label: str
    path: str
    folder: Path
    kind: str
    body: dict[str, Any] | None
    sha256: str
    source: frozenset[str]
    tokenizer: Mapping[str, str]

    @property
    def sparse(self) -> bool:
        """Whether its weights were pruned; that some are zero is nothing yet, dequantised weights have zeros."""
        rows = (self.body or {}).get("linears", ())
        return any(parse_pattern(row["pattern"]).sparsity > 0 for row in rows)

    def record(self, role: str) -> dict[str, Any]:
        """The fields of its ``artifact`` record."""
        body = self.body or {}
        recipe, covered = body.get("recipe", {}), body.get("coverage")
        return {
            "artifact": self.label,
            "path": self.path,
            "role": role,
            "kind": self.kind,
            "model": body.get("source", {}).get("name", self.path),
            "pattern": recipe.get("pattern") if self.sparse else None,
            "method": recipe.get("method") if self.sparse else None,
            "sparsity": covered["zeros"] / covered["selected"] if covered and self.sparse else None,
            "precision": body.get("onnx", {}).get("precision") or body.get("storage", {}).get("values"),
            "sha256": self.sha256,
            "source_sha256": _digest(sorted(self.source)) if self.source else None,
            "tokenizer_sha256": _of(self.tokenizer) if self.tokenizer else None,
            "file_bytes": folder_bytes(self.folder),
            "weight_bytes": weight_bytes(self.folder),
            "linears": len(body.get("linears", ())) if self.sparse else 0,
        }

    def like(self) -> tuple[Any, ...]:
        """What a dense graph has in common with this one that it is a fair baseline of."""
        graph = (self.body or {}).get("onnx", {})
        return (self.kind, *(graph.get(key) for key in ("layout", "precision", "provider")))


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    found = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file())
    return found or folder_bytes(folder)


def identify(paths: Sequence[str], progress: Progress | None = None) -> list[Subject]:
    """The subjects that ``paths`` name, each checked file by file.

    Raises:
        VerificationError: a manifest is damaged, or a file is not what it says.
        ModelError: no such model, or a folder that is none.
        UsageError: one is named twice.
    """
    progress = progress or Silent()
    progress.stage("checking files", len(paths))
    found = []
    for path, label in zip(paths, _labels(paths), strict=True):
        found.append(_identify(path, label))
        progress.advance()
    return found


def _identify(path: str, label: str) -> Subject:
    folder = Path(path) if Path(path).is_dir() else resolve(path).folder
    if (folder / manifest.NAME).exists():
        body = manifest.read(folder)
        kind = body["kind"]
        if kind not in RUNTIMES_OF:
            raise VerificationError(f"{folder / manifest.NAME}: key kind is {str(kind)[:40]!r}, which no runtime opens")
        damage = manifest.damaged_files(folder, body)
        if damage:
            raise VerificationError(
                f"{folder}: {damage[0]} ({len(damage)} problems): changed after its export; export it again"
            )
        hashes = {name: entry["sha256"] for name, entry in body["files"].items()}
        source = frozenset(str(value) for value in (body["source"].get("files") or {}).values())
        return Subject(label, path, folder, kind, body, _of(hashes), source, _tokenizer(hashes))
    shards = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not shards:
        raise ModelError(
            f"{folder}: holds neither {manifest.NAME} nor config.json with safetensors; name an artifact or a model"
        )
    hashes = {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.is_file()}
    source = frozenset(hashes[shard.name] for shard in shards)
    return Subject(label, path, folder, "model", None, _of(hashes), source, _tokenizer(hashes))


def _of(hashes: Mapping[str, str]) -> str:
    return _digest([[name, hashes[name]] for name in sorted(hashes)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tokenizer(hashes: Mapping[str, str]) -> dict[str, str]:
    return {name: hashes[name] for name in _TOKENIZERS if name in hashes}


def _labels(paths: Sequence[str]) -> list[str]:
    """For each path its last parts, as few as tell it from the others."""
    # A name such as smollm2-135m is no path, and ``.`` is a path without a name.
    parts = [Path(path).resolve().parts if Path(path).is_dir() else Path(path).parts for path in paths]
    if len({Path(path) for path in paths}) != len(paths):
        twice = next(path for path in paths if sum(Path(path) == Path(other) for other in paths) > 1)
        raise UsageError(f"{twice}: named twice; name each artifact and baseline once")
    labels = []
    for mine in parts:
        length = next(
            (k for k in range(1, len(mine)) if sum(other[-k:] == mine[-k:] for other in parts) == 1), len(mine)
        )
        labels.append("/".join(mine[-length:]).replace("//", "/"))
    return labels


def check_baseline(candidate: Subject, baseline: Subject) -> list[str]:
    """Refuse a baseline that is not of the candidate's model; returns why it may be another all the same.

    Shards tell it for sure: those that a manifest names as the candidate's source, or both models' own. Where they do
    not, the sizes in both configs have to be equal.

    Raises:
        UsageError: other source shards, another type or size of model, another tokenizer, or one that was pruned
            itself.
        ModelError: a config.json that is there cannot be read.
    """
    if baseline.sparse:
        raise UsageError(f"--baseline {baseline.path}: was pruned itself; give the dense model")
    if candidate.body is not None and candidate.source and baseline.source and candidate.source != baseline.source:
        raise UsageError(
            f"--baseline {baseline.path}: is another model: its shards are not those of source.files in "
            f"{candidate.folder / manifest.NAME}; give {candidate.body['source']['name']}"
        )
    # One may have files of another library's beside those that both have.
    both = candidate.tokenizer.keys() & baseline.tokenizer.keys()
    if any(candidate.tokenizer[name] != baseline.tokenizer[name] for name in both):
        raise UsageError(
            f"--baseline {baseline.path}: its tokenizer is another than that of {candidate.path}, so the same text "
            "would be other tokens; give the model it was pruned from"
        )
    mine, dense = _sizes(candidate.folder), _sizes(baseline.folder)
    common = mine.keys() & dense.keys()
    for key in _SIZES:
        if key in common and mine[key] != dense[key]:
            raise UsageError(
                f"--baseline {baseline.path}: is another model: key {key} in its config.json is {dense[key]!s:.40}, in "
                f"that of {candidate.path} {mine[key]!s:.40}; give the model it was made from"
            )
    doubts = []
    if not candidate.source or candidate.source != baseline.source:
        alike = f"they are alike in {', '.join(key for key in _SIZES if key in common)}" if common else "nor do configs"
        doubts.append(f"no manifest names its shards as what it was made from; {alike}")
    if not both and (candidate.tokenizer or baseline.tokenizer):
        doubts.append("they have no tokenizer file in common, so the same ids may be other text")
    return doubts


def _sizes(folder: Path) -> dict[str, Any]:
    """What of ``_SIZES`` the config in ``folder`` says, of the language model in it; nothing where there is none."""
    if not (folder / "config.json").is_file():
        return {}
    config = read_config(folder)
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    found = {key: next((config[name] for name in names if name in config), None) for key, names in _SIZES.items()}
    return {key: value for key, value in found.items() if value is not None}
