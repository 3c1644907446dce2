"""What TensorRT itself says of sparse kernels: the reports in its build log and the layers of a finished engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math:|Found (\d+) layer\(s\) eligible to use sparse tactics:?)(.*)"
)
_CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers:"
    r"|Chose (\d+) layer\(s\) using sparse tactics:?)(.*)"
)
# Placeholders for kernels that are generated or chosen later, on the device.
_NO_TACTIC = re.compile(r"^(0x0*|__myelin_CASK_STUB|__myl_.*)?$")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# The first of a list stands behind the prefix of our own log or of trtexec's.
_LOGGED_LAYER = re.compile(r"^(?: *\d+\.\d+ [A-Z_]+ |.*\[TRT\] )?(?:Layers: *)?Name: (.*?), LayerType: [^,]*,")
_LOGGED_TACTIC = re.compile(r", TacticName: ([^,]*),")
_PROFILE = re.compile(r" \[profile (\d{1,4})\]")
_SPARSE_TACTIC = re.compile(r"sparse|sptensor", re.IGNORECASE)
_FUSION = re.compile(r"_myl\d+_\d+$")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a finished engine.

    Attributes:
        name: as TensorRT has it.
        tactic: the kernel that runs it; empty where unknown.
        nodes: the ONNX nodes it computes.
        profile: number of the optimisation profile that it belongs to.
    """

    name: str
    tactic: str
    nodes: tuple[str, ...]
    profile: int = 0


@dataclass(frozen=True)
class SparsityReport:
    """What one tactic selection reported: layer names, and their numbers where only these were logged."""

    n_eligible: int
    n_chosen: int
    eligible: tuple[str, ...]
    chosen: tuple[str, ...]


def parse_log(lines: Iterable[str]) -> tuple[SparsityReport, ...]:
    """The sparsity reports of a build log, ours or ``trtexec``'s, of any version."""
    found: list[SparsityReport] = []
    pending: tuple[int, tuple[str, ...]] | None = None
    for line in lines:
        if match := _ELIGIBLE.search(line):
            pending = _counted(match)
        elif match := _CHOSEN.search(line):
            n_eligible, eligible = pending or (0, ())
            found.append(SparsityReport(n_eligible, (chosen := _counted(match))[0], eligible, chosen[1]))
            pending = None
    return tuple(found)


def _counted(match: re.Match[str]) -> tuple[int, tuple[str, ...]]:
    names = tuple(name.strip() for name in match[2].split(", ") if name.strip())
    return (int(match[1]) if match[1] else len(names)), names


def logged_layers(lines: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers that a verbose log of 10 and later lists at its end."""
    layers = []
    for line in lines:
        if match := _LOGGED_LAYER.match(line):
            tactic = _LOGGED_TACTIC.search(line)
            layers.append(_layer(match[1], tactic[1] if tactic else "", line))
    return tuple(layers)


def inspected_layers(text: str) -> tuple[EngineLayer, ...]:
    """The layers of the inspector's JSON; an engine built without detail has names only.

    Raises:
        ValueError: not the inspector's JSON.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    entries = value.get("Layers") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no list of layers")
    layers = []
    for entry in entries:
        if isinstance(entry, str):
            layers.append(_layer(entry, "", ""))
        elif isinstance(entry, dict):
            layers.append(
                _layer(str(entry.get("Name", "")), str(entry.get("TacticName") or ""), str(entry.get("Metadata") or ""))
            )
        else:
            raise ValueError(f"a layer is {type(entry).__name__}")
    return tuple(layers)


def _layer(name: str, tactic: str, metadata: str) -> EngineLayer:
    nodes = tuple(_ONNX_LAYER.findall(metadata)) or onnx_nodes(name)
    profile = _PROFILE.search(name)
    return EngineLayer(name, "" if _NO_TACTIC.match(tactic) else tactic, nodes, int(profile[1]) if profile else 0)


def is_sparse(tactic: str) -> bool:
    """Whether a kernel is a sparse one, by its name."""
    return _SPARSE_TACTIC.search(tactic) is not None


def kernels_of(layers: Iterable[EngineLayer], profiles: Sequence[str]) -> dict[str, dict[str, str]]:
    """ONNX node -> profile -> the kernel that runs it there, the sparse one where it is split among several.

    Args:
        layers: of an engine.
        profiles: names of its profiles, in order; one beyond them goes by its number.
    """
    found: dict[str, dict[str, str]] = {}
    for layer in layers:
        profile = profiles[layer.profile] if layer.profile < len(profiles) else f"profile {layer.profile}"
        for node in layer.nodes if layer.tactic else ():
            kernels = found.setdefault(node, {})
            if profile not in kernels or is_sparse(layer.tactic):
                kernels[profile] = layer.tactic
    return found


def onnx_nodes(name: str) -> tuple[str, ...]:
    """The ONNX nodes in the name of a fused layer: ``a + b``, ``a+b_myl0_3``, ``a [profile 1]``."""
    plain = _FUSION.sub("", _PROFILE.sub("", name))
    return tuple(part.strip() for part in plain.split("+") if part.strip())
