"""A pruned SmolLM2 in the real engine, through every kernel: what the plain pruned checkpoint computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.data import load_windows
from sparsify.kernels import native
from sparsify.pipeline import evaluate
from sparsify.runtimes import Runtime
from tests_vllm.altered import as_compressed_tensors
from tests_vllm.conftest import NO_NATIVE, Answer, ask, ask_apart, close, kernels, same

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
    assert {name.partition("+expanded:")[0] for name in kernels(found)} == {"native"}
    (held,) = found.seen
    assert held == sum(entry.resident_bytes for entry in found.engaged.values())
    # Beside values and masks, where the values of each row begin.
    assert 0.5625 <= held / (2 * 106_168_320) <= 0.585
    # One pool of threads: torch's own, which computes the rest. Other packages may have brought theirs.
    assert Path(native.pool()).parent == Path(torch.__file__).parent / "lib"


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


def test_old_sparse_checkpoints_load_again(smol: Pair, plain: Callable[[str], Answer], tmp_path: Path) -> None:
    """Built from the layout of compressed-tensors 0.13, which vLLM itself refuses since 0.19.1."""
    for name, form in (("2:4", "sparse-24-bitmask"), ("0.5", "sparse-bitmask")):
        folder = as_compressed_tensors(smol(name)[1], tmp_path / form, form)
        for kernel in ("dense", "packed"):
            found = ask(folder, kernel=kernel)
            (same if kernel == "dense" else close)(found, plain(name))
            assert kernels(found) == {kernel}
