"""Kernel timings kept between builds: TensorRT's timing cache in a file that tells what it belongs to.

The file is one line of JSON (kind, version and GPU it was measured with, SHA-256 of the rest) and TensorRT's bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.exporters.tensorrt_api import Gpu, TensorRt
from sparsify.exporters.tensorrt_trust import try_folder
from sparsify.files import write_atomic, writing

FORMAT = "sparsify-timing-cache/1"
_REMEDY = "delete it or name another file"


class TimingCache:
    """A timing cache file for one TensorRT on one GPU; a missing file is an empty cache."""

    def __init__(self, path: Path, api: TensorRt, gpu: Gpu) -> None:
        self._path = path
        self._api = api
        self._head = {"format": FORMAT, "kind": api.kind, "version": api.version, "gpu": gpu.name}
        self._head["compute_capability"] = gpu.compute_capability

    def attach(self, config: Any) -> None:
        """Have a build use what the file holds.

        Raises:
            UsageError: not a timing cache, damaged, of another TensorRT or GPU, or refused by TensorRT.
            OutputError: it could not be written after the build.
        """
        with self._locked():
            try_folder(self._path.parent)
        cache = config.create_timing_cache(self._read())
        if cache is None or not config.set_timing_cache(cache, False):
            raise UsageError(
                f"{self._path}: {self._api.label} refuses this timing cache; delete it or name another file"
            )

    def update(self, config: Any) -> None:
        """Write the build's timings, together with what others wrote to the file meanwhile.

        Raises:
            UsageError: as ``attach``.
            OutputError: it cannot be written.
        """
        with self._locked():
            cache = config.get_timing_cache()
            cache.combine(config.create_timing_cache(self._read()), False)
            data = bytes(cache.serialize())
            head = json.dumps({**self._head, "sha256": hashlib.sha256(data).hexdigest()})
            write_atomic(self._path, lambda temporary: temporary.write_bytes(head.encode() + b"\n" + data))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._path.with_name(self._path.name + ".lock")
        with writing(self._path):
            lock.parent.mkdir(parents=True, exist_ok=True)
            opened = lock.open("a")
        with opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            yield

    def _read(self) -> bytes:
        """TensorRT's bytes in the file, none where there is no file."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be read: {error.strerror or error}; {_REMEDY}") from error
        line, newline, data = content.partition(b"\n")
        try:
            head = json.loads(line)
            if not newline or head["format"] != FORMAT:
                raise ValueError("no such header")
            digest = head.pop("sha256")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{self._path}: is not a timing cache of sparsify's; {_REMEDY}") from error
        for key, value in self._head.items():
            if head.get(key) != value:
                raise UsageError(f"{self._path}: timings of {key} {head.get(key)!r}, this is {value!r}; {_REMEDY}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise UsageError(f"{self._path}: the timing cache is damaged; {_REMEDY}")
        return data
