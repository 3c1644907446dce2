"""The stage that checks format, kernels and engine."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gpu_machine.weights import ERROR_FACTOR

from vllm_gpu.children import run_child
from vllm_gpu.model import MODELS, make_model
from vllm_gpu.record import Record
from vllm_gpu.variants import absent, run_engine

PARTS = ("format", "kernels", "engine")
# Log-probabilities of a small model by another kernel: mean and largest difference, or this many times what dense
# differs from itself between eager mode and compiled graphs.
LOGPROB_MEAN, LOGPROB_MAX, NOISE_FACTOR = 0.03, 0.3, 3.0
MODES = ("eager", "compiled with CUDA graphs")


def check(options: argparse.Namespace) -> int:
    """Correctness of format, kernels and engine."""
    record = Record("check", options)
    common = {"device": options.device, "tiny": options.tiny}
    record.body |= {
        "error_factor": ERROR_FACTOR,
        "logprob_tolerance": {"mean": LOGPROB_MEAN, "max": LOGPROB_MAX, "noise_factor": NOISE_FACTOR},
        "cases": [],
        "engine": {},
    }
    if "format" in options.parts:
        _check_cases(record, options, "format", "format", common)
    if "kernels" in options.parts:
        for kernel in options.kernels:
            _check_cases(record, options, f"kernel {kernel}", "kernel", {**common, "kernel": kernel})
    if "engine" in options.parts:
        _check_engine(record, options)
    counts = Counter(bool(case["ok"]) for case in record.body["cases"] if "ok" in case)
    print(f"{counts[True]} cases right, {counts[False]} wrong, {len(record.body['not_run'])} not run")
    return record.close()


def _check_cases(record: Record, options: argparse.Namespace, what: str, task: str, arguments: dict[str, Any]) -> None:
    if record.left_s < 15:
        record.not_run(what, "the budget is spent")
        return
    cases = run_child(record, what, task, arguments, options.work, record.left_s).found
    for case in cases:
        if "absent" in case:
            record.not_run(what, case["absent"])
        elif "not_run" in case:
            record.not_run(f"{what}, {case['not_run']}", case["why"])
        elif not case["ok"]:
            record.failed(f"{what}, {case.get('part', '')} {case['case']}", json.dumps(case))
    record.body["cases"] += [{"of": what, **case} for case in cases if "ok" in case]
    right = sum(bool(case.get("ok")) for case in cases)
    print(f"{what}: {right} of {sum('ok' in case for case in cases)} right", flush=True)
    record.write()


def _check_engine(record: Record, options: argparse.Namespace) -> None:
    """A small model: plain against compressed, and each kernel against dense."""
    on_gpu = options.device == "cuda"
    sizes = MODELS["tiny" if options.tiny else "small"]
    root = options.work / f"check-{sizes.hidden}"
    record.body["engine_model"] = {**make_model(record, root, sizes, options.device), "weights": "random, 2:4"}
    settings = {
        "device": options.device, "sizes": asdict(sizes), "max_batch": 8, "max_length": 128, "batched_tokens": 1024,
        "cache_tokens": 4096, "graph_batches": [1, 2, 4, 8], "attention": options.attention, "in_process": True,
    }  # fmt: skip
    answers: dict[str, dict[str, Any]] = {}
    for mode, name in itertools.product(MODES, ("plain", "dense", *options.kernels)):
        key, eager = f"{name}, {mode}", mode == MODES[0]
        if eager and on_gpu and name in options.kernels:
            continue  # compiled is the harder case, and eager mode only shows how far dense differs from itself
        why = absent(name, options.device)
        if not eager and not on_gpu:
            why = "no CUDA device"
        elif not why and record.left_s < 20:
            why = "the budget is spent"
        if why:
            record.not_run(f"engine {key}", why)
            continue
        timeout_s = min(record.left_s, 240)
        outcome = run_engine(record, f"engine {key}", "ask", name, root, {**settings, "eager": eager}, timeout_s)
        if outcome.why:
            continue
        answers[key] = outcome.found[0]
        record.body["engine"][key] = {"engaged": outcome.engaged, "memory": answers[key]["memory"]}
        print(f"engine {key}: answered", flush=True)
        record.write()
    _compare_answers(record, answers, options.kernels)


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    def pairs(key: str) -> Iterator[tuple[float, float]]:
        return zip(*(itertools.chain.from_iterable(answer[key]) for answer in (one, other)), strict=True)

    gaps = [abs(a - b) for a, b in pairs("logprobs")]
    tokens = statistics.fmean(a == b for a, b in pairs("tokens"))
    return {"logprob_mean": statistics.fmean(gaps), "logprob_max": max(gaps), "tokens": tokens}


def _compare_answers(record: Record, answers: dict[str, dict[str, Any]], kernels: list[str]) -> None:
    record.body["comparisons"] = comparisons = {}
    noise = {"logprob_mean": 0.0, "logprob_max": 0.0}
    plain = {mode: answers[f"plain, {mode}"] for mode in MODES if f"plain, {mode}" in answers}
    if len(plain) == len(MODES):
        noise = _differences(*plain.values())
        comparisons["plain, eager against compiled"] = noise
    for mode, name in itertools.product(plain, ("dense", *kernels)):
        key = f"{name}, {mode}"
        if key not in answers:
            continue
        gap = comparisons[f"{key} against plain"] = _differences(answers[key], plain[mode])
        print(f"engine {key} against plain: {gap}", flush=True)
        # A NaN compares false.
        if name == "dense":
            right = gap["logprob_mean"] == 0 and gap["tokens"] == 1
        else:
            right = (
                gap["logprob_mean"] <= max(LOGPROB_MEAN, NOISE_FACTOR * noise["logprob_mean"])
                and gap["logprob_max"] <= max(LOGPROB_MAX, NOISE_FACTOR * noise["logprob_max"])
            )  # fmt: skip
        if not right:
            record.failed(f"engine {key}", f"differs from plain: {gap}")
    if not comparisons:
        record.not_run("engine, comparisons", "no two engines answered")
