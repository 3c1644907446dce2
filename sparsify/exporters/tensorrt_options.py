"""What a user may choose about a TensorRT engine, and the optimisation profiles that follow from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError, UsageError
from sparsify.exporters.tensorrt_api import MODULES
from sparsify.exporters.tensorrt_header import HARDWARE, Profile

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Names of the cache's inputs.
PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


@dataclass(frozen=True)
class EngineOptions:
    """Options of one build; the precision is not among them: the data types of the ONNX file are kept.

    Attributes:
        runtime: ``tensorrt`` or ``tensorrt-rtx``; None takes the one that is installed.
        sparse: allow sparse tactics.
        batch: largest number of sequences.
        prompt: longest prompt in tokens.
        total: longest prompt and answer together, in tokens.
        workspace_bytes: limit of the scratch memory of a kernel; None leaves it to TensorRT (all of the GPU).
        timing_cache: file with kernel timings, read and brought up to date.
        level: builder optimisation level 0 to 5; None is TensorRT's default.
        version_compatible: newer versions of the same major run the engine too.
        hardware: ``none``, ``ampere-plus`` or ``same-compute-capability``.
        targets: compute capabilities to build for (TensorRT-RTX); empty is its own choice.
        weight_streaming: weights may stay in host memory at run time.
        refit: weights can be replaced later by others with zeros in the same places.
        tactic_sources: names of kernel libraries to choose from; empty is TensorRT's default.
    """

    runtime: str | None = None
    sparse: bool = True
    batch: int = 8
    prompt: int = 512
    total: int = 1024
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    level: int | None = None
    version_compatible: bool = False
    hardware: str = "none"
    targets: tuple[str, ...] = ()
    weight_streaming: bool = False
    refit: bool = False
    tactic_sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, value in (("batch", self.batch), ("prompt", self.prompt)):
            if value < 1:
                raise UsageError(f"engine option {key}={value}: want at least 1")
        if self.total <= self.prompt:
            raise UsageError(f"engine option total={self.total}: want more than prompt={self.prompt}, for the answer")
        if self.level is not None and not 0 <= self.level <= 5:
            raise UsageError(f"engine option level={self.level}: choose 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise UsageError("engine option workspace=0: want a size, as 4GiB")
        if self.hardware not in HARDWARE:
            raise UsageError(f"engine option hardware={self.hardware}: choose one of {', '.join(HARDWARE)}")
        if self.runtime not in (None, *MODULES):
            raise UsageError(f"engine option runtime={self.runtime}: choose one of {', '.join(MODULES)}")
        if self.runtime == "tensorrt-rtx" and self.version_compatible:
            raise UsageError("engine option version-compatible=on: TensorRT-RTX has no such engines; leave it out")

    @classmethod
    def parse(cls, entries: Iterable[str]) -> EngineOptions:
        """The options of ``KEY=VALUE`` texts, as ``workspace=4GiB``; what is not named keeps its default.

        Raises:
            UsageError: an unknown key, a repeated one, a value that means nothing, or options that exclude each other.
        """
        values: dict[str, Any] = {}
        for entry in entries:
            key, equals, text = entry.partition("=")
            if not equals or key not in _PARSERS:
                raise UsageError(f"engine option {entry!r}: want KEY=VALUE with KEY one of {', '.join(_PARSERS)}")
            name, parse = _PARSERS[key]
            if name in values:
                raise UsageError(f"engine option {key}: given twice")
            try:
                values[name] = parse(text)
            except ValueError as error:
                raise UsageError(f"engine option {entry}: {error}") from None
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON values, for records."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError("want a whole number")
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("want on or off")
    return text == "on"


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})\s*(\D*)", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"want a size with one of the units {', '.join(filter(None, _UNITS))}, as 4GiB")
    return int(match[1]) * _UNITS[match[2]]


def _file(text: str) -> Path:
    if not text:
        raise ValueError("want a file")
    return Path(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ValueError("want names with commas between them")
    return names


def _capabilities(text: str) -> tuple[str, ...]:
    names = _names(text)
    for name in names:
        if not re.fullmatch(r"\d{1,2}\.\d", name):
            raise ValueError(f"want compute capabilities as 8.6,8.9, got {name!r}")
    return names


def memory_bytes(option: str, text: str) -> int:
    """Bytes of a size such as ``4GiB``, given for ``option``.

    Raises:
        UsageError: it is none.
    """
    try:
        return _size(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}") from None


_PARSERS: dict[str, tuple[str, Any]] = {
    "runtime": ("runtime", str),
    "sparse": ("sparse", _switch),
    "batch": ("batch", _count),
    "prompt": ("prompt", _count),
    "total": ("total", _count),
    "workspace": ("workspace_bytes", _size),
    "timing-cache": ("timing_cache", _file),
    "level": ("level", _count),
    "version-compatible": ("version_compatible", _switch),
    "hardware": ("hardware", str),
    "targets": ("targets", _capabilities),
    "weight-streaming": ("weight_streaming", _switch),
    "refit": ("refit", _switch),
    "tactic-sources": ("tactic_sources", _names),
}


def profiles(inputs: Mapping[str, tuple[int, ...]], options: EngineOptions, source: Path) -> tuple[Profile, ...]:
    """Two profiles for a decoder: prefill (no past) and decode (one token after a past).

    Kernels are chosen for the optimum, which is the largest batch and prompt, and half of the longest past.

    Args:
        inputs: input name -> shape with -1 for dynamic axes, as the parsed network has them.
        options: of the build.
        source: the ONNX file, for messages.

    Raises:
        ModelError: an input that is none of a decoder's, or of another rank.
    """
    longest = options.total - 1
    steps = {  # name -> (batch, sequence, past) at min, opt, max
        "prefill": ((1, 1, 0), (options.batch, options.prompt, 0), (options.batch, options.prompt, 0)),
        "decode": ((1, 1, 1), (options.batch, 1, max(longest // 2, 1)), (options.batch, 1, longest)),
    }

    def shape(name: str, batch: int, sequence: int, past: int) -> tuple[int, ...]:
        declared = inputs[name]
        if name in ("input_ids", "position_ids") and len(declared) == 2:
            return (batch, sequence)
        if name == "attention_mask" and len(declared) == 2:
            return (batch, sequence + past)
        if PAST.fullmatch(name) and len(declared) == 4 and min(declared[1], declared[3]) > 0:
            return (batch, declared[1], past, declared[3])
        raise ModelError(
            f"{source}: input {name} {list(declared)} is not one of a decoder with a key/value cache; "
            "export it with --layout standard"
        )

    made = []
    for step, bounds in steps.items():
        low, best, high = ({name: shape(name, *bound) for name in inputs} for bound in bounds)
        made.append(Profile(step, {name: (low[name], best[name], high[name]) for name in inputs}))
    return tuple(made)
