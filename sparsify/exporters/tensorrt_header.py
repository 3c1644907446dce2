"""The header of an engine file: what was built, from what, for what; read and checked before TensorRT sees a byte.

``model.engine`` is the plan as TensorRT wrote it, so that ``trtexec`` and Triton load it too. The header lies beside
it as ``model.engine.json`` and is tied to it by length and SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_api import version_tuple
from sparsify.files import read_json, write_json

FORMAT = "sparsify-engine/1"
HARDWARE = ("none", "ampere-plus", "same-compute-capability")
# No header of ours comes near; anything larger is no header.
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

    Attributes:
        name: ``prefill`` or ``decode``.
        shapes: input name -> (min, opt, max) shape.
    """

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class EngineHeader:
    """What an engine file is.

    Attributes:
        kind: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the builder, ``11.4.0.106``.
        gpu: name of the GPU it was built on; empty where it was built without one.
        compute_capabilities: those it was built for, as ``9.0``.
        hardware_compatibility: one of ``HARDWARE``.
        version_compatible: whether newer versions of the same major may run it.
        sparse: whether the builder was allowed sparse tactics; what it chose is in the proof.
        precision: data type of the weights in the ONNX file, as ``float16``.
        refit: whether weights of the same pattern can be put into it.
        weight_streaming: whether weights may stay in host memory.
        profiles: in the engine's order.
        source_sha256: file name -> SHA-256 of the ONNX file and its external data.
        plan_bytes: length of the engine file.
        plan_sha256: its SHA-256.
        options: every option of the build.
    """

    kind: str
    version: str
    gpu: str
    compute_capabilities: tuple[str, ...]
    hardware_compatibility: str
    version_compatible: bool
    sparse: bool
    precision: str
    refit: bool
    weight_streaming: bool
    profiles: tuple[Profile, ...]
    source_sha256: Mapping[str, str]
    plan_bytes: int
    plan_sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)


def header_path(engine: Path) -> Path:
    """Where the header of an engine file lies."""
    return engine.with_name(engine.name + ".json")


def write_header(engine: Path, header: EngineHeader) -> None:
    """Write the header beside ``engine``, atomically (``OutputError`` where that fails)."""
    write_json(header_path(engine), {"format": FORMAT, **asdict(header)})


def read_header(engine: Path) -> EngineHeader:
    """The header of an engine file; the engine's length is compared, its hash is not (``load_plan`` does that).

    Raises:
        ModelError: no engine, no header, a malformed one, or one that belongs to a file of another length.
    """
    path = header_path(engine)
    try:
        size = engine.stat().st_size
    except OSError as error:
        raise ModelError(f"{engine}: cannot be read: {error.strerror or error}") from error
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        value = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{engine}: has no header {path.name} beside it; build it again with sparsify") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is not an engine header: {error}") from error
    try:
        header = _parse(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: is not an engine header: {type(error).__name__}: {error}") from error
    if header.plan_bytes != size:
        what = "truncated" if size < header.plan_bytes else "longer than what was built"
        raise ModelError(f"{engine}: {what}: {size} bytes, its header says {header.plan_bytes}; build it again")
    return header


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"want text, got {type(value).__name__}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"want true or false, got {type(value).__name__}")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"want a number of 0 or more, got {value!r}")
    return value


def _digest(value: Any) -> str:
    text = _text(value)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("a SHA-256 is not 64 hexadecimal digits")
    return text


def _profile(value: Any) -> Profile:
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for name, bounds in value["shapes"].items():
        low, best, high = (tuple(_number(size) for size in shape) for shape in bounds)
        ordered = all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        if not ordered:
            raise ValueError(f"the bounds of {name} are not in order")
        shapes[_text(name)] = (low, best, high)
    return Profile(_text(value["name"]), shapes)


def _parse(value: Any) -> EngineHeader:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"want format {FORMAT}")
    hardware = _text(value["hardware_compatibility"])
    if hardware not in HARDWARE:
        raise ValueError(f"hardware_compatibility {hardware!r}")
    options, sources = value["options"], value["source_sha256"]
    if not isinstance(options, dict) or not isinstance(sources, dict):
        raise TypeError("options and source_sha256 are not tables")
    try:
        profiles = tuple(_profile(entry) for entry in value["profiles"])
    except AttributeError as error:
        raise TypeError(str(error)) from error
    return EngineHeader(
        kind=_text(value["kind"]),
        version=_text(value["version"]),
        gpu=_text(value["gpu"]),
        compute_capabilities=tuple(_text(entry) for entry in value["compute_capabilities"]),
        hardware_compatibility=hardware,
        version_compatible=_flag(value["version_compatible"]),
        sparse=_flag(value["sparse"]),
        precision=_text(value["precision"]),
        refit=_flag(value["refit"]),
        weight_streaming=_flag(value["weight_streaming"]),
        profiles=profiles,
        source_sha256={_text(name): _digest(digest) for name, digest in sources.items()},
        plan_bytes=_number(value["plan_bytes"]),
        plan_sha256=_digest(value["plan_sha256"]),
        options=options,
    )


def check(
    engine: Path,
    header: EngineHeader,
    *,
    kind: str,
    version: str,
    compute_capability: str,
    source_sha256: Mapping[str, str] | None = None,
) -> None:
    """Refuse an engine that this TensorRT on this GPU cannot run, or that was built from another ONNX file.

    Args:
        engine: the file, for messages.
        header: its header.
        kind: of the TensorRT that would run it.
        version: of that TensorRT.
        compute_capability: of the GPU, as ``9.0``.
        source_sha256: file name -> SHA-256 of the ONNX files it should come from; None skips that check.

    Raises:
        ModelError: what does not fit, in one line.
    """
    remedy = "build it again here"
    if header.kind != kind:
        raise ModelError(f"{engine}: is an engine for {header.kind}, this is {kind}; {remedy}")
    if kind == "tensorrt-rtx" and header.version_compatible:
        raise ModelError(f"{engine}: claims to run on several versions, which {kind} does not have; {remedy}")
    built, here = version_tuple(header.version), version_tuple(version)
    newer_minor = header.version_compatible and built[:1] == here[:1] and built <= here
    if built != here and not newer_minor:
        raise ModelError(f"{engine}: was built with {kind} {header.version}, this is {version}; {remedy}")
    if not _runs_on(header, compute_capability):
        wanted = ", ".join(header.compute_capabilities) or "no GPU"
        extra = " and later" if header.hardware_compatibility == "ampere-plus" else ""
        raise ModelError(
            f"{engine}: was built for compute capability {wanted}{extra}"
            f"{f' ({header.gpu})' if header.gpu else ''}, this GPU has {compute_capability}; {remedy}"
        )
    if source_sha256 is not None and dict(source_sha256) != dict(header.source_sha256):
        names = source_sha256.keys() | header.source_sha256.keys()
        changed = sorted(name for name in names if source_sha256.get(name) != header.source_sha256.get(name))
        raise ModelError(f"{engine}: was built from another {', '.join(changed)}; build it again from this one")


def _runs_on(header: EngineHeader, capability: str) -> bool:
    if header.hardware_compatibility == "ampere-plus":
        return version_tuple(capability) >= (8, 0)
    return capability in header.compute_capabilities
