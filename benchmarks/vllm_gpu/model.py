"""The stage that writes the model that is served, plain and compressed; the small one that is checked."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_machine.llama import LLAMA_8B, Llama, write_model
from gpu_machine.weights import same_bits

from vllm_gpu.record import Record

MODELS = {
    "8b": LLAMA_8B,
    "small": Llama(512, 1536, 4, 8, 4, 2048),
    "tiny": Llama(128, 256, 2, 4, 2, 256),
}


def model(options: argparse.Namespace) -> int:
    """Write the model that ``serve`` runs, plain and compressed."""
    record = Record("model", options)
    sizes = MODELS["tiny" if options.tiny else "8b"]
    if options.layers:
        sizes = replace(sizes, layers=options.layers)
    root = options.work / "model"
    record.body |= {**make_model(record, root, sizes, options.device), "weights": "random, 2:4 by magnitude"}
    print(f"{root}: {record.body['bytes']} bytes in {record.body['seconds']} s")
    return record.close()


def make_model(record: Record, root: Path, sizes: Llama, device: str) -> dict[str, Any]:
    """Write the two checkpoints and compare them; what the record says of them."""
    made = write_model(root, sizes, device)
    for name in differing_weights(root, sizes):
        record.failed(f"checkpoint, {name}", "differs between plain and compressed")
    return made


def differing_weights(root: Path, sizes: Llama) -> list[str]:
    """Weights of the first and last block that the two checkpoints hold differently, read by the project's readers."""
    from sparsify.format.reader import open_checkpoint

    names = [f"model.layers.{i}.{name}.weight" for i in {0, sizes.layers - 1} for name in sizes.linears]
    plain, compressed = (open_checkpoint(root / variant) for variant in ("plain", "compressed"))
    pairs = zip(plain.read(names), compressed.read(names), strict=True)
    return [name for (name, one), (_, other) in pairs if not same_bits(one, other)]
