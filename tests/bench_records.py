"""A file of records as ``sparsify bench`` writes them, with times made up from a seed."""

from __future__ import annotations

import random
from math import log
from pathlib import Path
from typing import Any

from sparsify.bench.records import Writer, writer
from sparsify.bench.spread import spread

SHAPES = {"model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.mlp.down_proj": (576, 1536)}
SCENARIOS = ((128, 32, 1), (512, 32, 1), (128, 32, 8))
# label -> pattern, time to a token relative to dense, bytes of weights, perplexity
ARTIFACTS: dict[str, tuple[str | None, float, int, float]] = {
    "dense": (None, 1.0, 269_000_000, 13.2),
    "2of4": ("2:4", 0.65, 163_000_000, 19.0),
    "half": ("0.5", 0.70, 163_000_000, 15.1),
}


def write_example(path: Path, *, seed: int = 0, rounds: int = 7, runtimes: tuple[str, ...] = ("torch", "vllm")) -> Path:
    """Write a run of three artifacts of one model; in onnxruntime sparse artifacts run dense and are not faster."""
    with writer(path) as out:
        write_run(out, seed=seed, rounds=rounds, runtimes=runtimes)
    return path


def write_run(out: Writer, *, seed: int, rounds: int, runtimes: tuple[str, ...], noise: float = 0.01) -> None:
    """The records of one run."""
    draw = random.Random(seed)
    out.write(
        "run",
        command=["sparsify", "bench", "2of4", "half", "--baseline", "dense"],
        seed=seed,
        rounds=rounds,
        warm_up=1,
        environment={
            "host": {
                "processor": "Some CPU at 2.0 GHz", "cores": 2, "memory_bytes": 24 << 30, "system": "Linux 6.1",
                "governor": None, "load_1m": 0.2, "threads": 2, "wait_policy": "PASSIVE",
            },
            "gpu": None,
            "versions": {"sparsify": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"},
        },
        ceilings=[
            {"device": "cpu", "how": "measured", "bytes_per_s": 2e10, "flops": {"bfloat16": 1e12}, "source": "this run"}
        ],
    )  # fmt: skip
    for label, (pattern, _, weight_bytes, _) in ARTIFACTS.items():
        out.write(
            "artifact", artifact=label, path=f"build/{label}", role="candidate" if pattern else "baseline",
            kind="vllm" if pattern else "model", model="smollm2-135m", pattern=pattern,
            method="sparsegpt" if pattern else None, sparsity=0.5 if pattern else None, precision=None,
            sha256="a" * 64, source_sha256="b" * 64, tokenizer_sha256="c" * 64, file_bytes=weight_bytes + 4_000_000,
            weight_bytes=weight_bytes, linears=len(SHAPES) if pattern else 0,
        )  # fmt: skip
    for runtime in runtimes:
        for scenario in SCENARIOS:
            for label in ARTIFACTS:
                _latency(out, draw, label, runtime, scenario, rounds, noise)
        for label, (pattern, _, weight_bytes, perplexity) in ARTIFACTS.items():
            common = {
                "artifact": label, "runtime": runtime, "session": f"{runtime} cpu bfloat16",
                "engaged": engaged(label, runtime),
            }  # fmt: skip
            out.write(
                "memory", **common, processes=1, loaded_resident_bytes=weight_bytes + 300_000_000,
                peak_resident_bytes=weight_bytes + 400_000_000, device_peak_bytes=None, weights_resident_bytes=None,
                versions={"torch": "2.13.0"},
            )  # fmt: skip
            # Windows differ, and differ more for what was pruned; their mean is the logarithm of the perplexity.
            each = [log(perplexity) + (0.02 if pattern else 0.01) * (i - 3.5) for i in range(8)]
            out.write(
                "perplexity", **common,
                text={
                    "source": "pydoc", "windows": 8, "length": 512, "stride": 512, "bos": False, "sha256": "d" * 64
                },
                perplexity=perplexity, nll_mean=log(perplexity), standard_error=0.4, window_nll=each,
                window_tokens=[511] * 8, n_tokens=8 * 511,
                kl=None if runtime == "vllm" else {
                    "mean_nats": 0.3 if pattern else 1e-4, "standard_error_nats": 0.02 if pattern else 1e-5,
                    "n_tokens": 4096, "top1_agreement": 0.8, "reference": "dense",
                },
            )  # fmt: skip
            out.write(
                "task", **common, task="arc_easy", metric="acc", value=0.4 if pattern else 0.5, standard_error=0.03,
                n=200, harness="lm-eval 0.4.13", samples_sha256="e" * 64, higher_is_better=True,
                # Dense has the first 100 right; pruned loses 30 of them and gains 10 others.
                samples=[1.0] * 70 + [0.0] * 30 + [1.0] * 10 + [0.0] * 90 if pattern else [1.0] * 100 + [0.0] * 100,
            )  # fmt: skip
    for name, shape in SHAPES.items():
        for tokens in (1, 32):
            _kernel(out, draw, name, shape, tokens)
    out.write(
        "missing", what="KL divergence in vllm", why="vLLM gives log-probabilities of tokens, not logits", failed=False,
        artifact=None, runtime="vllm", scenario=None,
    )  # fmt: skip
    out.write("end", seconds=123.4, failed=0, load_1m=1.9, gpu=None)


def engaged(label: str, runtime: str) -> dict[str, str]:
    """What ran, per linear."""
    sparse = ARTIFACTS[label][0] is not None and runtime != "onnxruntime"
    return {name: "native" if sparse else "dense" for name in SHAPES}


def _latency(
    out: Writer,
    draw: random.Random,
    label: str,
    runtime: str,
    scenario: tuple[int, int, int],
    rounds: int,
    noise: float,
) -> None:
    prompt, new, batch = scenario
    pattern, relative, *_ = ARTIFACTS[label]
    sparse = "native" in engaged(label, runtime).values()
    relative, work = (relative, 9 / 16) if sparse else (1.0, 1.0)
    found: list[dict[str, Any]] = []
    for i in range(rounds):
        for again in (False, True) if pattern is None else (False,):
            first, step = (value * relative * draw.gauss(1, noise) for value in (0.001 * prompt, 0.05))
            found.append(
                {
                    "round": i,
                    "position": len(ARTIFACTS) if again else list(ARTIFACTS).index(label),
                    "again": again,
                    "ttft_s": [first] * batch,
                    "gaps_s": [[step] * (new - 1)] * batch,
                    "total_s": first + step * (new - 1),
                }
            )
    # Rows that come together are one sample.
    firsts = [value for each in found for value in dict.fromkeys(each["ttft_s"])]
    gaps = [value for each in found for row in dict.fromkeys(map(tuple, each["gaps_s"])) for value in row]
    totals = [each["total_s"] for each in found]
    out.write(
        "latency", artifact=label, runtime=runtime, session=f"{runtime} cpu bfloat16",
        baseline="dense" if pattern else None, asked_sparse=pattern is not None, engaged=engaged(label, runtime),
        scenario={"prompt_tokens": prompt, "new_tokens": new, "batch": batch, "load": "batch"},
        trace_sha256="f" * 64, interleaved=True, rounds=found,
        statistics={
            "ttft_s": spread(firsts), "tpot_s": spread(gaps), "total_s": spread(totals),
            "tokens_per_s": spread([batch * new / total for total in totals]),
        },
        roof={
            "ttft_s": 0.0004 * prompt * work, "tpot_s": 0.02 * work, "ttft_limit": "compute",
            "tpot_limit": "bandwidth", "ceilings": "measured",
        },
        gpu=None, same_tokens=[new] * batch if pattern is None else [3] * batch,
    )  # fmt: skip


def _kernel(out: Writer, draw: random.Random, name: str, shape: tuple[int, int], tokens: int) -> None:
    dense = shape[0] * shape[1] * 2 / 2e10 * 1e6
    times = {}
    for kernel, share, slower in (("dense torch", 1.0, 2.0), ("native", 9 / 16, 2.2)):
        roof = dense * share
        samples = [roof * slower * draw.gauss(1, 0.02) for _ in range(7)]
        times[kernel] = {
            "samples_us": samples, "median_us": sorted(samples)[3], "roof_us": roof, "limited_by": "bandwidth"
        }  # fmt: skip
    out.write(
        "kernel", artifact="2of4", device="cpu", linear=name, linears=30, shape=list(shape), pattern="2:4", density=0.5,
        dtype="bfloat16", tokens=tokens, threads=2, kernels=times, best_dense="dense torch", auto="native", cold=True,
        graphs=False,
    )  # fmt: skip
