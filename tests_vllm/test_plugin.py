"""Compressed checkpoints in the real engine compute what the plain pruned checkpoint computes, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import SINGLE
from sparsify.data import load_windows
from sparsify.format.packed import Packed, unstructured
from sparsify.format.reader import CompressedReader
from sparsify.format.storage import SERVED
from sparsify.kernels import native
from sparsify.kernels.dispatch import NATIVE
from sparsify.kernels.table import Entry, Times
from sparsify.pipeline import evaluate
from sparsify.runtimes import Runtime
from tests_vllm.conftest import Answer, ask, ask_apart, close, kernels, run_python, same

NO_NATIVE = NATIVE.absent(torch.device("cpu"))
Pair = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def plain(smol: Pair) -> Callable[[str], Answer]:
    """What the plain checkpoint of a pruned SmolLM2 says, asked once."""
    answers: dict[str, Answer] = {}

    def get(name: str) -> Answer:
        if name not in answers:
            answers[name] = ask(smol(name)[0])
        return answers[name]

    return get


@pytest.mark.parametrize("kernel", ["dense", "packed"])
@pytest.mark.parametrize("name", ["2:4", "0.5", "mixed"])
def test_smollm2(smol: Pair, plain: Callable[[str], Answer], name: str, kernel: str) -> None:
    found = ask(smol(name)[1], kernel=kernel)
    # Kernel dense is vLLM's own product with the same weights. What that adds up in which order is up to oneDNN and the
    # processor: without AMX the packed kernel gave the same bits, with AMX it does not.
    (same if kernel == "dense" else close)(found, plain(name))
    assert not plain(name).engaged
    assert len(found.engaged) == 30 * 4  # qkv, o, gate_up, down
    if kernel == "dense" or name != "mixed":
        assert kernels(found) == {kernel}
        return
    by_leaf = {linear.rpartition(".")[2]: entry for linear, entry in found.engaged.items()}
    assert (by_leaf["qkv_proj"].kernel, by_leaf["o_proj"].kernel) == ("dense", "dense")
    assert "fused" in by_leaf["qkv_proj"].reason
    # gate is 2:4 and up is 4:8: no pattern is common to them.
    assert (by_leaf["gate_up_proj"].kernel, by_leaf["gate_up_proj"].pattern) == ("packed", "unstructured")
    assert (by_leaf["down_proj"].kernel, by_leaf["down_proj"].pattern) == ("packed", "2:4")


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
@pytest.mark.parametrize("name", ["2:4", "0.5"])
def test_native_kernels(smol: Pair, plain: Callable[[str], Answer], name: str) -> None:
    found = ask(smol(name)[1], kernel="native", look=_bytes_of_linears)
    close(found, plain(name))
    assert kernels(found) == {"native"}
    (held,) = found.seen
    assert held == sum(entry.resident_bytes for entry in found.engaged.values())
    # Beside values and masks, where the values of each row begin.
    assert 0.5625 <= held / (2 * 106_168_320) <= 0.585
    # One pool of threads: torch's own, which computes the rest. Other packages may have brought theirs.
    assert Path(native.pool()).parent == Path(torch.__file__).parent / "lib"


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_native_kernels_in_float32(families: Pair) -> None:
    """Sums in another order, rounded to float32: the same tokens. Compiled too, where kernels are part of the graph."""
    folder = families("qwen2")[1]
    reference = ask(folder, dtype="float32", kernel="dense")
    for eager in (True, False):
        found = ask(folder, dtype="float32", kernel="native", enforce_eager=eager)
        assert found.tokens == reference.tokens
        torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-3, atol=1e-3)
        assert kernels(found) == {"native"}


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
@pytest.mark.parametrize("form", [0, 1], ids=["plain", "packed"])
def test_auto_takes_what_was_measured(families: Pair, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a plain checkpoint, which is packed as it loads."""

    def measured(packed: Packed, x: torch.dtype) -> Entry:
        # The hidden size is 128: what is fused has more rows.
        ways = {"dense": 10.0, "slices": 5.0 if packed.shape[0] > 128 else 20.0}
        times = {way: Times(median, median, median, 3) for way, median in ways.items()}
        return Entry("f32", "f32", str(packed.pattern), 0.5, *packed.shape, {1: times, 512: times})

    monkeypatch.setattr("sparsify.kernels.dispatch._measured", measured)
    found = ask(families("llama")[form], dtype="float32", quantization="sparsify")
    by_leaf = {name.rpartition(".")[2]: entry for name, entry in found.engaged.items()}
    runs = {name: entry.kernel for name, entry in by_leaf.items()}
    assert runs == {"qkv_proj": "native", "gate_up_proj": "native", "o_proj": "dense", "down_proj": "dense"}
    assert "dense is faster" in by_leaf["o_proj"].reason
    reference = ask(families("llama")[0], dtype="float32")
    assert found.tokens == reference.tokens


@pytest.mark.parametrize("name", ["2:4", "0.5"])
def test_memory_of_packed_linears(smol: Pair, name: str) -> None:
    """What the engine's own modules hold, beside what the plugin says of it."""
    found = ask(smol(name)[1], kernel="packed", look=_bytes_of_linears)
    held = sum(found.seen)
    assert held == sum(entry.resident_bytes for entry in found.engaged.values())
    assert 0.5625 <= held / (2 * 106_168_320) <= 0.57


def _bytes_of_linears(model: torch.nn.Module) -> int:
    linears = [part for name, part in model.named_modules() if name.endswith("_proj")]
    assert len(linears) == 120
    tensors = [tensor for part in linears for tensor in (*part.parameters(), *part.buffers())]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_plain_checkpoint_packed_at_load(smol: Pair, plain: Callable[[str], Answer]) -> None:
    found = ask(smol("2:4")[0], kernel="packed", quantization="sparsify")
    close(found, plain("2:4"))
    assert {(entry.kernel, entry.pattern) for entry in found.engaged.values()} == {("packed", "2:4")}
    found = ask(smol("2:4")[0], kernel="dense", quantization="sparsify")
    same(found, plain("2:4"))
    assert kernels(found) == {"dense"}


def test_transformers_models_in_vllm(smol: Pair) -> None:
    """vLLM then replaces parts of transformers in its process, hence the processes of their own."""
    options = {"model_impl": "transformers", "dtype": "float32"}
    plain, compressed = smol("2:4")
    reference, found = ask_apart(plain, **options), ask_apart(compressed, kernel="packed", **options)
    assert found.tokens == reference.tokens
    torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-3, atol=1e-3)
    assert kernels(found) == {"packed"}


@pytest.mark.parametrize("permute", ["gather", "simulate"])
def test_orders_that_are_not_folded(stories: Path, make: Callable[..., tuple[Path, Path]], permute: str) -> None:
    """One order for each input is a gather before the product; q, k and v with orders of their own cannot be fused."""
    plain, compressed = make(stories, pattern="2:4", method="ria", permute=permute, windows=4, length=128)
    reference = ask(plain, dtype="float32")
    same(ask(compressed, dtype="float32", kernel="dense"), reference)
    found = ask(compressed, dtype="float32", kernel="packed")
    # Sums run over the stored order.
    assert found.tokens == reference.tokens
    torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-4, atol=1e-4)
    dense = {
        (name.rpartition(".")[2], entry.reason) for name, entry in found.engaged.items() if entry.kernel == "dense"
    }
    expected = {("qkv_proj", _DIFFER), ("gate_up_proj", _DIFFER)}
    assert dense == (expected if permute == "simulate" else set())
    assert any(entry.pattern == "2:4" for entry in found.engaged.values())


_DIFFER = "the weights fused into it store their inputs in different orders"


def test_perplexity_is_that_of_transformers(smol: Pair) -> None:
    windows = load_windows("pydoc", smol("2:4")[0], n_windows=2, length=256, split="evaluation")
    reference = evaluate(smol("2:4")[0], windows, runtime=Runtime("torch"))
    found = evaluate(smol("2:4")[1], windows, runtime=Runtime("vllm", dtype="float32", kernel="packed"))
    assert found["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    assert found["engaged"] == {"packed": 120}
    served = evaluate(smol("2:4")[1], windows)
    assert served["runtime"].startswith("vllm ")
    assert served["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-2)
    # What auto takes is up to what was measured on this machine.
    assert sum(served["engaged"].values()) == 120


def test_random_weights_start(smol: Pair) -> None:
    found = ask(smol("2:4")[1], load_format="dummy")
    assert len(found.engaged) == 120
    assert torch.isfinite(found.logprobs).all()


@pytest.mark.parametrize("model_type", sorted(SERVED))
def test_every_family_that_export_accepts(families: Pair, model_type: str) -> None:
    plain, compressed = families(model_type)
    reference = ask(plain, dtype="float32")
    found = ask(compressed, dtype="float32", kernel="packed")
    same(found, reference)
    assert "packed" in kernels(found)
    # Every linear whose stored weights are packed runs packed; experts are the exception that the record names.
    packed = {entry for entry in found.engaged.values() if entry.pattern == "2:4"}
    assert packed
    assert all(entry.kernel == "packed" for entry in packed)
    if "moe" in model_type or model_type == "mixtral":
        assert [entry.reason for entry in found.engaged.values() if entry.pattern == "experts"] == [
            "experts are computed dense"
        ] * 2


def test_old_sparse_checkpoints_load_again(smol: Pair, plain: Callable[[str], Answer], tmp_path: Path) -> None:
    """Built from the layout of compressed-tensors 0.13, which vLLM itself refuses since 0.19.1."""
    for name, form in (("2:4", "sparse-24-bitmask"), ("0.5", "sparse-bitmask")):
        folder = _as_compressed_tensors(smol(name)[1], tmp_path / form, form)
        for kernel in ("dense", "packed"):
            found = ask(folder, kernel=kernel)
            (same if kernel == "dense" else close)(found, plain(name))
            assert kernels(found) == {kernel}


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_old_sparse_checkpoints_with_experts(families: Pair, tmp_path: Path, form: str) -> None:
    plain, compressed = families("qwen3_moe")
    old = _as_compressed_tensors(compressed, tmp_path / "old", form)
    same(ask(old, dtype="float32", kernel="dense"), ask(plain, dtype="float32"))


def _as_compressed_tensors(compressed: Path, out: Path, form: str) -> Path:
    shutil.copytree(compressed, out)
    reader = CompressedReader(compressed)
    stored = load_file(compressed / SINGLE)
    for module in reader.packed:
        packed: Packed = reader.read_packed(module)
        if form == "sparse-bitmask":
            packed = unstructured(packed)
        del stored[f"{module}.weight"], stored[f"{module}.weight_mask"], stored[f"{module}.weight_check"]
        stored[f"{module}.compressed"] = packed.values
        stored[f"{module}.bitmask"] = packed.mask
        stored[f"{module}.shape"] = torch.tensor(packed.shape).reshape(-1, 1)
        if form == "sparse-bitmask":
            counts = torch.tensor(
                [bin(int.from_bytes(bytes(row), "little")).count("1") for row in packed.mask.tolist()]
            )
            stored[f"{module}.row_offsets"] = counts.cumsum(0) - counts
            stored[f"{module}.shape"] = torch.tensor(packed.shape)
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    structure = "2:4" if "24" in form else "unstructured"
    sparsity = {"format": form, "global_sparsity": 0.4, "ignore": ["lm_head"], "sparsity_structure": structure}
    _configure(out, {"quant_method": "compressed-tensors", "sparsity_config": {**sparsity, "targets": ["Linear"]}})
    return out


def _configure(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


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


def _without(folder: Path, out: Path, *names: str) -> Path:
    """A copy of a checkpoint whose tensors that begin with ``names`` are gone."""
    shutil.copytree(folder, out)
    stored = load_file(out / SINGLE)
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(names)}
    assert len(kept) < len(stored)
    save_file(kept, out / SINGLE, metadata={"format": "pt"})
    return out


def _no_digest(folder: Path) -> Path:
    """As a checkpoint that ``save_pretrained`` has written."""
    _configure(folder, {"quant_method": "sparsify", "format": 1, "ignore": []})
    return folder


def test_missing_tensors_are_missed(smol: Pair, families: Pair, tmp_path: Path) -> None:
    """VLLM looks for them only where nothing is quantised, and would compute with memory as it was."""
    norm = _without(smol("2:4")[1], tmp_path / "norm", "model.norm.weight")
    assert "quantization_config.digest does not belong to the tensors beside it" in _fails(norm)
    experts = families("qwen3_moe")[1]
    gone = _no_digest(_without(experts, tmp_path / "expert", "model.layers.1.mlp.experts.2."))
    assert "tensor model.layers.1.mlp.experts.2.w1.weight is missing" in _fails(gone)
    plain = _without(smol("2:4")[0], tmp_path / "plain", "model.layers.3.mlp.down_proj.weight")
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
    _configure(newer, {"quant_method": "sparsify", "format": 3, "ignore": []})
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
