"""One model on a CPU in PyTorch, ONNX Runtime and onnxruntime-genai: speed, load time, memory and file sizes.

Each sample is a process of its own, engines in turn, files in the page cache: of two models in one process, the one
that is loaded later is faster, by more than what is to be told apart. A round is what can be compared. ``prefill`` is a
prompt of 512 tokens up to the first token after it; ``decode`` is 64 tokens behind a prompt of 128, without that
prompt. PyTorch computes the logits of the last token alone, the ONNX graphs those of all tokens.

    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
    python benchmarks/onnx_cpu.py --checkpoint DIR --standard DIR --genai DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import commit

from sparsify.manifest import versions
from sparsify.memory import peak_memory_bytes

PEER = "onnxruntime-genai"
# engine -> the option that names its folder
ENGINES = {
    "PyTorch float32": "checkpoint",
    "ours, standard": "standard",
    "ours, genai": "genai",
    "ours, packed": "packed",
    "ours, packed, folded by ONNX Runtime": "packed",
    "ours, int8": "int8",
    PEER: "genai",
}
OPTIONS = {"checkpoint": True, "standard": True, "genai": True, "packed": False, "int8": False}
PREFILL_TOKENS, PROMPT_TOKENS, DECODE_TOKENS = 512, 128, 64
WEIGHTS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.packed.data")
Generate = Callable[[NDArray[np.int64], int], NDArray[np.int64]]


def load(engine: str, folder: Path, threads: int, spinning: bool) -> Generate:
    """Open ``folder`` and return a function of (ids [1, length], n) -> the next n tokens [1, n], greedily."""
    if engine == "PyTorch float32":
        import torch

        from sparsify.runtimes.torch_session import TorchSession

        torch.set_num_threads(threads)
        return TorchSession(folder).generate
    if engine != PEER:
        from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
        from sparsify.runtimes.onnxruntime_settings import OrtSettings

        settings = OrtSettings(threads=threads, spinning=spinning, unpack="folded" not in engine)
        return OnnxRuntimeSession(folder, settings).generate
    import onnxruntime_genai

    options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": str(int(spinning))}
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)

    def generate(ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        length = ids.shape[1] + n
        parameters = onnxruntime_genai.GeneratorParams(model)
        # The least length keeps its search from stopping at the end-of-sequence token.
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids[0].astype(np.int32))
        for _ in range(n):
            generator.generate_next_token()
        made: NDArray[np.int64] = np.asarray(generator.get_sequence(0))[None, -n:].astype(np.int64)
        return made

    return generate


def prompts() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompts of prefill and decode."""
    ids = np.random.default_rng(0).integers(100, 40_000, (1, PREFILL_TOKENS + PROMPT_TOKENS), dtype=np.int64)
    return ids[:, :PREFILL_TOKENS], ids[:, PREFILL_TOKENS:]


def seconds(generate: Generate, ids: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Wall time and processor time of one call."""
    started = time.perf_counter(), time.process_time()
    generate(ids, n)
    return np.array([time.perf_counter() - started[0], time.process_time() - started[1]])


def resident() -> dict[str, int]:
    """Resident bytes of this process: anonymous memory, and pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Rss")}
    return {"anon_bytes": found["RssAnon"], "file_bytes": found["RssFile"]}


def measure(engine: str, folder: Path, threads: int, spinning: bool) -> dict[str, Any]:
    """One sample of one engine; run in a process of its own."""
    # Imports are over before the clock starts, and their memory is told apart.
    if engine == PEER:
        import onnxruntime_genai  # noqa: F401
    elif engine.startswith("ours"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        import sparsify.runtimes.onnxruntime_session
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        import sparsify.runtimes.torch_session  # noqa: F401
    imports = resident()
    started = time.perf_counter()
    generate = load(engine, folder, threads, spinning)
    load_s = time.perf_counter() - started
    loaded, load_peak_bytes = resident(), peak_memory_bytes()
    long, short = prompts()
    generate(long, 1)
    tokens = generate(short, 8)
    prefill = np.minimum(seconds(generate, long, 1), seconds(generate, long, 1))
    decode = seconds(generate, short, DECODE_TOKENS + 1) - seconds(generate, short, 1)
    return {
        "load_s": load_s,
        "prefill_tokens_per_s": PREFILL_TOKENS / prefill[0],
        "decode_tokens_per_s": DECODE_TOKENS / decode[0],
        "prefill_tokens_per_cpu_s": PREFILL_TOKENS / prefill[1],
        "decode_tokens_per_cpu_s": DECODE_TOKENS / decode[1],
        "tokens": tokens[0].tolist(),
        "imports": imports,
        "loaded": loaded,
        "load_peak_bytes": load_peak_bytes,
        "peak_bytes": peak_memory_bytes(),
    }


def child(engine: str, folder: Path, threads: int, spinning: bool) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        subprocess.run(
            [sys.executable, __file__, "--child", engine, str(folder), str(threads), str(int(spinning)), answer.name],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result: dict[str, Any] = json.load(answer)
        return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of ``values``, and how many they are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds by threads, engine and phase, and their ratios to the peer and to PyTorch within each round."""
    found = {(s["threads"], s["engine"], s["round"]): s for s in samples}
    rounds = sorted({s["round"] for s in samples})
    result: dict[str, Any] = {}
    for threads in sorted({s["threads"] for s in samples}):
        for engine in dict.fromkeys(s["engine"] for s in samples):
            for phase in ("prefill", "decode"):
                entry: dict[str, Any] = {}
                for unit in ("tokens_per_s", "tokens_per_cpu_s"):
                    key = f"{phase}_{unit}"
                    values = [found[threads, engine, i][key] for i in rounds]
                    entry[unit] = spread(values)
                    for other in (PEER, "PyTorch float32"):
                        if other != engine:
                            pairs = [v / found[threads, other, i][key] for v, i in zip(values, rounds, strict=True)]
                            entry[f"{unit} to {other}"] = spread(pairs)
                result[f"{engine}, {phase}, {threads} thread{'s' * (threads > 1)}"] = entry
    return result


def load_summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Load time and memory of one engine; ``imports_bytes`` is what it needs before the model is there."""
    return {
        "load_s": spread([s["load_s"] for s in samples]),
        "imports_bytes": spread([sum(s["imports"].values()) for s in samples]),
        "loaded_bytes": spread([sum(s["loaded"].values()) for s in samples]),
        "load_peak_bytes": spread([s["load_peak_bytes"] for s in samples]),
        "peak_bytes": spread([s["peak_bytes"] for s in samples]),
    }


def weight_files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files with graph or weights."""
    return {path.name: path.stat().st_size for pattern in WEIGHTS for path in sorted(folder.glob(pattern))}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        engine, path, threads, spinning, answer = sys.argv[2:]
        sample = measure(engine, Path(path), int(threads), spinning == "1")
        Path(answer).write_text(json.dumps(sample), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, required in OPTIONS.items():
        parser.add_argument(f"--{name}", type=Path, required=required)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-spinning", action="store_true", help="idle threads sleep: for cores that others use too")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = {option: getattr(arguments, option) for option in OPTIONS}
    folders = {engine: given[option] for engine, option in ENGINES.items() if given[option] is not None}
    for folder in folders.values():
        for name in weight_files(folder):
            with (folder / name).open("rb") as file:
                while file.read(1 << 24):
                    pass
    samples: list[dict[str, Any]] = []
    for i in range(arguments.rounds):
        for n in arguments.threads:
            # Whoever comes after a heavy neighbour differs from round to round.
            for engine in (list(folders) * 2)[i % len(folders) :][: len(folders)]:
                folder = folders[engine]
                sample = child(engine, folder, n, not arguments.no_spinning)
                samples.append({"round": i, "threads": n, "engine": engine, **sample})
                print(json.dumps(samples[-1]), flush=True)
    summary = summarise(samples)
    loads = {engine: load_summary([s for s in samples if s["engine"] == engine]) for engine in folders}
    first = samples[0]["tokens"]
    record = {
        "benchmark": "onnx_cpu",
        "commit": commit(),
        "versions": versions("torch", "transformers", "onnxruntime", "onnxruntime-genai"),
        "cores": os.cpu_count(),
        "spinning": not arguments.no_spinning,
        "files": {option: weight_files(folder) for option, folder in given.items() if folder is not None},
        "speed": summary,
        "load": loads,
        "same_tokens": all(s["tokens"] == first for s in samples if "int8" not in s["engine"]),
        "samples": samples,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, entry in summary.items():
        ratio = "".join(f", {entry[key]['median']:.3f} {key}" for key in entry if " to " in key)
        print(f"{name}: {entry['tokens_per_s']['median']:.1f} tokens/s{ratio}", flush=True)
    for engine, entry in loads.items():
        sizes = ", ".join(
            f"{k.removesuffix('_bytes')} {v['median'] / 1e6:.0f} MB" for k, v in entry.items() if "_b" in k
        )
        print(f"{engine}: load {entry['load_s']['median']:.2f} s, {sizes}", flush=True)


if __name__ == "__main__":
    main()
