"""The parts of ``run``, each in a process of its own; what they yield goes into the record."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_machine.llama import Llama, write_model

from onnx_gpu.compare import CASES, check_session, references
from onnx_gpu.timing import time_sessions

if TYPE_CHECKING:
    from gpu_machine.children import Task

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Lines of a build log that are worth keeping whole.
SPARSITY = "(Sparsity)"


def _folder(arguments: dict[str, Any], name: str) -> Path:
    return Path(arguments["root"], arguments["precision"], name)


def _checkpoint(arguments: dict[str, Any]) -> Path:
    return Path(arguments["root"], "model/plain")


def make_model(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The checkpoint: random weights with 2:4 zeros, and a tokenizer, which the builder of layout ``genai`` wants."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    sizes = Llama(**arguments["sizes"])
    found = write_model(Path(arguments["root"], "model"), sizes, arguments["device"])
    words = WordLevel({f"w{i}": i for i in range(sizes.vocabulary)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(_checkpoint(arguments))
    yield found


def export(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The checkpoint in layout ``standard``."""
    from sparsify.exporters.onnx_standard import export_onnx
    from sparsify.files import folder_bytes

    out = _folder(arguments, "standard")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    export_onnx(_checkpoint(arguments), out, precision=arguments["precision"])
    yield {"case": "export", "ok": True, "seconds": time.perf_counter() - started, "bytes": folder_bytes(out)}


def build(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A sparse engine and its dense twin, and what is proven of the first."""
    from sparsify.exporters.tensorrt_engine import build_engine
    from sparsify.exporters.tensorrt_options import EngineOptions

    out = _folder(arguments, "standard")
    longest = max(arguments["lengths"])
    options = EngineOptions(
        runtime=arguments["runtime"],
        batch=max(3, *arguments["batches"]),
        prompt=longest,
        total=longest + max(arguments["new_tokens"] + 1, 64),
    )
    started = time.perf_counter()
    built = build_engine(out / "model.onnx", out, options)
    seconds = time.perf_counter() - started
    yield {
        "case": "build",
        "ok": True,
        "seconds_of_both": seconds,
        "engine": {key: value for key, value in asdict(built.header).items() if key not in ("profiles", "options")},
        "options": options.to_json(),
        "twin_bytes": built.twin.stat().st_size if built.twin else None,
        "proof": built.proof.to_json(),
    }
    for log in sorted(out.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        yield {"log": log.name, "lines": len(lines), "sparsity": [line for line in lines if SPARSITY in line][:200]}


def engine(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The engines against PyTorch, and sparse against dense in turn, with and without CUDA graphs."""
    from sparsify.runtimes.tensorrt_session import TensorRtSession

    folder = _folder(arguments, "standard")
    wanted = references(_checkpoint(arguments), DTYPES[arguments["precision"]], arguments["device"])
    names = {"sparse": "model.engine", "dense": "dense.engine"}
    with ExitStack() as stack:
        sessions = {}
        for name, file in names.items():
            for graphs in (True, False):
                key = f"{name}, {'CUDA graphs' if graphs else 'growing cache'}"
                try:
                    started = time.perf_counter()
                    session = stack.enter_context(TensorRtSession(folder, cuda_graphs=graphs, engine=file))
                    seconds = time.perf_counter() - started
                    yield from check_session(key, session, wanted)
                    yield {"session": key, "open_s": seconds, "memory": session.memory_bytes, "name": session.name}
                    if graphs:
                        yield {"engaged": session.engaged(), "session": key}
                    sessions[key] = session
                except Exception as error:  # recorded, and the others are still worth a try
                    yield {"case": key, "ok": False, "why": f"{type(error).__name__}: {error}"}
        yield from time_sessions(sessions, arguments)


def onnxruntime(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exported model in ONNX Runtime with one provider."""
    yield from _onnxruntime(arguments, _folder(arguments, "standard"), CASES)


def genai(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The checkpoint in layout ``genai``, in ONNX Runtime."""
    from sparsify.exporters.onnx_forms import choose
    from sparsify.exporters.onnx_genai import export_genai
    from sparsify.files import folder_bytes

    out = _folder(arguments, "genai")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    form = choose("genai", arguments["precision"], arguments["provider"])[0]
    export_genai(_checkpoint(arguments), out, form)
    yield {"case": "export", "ok": True, "seconds": time.perf_counter() - started, "bytes": folder_bytes(out)}
    # Its attention reads lengths out of the mask, so that padding can only be behind.
    yield from _onnxruntime(arguments, out, (CASES[0], CASES[2]))


def _onnxruntime(arguments: dict[str, Any], folder: Path, cases: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
    from sparsify.runtimes.onnxruntime_settings import OrtSettings

    longest = max(arguments["lengths"])
    settings = OrtSettings(
        provider=arguments["provider"],
        max_batch=max(3, *arguments["batches"]),
        max_length=longest + arguments["new_tokens"] + 1,
    )
    wanted = references(_checkpoint(arguments), DTYPES[arguments["precision"]], arguments["device"])
    started = time.perf_counter()
    try:
        session = OnnxRuntimeSession(folder, settings)
    except Exception as error:  # a provider that does not start: its own words are the result
        yield {"not_run": arguments["provider"], "why": f"{type(error).__name__}: {error}"}
        return
    with session:
        key = session.name
        yield {"session": key, "open_s": time.perf_counter() - started, "notices": list(session.notices)}
        yield from check_session(key, session, wanted, cases)
        yield {"session": key, "engaged": session.engaged(), "options": session.options()}
        yield from time_sessions({key: session}, arguments)


TASKS: dict[str, Task] = {
    "model": make_model,
    "export": export,
    "build": build,
    "engine": engine,
    "onnxruntime": onnxruntime,
    "genai": genai,
}
