"""Engines for the stand-in of TensorRT, of random models that are exported once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from sparsify.exporters.onnx_standard import export_onnx
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import EngineHeader, write_header
from sparsify.exporters.tensorrt_options import EngineOptions, profiles
from sparsify.exporters.tensorrt_trust import remember
from sparsify.files import sha256_file
from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_session import TensorRtSession
from tests import trt_double

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {"llama": lambda: LlamaConfig(**SIZES), "mistral": lambda: MistralConfig(**SIZES, sliding_window=24)}

MADE: dict[str, tuple[Path, Path]] = {}


def make(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, ONNX folder) of a random model, made once."""
    if name not in MADE:
        folder = factory.mktemp(name)
        checkpoint = folder / "checkpoint"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Initial weights of 0.02 would leave logits near zero.
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(checkpoint)
        (folder / "onnx").mkdir()
        export_onnx(checkpoint, folder / "onnx")
        MADE[name] = checkpoint, folder / "onnx"
    return MADE[name]


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own record of trusted engines, and the stand-in knows what memory there is."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    memory: list[tuple[int, int]] = []
    zeros = Device.zeros

    def noted(self: Device, count: int, dtype: torch.dtype) -> torch.Tensor:
        made = zeros(self, count, dtype)
        memory.append((made.data_ptr(), made.nbytes))
        return made

    monkeypatch.setattr(Device, "zeros", noted)
    monkeypatch.setattr(trt_double, "MEMORY", memory)


def shapes(model: Path) -> dict[str, tuple[int, ...]]:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return {v.name: tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim) for v in graph.input}


def build(folder: Path, source: Path, options: EngineOptions | None = None, **changes: Any) -> EngineHeader:
    """An engine for the stand-in, as the builder would write it."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    options = options or EngineOptions(batch=3, prompt=24, total=160)
    model = folder / "model.onnx"
    made = profiles(shapes(model), options, model)
    engine = folder / "model.engine"
    engine.write_bytes(trt_double.plan(model, [dict(profile.shapes) for profile in made], **changes))
    header = EngineHeader(
        kind="tensorrt",
        version=trt_double.__version__,
        gpu="",
        compute_capabilities=("cpu",),
        hardware_compatibility="none",
        version_compatible=False,
        sparse=True,
        precision="float32",
        refit=False,
        weight_streaming=False,
        profiles=made,
        source_sha256={"model.onnx": sha256_file(model)},
        plan_bytes=engine.stat().st_size,
        plan_sha256=sha256_file(engine),
        options=options.to_json(),
    )
    write_header(engine, header)
    remember(header.plan_sha256)
    return header


def open_engine(folder: Path, module: Any = trt_double, **options: Any) -> TensorRtSession:
    return TensorRtSession(folder, device="cpu", api=TensorRt(module, "tensorrt"), **options)


def random_ids(batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, VOCAB, size=(batch, length), dtype=np.int64)
