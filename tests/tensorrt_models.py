"""What the tests on TensorRT share: a small 2:4 model's exports, graphs of a few nodes, the stand-in put in place."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparsify.exporters import tensorrt_api, tensorrt_engine, tensorrt_refit
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.progress import Silent
from tests.fake_tensorrt import Behaviour, make_tensorrt

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = ["batch=2", "prompt=16", "total=32"]
GPU = tensorrt_api.Gpu("Pretend GPU", "9.0")
F32, INT8, F16 = 1, 3, 10


def checkpoint(folder: Path, config: Any, seed: int = 0) -> Path:
    """A random model whose every linear is 2:4, by torch and not by our own masks."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(module.out_features, -1, 4)
            module.weight.data = (groups * (torch.rand_like(groups).argsort(-1) < 2)).view_as(module.weight)
    model.save_pretrained(folder)
    return folder


@functools.cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="sparsify-tests-")


@functools.cache
def exported(precision: str) -> Path:
    """The ONNX file of the 2:4 model in a precision, made once for all tests of a run; not to be changed."""
    from transformers import LlamaConfig

    folder = Path(_folder().name) / precision
    folder.mkdir()
    export_onnx(checkpoint(folder / "checkpoint", LlamaConfig(**SIZES)), folder, precision=precision)
    return folder / "model.onnx"


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """An ONNX node called after its output."""
    import onnx

    return onnx.helper.make_node(op, inputs, [output], name=f"n_{output}", **attributes)


def graph(weight: NDArray[Any], nodes: list[Any], *, data_type: int, extra: list[Any] | None = None) -> Any:
    """A model of these nodes with input x [n, 64] and output y, both float16, and the initializer w."""
    from onnx import helper

    tensor = helper.make_tensor("w", data_type, weight.shape, weight.tobytes(), raw=True)
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes, "g", [value("x", F16, ["n", 64])], [value("y", F16, None)], [tensor, *(extra or [])]
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def two_four(rows: int, columns: int, dtype: Any = np.float16) -> NDArray[Any]:
    """[rows, columns] with two values of every four along the rows."""
    rng = np.random.default_rng(rows * columns)
    weight = rng.integers(1, 100, (rows // 4, 4, columns))
    weight *= np.argsort(np.argsort(rng.random(weight.shape), axis=1), axis=1) < 2
    return np.asarray(weight.reshape(rows, columns), dtype=dtype)


def play(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """Put TensorRT 11 with a GPU in place; what is returned decides its version and conduct until each build."""
    behaviour = Behaviour()

    def load(kind: str | None = None) -> Any:
        return tensorrt_api.TensorRt(make_tensorrt(behaviour), "tensorrt")

    for module in (tensorrt_engine, tensorrt_refit):
        monkeypatch.setattr(module, "load_tensorrt", load)
        monkeypatch.setattr(module, "find_gpu", lambda: GPU)
    monkeypatch.setattr(tensorrt_api, "find_gpu", lambda: GPU)
    return behaviour


class Told(Silent):
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps = 0
        self.notices: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def notice(self, text: str) -> None:
        self.notices.append(text)
