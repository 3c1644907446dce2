"""The exporter of compressed checkpoints: from pruned models and back, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.checkpoint import INDEX, CheckpointReader, read_config, read_permutations, write_permutations
from sparsify.errors import ModelError, UsageError
from sparsify.exporters.vllm_compressed import export_compressed
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.format.record import CHECK, MASK, PERM, VALUES
from sparsify.naming import linear_weights
from sparsify.pipeline import export
from sparsify.recipe import Recipe
from sparsify.targets import Options
from sparsify.verify import verify
from tests.conftest import CONFIGS, Run, refuse, save_random_model
from tests.coupled import run
from tests.test_format import Tensors
from tests.test_format_files import assert_same_tensors, read_all, split

FAMILIES = ["llama", "qwen2", "phi3", "mixtral", "qwen3_moe"]
Pruned = Callable[..., Path]


@pytest.fixture(scope="module")
def pruned(random_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Family, pattern and other parts of a recipe -> pruned checkpoint, made once; not to be written to."""
    root = tmp_path_factory.mktemp("pruned")
    made: dict[str, Path] = {}

    def get(family: str, pattern: str = "2:4", **options: Any) -> Path:
        recipe = Recipe(pattern, **{"method": "magnitude", **options})
        key = f"{family} {recipe}"
        if key not in made:
            made[key] = run(random_models(family), recipe, root / str(len(made)))
        return made[key]

    return get


def rewrite(folder: Path, edit: Callable[[Tensors], object], like: str) -> None:
    """Edit the tensors of the shard that holds ``like``, and make the manifest's hashes fit."""
    file = CheckpointReader(folder).tensors[like].file
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    sign(folder)


def sign(folder: Path) -> None:
    manifest.write(
        folder, {key: value for key, value in manifest.read(folder).items() if key not in ("format", "files")}
    )


def packed_modules(folder: Path) -> set[str]:
    reader = open_checkpoint(folder)
    assert isinstance(reader, CompressedReader)
    return set(reader.packed)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_back_in_hf_it_is_the_plain_checkpoint(family: str, pattern: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family, pattern)
    body = export(checkpoint, "vllm", tmp_path / "packed")
    plain = export(checkpoint, "vllm", tmp_path / "plain", options=Options(dense=True))
    back = export(tmp_path / "packed", "hf", tmp_path / "back")
    assert_same_tensors(read_all(tmp_path / "back"), read_all(checkpoint))
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # What is stored: one tensor per linear, with experts one by one; only those are packed, and every one of them.
    linears = sum(row["shape"][0] * row["shape"][1] for row in body["linears"])
    modules = packed_modules(tmp_path / "packed")
    assert sum(read_all(checkpoint)[f"{module}.weight"].numel() for module in modules) == linears
    kind = "2:4" if pattern == "2:4" else "unstructured"
    assert body["storage"]["packed"] == {kind: len(modules)}
    assert body["storage"]["dense"] == 0
    assert body["storage"]["dense_bytes"] == 4 * linears
    sizes = {name: info.n_bytes for name, info in CheckpointReader(tmp_path / "packed").tensors.items()}
    assert body["storage"]["packed_bytes"] == sum(
        size for name, size in sizes.items() if name.removesuffix("_mask").removesuffix("_check")[:-7] in modules
    )
    assert "storage" not in plain
    assert "storage" not in back
    assert (body["kind"], plain["kind"], back["kind"]) == ("vllm", "vllm", "hf")
    assert body["linears"] == back["linears"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_lists_the_matrices_that_are_dense(family: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family)
    export(checkpoint, "vllm", tmp_path / "packed")
    config = read_config(tmp_path / "packed")
    entry = config.pop("quantization_config")
    assert config == read_config(checkpoint)
    assert entry.keys() == {"quant_method", "format", "ignore", "digest"}
    assert (entry["quant_method"], entry["format"]) == ("sparsify", 1)
    names = {f"{module}.weight" for module in entry["ignore"]}
    assert len(names) == len(entry["ignore"])
    matrices = {n for n, info in open_checkpoint(checkpoint).tensors.items() if len(info.shape) == 2}
    assert names == matrices - {f"{module}.weight" for module in packed_modules(tmp_path / "packed")}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    assert any("gate" in name for name in names) == (family in ("mixtral", "qwen3_moe"))


def test_it_is_inspected_like_any_artifact(pruned: Pruned, cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = cli("export", pruned("llama"), "--target", "vllm", "--out", out)
    assert result.returncode == 0, result.stderr
    assert verify(out)[1] == []
    assert cli("inspect", out).returncode == 0
    name = "model.layers.1.mlp.up_proj"
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    header, body = split(bytes(data))
    for part in (VALUES, MASK):
        at = len(data) - len(body) + header[f"{name}.{part}"]["data_offsets"][0]
        data[at] ^= 4
        shard.write_bytes(data)
        assert verify(out)[1] == ["model.safetensors: content differs from the manifest"]
        assert cli("inspect", out).returncode == 8
        # And where the manifest was written over the damage.
        sign(out)
        [problem] = verify(out)[1]
        assert f"model.safetensors: tensor {name}.{part} differs from its checksum" in problem
        with pytest.raises(ModelError, match=rf"{name}\.{part} differs"):
            export(out, "hf", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        data[at] ^= 4


def test_nine_sixteenths_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", CONFIGS["llama"](), dtype=torch.bfloat16)
    checkpoint = run(source, Recipe("2:4", "magnitude"), tmp_path / "pruned")
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert storage["packed"] == {"2:4": 14}
    assert storage["packed_bytes"] == storage["dense_bytes"] * 9 // 16 + 14 * 64
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))


@pytest.mark.parametrize("source_is_packed", [False, True])
def test_shards_hold_whole_weights(source_is_packed: bool, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned("llama")
    if source_is_packed:
        export(checkpoint, "vllm", tmp_path / "packed")
        checkpoint = tmp_path / "packed"
    out = tmp_path / "out"
    out.mkdir()
    export_compressed(checkpoint, out, manifest.read(checkpoint)["linears"], shard_bytes=8000)
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 4
    assert sorted(set(index["weight_map"].values())) == files
    assert not [path for path in out.iterdir() if path.name == "model.safetensors" or path.suffix == ".tmp"]
    stored = CheckpointReader(out).tensors
    assert index["metadata"]["total_size"] == sum(info.n_bytes for info in stored.values())
    for module in packed_modules(out):
        assert len({stored[f"{module}.{part}"].file for part in (VALUES, MASK, CHECK)}) == 1
    assert_same_tensors(read_all(out), read_all(pruned("llama")))


def test_what_would_not_become_smaller_stays_dense(pruned: Pruned, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    checkpoint = pruned("llama", overrides={name: "0.01", "model.layers.1.mlp.up_proj": "0.5"})
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert (storage["packed"], storage["dense"]) == ({"2:4": 12, "unstructured": 1}, 1)
    assert name in read_config(tmp_path / "packed")["quantization_config"]["ignore"]
    assert name not in packed_modules(tmp_path / "packed")
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


def test_minus_zero_where_a_weight_was_pruned_is_stored(pruned: Pruned, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint = Path(shutil.copytree(pruned("llama"), tmp_path / "pruned"))

    def negate(tensors: Tensors) -> None:
        place = tuple((tensors[name] == 0).nonzero()[5].tolist())
        tensors[name][place] = -0.0

    rewrite(checkpoint, negate, name)
    assert verify(checkpoint)[1] == []
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert storage["packed"] == {"2:4": 13, "unstructured": 1}
    back = read_all(tmp_path / "packed")
    assert int((back[name].signbit() & (back[name] == 0)).sum()) == 1
    assert_same_tensors(back, read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


@pytest.mark.parametrize("mode", ["simulate", "gather"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_recorded_orders_are_carried(family: str, mode: str, pruned: Pruned, ids_file: str, tmp_path: Path) -> None:
    checkpoint = pruned(family, method="ria", permute=mode, calibration=ids_file)
    body = export(checkpoint, "vllm", tmp_path / "packed")
    modules = packed_modules(tmp_path / "packed")
    # Each expert was pruned in an order of its own.
    assert body["storage"] == {**body["storage"], "packed": {"2:4": len(modules)}, "dense": 0}
    moved = {name.removesuffix(f".{PERM}") for name in CheckpointReader(tmp_path / "packed").tensors if PERM in name}
    rows = {row["name"] for row in body["linears"] if row["permuted"] == "recorded"}
    assert len(moved) == len(rows) > 0
    if family in ("llama", "phi3"):
        assert moved == rows
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    orders = read_permutations(tmp_path / "packed" / manifest.PERMUTATIONS)
    reader = open_checkpoint(tmp_path / "packed")
    assert isinstance(reader, CompressedReader)
    for module in moved:
        perm = reader.read_packed(module).perm
        assert perm is not None
        found = {name for name, order in orders.items() if torch.equal(order, perm.long())}
        assert module in found or module not in orders
        assert found
    assert verify(tmp_path / "packed")[1] == []
    export(tmp_path / "packed", "hf", tmp_path / "back")
    assert verify(tmp_path / "back")[1] == []
    assert_same_tensors(read_all(tmp_path / "back"), read_all(checkpoint))


def test_orders_that_lack_a_linear_are_refused(pruned: Pruned, ids_file: str, tmp_path: Path) -> None:
    simulated = pruned("llama", method="ria", permute="simulate", calibration=ids_file)
    checkpoint = Path(shutil.copytree(simulated, tmp_path / "pruned"))
    orders = read_permutations(checkpoint / manifest.PERMUTATIONS)
    del orders["model.layers.1.mlp.up_proj"]
    write_permutations(checkpoint / manifest.PERMUTATIONS, orders)
    sign(checkpoint)
    with pytest.raises(ModelError, match=r"sparsify\.perm: entry model\.layers\.1\.mlp\.up_proj is missing"):
        export(checkpoint, "vllm", tmp_path / "packed")


def test_experts_are_stored_in_their_own_pattern(pruned: Pruned, tmp_path: Path) -> None:
    overrides = {"*.experts.1.*": "1:4", "*.experts.2.*": "0.7", "*.experts.3.down_proj": "0.01"}
    checkpoint = pruned("mixtral", overrides=overrides)
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    attention, parts, blocks = 4, 3, 2
    assert storage["packed"] == {
        "1:4": parts * blocks, "2:4": (attention + parts + parts - 1) * blocks, "unstructured": parts * blocks
    }  # fmt: skip
    assert storage["dense"] == blocks
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_families_whose_loader_is_not_known_are_refused(family: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family)
    with pytest.raises(ModelError, match=rf"config\.json.*'{family}'.*--dense"):
        export(checkpoint, "vllm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(checkpoint, "vllm", tmp_path / "out", options=Options(dense=True))
    assert_same_tensors(read_all(tmp_path / "out"), read_all(checkpoint))
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert verify(tmp_path / "out")[1] == []


def test_dense_is_about_vllm_only(pruned: Pruned, cli: Run, tmp_path: Path) -> None:
    checkpoint, out = pruned("llama"), tmp_path / "out"
    with pytest.raises(UsageError, match="--dense is about target vllm"):
        export(checkpoint, "hf", out, options=Options(dense=True))
    refuse(cli("export", checkpoint, "--target", "hf", "--dense", "--out", out), 2, "--dense", "hf")
    assert cli("export", checkpoint, "--target", "vllm", "--dense", "--out", out).returncode == 0
    assert "quantization_config" not in read_config(out)
    pytest.importorskip("onnx")
    refuse(cli("export", checkpoint, "--target", "onnx", "--dense", "--out", tmp_path / "onnx"), 2, "--dense", "onnx")


def test_a_compressed_checkpoint_is_a_source_like_any(pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned("llama", "3:4")
    export(checkpoint, "vllm", tmp_path / "packed")
    export(checkpoint, "hf", tmp_path / "hf")
    out = run(tmp_path / "packed", Recipe("1:4", "magnitude"), tmp_path / "again")
    expected = run(tmp_path / "hf", Recipe("1:4", "magnitude"), tmp_path / "expected")
    assert_same_tensors(read_all(out), read_all(expected))
    assert manifest.read(out)["linears"] == manifest.read(expected)["linears"]
    assert "quantization_config" not in read_config(out)
    assert verify(out)[1] == []
    body = export(tmp_path / "packed", "vllm", tmp_path / "copy")
    assert body["storage"] == manifest.read(tmp_path / "packed")["storage"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_without_its_entry_in_the_config_nobody_takes_the_values_for_weights(
    pattern: str, pruned: Pruned, tmp_path: Path
) -> None:
    export(pruned("llama", pattern), "vllm", tmp_path / "packed")
    config = read_config(tmp_path / "packed")
    del config["quantization_config"]
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"proj\.weight has shape .* config\.json asks for"):
        next(linear_weights(tmp_path / "packed"))
