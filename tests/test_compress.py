"""Models in memory: linears packed and unpacked, what is left alone, what they compute, keep and say."""

import copy
import io
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.compress import compress_, decompress_, engaged, report
from sparsify.errors import UsageError
from sparsify.format.packed import Packed, decode, encode, quantise
from sparsify.format.reader import CompressedReader
from sparsify.kernels import native
from sparsify.kernels.dispatch import KERNELS
from sparsify.kernels.kernel import Kernel, State
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.table import Entry, Times
from sparsify.pipeline import export
from sparsify.plugins.sparse_linear import SparseLinear, packed_if_sparse
from sparsify.plugins.transformers_quantizer import sparsify_linears
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.runtimes import Runtime, open_session
from sparsify.runtimes.torch_session import TorchSession
from sparsify.source import Source
from sparsify.targets import Options
from sparsify.types import NofM
from tests.conftest import CONFIGS, Run, refuse, save_random_model

BF16, F32 = torch.bfloat16, torch.float32
TWO_OF_FOUR = NofM(2, 4)
NO_NATIVE = KERNELS["native"].absent(torch.device("cpu"))
# Those that have a CPU here.
NAMES = ["packed", pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or ""))]
# float32 sums in another order, rounded to bfloat16 in each of a few layers.
TOLERANCE = {F32: 1e-4, BF16: 5e-2}


def zeroed(shape: tuple[int, int], pattern: NofM | None, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    rank = torch.rand(shape, generator=generator)
    if pattern is None:
        return torch.where(rank < 0.5, weight, 0).to(dtype)
    order = rank.view(shape[0], -1, pattern.m).argsort(dim=2).argsort(dim=2)
    return torch.where((order < pattern.n).view(shape), weight, 0).to(dtype)


class Block(nn.Module):
    """2:4, half of zeros, none, and tied."""

    two_of_four: Any
    loose: Any

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32, dtype=dtype)
        self.two_of_four = nn.Linear(32, 48, dtype=dtype)
        self.loose = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.full = nn.Linear(32, 32, dtype=dtype)
        self.norm = nn.LayerNorm(32, dtype=dtype)
        self.head = nn.Linear(32, 24, bias=False, dtype=dtype)
        with torch.no_grad():
            self.two_of_four.weight.copy_(zeroed((48, 32), TWO_OF_FOUR, dtype, 1))
            self.loose.weight.copy_(zeroed((32, 48), None, dtype, 2))
            self.loose.weight[3, 5] = -0.0
            self.embed.weight.copy_(zeroed((24, 32), None, dtype, 3))
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.full(self.loose(torch.relu(self.two_of_four(x))))))
        return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def same_state(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def x_of(dtype: torch.dtype, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kernel", NAMES)
def test_the_function_stays_and_comes_back_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    model = Block(dtype)
    before, kept = copy.deepcopy(model), model.full
    assert compress_(model, kernel) is model
    assert engaged(model) == {"two_of_four": kernel, "loose": kernel, "full": "dense", "head": "dense"}
    assert model.full is kept
    assert model.head.weight is model.embed.weight
    patterns = {name: (entry.kernel, entry.pattern, entry.reason) for name, entry in report(model).items()}
    assert patterns["full"] == ("dense", "dense", "it is not sparse")
    assert patterns["head"] == ("dense", "dense", "its weight is tied")
    assert [patterns[name][:2] for name in ("two_of_four", "loose")] == [(kernel, "2:4"), (kernel, "unstructured")]
    with torch.no_grad():
        torch.testing.assert_close(
            model(x_of(dtype)), before(x_of(dtype)), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    assert decompress_(model) is model
    assert not report(model)
    assert {type(part) for part in model.modules()} == {type(part) for part in before.modules()}
    same_state(model, before)
    with torch.no_grad():
        assert torch.equal(model(x_of(dtype)), before(x_of(dtype)))


@pytest.mark.parametrize("kernel", NAMES)
def test_what_stays_in_memory(kernel: str) -> None:
    model = compress_(Block(), kernel)
    layer = model.two_of_four
    assert isinstance(layer, SparseLinear)
    held = sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers())
    assert held == layer.n_bytes == report(model)["two_of_four"].resident_bytes
    # A mask of one bit and half the values, and at most 16 bytes of a size that says where values begin.
    assert 32 * 48 * 2 * 9 / 16 <= held <= 32 * 48 * 2 * 9 / 16 + 16
    assert "weight" not in dict(layer.named_parameters())


def test_flags_of_parameters_and_modes_come_back() -> None:
    model = Block()
    model.two_of_four.weight.requires_grad_(False)
    model.two_of_four.eval()
    bias = model.two_of_four.bias
    compress_(model, "packed")
    assert (model.two_of_four.training, model.loose.training) == (False, True)
    compress_(model, "packed")
    decompress_(model)
    assert (model.two_of_four.weight.requires_grad, model.loose.weight.requires_grad) == (False, True)
    assert (model.two_of_four.training, model.loose.training) == (False, True)
    assert model.two_of_four.bias is bias


def test_globs_choose_linears() -> None:
    assert set(engaged(compress_(Block(), "packed", include="loose")).items()) >= {
        ("loose", "packed"),
        ("two_of_four", "dense"),
    }
    model = compress_(Block(), "packed", exclude=["l*"])
    assert (engaged(model)["loose"], engaged(model)["two_of_four"]) == ("dense", "packed")
    assert "loose" not in report(model)
    for options in ({"include": "other"}, {"exclude": ["loose", "other*"]}):
        with pytest.raises(UsageError, match=r"'other\*?' matches no linear of the model; names look like two_of_four"):
            compress_(Block(), "packed", **options)


def test_kernels_that_are_not_there_are_refused_before_anything_changes() -> None:
    model = Block()
    before = dict(model.named_modules())
    with pytest.raises(UsageError, match="kernel 'fast' is unknown; choose auto, dense, packed"):
        compress_(model, "fast")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="kernel triton cannot run on cpu"):
            compress_(model, "triton")
    with pytest.raises(UsageError, match="itself a linear"):
        compress_(nn.Linear(4, 4), "packed")
    assert dict(model.named_modules()) == before


def test_what_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Special(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.ModuleDict({
        "special": Special(8, 8), "hooked": nn.Linear(8, 8), "far": nn.Linear(8, 8, device="meta"),
        "wide": nn.Linear(8, 8, dtype=torch.float64), "shared": nn.Linear(8, 8), "plain": nn.Linear(8, 8),
    })  # fmt: skip
    model["again"] = model["shared"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model["hooked"].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "sparsify"):
        compress_(model, "packed")
    reasons = {name: entry.reason for name, entry in report(model).items()}
    assert reasons == {
        "hooked": "it has hooks", "far": "its weight is not in memory",
        "wide": "it is not sparse", "shared": "its weight is tied", "plain": "",
    }  # fmt: skip
    assert [name for name, part in model.items() if isinstance(part, SparseLinear)] == ["plain"]
    (line,) = caplog.messages
    assert "1 x 2:4 by packed; " in line
    assert "1 x dense by dense (it has hooks)" in line


def test_a_weight_is_worth_packing_from_a_quarter_of_zeros_on() -> None:
    weight = torch.ones(8, 16)
    weight[:2] = 0
    found = packed_if_sparse(weight)
    assert found is not None
    assert found.pattern is None
    weight[1, 0] = 1
    assert packed_if_sparse(weight) is None
    assert packed_if_sparse(torch.full((8, 16), -0.0)) is None
    assert packed_if_sparse(torch.zeros(0, 16)) is None
    found = packed_if_sparse(torch.zeros(8, 16))
    assert found is not None
    assert found.pattern == TWO_OF_FOUR


@pytest.mark.parametrize("kernel", NAMES)
def test_one_linear_is_packed_at_a_time(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    dense_bytes = sum(p.nbytes for p in model.parameters())
    alive: list[int] = []

    def prepare(self: SparseLinear, *arguments: Any, **options: Any) -> None:
        # Of everything that is referred to from the model when the next linear is prepared, nothing is there twice.
        alive.append(sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
        init(self, *arguments, **options)

    init = SparseLinear.__init__
    monkeypatch.setattr(SparseLinear, "__init__", prepare)
    compress_(model, kernel)
    assert len(alive) == 2
    assert alive[0] == dense_bytes > alive[1]


def table(ways: dict[str, float], *, n_out: int, n_in: int, values: str = "bf16", pattern: str = "2:4") -> Entry:
    times = {way: Times(median, median, median, 3) for way, median in ways.items()}
    return Entry(values, values, pattern, 0.5, n_out, n_in, {1: times, 512: times})


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_auto_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    entries = {
        (48, 32): table({"dense": 10.0, "slices": 5.0}, n_out=48, n_in=32),
        (32, 48): table({"dense": 10.0, "slices": 20.0}, n_out=32, n_in=48, pattern="unstructured"),
    }
    monkeypatch.setattr("sparsify.kernels.dispatch._measured", lambda packed, x: entries[packed.shape])
    with caplog.at_level(logging.INFO, "sparsify"):
        model = compress_(Block())
    assert engaged(model) == {"two_of_four": "native", "loose": "dense", "full": "dense", "head": "dense"}
    assert type(model.loose) is nn.Linear
    assert "dense is faster" in report(model)["loose"].reason
    assert [record.levelname for record in caplog.records] == ["INFO"]
    # The plan is the table's, not that of the row in the list of kernels.
    assert model.two_of_four.kernel is native.native("slices")


def test_auto_without_measurements_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.kernels.dispatch.table_for", lambda device: None)
    model = Block()
    assert set(engaged(compress_(model)).values()) == {"dense"}
    assert "sparsify tune" in report(model)["loose"].reason or NO_NATIVE


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_a_dtype_that_a_kernel_cannot_take_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(torch.float16)
    with caplog.at_level(logging.INFO, "sparsify"):
        compress_(model, "native")
    assert set(engaged(model).values()) == {"dense"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch.float16" in caplog.messages[0]


def test_another_kernel_takes_over() -> None:
    model = Block()
    dense = copy.deepcopy(model)
    compress_(model, "packed")
    values = model.loose.values
    again = compress_(model, "packed")
    assert again.loose.values is values
    same_state(compress_(model, "dense"), dense)
    assert set(engaged(model).values()) == {"dense"}


def test_forms_that_cannot_be_undone_are_left() -> None:
    blob = Kernel(
        "blob", "", lambda device: None, lambda packed: None, lambda packed: State({"blob": decode(packed)}, {}),
        lambda x, tensors, sizes, bias: nn.functional.linear(x, tensors["blob"], bias),
    )  # fmt: skip
    model = compress_(Block(), "packed")
    model.loose = SparseLinear(model.loose.packed(), blob)
    with pytest.raises(UsageError, match="loose: what kernel blob keeps cannot be undone; open the model again"):
        decompress_(model)
    assert isinstance(model.two_of_four, SparseLinear)
    with pytest.raises(UsageError, match="loose: what kernel blob"):
        compress_(model, "packed")
    assert compress_(model, "dense", exclude="loose").loose.kernel_name == "blob"


# The layer


def layers(dtype: torch.dtype = BF16) -> list[tuple[Packed, Kernel]]:
    perm = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    weight = zeroed((32, 48), TWO_OF_FOUR, dtype)
    scattered = torch.empty_like(weight)
    scattered[:, perm] = weight
    kinds = [encode(weight, TWO_OF_FOUR), encode(scattered, TWO_OF_FOUR, perm), encode(zeroed((32, 48), None, dtype))]
    kinds += [quantise(kind) for kind in kinds]
    kernels = [PACKED]
    if NO_NATIVE is None:
        kernels += [native.native("slices"), native.native("slices<=2,dense")]
    return [(packed, kernel) for packed in kinds for kernel in kernels]


def test_every_state_gives_its_packed_weight_back() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel)
        back = layer.packed()
        assert (back.shape, back.pattern, back.dtype) == (packed.shape, packed.pattern, packed.dtype)
        for part in ("values", "mask", "perm", "scale"):
            ours, theirs = getattr(back, part), getattr(packed, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
        assert torch.equal(bits(layer.to_linear().weight), bits(decode(packed)))


def bias() -> nn.Parameter:
    return nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(5)).to(BF16))


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel, bias())
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        empty = SparseLinear(replace(packed, values=torch.zeros_like(packed.values)), kernel, bias())
        others = [copy.deepcopy(layer), torch.load(file, weights_only=False), empty]
        for tokens in (1, 5):
            x = x_of(BF16, 48).view(-1, 48)[:tokens]
            with torch.no_grad():
                assert not torch.equal(empty(x), layer(x))
                empty.load_state_dict(layer.state_dict())
                assert all(torch.equal(other(x), layer(x)) for other in others)
            for name in {"values", "dense"} & set(empty.state_names):
                empty.get_buffer(name).zero_()
        assert {other.kernel_name for other in others} == {kernel.name}


def test_casts_change_the_weight_and_nothing_that_it_is_made_from() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel, bias())
        assert layer.to(BF16) is layer
        if kernel is not PACKED:
            with pytest.raises(UsageError, match=f"prepared for kernel {re.escape(kernel.name)} cannot be cast"):
                layer.to(F32)
        else:
            layer.to(F32)
            assert torch.equal(bits(layer.to_linear().weight), bits(decode(packed.to(F32))))
        scale = layer.packed().scale
        assert scale is None or scale.dtype == F32


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("kernel", NAMES)
def test_one_graph(kernel: str) -> None:
    model = compress_(Block(), kernel)
    with torch.no_grad():
        run: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(run(x_of(BF16)), model(x_of(BF16)))


@pytest.mark.parametrize("kernel", NAMES)
def test_gradients_are_refused(kernel: str) -> None:
    model = compress_(Block(), kernel)
    with pytest.raises(UsageError, match=f"kernel {kernel} computes no gradients"):
        model(x_of(BF16)).sum().backward()


# Models of transformers


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family, pattern -> an ordinary pruned checkpoint in bfloat16 and the compressed one; not to be written to."""
    root = tmp_path_factory.mktemp("pruned")

    def get(family: str, pattern: str = "2:4", **config: Any) -> tuple[Path, Path]:
        folder = root / f"{family} {pattern} {len(config)}".replace(":", "of")
        if not folder.exists():
            made = CONFIGS[family]()
            made.update(config)
            save_random_model(folder / "dense", made, dtype=BF16)
            prune(Source(family, folder / "dense", "folder"), Recipe(pattern, "magnitude"), folder / "plain")
            export(folder / "plain", "vllm", folder / "packed")
        return folder / "plain", folder / "packed"

    return get


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 43).view(2, 20)).logits
    return result


def packed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("made", ["llama 2:4", "llama 0.5", "phi3 2:4", "mixtral 2:4"])
def test_models_are_saved_as_export_writes_them(
    made: str, kernel: str, pruned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, packed = pruned(*made.split())
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
    ours, theirs = packed_tensors(tmp_path / "again"), packed_tensors(packed)
    # Experts, which stay dense in memory, are stored as they are.
    assert {name for name in ours if name.endswith("_mask")} == {
        name for name in theirs if name.endswith("_mask") and ".experts." not in name
    }
    shared = [name for name in ours if ".experts." not in name]
    assert all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in shared)
    assert CompressedReader(tmp_path / "again").digest
    same_state(opened(tmp_path / "again"), dense)
    assert not model.hf_quantizer.is_trainable

    same_state(decompress_(model), dense)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    same_state(opened(tmp_path / "plain"), dense)
    assert vars(model).keys() == vars(dense).keys()


def test_a_quantizer_of_the_model_follows(pruned: Any, tmp_path: Path) -> None:
    plain, packed = pruned("llama")
    model = compress_(opened(plain), "packed")
    with pytest.raises(UsageError, match="was not opened from a compressed checkpoint"):
        sparsify_linears(model, "packed")
    dense = model.dequantize()
    same_state(dense, opened(plain))
    dense.save_pretrained(tmp_path / "dense")
    assert not (packed_tensors(tmp_path / "dense").keys() ^ packed_tensors(plain).keys())
    compressed = opened(packed)
    assert compressed.hf_quantizer.is_trainable
    compress_(compressed, "packed")
    assert not compressed.hf_quantizer.is_trainable
    compressed.save_pretrained(tmp_path / "packed")
    assert packed_tensors(tmp_path / "packed").keys() == packed_tensors(packed).keys()
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
        assert layer.kernel_name == kernel
        assert (layer.packed().perm is None, layer.packed().scale is None) == (False, precision is None)
        torch.testing.assert_close(logits(model), logits(dense), rtol=5e-2, atol=5e-2)
        model.save_pretrained(tmp_path / f"again-{precision}")
        ours, theirs = packed_tensors(tmp_path / f"again-{precision}"), packed_tensors(folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(bits(tensor), bits(theirs[name])) for name, tensor in ours.items())
        same_state(decompress_(model), dense)


def test_tied_embeddings_stay_tied(pruned: Any, tmp_path: Path) -> None:
    plain, _ = pruned("llama", tie_word_embeddings=True)
    model = opened(plain)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.rand(model.lm_head.weight.shape) < 0.3)
    compress_(model, "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report(model)["lm_head"].reason == "its weight is tied"
    model.save_pretrained(tmp_path / "again")
    assert opened(tmp_path / "again").lm_head.weight.eq(model.lm_head.weight).all()


# Sessions


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("form", [0, 1], ids=["plain", "packed"])
def test_a_session_runs_a_kernel(form: int, kernel: str, pruned: Any) -> None:
    folder = pruned("llama")[form]
    ids = np.arange(3, 23, dtype=np.int64).reshape(2, 10)
    with TorchSession(folder) as reference, open_session(folder, Runtime("torch", kernel=kernel)) as session:
        names = reference.engaged().keys()
        assert set(reference.engaged().values()) == {"dense"}
        wanted = {name: kernel if name.startswith("model.layers.") else "dense" for name in names}
        assert session.engaged() == wanted
        np.testing.assert_allclose(session.logits(ids), reference.logits(ids), rtol=1e-4, atol=1e-4)
        assert np.array_equal(session.generate(ids, 6), reference.generate(ids, 6))


def test_a_session_refuses_before_it_loads(pruned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.model.load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(UsageError, match="kernel 'fast' is unknown"):
        open_session(pruned("llama")[0], Runtime("torch", kernel="fast"))


def test_eval_asks_for_a_kernel(cli: Run, pruned: Any, ids_file: str) -> None:
    folder = pruned("llama")[0]
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


def test_public_names_come_without_torch() -> None:
    code = (
        "import sys, sparsify\nassert 'torch' not in sys.modules\n"
        "from sparsify import compress_, decompress_, engaged\nassert 'torch' in sys.modules\n"
        "try: sparsify.nothing\nexcept AttributeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "module 'sparsify' has no attribute 'nothing'\n"), result.stderr
    assert sparsify.compress_ is compress_
