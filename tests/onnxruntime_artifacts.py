"""A small 2:4 model as a checkpoint and as what ONNX Runtime and onnxruntime-genai open, made once; tokens for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen2Config

from sparsify.errors import SparsifyError
from sparsify.exporters.onnx_forms import Form
from sparsify.exporters.onnx_genai import export_genai
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.runtimes.onnxruntime_settings import OrtSettings

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

VOCAB, CONTEXT = 96, 64
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE = OrtSettings(threads=1)
# What of the checkpoint is a linear; the tied output layer goes by another name in each graph.
PARTS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
LINEARS = {f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS}


MADE: dict[str, Path] = {}


def make(kind: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of ``checkpoint``, or of what is exported from it: ``standard``, ``genai`` or ``int8``; made once."""
    if kind not in MADE:
        folder = factory.mktemp(kind) / "onnx"
        folder.mkdir()
        if kind == "checkpoint":
            _save_two_of_four(folder)
        elif kind == "standard":
            export_onnx(make("checkpoint", factory), folder)
        else:
            form = Form("genai", {"genai": "fp32", "int8": "int8"}[kind], "cpu")
            export_genai(make("checkpoint", factory), folder, form)
        MADE[kind] = folder
    return MADE[kind]


def fixture(kind: str) -> Any:
    """What ``make`` makes, as the fixture of that name, to be assigned to it."""

    @pytest.fixture(scope="module", name=kind)
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make(kind, tmp_path_factory)

    return made


def _save_two_of_four(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
        if name.endswith("proj.weight"):
            groups = parameter.data.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
    model.save_pretrained(folder)


def random_ids(*shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(3, VOCAB, shape, dtype=np.int64)


def some_masks() -> NDArray[np.int64]:
    """Left padding, a hole, right padding, none."""
    mask = np.ones((4, 12), dtype=np.int64)
    mask[0, :4], mask[1, 5:7], mask[2, -3:] = 0, 0, 0
    return mask


def one_line(error: pytest.ExceptionInfo[SparsifyError]) -> None:
    assert "\n" not in str(error.value)
