"""Compressed checkpoints opened by transformers itself: dense and through kernels, saved, damaged, and without us."""

import copy
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import sparsify
from sparsify import hooks
from sparsify.errors import ModelError, UsageError
from sparsify.format.packed import decode, encode
from sparsify.format.reader import CompressedReader
from sparsify.format.record import to_tensors
from sparsify.format.storage import SERVED
from sparsify.kernels.kernel import State
from sparsify.kernels.packed_reference import PACKED
from sparsify.pipeline import export
from sparsify.plugins import transformers_quantizer
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.plugins.transformers_quantizer import SparsifyConfig, SparsifyQuantizer, sparsify_linears
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.types import NofM
from tests.conftest import CONFIGS, EXTRA, save_random_model

# The stablelm of these tests has a setting that vLLM lacks, with which export refuses it.
FAMILIES = [*sorted((SERVED & {*CONFIGS, *EXTRA}) - {"stablelm"}), "llama-nine-heads"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
Q_PROJ = "model.layers.0.self_attn.q_proj"
Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    """Model type, pattern, dtype -> an ordinary pruned checkpoint and the compressed one; not to be written to."""
    root = tmp_path_factory.mktemp("compressed")

    def get(model_type: str, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
        folder = root / f"{model_type} {pattern} {dtype} {len(config)}".replace(":", "of")
        plain, packed = folder / "plain", folder / "packed"
        if not packed.exists():
            made = {**CONFIGS, **EXTRA}[model_type]()
            made.update(config)
            save_random_model(folder / "dense", made, dtype=dtype)
            source = Source(model_type, folder / "dense", "folder")
            if pattern == "permuted":
                recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
            else:
                recipe = Recipe(pattern, "magnitude")
            export(prune(source, recipe, plain), "vllm", packed)
        return plain, packed

    return get


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_kernel(folder: Path, kernel: str, **options: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["kernel"] = kernel
    return opened(folder, config=config, **options)


def same(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        bits = torch.uint8
        assert torch.equal(tensor.view(bits), theirs[name].view(bits)), name


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tensors, config


def same_stored(folder: Path, other: Path) -> None:
    (ours, config), (theirs, expected) = stored(folder), stored(other)
    # Some tests change tensors and leave the config beside them as it was.
    assert config.pop("digest") == CompressedReader(folder).digest
    expected.pop("digest", None)
    assert config == expected
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


def kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, SparseLinear | nn.Linear)}


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_open_dense_and_are_saved_as_they_were(
    family: str, pattern: str, folders: Folders, tmp_path: Path
) -> None:
    plain, packed = folders(family, pattern)
    assert len(CompressedReader(packed).packed) >= 8
    model = opened(packed)
    same(model, opened(plain))
    assert torch.equal(logits(model), logits(opened(plain)))
    model.save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)
    same(opened(tmp_path / "again"), model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_a_dtype_is_applied_to_decoded_weights(family: str, wanted: torch.dtype, folders: Folders) -> None:
    plain, packed = folders(family)
    model = opened(packed, dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    same(model, opened(plain, dtype=wanted))


def test_parameters_that_stay_in_float32_do(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = folders("llama")
    kept = {"down_proj", "input_layernorm"}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", kept)
    model = opened(packed)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "down_proj" in name} == {torch.float32}
    same(model, opened(plain))


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "permuted"])
def test_patterns_and_orders_come_back(pattern: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama", pattern)
    names = stored(packed)[0].keys()
    assert (f"{Q_PROJ}.weight_perm" in names) == (pattern == "permuted")
    for model in (opened(packed), with_kernel(packed, "packed")):
        assert torch.equal(logits(model), logits(opened(plain)))
        model.save_pretrained(tmp_path / "again")
        same_stored(tmp_path / "again", packed)


def test_negative_zeros_survive(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[:, ::2] = -0.0
    replace_tensors(packed, lambda tensors: set_packed(tensors, Q_PROJ, weight, NofM(2, 4)))
    model = opened(packed)
    assert torch.equal(model.get_submodule(Q_PROJ).weight.view(torch.int16), weight.view(torch.int16))
    model.save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)


def test_weights_without_a_value_are_saved(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    empty = [Q_PROJ, "model.layers.1.self_attn.o_proj"]
    zeros = torch.zeros(32, 32, dtype=torch.bfloat16)
    for name in empty:
        replace_tensors(packed, lambda tensors, name=name: set_packed(tensors, name, zeros, None))  # type: ignore[misc]
    for model in (opened(packed), with_kernel(packed, "packed")):
        model.save_pretrained(tmp_path / "again")
        same_stored(tmp_path / "again", packed)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tied_embeddings_and_shards(family: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders(family, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored(packed)[0]
    model = opened(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same(model, opened(plain))
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    same_stored(tmp_path / "again", packed)
    same(opened(tmp_path / "again"), model)
    ours, theirs = CompressedReader(tmp_path / "again"), CompressedReader(packed)
    assert dict(ours.read(ours.tensors)).keys() == dict(theirs.read(theirs.tensors)).keys()
    for kernel in (with_kernel(packed, "packed"), with_kernel(tmp_path / "again", "packed")):
        assert torch.equal(logits(kernel), logits(model))


def test_models_without_a_head(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("qwen2")
    model = AutoModel.from_pretrained(packed, dtype=torch.float32)
    same(model, AutoModel.from_pretrained(plain, dtype=torch.float32))
    model = AutoModel.from_pretrained(packed)
    model.save_pretrained(tmp_path / "body")
    tensors = stored(tmp_path / "body")[0]
    assert sum(name.endswith(".weight_check") for name in tensors) == len(CompressedReader(packed).packed)
    same(AutoModel.from_pretrained(tmp_path / "body"), model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_device_maps(family: str, folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain, packed = folders(family)
    same(opened(packed, device_map="cpu"), opened(plain))
    opened(packed, device_map={"": "cpu"}).save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)
    assert "SparseLinear" in kinds(with_kernel(packed, "packed", device_map="cpu"))
    halves: dict[str, str] = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    halves |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = opened(packed, device_map=halves, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(opened(plain)))
    with pytest.raises(UsageError, match="not in memory; open it without device_map"):
        model.save_pretrained(tmp_path / "offloaded")
    assert not list((tmp_path / "offloaded").iterdir())
    with pytest.raises(UsageError, match="take disk out of device_map"):
        with_kernel(packed, "packed", device_map=halves, offload_folder=tmp_path / "offload")


# Kernels


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "starcoder2", "mixtral", "qwen2_moe"])
def test_a_kernel_takes_the_packed_linears(family: str, pattern: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders(family, pattern)
    model, dense = with_kernel(packed, "packed"), opened(plain)
    places = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert places == linears & set(CompressedReader(packed).packed)
    assert all(model.get_submodule(name).kernel_name == "packed" for name in places)
    torch.testing.assert_close(logits(model), logits(dense))
    made = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert torch.equal(made, dense.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False))
    model.save_pretrained(tmp_path / "again")
    same_stored(tmp_path / "again", packed)
    assert "kernel" not in model.config.to_dict()["quantization_config"]
    assert not model.hf_quantizer.is_trainable
    model.dequantize()
    same(model, dense)


def test_kernels_keep_no_dense_weight_and_no_file(folders: Folders) -> None:
    model = with_kernel(folders("llama")[1], "packed")
    layer = model.get_submodule(Q_PROJ)
    assert {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()} == {
        "values": ((32, 16), torch.bfloat16),
        "mask": ((32, 4), torch.uint8),
        "starts": ((2,), torch.int64),
    }
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in layer.buffers())
    assert f"{Q_PROJ}.weight" not in dict(model.named_parameters())


def test_a_kernel_in_another_dtype(folders: Folders) -> None:
    plain, packed = folders("llama")
    model = with_kernel(packed, "packed", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(opened(plain, dtype=torch.float32)))
    assert logits(copy.deepcopy(model).to(torch.float16)).dtype == torch.float16


def test_ways_to_ask_for_a_kernel(folders: Folders, tmp_path: Path) -> None:
    packed = folders("llama")[1]
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        asked = opened(packed, quantization_config=SparsifyConfig(kernel="packed"))
    later = opened(packed)
    report = sparsify_linears(later, "packed")
    again = opened(packed, config=asked.config)
    for model in (asked, later, again):
        assert kinds(model) == {"SparseLinear", "Linear"}
        same(model, with_kernel(packed, "packed"))
        assert not model.hf_quantizer.is_trainable
        model.save_pretrained(tmp_path / "again")
        same_stored(tmp_path / "again", packed)
    assert report == dict.fromkeys(CompressedReader(packed).packed, "packed")
    assert sparsify_linears(later, "packed") == report
    assert set(sparsify_linears(later, "dense").values()) == {"dense"}
    same(later, opened(packed))
    assert later.hf_quantizer.is_trainable
    for kernel in ("auto", "dense"):
        assert kinds(with_kernel(packed, kernel)) == {"Linear"}
        assert set(sparsify_linears(opened(packed), kernel).values()) == {"dense"}


def test_kernels_that_cannot_run_are_refused_before_loading(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = folders("llama")
    monkeypatch.setattr(SparsifyQuantizer, "preprocess_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(UsageError, match=r"kernel 'fast' is unknown; choose auto, dense, packed"):
        with_kernel(packed, "fast")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"kernel cusparselt cannot run on cpu: it runs on NVIDIA GPUs only"):
            with_kernel(packed, "cusparselt")
    with pytest.raises(UsageError, match="opens compressed checkpoints, and this one is not"):
        opened(plain, quantization_config=SparsifyConfig(kernel="packed"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="kernel 'fast' is unknown"):
        sparsify_linears(opened(packed), "fast")
    with pytest.raises(UsageError, match="was not opened from a compressed checkpoint"):
        sparsify_linears(opened(plain), "packed")


def test_unknown_keys_are_named(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.from_pretrained(folders("llama")[1])
    config.quantization_config["kernal"] = "packed"
    assert kinds(opened(folders("llama")[1], config=config)) == {"Linear"}
    assert caplog.messages == ["quantization_config.kernal is unknown and ignored"]


def test_a_kernel_that_refuses_a_weight_leaves_it_dense(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparsify.kernels import dispatch
    from sparsify.kernels.packed_reference import PACKED

    plain, packed = folders("llama")
    picky = copy.copy(PACKED)
    object.__setattr__(picky, "refuse", lambda weight: None if weight.shape[0] == 48 else "it is too small")
    monkeypatch.setitem(dispatch.KERNELS, "packed", picky)
    model = with_kernel(packed, "packed")
    sparse = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert {name.rpartition(".")[2] for name in sparse} == {"gate_proj", "up_proj"}
    assert torch.equal(logits(model), logits(opened(plain)))
    assert caplog.messages == ["10 of 14 linears stay dense: packed cannot take it: it is too small"]


def test_kernels_have_no_gradients_and_say_so(folders: Folders) -> None:
    model = with_kernel(folders("qwen2")[1], "packed")
    ids = torch.tensor([[3, 4, 5]])
    loss = model(ids, labels=ids).loss
    with pytest.raises(UsageError, match="kernel packed computes no gradients; open the model without a kernel"):
        loss.backward()
    with pytest.raises(ValueError, match=r"not supported for quantized model"):
        model.half()


def test_foreign_states_are_neither_saved_nor_cast(folders: Folders, tmp_path: Path) -> None:
    model = with_kernel(folders("llama")[1], "packed")
    packed = model.get_submodule(Q_PROJ).packed()
    blob = replace(PACKED, name="cusparselt", prepare=lambda packed: State({"blob": decode(packed)}, {}))
    layer = SparseLinear(packed, blob)
    model.set_submodule(Q_PROJ, layer)
    with pytest.raises(UsageError, match="kernel cusparselt keeps weights in a form that no checkpoint has"):
        model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())
    with pytest.raises(UsageError, match="cusparselt cannot be cast"):
        layer.to(torch.float32)
    assert layer.blob.dtype == torch.bfloat16
    assert layer.to("cpu") is layer


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled(folders: Folders) -> None:
    model = with_kernel(folders("llama")[1], "packed")
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        run: Any = torch.compile(model, backend="eager", fullgraph=True)
        compiled = run(ids, use_cache=False).logits
        assert torch.equal(compiled, model(ids).logits)


# Training and changes


def test_changed_weights_are_saved_as_they_are(folders: Folders, tmp_path: Path) -> None:
    packed = folders("mixtral")[1]
    model = opened(packed)
    before = stored(packed)
    with torch.no_grad():
        model.get_submodule(Q_PROJ).weight[0, :4] = 1.0
        model.model.layers[0].self_attn.k_proj.weight.fill_(1.0)
        model.model.layers[1].mlp.experts.down_proj[2].fill_(2.0)
        model.model.layers[1].mlp.experts.down_proj[3, 0, :4] = 3.0
    model.save_pretrained(tmp_path / "again")
    same(opened(tmp_path / "again"), model)
    tensors, config = stored(tmp_path / "again")
    dense = ["model.layers.0.self_attn.k_proj", "model.layers.1.block_sparse_moe.experts.2.w2"]
    assert config["ignore"] == [*before[1]["ignore"], *dense]
    assert all(f"{name}.weight_check" not in tensors and f"{name}.weight_mask" not in tensors for name in dense)
    for name in (Q_PROJ, "model.layers.1.block_sparse_moe.experts.3.w2"):
        assert before[0][f"{name}.weight_check"][3:5].tolist() == [2, 4]
        assert tensors[f"{name}.weight_check"][3:5].tolist() == [0, 0]
    changed = {f"{name}.weight" for name in (*dense, Q_PROJ, "model.layers.1.block_sparse_moe.experts.3.w2")}
    for name in before[0].keys() & tensors.keys():
        assert torch.equal(before[0][name], tensors[name]) == (name.partition(".weight")[0] + ".weight" not in changed)
    same(with_kernel(tmp_path / "again", "packed").dequantize(), model)
    # Sparse again, and so stored.
    reopened = opened(packed)
    model.load_state_dict(reopened.state_dict())
    model.save_pretrained(tmp_path / "back")
    same_stored(tmp_path / "back", packed)


def test_training_works_and_is_saved(folders: Folders, tmp_path: Path) -> None:
    packed = folders("llama", dtype=torch.float32)[1]
    model = opened(packed)
    assert model.hf_quantizer.is_trainable
    ids = torch.tensor([[3, 4, 5, 6]])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.save_pretrained(tmp_path / "tuned")
    same(opened(tmp_path / "tuned"), model)
    assert opened(packed).half().dtype == torch.float16


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dequantized_models_are_ordinary(family: str, folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders(family)
    opened(packed).dequantize().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    ours, theirs = load_file(tmp_path / "plain/model.safetensors"), stored_plain(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stored_plain(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


# Damage


def set_packed(tensors: dict[str, torch.Tensor], module: str, weight: torch.Tensor, pattern: NofM | None) -> None:
    tensors |= {f"{module}.{part}": tensor for part, tensor in to_tensors(encode(weight, pattern)).items()}


def replace_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(tensor: torch.Tensor) -> None:
    tensor.flatten().view(torch.uint8)[0] ^= 1


EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w1",
    "qwen2_moe": "model.layers.0.mlp.experts.1.gate_proj",
}


@pytest.mark.parametrize("kernel", ["dense", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("part", ["weight", "weight_mask", "weight_check"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_is_an_error_that_names_the_tensor(
    damage: str, part: str, family: str, kernel: str, folders: Folders, tmp_path: Path
) -> None:
    packed = Path(shutil.copytree(folders(family)[1], tmp_path / "packed"))
    name = f"{EXPERT.get(family, Q_PROJ)}.{part}"
    replace_tensors(packed, lambda tensors: flip(tensors[name]) if damage == "flipped" else tensors.pop(name))
    with pytest.raises(ModelError) as caught:
        with_kernel(packed, kernel)
    assert str(caught.value).startswith(f"{packed / 'model.safetensors'}: tensor ")
    assert name.rpartition(".")[0] in str(caught.value)
    assert (part == "weight_check" and damage == "flipped") or name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    weight = torch.ones(16, 32, dtype=torch.bfloat16) * torch.tensor([1.0, 0.0] * 16, dtype=torch.bfloat16)
    replace_tensors(packed, lambda tensors: set_packed(tensors, Q_PROJ, weight, NofM(2, 4)))
    for kernel in ("dense", "packed"):
        with pytest.raises(ModelError, match=rf"tensor {Q_PROJ}.weight is \[16, 32\], config.json asks for \[32, 32\]"):
            with_kernel(packed, kernel)
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "norm"))
    replace_tensors(packed, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises((ModelError, RuntimeError)):
        opened(packed)


def test_unreadable_configs_and_shards(folders: Folders, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(folders("llama")[1], tmp_path / "packed"))
    config = json.loads((packed / "config.json").read_text())
    for key, value in (("format", 3), ("ignore", "lm_head")):
        broken = {**config, "quantization_config": {**config["quantization_config"], key: value}}
        (packed / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=key):
            opened(packed)
    (packed / "config.json").write_text(json.dumps(config))
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"model\.safetensors|[Ii]ncomplete|InvalidOffset|[Hh]eader"):
        opened(packed)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize(("family", "pattern"), [("llama", "2:4"), ("llama", "0.5"), ("qwen3_moe", "2:4")])
def test_without_sparsify_nothing_is_made_up(family: str, pattern: str, folders: Folders) -> None:
    packed = folders(family, pattern)[1]
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"try: AutoModelForCausalLM.from_pretrained({str(packed)!r})\n"
        "except RuntimeError as error: print('raised')\n"
        "assert 'sparsify' not in sys.modules\n"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "raised\n"), result.stderr


# Registration


ORDERS = [
    "import sparsify, transformers.modeling_utils",
    "import transformers.modeling_utils, sparsify",
    "import transformers, sparsify, transformers.quantizers",
    "import sparsify, transformers.core_model_loading, transformers.quantizers.auto",
    "import sparsify.plugins.transformers_quantizer, importlib; importlib.reload(sparsify)",
    "import importlib, sparsify; importlib.reload(sparsify.hooks); importlib.reload(sparsify)",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each order would take a minute")
def test_imports_in_any_order() -> None:
    code = (
        "import sys, os, torch\n"
        "children = []\n"
        f"for order in {ORDERS!r}:\n"
        "    children.append((os.fork(), order))\n"
        "    if not children[-1][0]:\n"
        "        exec(order)\n"
        "        from transformers.quantizers import auto\n"
        "        assert auto.AUTO_QUANTIZER_MAPPING['sparsify'].__name__ == 'SparsifyQuantizer'\n"
        "        assert not any(type(finder).__module__ == 'sparsify.hooks' for finder in sys.meta_path), order\n"
        "        assert 'exec_module' not in vars(auto.__spec__.loader)\n"
        "        os._exit(0)\n"
        "for child, order in children:\n"
        "    assert os.waitpid(child, 0)[1] == 0, order\n"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_process_of_its_own_opens_checkpoints(folders: Folders) -> None:
    code = (
        "import importlib, sparsify\nfrom transformers import AutoModelForCausalLM\n"
        "from sparsify.plugins import transformers_quantizer\nimportlib.reload(transformers_quantizer)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders('llama')[1])!r})\n"
        "print(model.hf_quantizer.quantization_config.ignore)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "['lm_head', 'model.embed_tokens']\n"), result.stderr


def test_importing_us_imports_nothing_else() -> None:
    result = python("import sparsify, sys\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_a_failure_to_register_breaks_nothing() -> None:
    code = (
        "import sys\nsys.modules['sparsify.plugins.transformers_quantizer'] = None\n"
        "import sparsify\nfrom transformers import LlamaConfig, LlamaForCausalLM\nprint(LlamaConfig.model_type)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "llama\n"), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "sparsify" in line]
    assert line.startswith("transformers cannot open compressed checkpoints: ModuleNotFoundError")


def test_a_failed_import_of_transformers_may_be_tried_again(folders: Folders) -> None:
    code = (
        "import sys, sparsify\nsys.modules['transformers.quantizers.quantizer_gguf'] = None\n"
        "sys.modules['transformers.quantizers.quantizer_awq'] = None\n"
        "try: import transformers.quantizers.auto\nexcept ImportError: print('failed')\n"
        "del sys.modules['transformers.quantizers.quantizer_awq']\n"
        "sys.modules.pop('transformers.quantizers.quantizer_gguf')\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nprint('sparsify' in AUTO_QUANTIZER_MAPPING)"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "failed\nTrue\n"), result.stderr


def test_registration_is_idempotent(caplog: pytest.LogCaptureFixture) -> None:
    before = auto.AUTO_QUANTIZER_MAPPING["sparsify"]
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    with caplog.at_level(logging.DEBUG):
        importlib.reload(sparsify)
        hooks.register_with_transformers()
        transformers_quantizer.register()
    assert auto.AUTO_QUANTIZER_MAPPING["sparsify"] is before is SparsifyQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sparsify"] is SparsifyConfig
    assert types == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert not caplog.records


def test_other_models_are_not_touched(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama")
    model = opened(plain)
    assert getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(tmp_path / "plain")
    same(opened(tmp_path / "plain"), model)
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(packed))
    assert kinds(empty) == {"Linear"}
