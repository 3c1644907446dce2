"""The stage that times vLLM."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_machine.record import spread

from vllm_gpu.model import MODELS
from vllm_gpu.record import Record
from vllm_gpu.variants import present, run_engine


def serve(options: argparse.Namespace) -> int:
    """Engines in turn, round by round, each in a process of its own."""
    record = Record("serve", options)
    root, kept = options.work / "model", options.work / "serve.json"
    if not (root / "compressed/config.json").exists():
        record.not_run("serve", f"{root} holds no model: run the stage `model` first")
        return record.close()
    n_layers = json.loads((root / "compressed/config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    sizes = replace(MODELS["tiny" if options.tiny else "8b"], layers=n_layers)
    on_gpu = options.device == "cuda"
    batches = [1, 4] if options.tiny else options.batches
    lengths = [64] if options.tiny else options.lengths
    n_new = 8 if options.tiny else options.new_tokens
    prompt = 16 if options.tiny else 32
    blocks = max(batches) * math.ceil((prompt + n_new + 17) / 16) + math.ceil(max(lengths) / 16) + 64
    settings = {
        "device": options.device, "sizes": asdict(sizes), "eager": not on_gpu, "batches": batches, "lengths": lengths,
        "new_tokens": n_new, "prompt": prompt, "repeats": options.repeats, "max_batch": max(batches),
        "max_length": max(lengths) + 16, "batched_tokens": max(*lengths, max(batches) * prompt),
        "cache_tokens": 16 * blocks, "graph_batches": sorted(set(batches)), "attention": options.attention,
        "in_process": options.in_process or not on_gpu,
    }  # fmt: skip
    samples: list[dict[str, Any]] = []
    if options.resume and kept.exists():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        gpus = (found["environment"].get("name") for found in (earlier, record.body))
        if earlier["settings"] != settings or len(set(gpus)) > 1:
            record.not_run("serve", f"{kept} was made with other settings or on another GPU; run without --resume")
            return record.close()
        samples = earlier["samples"]
    record.body |= {"settings": settings, "weights": "random, 2:4", "page_cache": "warm", "samples": samples}
    done = {(sample["round"], sample["variant"]) for sample in samples}
    variants = present(record, "variant", options.variants, options.device)
    taken: dict[str, float] = {sample["variant"]: sample["seconds"] for sample in samples}
    for i, name in itertools.product(range(options.rounds), variants):
        if (i, name) in done:
            continue
        if record.left_s < 1.1 * taken.get(name, 30):
            record.not_run(f"round {i}, {name}", f"the budget is spent: {record.left_s:.0f} s left")
            continue
        for path in (root / ("plain" if name == "plain" else "compressed")).glob("*.safetensors"):
            _read(path)
        started = time.monotonic()
        outcome = run_engine(record, f"round {i}, {name}", "time", name, root, settings, record.left_s)
        taken[name] = time.monotonic() - started
        if outcome.why:
            continue
        sample = {"round": i, "variant": name, "seconds": taken[name], "engaged": outcome.engaged}
        sample |= {**_load_times(outcome.log), **outcome.found[0]}
        samples.append(sample)
        print(json.dumps({key: value for key, value in sample.items() if key != "engaged"}), flush=True)
        record.body["summary"] = summary(samples)
        record.write()
        shutil.copy(record.path, kept)
    record.body["summary"] = summary(samples)
    for key, value in record.body["summary"].items():
        print(f"{key}: {value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g}, n = {value['n']})")
    return record.close()


def _read(path: Path) -> None:
    """Into the page cache: every variant loads from there."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def _load_times(log: str) -> dict[str, float | None]:
    """What vLLM says of loading: seconds to read the weights, and to have the model ready."""
    weights = re.search(r"Loading weights took ([\d.]+) seconds", log)
    ready = re.search(r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds", log)
    return {"weights_s": float(weights[1]) if weights else None, "load_s": float(ready[1]) if ready else None}


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per variant the spread over rounds of each measure, and of its ratio to plain in the same round."""
    measures: dict[tuple[str, str], dict[int, float]] = {}
    for sample in samples:
        values: dict[str, float | None] = {key: sample[key] for key in ("load_s", "start_s")}
        for kind in ("decode", "prefill"):
            for size, found in sample[f"{kind}_tokens_per_s"].items():
                values[f"{kind} {size}, tokens/s"] = statistics.median(found)
        for key in ("model_tensor_bytes", "vllm_model_bytes", "allocated_bytes"):
            values[key] = sample["memory"].get(key)
        for key in ("resident_bytes", "dense_bytes"):
            values[f"linears, {key}"] = sum(row[key] for row in sample["engaged"]) or None
        for key, value in values.items():
            if value is not None:
                measures.setdefault((sample["variant"], key), {})[sample["round"]] = value
    result = {}
    for (variant, key), by_round in measures.items():
        result[f"{variant}: {key}"] = spread(list(by_round.values()))
        plain = measures.get(("plain", key), {})
        ratios = [value / plain[i] for i, value in by_round.items() if plain.get(i)]
        if variant != "plain" and ratios:
            result[f"{variant}: {key}, to plain"] = spread(ratios)
    return result
