"""Values in 8 bits in the real engine: dense and through a kernel, experts, and a rank's share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import SINGLE
from sparsify.pipeline import export
from sparsify.targets import Options
from tests_vllm.conftest import ask, kernels, run_python, same

Pair = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_engine_computes_with_the_rounded_weights(families: Pair, model_type: str, tmp_path: Path) -> None:
    plain, compressed = families(model_type)
    export(compressed, "vllm", tmp_path / "int8", options=Options(precision="int8"))
    export(tmp_path / "int8", "hf", tmp_path / "rounded")
    reference = ask(tmp_path / "rounded", dtype="float32")
    assert not torch.equal(reference.logprobs, ask(plain, dtype="float32").logprobs)
    same(ask(tmp_path / "int8", dtype="float32", kernel="dense"), reference)
    found = ask(tmp_path / "int8", dtype="float32", kernel="packed")
    same(found, reference)
    assert "packed" in kernels(found)
    packed = [entry for entry in found.engaged.values() if entry.kernel == "packed"]
    assert all(entry.dense_bytes > 5 * entry.resident_bytes for entry in packed)


@pytest.mark.parametrize(("model_type", "module"), [("llama", "mlp.up_proj"), ("qwen3_moe", "experts.1.w2")])
def test_a_scale_that_is_missing_is_missed(families: Pair, model_type: str, module: str, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    export(families(model_type)[1], "vllm", folder, options=Options(precision="int8"))
    tensors = load_file(folder / SINGLE)
    # vLLM calls parts of experts by names of its own.
    stored = module.replace("w2", "down_proj")
    gone = f"model.layers.1.{'mlp.' if 'experts' in module else ''}{stored}.weight_scale"
    del tensors[gone]
    save_file(tensors, folder / SINGLE)
    # As a checkpoint whose writer gave no digest, which would tell too.
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["digest"]
    (folder / "config.json").write_text(json.dumps(config))
    start = f"LLM(model={str(folder)!r}, skip_tokenizer_init=True, max_model_len=64, enforce_eager=True)"
    result = run_python(f"from vllm import LLM\n{start}")
    assert result.returncode != 0
    assert f"{module}.weight_scale is missing" in result.stderr + result.stdout
