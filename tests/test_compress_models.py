"""Models of transformers packed in memory: saved, tied, opened by sessions, asked for at the command line."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparsify.compress import compress_, decompress_, report
from sparsify.errors import UsageError
from sparsify.format.reader import CompressedReader
from sparsify.pipeline import export
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.plugins.transformers_quantizer import sparsify_linears
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.runtimes import Runtime, open_session
from sparsify.runtimes.torch_session import TorchSession
from sparsify.source import Source
from sparsify.targets import Options
from tests.checkpoints import Folders, bits, logits, make_folders, opened, same, tensors_of
from tests.conftest import CONFIGS, Run, refuse, save_random_model
from tests.sparse_layers import BF16, NAMES, kernel_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("compressed"), ids_file)


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("made", ["llama 2:4", "llama 0.5", "phi3 2:4", "mixtral 2:4"])
def test_models_are_saved_as_export_writes_them(
    made: str, kernel: str, folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, packed = folders(*made.split())
    model, dense = opened(plain), opened(plain)
    with caplog.at_level(logging.INFO, "sparsify"):
        compress_(model, kernel)
    blocks = {
        name for name, part in dense.named_modules() if type(part) is nn.Linear and name.startswith("model.layers.")
    }
    assert {name for name, part in model.named_modules() if isinstance(part, SparseLinear)} == blocks
    assert ("4 tensors of fused experts stay dense" in caplog.text) == ("mixtral" in made)
    torch.testing.assert_close(logits(model), logits(dense), rtol=5e-2, atol=5e-2)
    ids = torch.tensor([[3, 4, 5]])
    ours, theirs = (m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, dense))
    assert torch.equal(ours, theirs)

    model.save_pretrained(tmp_path / "again")
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(packed)
    # Experts, which stay dense in memory, are stored as they are.
    assert {name for name in ours if name.endswith("_mask")} == {
        name for name in theirs if name.endswith("_mask") and ".experts." not in name
    }
    shared = [name for name in ours if ".experts." not in name]
    assert all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in shared)
    assert CompressedReader(tmp_path / "again").digest
    same(opened(tmp_path / "again"), dense)
    assert not model.hf_quantizer.is_trainable

    same(decompress_(model), dense)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    same(opened(tmp_path / "plain"), dense)
    assert vars(model).keys() == vars(dense).keys()


def test_a_quantizer_of_the_model_follows(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama")
    model = compress_(opened(plain), "packed")
    with pytest.raises(UsageError, match="was not opened from a compressed checkpoint"):
        sparsify_linears(model, "packed")
    dense = model.dequantize()
    same(dense, opened(plain))
    dense.save_pretrained(tmp_path / "dense")
    assert not (tensors_of(tmp_path / "dense").keys() ^ tensors_of(plain).keys())
    compressed = opened(packed)
    assert compressed.hf_quantizer.is_trainable
    compress_(compressed, "packed")
    assert not compressed.hf_quantizer.is_trainable
    compressed.save_pretrained(tmp_path / "packed")
    assert tensors_of(tmp_path / "packed").keys() == tensors_of(packed).keys()
    decompress_(compressed)
    assert compressed.hf_quantizer.is_trainable


@pytest.mark.parametrize("kernel", NAMES)
def test_orders_and_8_bits_of_a_checkpoint_stay(kernel: str, tmp_path: Path, ids_file: str) -> None:
    save_random_model(tmp_path / "model", CONFIGS["llama"](), dtype=BF16)
    recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
    prune(Source("llama", tmp_path / "model", "folder"), recipe, tmp_path / "plain")
    for precision in (None, "int8"):
        folder = tmp_path / f"packed-{precision}"
        export(tmp_path / "plain", "vllm", folder, options=Options(precision=precision))
        model, dense = opened(folder), opened(folder)
        compress_(model, kernel)
        layer = model.model.layers[0].mlp.up_proj
        assert kernel_of(layer.kernel_name) == kernel
        assert (layer.packed().perm is None, layer.packed().scale is None) == (False, precision is None)
        torch.testing.assert_close(logits(model), logits(dense), rtol=5e-2, atol=5e-2)
        model.save_pretrained(tmp_path / f"again-{precision}")
        ours, theirs = tensors_of(tmp_path / f"again-{precision}"), tensors_of(folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(bits(tensor), bits(theirs[name])) for name, tensor in ours.items())
        same(decompress_(model), dense)


def test_tied_embeddings_stay_tied(folders: Folders, tmp_path: Path) -> None:
    plain, _ = folders("llama", tie_word_embeddings=True)
    model = opened(plain)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.rand(model.lm_head.weight.shape) < 0.3)
    compress_(model, "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report(model)["lm_head"].reason == "its weight is tied"
    model.save_pretrained(tmp_path / "again")
    assert opened(tmp_path / "again").lm_head.weight.eq(model.lm_head.weight).all()


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("form", [0, 1], ids=["plain", "packed"])
def test_a_session_runs_a_kernel(form: int, kernel: str, folders: Folders) -> None:
    folder = folders("llama")[form]
    ids = np.arange(3, 23, dtype=np.int64).reshape(2, 10)
    with TorchSession(folder) as reference, open_session(folder, Runtime("torch", kernel=kernel)) as session:
        names = reference.engaged().keys()
        assert set(reference.engaged().values()) == {"dense"}
        wanted = {name: kernel if name.startswith("model.layers.") else "dense" for name in names}
        assert {name: kernel_of(ran) for name, ran in session.engaged().items()} == wanted
        np.testing.assert_allclose(session.logits(ids), reference.logits(ids), rtol=1e-4, atol=1e-4)
        assert np.array_equal(session.generate(ids, 6), reference.generate(ids, 6))


def test_a_session_refuses_before_it_loads(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.model.load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(UsageError, match="kernel 'fast' is unknown"):
        open_session(folders("llama")[0], Runtime("torch", kernel="fast"))


def test_eval_asks_for_a_kernel(cli: Run, folders: Folders, ids_file: str) -> None:
    folder = folders("llama")[0]
    options = ("--text", ids_file, "--windows", 2, "--length", 24, "--runtime", "torch", "--json")
    found = {}
    for kernel in ("dense", "packed"):
        result = cli("eval", folder, *options, "--kernel", kernel)
        assert result.returncode == 0, result.stderr
        found[kernel] = json.loads(result.stdout)
    assert found["dense"]["engaged"] == {"dense": 15}
    assert found["packed"]["engaged"] == {"dense": 1, "packed": 14}
    assert found["packed"]["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=1e-4)
    refuse(cli("eval", folder, *options, "--kernel", "fast"), 2, "kernel 'fast' is unknown")
    if not torch.cuda.is_available():
        refuse(cli("eval", folder, *options, "--kernel", "triton"), 2, "kernel triton cannot run on cpu")
