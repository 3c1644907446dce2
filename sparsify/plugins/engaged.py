"""Which kernel computes with each linear of a served model, as the engine's own process knows it.

The plugin fills a ``Record`` while a model loads. When the last linear is ready it says so once in the log and, where
``SPARSIFY_ENGAGED_DIR`` names a folder, writes ``<pid>-<n>.json`` there, since the engine may be another process.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = "SPARSIFY_ENGAGED_DIR"
# Below vLLM's own logger, so that its handlers print what is said here.
log = logging.getLogger("vllm.sparsify")


@dataclass(frozen=True)
class Engaged:
    """How one linear runs on one rank.

    Attributes:
        kernel: name of the sparse kernel, or ``dense``.
        pattern: of the weight as it was loaded: ``2:4``, ``unstructured``, ``dense``.
        reason: why it is dense although a kernel could have been, or what was not known about the kernel; else empty.
        dense_bytes: the weight without packing.
        resident_bytes: what stays in memory of it.
    """

    kernel: str
    pattern: str
    reason: str
    dense_bytes: int
    resident_bytes: int


def summary(linears: Mapping[str, Engaged]) -> str:
    """How many linears run by which kernel and why, and their memory, for one line."""
    groups = Counter((e.kernel, e.pattern, e.reason) for e in linears.values())
    parts = [
        f"{n} x {pattern} by {kernel}" + (f" ({reason})" if reason else "")
        for (kernel, pattern, reason), n in sorted(groups.items())
    ]
    resident = sum(e.resident_bytes for e in linears.values())
    dense = sum(e.dense_bytes for e in linears.values())
    memory = f"{resident / 1e6:.1f} MB of weights in memory, {dense / 1e6:.1f} MB if all were dense"
    return "; ".join([*parts, memory])


@dataclass
class Record:
    """The linears of one model on one rank: ``expected`` names, and those that are ready; ``number`` is the model's."""

    rank: int = 0
    number: int = field(default_factory=itertools.count().__next__)
    expected: set[str] = field(default_factory=set)
    linears: dict[str, Engaged] = field(default_factory=dict)

    def ready(self, name: str, engaged: Engaged) -> None:
        """Note that ``name`` can compute; after the last one the model is reported."""
        self.linears[name] = engaged
        if self.expected <= self.linears.keys():
            log.info("%s", self.summary())
            try:
                self.write()
            except OSError as error:
                log.warning("sparsify: %s: what runs cannot be written there: %s", os.environ[FOLDER], error.strerror)

    def summary(self) -> str:
        """One line: how many linears run by which kernel and why, and their memory."""
        return f"sparsify: rank {self.rank}, linears: {summary(self.linears)}"

    def write(self) -> None:
        """Write the record where ``SPARSIFY_ENGAGED_DIR`` asks for it."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return
        path = Path(folder) / f"{os.getpid()}-{self.number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"rank": self.rank, "linears": {name: asdict(entry) for name, entry in self.linears.items()}}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body), encoding="utf-8")
        temporary.replace(path)


RECORDS: list[Record] = []


def engaged() -> dict[str, str]:
    """Linear -> kernel, over the models that this process has loaded through the plugin, the last one winning."""
    return {name: entry.kernel for record in RECORDS for name, entry in record.linears.items()}
