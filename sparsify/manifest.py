"""``sparsify.json``: what was done to a model, verifiable against the files it lies with.

It holds nothing that differs between two runs of the same recipe; timings and peak memory are in ``run.json``.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsify import __version__
from sparsify.errors import VerificationError
from sparsify.files import read_json, sha256_file, write_json
from sparsify.journal import JOURNAL, METRICS
from sparsify.types import PrunedLinear

NAME = "sparsify.json"
RUN = "run.json"
# What differs between two runs of the same recipe.
ABOUT_RUN = (RUN, JOURNAL)
# Not called .safetensors: loaders that read every such file in a folder would take it for weights.
PERMUTATIONS = "sparsify.perm"
FORMAT = 1


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages``, Python's and ours first; those that are absent are left out."""
    found = {"sparsify": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def artifact_files(folder: Path) -> list[str]:
    """Names of the files below ``folder`` that a manifest lists; not itself, what tells of the run, nor dot files."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    told = (NAME, *ABOUT_RUN, METRICS)
    return [name for name in names if name not in told and not any(part.startswith(".") for part in name.split("/"))]


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in artifact_files(folder)
    }


def coverage(total: int, prunable: int, linears: list[PrunedLinear]) -> dict[str, Any]:
    """How much of the model pruning reached.

    Args:
        total: values in the model's parameters, tied ones once.
        prunable: weights of every linear that could be pruned.
        linears: those that were.

    Returns:
        counts ``total``, ``prunable``, ``selected``, ``zeros`` (in the selected linears), and as shares of ``total``
        ``prunable_share``, ``pruned_share`` (selected) and ``zero_share``.
    """
    selected = sum(entry.shape[0] * entry.shape[1] for entry in linears)
    zeros = sum(entry.zeros for entry in linears)
    return {
        "total": total,
        "prunable": prunable,
        "selected": selected,
        "zeros": zeros,
        "prunable_share": prunable / total,
        "pruned_share": selected / total,
        "zero_share": zeros / total,
    }


def write(folder: Path, body: dict[str, Any]) -> None:
    """Write the manifest over the files that are in ``folder`` now."""
    write_json(folder / NAME, {"format": FORMAT, **body, "files": _file_table(folder)})


def linear_records(linears: list[PrunedLinear]) -> list[dict[str, Any]]:
    """The manifest's rows, as plain values."""
    return [{**asdict(entry), "shape": list(entry.shape)} for entry in linears]


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, with the keys every artifact has checked for presence and type.

    Raises:
        VerificationError: missing, truncated, of another format.
    """
    path = folder / NAME
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise VerificationError(f"{folder}: has no {NAME}; it is not an artifact of sparsify") from None
    except NotADirectoryError:
        raise VerificationError(f"{folder}: is a file; name the folder of an artifact") from None
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path}: not readable as JSON ({error}); export the artifact again") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise VerificationError(
            f"{path}: key format is {found!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    shapes: dict[str, type] = {
        "kind": str, "source": dict, "recipe": dict, "linears": list, "coverage": dict, "files": dict, "versions": dict,
    }  # fmt: skip
    for key, kind in shapes.items():
        if not isinstance(value.get(key), kind):
            raise VerificationError(f"{path}: key {key} is missing or not a {kind.__name__}; export the artifact again")
    counts = [value["coverage"].get(key) for key in ("total", "prunable", "selected", "zeros")]
    shares = [value["coverage"].get(key) for key in ("prunable_share", "pruned_share", "zero_share")]
    if not all(isinstance(n, int) and n >= 0 for n in counts) or not all(isinstance(x, float) for x in shares):
        raise VerificationError(f"{path}: key coverage is malformed; export the artifact again")
    if not isinstance(value["source"].get("name"), str):
        raise VerificationError(f"{path}: key source.name is missing; export the artifact again")
    for row in value["linears"]:
        if not _is_linear(row):
            raise VerificationError(f"{path}: an entry of linears is malformed ({str(row)[:80]}); export again")
    # An artifact whose manifest lists no linear would pass every check that goes over the linears.
    selected = sum(row["shape"][0] * row["shape"][1] for row in value["linears"])
    zeros = sum(row["zeros"] for row in value["linears"])
    if not selected or (selected, zeros) != (value["coverage"]["selected"], value["coverage"]["zeros"]):
        raise VerificationError(f"{path}: keys coverage and linears disagree; export the artifact again")
    for name, entry in value["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or _escapes(name):
            raise VerificationError(f"{path}: entry {name!r} of files is malformed; export the artifact again")
    return value


def _is_linear(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and isinstance(row.get("pattern"), str)
        and isinstance(row.get("group"), str)
        and isinstance(row.get("zeros"), int)
        and isinstance(row.get("relative_error"), int | float)
        and isinstance(row.get("shape"), list)
        and len(row["shape"]) == 2
        and all(isinstance(size, int) and size > 0 for size in row["shape"])
        # Manifests of earlier versions lack it.
        and isinstance(row.get("status", ""), str)
    )


def _escapes(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def verify_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files of an artifact, a sentence each; empty if they are as the manifest says."""
    extra = sorted(set(artifact_files(folder)) - set(manifest["files"]))
    return damaged_files(folder, manifest) + [f"{name}: not in the manifest" for name in extra]


def damaged_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Which files of an artifact are missing or changed, a sentence each; others may lie beside them."""
    problems = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: content differs from the manifest")
    return problems
