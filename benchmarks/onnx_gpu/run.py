"""The stage that exports, builds, checks and times."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_machine import record
from gpu_machine.children import Done, run_process, scratch_folder
from gpu_machine.llama import Llama

MODELS = {
    # Llama-3.2-1B's blocks; a small vocabulary, so that logits and embedding do not hide the linears.
    "1b": Llama(2048, 8192, 16, 32, 8, 32000),
    # The builder of layout genai takes every linear with as many outputs as the vocabulary for the output layer.
    "tiny": Llama(128, 256, 2, 4, 2, 320),
}
PARTS = ("export", "build", "engine", "onnxruntime", "genai")
# Of a part's process, where more is left.
LIMIT_S = 300
PACKAGES = (
    *("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda"),
    *("tensorrt", "tensorrt-rtx-cu13-libs"),
)


def run(options: argparse.Namespace) -> int:
    """Everything, one precision after the other; the record is written after every part."""
    sizes = MODELS["tiny" if options.tiny else "1b"]
    if options.layers:
        sizes = replace(sizes, layers=options.layers)
    found = record.Record("onnx_gpu run", options, PACKAGES)
    found.body |= {"model": asdict(sizes), "weights": "random, 2:4 by magnitude", "parts": {}}
    lengths = [16] if options.tiny else options.lengths
    common = {
        "device": options.device,
        "sizes": asdict(sizes),
        "root": str(options.work),
        "runtime": options.runtime,
        "batches": [1, 2] if options.tiny else options.batches,
        "lengths": lengths,
        "new_tokens": 8 if options.tiny else options.new_tokens,
        "repeats": 2 if options.tiny else options.repeats,
    }
    if not _part(found, options, "model", "model", common).why:
        for precision in options.precisions:
            _run_precision(found, options, {**common, "precision": precision})
    return found.close()


def _run_precision(found: record.Record, options: argparse.Namespace, common: dict[str, Any]) -> None:
    precision, on_gpu = common["precision"], options.device == "cuda"
    folder = options.work / precision
    for part in PARTS:
        if part not in options.parts:
            continue
        what = f"{part} {precision}"
        if part in ("build", "onnxruntime") and not (folder / "standard/model.onnx").is_file():
            found.not_run(what, "there is no exported model")
        elif part == "engine" and not on_gpu:
            found.not_run(what, "no CUDA device")
        elif part == "engine" and not (folder / "standard/model.engine.json").is_file():
            found.not_run(what, "there is no engine")
        elif part == "onnxruntime":
            # A provider that crashes must not take the other with it.
            for provider in ("cuda", "tensorrt") if on_gpu else ("cpu",):
                _part(found, options, f"{what} {provider}", part, {**common, "provider": provider})
        elif part == "genai":
            provider = "cuda" if on_gpu else "cpu"
            if not on_gpu and precision != "fp32":
                found.not_run(what, "ONNX Runtime runs that graph on a GPU only")
                continue
            _part(found, options, what, part, {**common, "provider": provider})
        else:
            _part(found, options, what, part, common)


def _part(found: record.Record, options: argparse.Namespace, what: str, task: str, arguments: dict[str, Any]) -> Done:
    """Run one part; its answers and whatever is wrong in them go to the record."""
    if found.left_s < 15:
        found.not_run(what, "the budget is spent")
        return Done([], "the budget is spent", "")
    own = Path(__file__).parent
    scratch = scratch_folder(options.work / "tasks", task)
    variables = _variables(own, options.work)
    done = run_process(found, what, task, arguments, scratch, min(found.left_s, LIMIT_S), tool=own, variables=variables)
    for answer in done.found:
        if answer.get("ok") is False:
            found.failed(f"{what}, {answer['case']}", answer["why"])
        if "not_run" in answer:
            found.not_run(f"{what}, {answer['not_run']}", answer["why"])
    found.body["parts"][what] = done.found
    print(f"{what}: {done.why or f'{len(done.found)} answers'}, {found.left_s:.0f} s left", flush=True)
    found.write()
    return done


def _variables(own: Path, work: Path) -> dict[str, str]:
    paths = filter(None, [str(own.parent), os.environ.get("PYTHONPATH")])
    return {
        "HF_HUB_OFFLINE": "1",
        # The engines' record of origin must not depend on the machine's home.
        "SPARSIFY_CACHE": str(work / "cache"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }
