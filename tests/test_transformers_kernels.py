"""Compressed checkpoints opened by transformers with a kernel: how it is asked for, what it keeps, what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sparsify.errors import UsageError
from sparsify.format.packed import decode
from sparsify.format.reader import CompressedReader
from sparsify.kernels.kernel import State
from sparsify.kernels.packed_reference import PACKED
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.plugins.transformers_quantizer import SparsifyConfig, SparsifyQuantizer, sparsify_linears
from tests.checkpoints import Q_PROJ, Folders, kinds, logits, make_folders, opened, same, same_stored, with_kernel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("compressed"), ids_file)


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
