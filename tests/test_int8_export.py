"""Artifacts with values in 8 bits: exported, verified, opened by transformers, saved, exported again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.checkpoint import SINGLE, read_config
from sparsify.errors import UsageError
from sparsify.format.packed import decode
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.naming import linear_weights
from sparsify.pipeline import export
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.plugins.transformers_quantizer import sparsify_linears
from sparsify.recipe import Recipe
from sparsify.targets import Options, check_options, options_for
from sparsify.types import NofM
from sparsify.verify import verify
from tests.checkpoints import logits, opened, same
from tests.conftest import CONFIGS, Run, refuse, save_random_model
from tests.coupled import run
from tests.test_format_files import assert_same_tensors, read_all

INT8 = Options(precision="int8")
FAMILIES = ["llama", "phi3", "mixtral", "qwen3_moe"]
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Family and pattern -> a pruned checkpoint in bfloat16 and its artifact in 8 bits; not to be written to."""
    root = tmp_path_factory.mktemp("int8")

    def get(family: str = "llama", pattern: str = "2:4") -> tuple[Path, Path]:
        folder = root / f"{family} {pattern}".replace(":", "of")
        if not folder.exists():
            source = save_random_model(folder / "model", CONFIGS[family](), dtype=torch.bfloat16)
            export(run(source, Recipe(pattern, "magnitude"), folder / "pruned"), "vllm", folder / "int8", options=INT8)
        return folder / "pruned", folder / "int8"

    return get


def reader(folder: Path) -> CompressedReader:
    found = open_checkpoint(folder)
    assert isinstance(found, CompressedReader)
    return found


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pruned_linear_is_within_half_a_step(family: str, pattern: str, made: Made) -> None:
    pruned, int8 = made(family, pattern)
    before, after, stored = read_all(pruned), read_all(int8), reader(int8)
    body = manifest.read(int8)
    linears = sum(row["shape"][0] * row["shape"][1] for row in body["linears"])
    assert sum(after[f"{module}.weight"].numel() for module in stored.packed) == linears
    for name, weight in after.items():
        module = name.removesuffix(".weight")
        if module not in stored.packed:
            assert torch.equal(weight, before[name])
            continue
        packed = stored.read_packed(module)
        assert packed.scale is not None
        assert (packed.values.dtype, packed.dtype, weight.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
        exact = decode(packed.to(torch.float32))
        assert ((exact - before[name].float()).abs() <= packed.scale[:, None] * 0.5001).all()
        assert not torch.equal(weight, before[name])
        assert (weight[before[name] == 0] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_says_what_was_rounded(family: str, made: Made) -> None:
    pruned, int8 = made(family)
    body, stored = manifest.read(int8), reader(int8)
    storage = body["storage"]
    assert (storage["values"], storage["packed"], storage["dense"]) == ("int8", {"2:4": len(stored.packed)}, 0)
    sizes = [stored.stored[f"{module}.{part}"].n_bytes for module in stored.packed
             for part in ("weight", "weight_mask", "weight_check", "weight_scale")]  # fmt: skip
    assert storage["packed_bytes"] == sum(sizes)
    outputs = sum(stored.tensors[f"{module}.weight"].shape[0] for module in stored.packed)
    assert sum(sizes) == storage["dense_bytes"] * 5 // 16 + 80 * len(stored.packed) + 4 * outputs
    assert body["linears"] == manifest.read(pruned)["linears"]
    counted = {spec.name: int((weight == 0).sum()) for spec, weight in linear_weights(int8)}
    assert body["rounded"] == {"values": "int8", "zeros": counted}
    entry = read_config(int8)["quantization_config"]
    assert (entry["format"], entry["digest"]) == (2, stored.digest)


def test_it_is_verified_like_any_artifact(made: Made, cli: Run, tmp_path: Path) -> None:
    pruned, _ = made()
    out = tmp_path / "int8"
    assert cli("export", pruned, "--target", "vllm", "--precision", "int8", "--out", out).returncode == 0
    assert verify(out)[1] == []
    assert cli("inspect", out).returncode == 0
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(out / SINGLE)

    def put(**parts: torch.Tensor) -> list[str]:
        save_file(tensors | {f"{name}.{part}": tensor for part, tensor in parts.items()}, out / SINGLE)
        rest = {key: value for key, value in manifest.read(out).items() if key not in ("format", "files")}
        config = read_config(out)
        config["quantization_config"]["digest"] = CompressedReader(out).digest
        (out / "config.json").write_text(json.dumps(config))
        manifest.write(out, rest)
        return verify(out)[1]

    assert put() == []
    [problem] = put(weight_scale=tensors[f"{name}.weight_scale"] * 2)
    assert f"tensor {name}.weight_scale differs from its checksum" in problem
    [problem] = put(weight=tensors[f"{name}.weight"].roll(1))
    assert f"tensor {name}.weight differs from its checksum" in problem
    body = manifest.read(out)
    body["rounded"]["zeros"][name] += 1
    manifest.write(out, {key: value for key, value in body.items() if key not in ("format", "files")})
    assert put()[0].startswith(f"{name}: has ")


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_again_it_is_rounded_still(family: str, made: Made, tmp_path: Path) -> None:
    _, int8 = made(family)
    for target, out in (("hf", tmp_path / "hf"), ("vllm", tmp_path / "vllm")):
        body = export(int8, target, out)
        assert_same_tensors(read_all(out), read_all(int8))
        assert body["rounded"] == manifest.read(int8)["rounded"]
        assert verify(out)[1] == []
    assert "quantization_config" not in read_config(tmp_path / "hf")
    assert read_config(tmp_path / "vllm")["quantization_config"]["format"] == 1
    assert "values" not in manifest.read(tmp_path / "vllm")["storage"]


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_and_saves_it(family: str, pattern: str, made: Made, tmp_path: Path) -> None:
    _, int8 = made(family, pattern)
    export(int8, "hf", tmp_path / "hf")
    model = opened(int8)
    same(model, opened(tmp_path / "hf"))
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(read_all(tmp_path / "again"), read_all(int8))
    again = reader(tmp_path / "again")
    assert again.packed == reader(int8).packed
    assert all(again.stored[f"{module}.weight"].dtype == "I8" for module in again.packed)
    assert read_config(tmp_path / "again")["quantization_config"]["format"] == 2
    # In another dtype each weight is rounded once.
    wide = opened(int8, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(wide[name].bfloat16(), tensor)
    assert any(not torch.equal(wide[name], tensor.float()) for name, tensor in model.state_dict().items())


def test_a_weight_that_was_changed_is_saved_as_it_is(made: Made, tmp_path: Path) -> None:
    model = opened(made()[1])
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight[3, weight[3].abs().argmax()] *= 1.5
    model.save_pretrained(tmp_path / "again")
    stored = reader(tmp_path / "again")
    kinds = {module: stored.stored[f"{module}.weight"].dtype for module in stored.packed}
    assert [module for module, dtype in kinds.items() if dtype != "I8"] == [name]
    same(opened(tmp_path / "again"), model)


def test_a_kernel_computes_with_the_codes(made: Made, tmp_path: Path) -> None:
    _, int8 = made()
    dense, model = opened(int8), opened(int8)
    assert set(sparsify_linears(model, "packed").values()) == {"packed"}
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert {layer.packed().values.dtype for layer in layers} == {torch.int8}
    torch.testing.assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(read_all(tmp_path / "again"), read_all(int8))
    # A cast changes the dtype of products, and not the scales.
    torch.testing.assert_close(logits(model.to(torch.float32)), logits(opened(int8, dtype=torch.float32)))
    assert {layer.packed().dtype for layer in layers} == {torch.float32}
    sparsify_linears(model, "dense")
    same(model, opened(int8, dtype=torch.float32))


def edited(pruned: Path, out: Path, name: str, edit: Callable[[torch.Tensor], object]) -> Path:
    """A copy of a pruned checkpoint with another weight ``name``, and a manifest that fits it."""
    shutil.copytree(pruned, out)
    file = open_checkpoint(out).tensors[name].file
    tensors = load_file(file)
    edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    manifest.write(out, {key: value for key, value in manifest.read(out).items() if key not in ("format", "files")})
    return out


def test_small_weights_beside_a_large_one_become_zeros(made: Made, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    pruned = edited(made()[0], tmp_path / "pruned", f"{name}.weight", lambda weight: weight[:, :4].mul_(1000))
    body = export(pruned, "vllm", tmp_path / "int8", options=INT8)
    [row] = [row for row in body["linears"] if row["name"] == name]
    zeros = body["rounded"]["zeros"]
    assert zeros[name] > row["zeros"] + 100
    assert all(zeros[row["name"]] == row["zeros"] for row in body["linears"] if row["name"] != name)
    assert reader(tmp_path / "int8").read_packed(name).pattern == NofM(2, 4)
    for target in ("hf", "vllm"):
        export(tmp_path / "int8", target, tmp_path / target)
        assert verify(tmp_path / target)[1] == []
    opened(tmp_path / "int8").save_pretrained(tmp_path / "again")
    assert_same_tensors(read_all(tmp_path / "again"), read_all(tmp_path / "int8"))


def test_a_weight_with_nan_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    pruned = edited(made()[0], tmp_path / "pruned", name, lambda weight: weight[0].fill_(torch.nan))
    with pytest.raises(UsageError, match=rf"tensor {name}: .*NaN"):
        export(pruned, "vllm", tmp_path / "out", options=INT8)


def test_options_that_mean_nothing(made: Made, cli: Run, tmp_path: Path) -> None:
    pruned, _ = made()
    for arguments, words in (
        (("--precision", "int4"), ("--precision int4", "int8")),
        (("--precision", "fp16"), ("--precision fp16", "int8")),
        (("--precision", "int8", "--dense"), ("--precision int8", "--dense")),
    ):
        result = cli("export", pruned, "--target", "vllm", *arguments, "--out", tmp_path / "out")
        refuse(result, 2, *words)
    refuse(cli("export", pruned, "--target", "hf", "--precision", "int8", "--out", tmp_path / "out"), 2, "--precision")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("precision", [None, "fp32", "int8"])
def test_of_several_targets_each_has_its_own_precision(precision: str | None, dense: bool) -> None:
    pytest.importorskip("onnx")
    options = Options(precision=precision, dense=dense)
    check_options(options, ["onnx", "vllm"])
    own = options_for(options, "vllm")
    check_options(own, ["vllm"])
    assert own.precision == (precision if precision == "int8" and not dense else None)
    assert options_for(options, "onnx").precision == precision
