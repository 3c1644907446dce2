"""Execution providers: started with options chosen for the model, and never left behind silently.

Option names are those of onnxruntime-gpu 1.31 and of its documentation; each provider refuses names it does not know.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.errors import MissingExtraError, ModelError, OutputError, UsageError
from sparsify.files import sha256_file, writing
from sparsify.runtimes.onnxruntime_errors import line, load_error
from sparsify.runtimes.onnxruntime_graph import Graph
from sparsify.runtimes.onnxruntime_settings import AUTO, CHAINS, CPU, CUDA, TENSORRT, OrtSettings, session_options
from sparsify.runtimes.onnxruntime_source import Source
from sparsify.source import cache_folder

_LIBRARY = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_INSTALL = "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
_ELSE = "install what is missing, or choose provider cpu"


@dataclass(frozen=True)
class Started:
    """A session and what became of the wishes.

    Attributes:
        session: ``onnxruntime.InferenceSession``.
        providers: those that run the model, in order of preference.
        assigned: node name -> provider, as ONNX Runtime divided the graph before its own fusions.
        notices: what fell back to another provider and why, one line each; empty where nothing did.
    """

    session: Any
    providers: tuple[str, ...]
    assigned: dict[str, str]
    notices: tuple[str, ...]


def start(graph: Graph, source: Source, settings: OrtSettings) -> Started:
    """Open ``source`` as ``settings`` ask.

    Args:
        graph: what the file holds.
        source: what ONNX Runtime loads for it.
        settings: checked settings.

    Raises:
        MissingExtraError: the installed onnxruntime is too old to say what runs where.
        UsageError: a provider is not in this build, did not start, refuses an option or cannot run an operator, and
            no fallback is allowed.
        ModelError: the file cannot be loaded.
        SparsifyError: not enough memory.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    choice = settings.provider if settings.provider != AUTO else "cuda" if CUDA in available else "cpu"
    chain, notices = list(CHAINS[choice]), list[str]()

    def give_up(provider: str, why: str) -> None:
        if not settings.allow_fallback:
            raise UsageError(f"{graph.path}: provider {choice}: {provider} {why}")
        notices.append(f"{provider} {why}")
        chain.remove(provider)
        if not chain:
            chain.append(CPU)

    if TENSORRT in chain and (graph.grouped or graph.packed):
        form = "layout genai" if graph.grouped else "packed weights"
        give_up(TENSORRT, f"cannot read {form}; export with layout standard and dense weights")
    while chain[0] not in available:
        has = ", ".join(available)
        give_up(chain[0], f"is not in this ONNX Runtime {onnxruntime.__version__} ({has}); {_INSTALL}")
    while True:
        try:
            session = _open(graph, source, settings, chain)
        except _NotStarted as error:
            give_up(chain[0], f"did not start: {_cause(chain[0]) or error}; {_ELSE}")
            continue
        missing = [provider for provider in chain if provider not in session.get_providers()]
        if not missing:
            break
        del session
        give_up(missing[0], f"did not start: {_cause(missing[0]) or 'no reason given; is a GPU there?'}; {_ELSE}")
    assigned, strays = _division(graph, session, chain)
    if strays:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(strays).most_common(5))
        text = f"left {len(strays)} operators to the CPU: {kinds}"
        if not settings.allow_fallback:
            raise UsageError(f"{graph.path}: provider {choice}: {chain[0]} {text}; allow the fallback to accept that")
        notices.append(f"{chain[0]} {text}")
    return Started(session, tuple(chain), assigned, tuple(notices))


class _NotStarted(Exception):
    """ONNX Runtime raised because of a provider, not because of the model."""


def _open(graph: Graph, source: Source, settings: OrtSettings, chain: Sequence[str]) -> Any:
    import onnxruntime

    providers = [(name, _options(name, graph, settings)) for name in chain]
    # ORT would otherwise print, try again with other providers, or take settings out of the model's metadata.
    plain = {"enable_fallback": 0, "read_config_from_model": 0}
    options = session_options(settings)
    source.apply(options)
    try:
        with _quiet(chain):
            session = onnxruntime.InferenceSession(source.model, options, providers, **plain)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        text = str(error)
        if "provider option" in text or "EP option" in text:
            raise UsageError(f"{graph.path}: {chain[0]} does not take an option: {line(error)}") from error
        if chain[0] != CPU and any(
            part in text for part in ("install TensorRT libraries", "CUDA failure", "CUDA error")
        ):
            raise _NotStarted(line(error)) from error
        raise load_error(graph.path, error) from error
    session.disable_fallback()
    return session


@contextmanager
def _quiet(chain: Sequence[str]) -> Iterator[None]:
    """Keep the log of a GPU provider that does not start off the terminal: the reason comes in the exception."""
    import onnxruntime

    if list(chain) == [CPU]:
        yield
        return
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # ONNX Runtime's default; it has no way to ask what it was


def _cause(provider: str) -> str:
    """Why the library of a provider does not load; empty where it does.

    Asked only after ONNX Runtime tried: the library calls back into it as it is loaded.
    """
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / _LIBRARY.get(provider, "")
    if not library.is_file():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return " ".join(str(error).split())
    return ""


def _division(graph: Graph, session: Any, chain: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(node name -> provider, types of operators that compute on the CPU though another provider was asked for)."""
    if list(chain) == [CPU]:
        return {}, []
    try:
        parts = session.get_provider_graph_assignment_info()
    except AttributeError:
        raise MissingExtraError(
            "this onnxruntime does not say which provider runs what; pip install --upgrade onnxruntime-gpu"
        ) from None
    return divide(graph, [(p.ep_name, n.name, n.op_type) for p in parts for n in p.get_nodes()])


def divide(graph: Graph, nodes: Sequence[tuple[str, str, str]]) -> tuple[dict[str, str], list[str]]:
    """(node name -> provider, types of the operators that compute on the CPU) of (provider, name, type) of nodes.

    Providers for GPUs leave the arithmetic of shapes to the CPU on purpose; that is no fallback.
    """
    strays = [kind for provider, name, kind in nodes if provider == CPU and graph.computes(name, kind)]
    return {name: provider for provider, name, _ in nodes}, strays


def _options(provider: str, graph: Graph, settings: OrtSettings) -> dict[str, str]:
    if provider == CUDA:
        return cuda_options(settings)
    if provider == TENSORRT:
        return tensorrt_options(graph, settings, cache_folder() / "onnxruntime-tensorrt")
    return {}


def cuda_options(settings: OrtSettings) -> dict[str, str]:
    """Options of the CUDA provider."""
    options = {
        "device_id": str(settings.device),
        # A cache that grows by a token would double the arena each time it crosses a power of two.
        "arena_extend_strategy": "kSameAsRequested",
        # float32 is to mean float32: on by default, it rounds products to 10 bits of mantissa.
        "use_tf32": "0",
    }
    if settings.gpu_memory_bytes is not None:
        options["gpu_mem_limit"] = str(settings.gpu_memory_bytes)
    return options


def tensorrt_options(graph: Graph, settings: OrtSettings, cache: Path) -> dict[str, str]:
    """Options of the TensorRT provider; ``cache`` is created, for engines and timings.

    Engines in the cache are run as they are, so the folder has to be the user's alone. Whether ONNX Runtime's own names
    tell weights apart was not tried (it takes a GPU): the prefix keeps the engine of another mask from being taken for
    this one either way.

    Raises:
        OutputError: ``cache`` cannot be created, or others can write to it.
        VerificationError: the artifact's manifest is damaged.
    """
    with writing(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise OutputError(f"{cache}: others can write to it; make it yours alone (chmod 700) or set SPARSIFY_CACHE")
    sparse = is_two_four(graph.path.parent)
    digest = hashlib.sha256("".join(sha256_file(path) for path in (graph.path, *graph.data)).encode())
    digest.update(f"{sparse} {settings.max_length} {settings.max_batch}".encode())
    options = {
        "device_id": str(settings.device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": digest.hexdigest()[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        **profile(graph, settings),
    }
    if sparse:
        options["trt_sparsity_enable"] = "1"
    # The provider's networks are weakly typed: without the flag, layers of these types run in float32.
    for name, flag in (("float16", "trt_fp16_enable"), ("bfloat16", "trt_bf16_enable")):
        if graph.precision == name:
            options[flag] = "1"
    if settings.workspace_bytes is not None:
        options["trt_max_workspace_size"] = str(settings.workspace_bytes)
    return options


def is_two_four(folder: Path) -> bool:
    """Whether the manifest of an artifact says that some linear is 2:4; False where there is no manifest.

    Raises:
        VerificationError: the manifest is damaged.
    """
    if not (folder / manifest.NAME).exists():
        return False
    return any(row.get("pattern") == "2:4" for row in manifest.read(folder)["linears"] if isinstance(row, dict))


def profile(graph: Graph, settings: OrtSettings) -> dict[str, str]:
    """One optimisation profile that takes prompts and single steps alike, tuned for a step with half the cache full.

    One profile, because nothing in the options of ONNX Runtime's TensorRT provider says which of several a run takes.

    Raises:
        ModelError: an axis is none of batch, sequence, past and total.
    """
    longest, half = settings.max_length, settings.max_length // 2
    sizes = {
        "min": {"batch": 1, "sequence": 1, "past": 0, "total": 1},
        "opt": {"batch": 1, "sequence": 1, "past": half, "total": half + 1},
        "max": {"batch": settings.max_batch, "sequence": longest, "past": longest - 1, "total": longest},
    }

    def size(axis: int | str, of: dict[str, int]) -> int:
        if isinstance(axis, int):
            return axis
        for key, value in of.items():
            if axis.startswith(key):
                return value
        raise ModelError(
            f"{graph.path}: axis {axis!r} of an input means nothing to an optimisation profile; export the model again"
        )

    return {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(str(size(axis, of)) for axis in axes)}" for name, axes in graph.inputs.items()
        )
        for which, of in sizes.items()
    }
