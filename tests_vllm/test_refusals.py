"""What cannot be served is refused in one line that says why, each time in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import SINGLE
from tests_vllm.altered import configure, no_digest, without
from tests_vllm.conftest import run_python

Pair = Callable[[str], tuple[Path, Path]]

# In a process of its own: an engine that fails to start leaves what it had allocated.
_START = (
    "from vllm import LLM\nLLM(model={folder!r}, skip_tokenizer_init=True, max_model_len=64, enforce_eager=True{more})"
)


def _fails(folder: Path, more: str = "", **environment: str) -> str:
    result = run_python(_START.format(folder=str(folder), more=more), **environment)
    assert result.returncode != 0
    return result.stderr + result.stdout


def test_without_the_plugin_vllm_says_what_is_missing(smol: Pair) -> None:
    assert "Unknown quantization method: sparsify" in _fails(smol("2:4")[1], VLLM_PLUGINS="")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("weight", "flip", "mlp.up_proj.weight differs from its checksum"),
        ("weight_mask", "flip", "mlp.up_proj.weight_mask differs from its checksum"),
        ("weight_mask", "drop", "mlp.up_proj.weight_mask is missing"),
        ("weight_check", "drop", "mlp.up_proj.weight_mask has no weight_check beside it"),
        ("weight", "drop", "mlp.up_proj.weight is missing"),
    ],
)
def test_damage_is_found_before_anything_is_served(
    smol: Pair, tmp_path: Path, part: str, change: str, says: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(smol("2:4")[1], folder)
    stored = load_file(folder / SINGLE)
    name = f"model.layers.7.mlp.up_proj.{part}"
    if change == "drop":
        del stored[name]
    else:
        stored[name].view(torch.uint8).flatten()[12345] ^= 16
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    assert f"model.layers.7.{says}" in _fails(folder)


def test_missing_tensors_are_missed(smol: Pair, families: Pair, tmp_path: Path) -> None:
    """VLLM looks for them only where nothing is quantised, and would compute with memory as it was."""
    norm = without(smol("2:4")[1], tmp_path / "norm", "model.norm.weight")
    assert "quantization_config.digest does not belong to the tensors beside it" in _fails(norm)
    experts = families("qwen3_moe")[1]
    gone = no_digest(without(experts, tmp_path / "expert", "model.layers.1.mlp.experts.2."))
    assert "tensor model.layers.1.mlp.experts.2.w1.weight is missing" in _fails(gone)
    plain = without(smol("2:4")[0], tmp_path / "plain", "model.layers.3.mlp.down_proj.weight")
    assert "tensor model.layers.3.mlp.down_proj.weight is missing" in _fails(plain, ", quantization='sparsify'")


def test_model_types_whose_loader_is_not_known(smol: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(smol("2:4")[1], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "how vLLM loads model type 'gpt_neox' has not been checked with packed weights" in _fails(folder)


def test_the_key_of_compiled_graphs_knows_the_weights(smol: Pair, tmp_path: Path) -> None:
    """Which linears are packed, and how, is part of the graph; vLLM hashes config.json and not what it describes."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs\nfrom pathlib import Path\nimport os, sys\n"
        "for kernel in ('dense', 'packed'):\n"
        "    engine = EngineArgs(model=sys.argv[1], additional_config={'sparsify': {'kernel': kernel}})\n"
        "    print('key', engine.create_engine_config().compute_hash())\n"
    )
    folder = tmp_path / "model"
    keys = []
    for name in ("2:4", "0.5"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(smol(name)[1], folder)
        lines = run_python(code, folder).stdout.splitlines()
        keys += [line for line in lines if line.startswith("key ")]
    assert len(set(keys)) == 4


def test_what_an_engine_cannot_do_is_said_in_one_line(smol: Pair, tmp_path: Path) -> None:
    folder = smol("2:4")[1]
    for options in ("'packed'", "{'kernl': 'packed'}"):
        assert "write {'sparsify': {'kernel': NAME}}" in _fails(
            folder, f", additional_config={{'sparsify': {options}}}"
        )
    unknown = ", additional_config={'sparsify': {'kernel': 'nonsense'}}, quantization='sparsify'"
    assert "kernel 'nonsense' is unknown; choose auto, dense, packed" in _fails(smol("2:4")[0], unknown)
    kernel = ", additional_config={'sparsify': {'kernel': 'cusparselt'}}"
    assert "kernel cusparselt cannot run on cpu: it runs on NVIDIA GPUs only" in _fails(folder, kernel)
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    configure(newer, {"quant_method": "sparsify", "format": 3, "ignore": []})
    assert "quantization_config.format is 3, this version of sparsify reads 1" in _fails(newer)


def test_a_faulty_plugin_stops_no_other_model(smol: Pair) -> None:
    """Registration that raises, and a vLLM that the plugin does not know: one line each, and the model is served."""
    faults = {
        "import sparsify.plugins.vllm_config as c; c.register_config = lambda: 1 / 0": "is off: ZeroDivisionError",
        "import vllm; vllm.__version__ = '0.99.0'": "vLLM 0.99.0 is outside 0.24 to 0.33",
    }
    serve = _START.format(folder=str(smol("2:4")[0]), more="") + (
        ".generate([{'prompt_token_ids': [1, 2, 3]}])\nprint('served')"
    )
    for fault, line in faults.items():
        result = run_python(f"{fault}\n{serve}")
        assert "served" in result.stdout, result.stderr[-2000:]
        assert line in result.stdout + result.stderr
