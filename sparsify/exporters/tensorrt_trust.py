"""Which engine files may be deserialised: those that this user built, and others only where the user says so.

An engine is code for the GPU and a container that TensorRT parses in native code. Engines built here leave an empty
file named by their SHA-256 in ``$SPARSIFY_CACHE/engines``, a folder that only the user can write to.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from sparsify.errors import ModelError, OutputError, UsageError
from sparsify.exporters.tensorrt_header import EngineHeader
from sparsify.files import writing
from sparsify.source import cache_folder


def _registry() -> Path:
    return cache_folder() / "engines"


def _private(folder: Path) -> bool:
    """Whether ``folder`` exists and nobody but this user can write to it."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


def open_registry() -> Path:
    """The folder of records, which this user can write to and nobody else; asked before a build.

    Raises:
        OutputError: the cache cannot be written, or others can write to it.
    """
    folder = _registry()
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(folder):
        raise OutputError(f"{folder}: others can write to it; make it yours alone (chmod 700) or set SPARSIFY_CACHE")
    try_folder(folder)
    return folder


def try_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be made (``OutputError``)."""
    with writing(folder), tempfile.TemporaryFile(dir=folder):
        pass


def remember(plan_sha256: str) -> None:
    """Record that this user built the engine with this SHA-256.

    Raises:
        OutputError: as ``open_registry``.
    """
    folder = open_registry()
    with writing(folder):
        (folder / plan_sha256).touch(mode=0o600)


def was_built_here(plan_sha256: str) -> bool:
    """Whether this user built the engine with this SHA-256; False where others could have written the record."""
    return _private(_registry()) and (_registry() / plan_sha256).is_file()


def load_plan(engine: Path, header: EngineHeader, *, trust_engine: bool = False) -> bytes:
    """The bytes of an engine file that match its header and may be deserialised.

    The bytes that are checked are the bytes that are returned: a file that changes afterwards changes nothing.

    Args:
        engine: the file.
        header: what ``read_header`` said of it.
        trust_engine: whether the user vouches for an engine that was not built here (``--trust-engine``).

    Raises:
        ModelError: it cannot be read, or differs from its header.
        UsageError: it was not built here and is not vouched for.
    """
    try:
        plan = engine.read_bytes()
    except OSError as error:
        raise ModelError(f"{engine}: cannot be read: {error.strerror or error}") from error
    if len(plan) != header.plan_bytes or hashlib.sha256(plan).hexdigest() != header.plan_sha256:
        raise ModelError(f"{engine}: differs from what its header describes; build it again")
    if not trust_engine and not was_built_here(header.plan_sha256):
        raise UsageError(
            f"{engine}: was not built here by this user, and an engine is code; "
            "pass --trust-engine if you trust its origin, or build it from the ONNX file"
        )
    return plan
