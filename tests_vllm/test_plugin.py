"""Small compressed checkpoints in the real engine compute what the plain ones compute: families, orders, kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.format.packed import Packed
from sparsify.format.storage import SERVED
from sparsify.kernels.table import Entry, Times
from tests_vllm.altered import as_compressed_tensors
from tests_vllm.conftest import NO_NATIVE, ask, kernels, same

Pair = Callable[[str], tuple[Path, Path]]


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_native_kernels_in_float32(families: Pair) -> None:
    """Sums in another order, rounded to float32: the same tokens. Compiled too, where kernels are part of the graph."""
    folder = families("qwen2")[1]
    reference = ask(folder, dtype="float32", kernel="dense")
    for eager in (True, False):
        found = ask(folder, dtype="float32", kernel="native", enforce_eager=eager)
        assert found.tokens == reference.tokens
        torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-3, atol=1e-3)
        assert {name.partition("+expanded:")[0] for name in kernels(found)} == {"native"}


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
    # The only way that was measured expands the weight.
    expanded = {"qkv_proj": "native+expanded:1-", "gate_up_proj": "native+expanded:1-"}
    assert runs == {**expanded, "o_proj": "dense", "down_proj": "dense"}
    assert "dense is faster" in by_leaf["o_proj"].reason
    reference = ask(families("llama")[0], dtype="float32")
    assert found.tokens == reference.tokens


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


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_old_sparse_checkpoints_with_experts(families: Pair, tmp_path: Path, form: str) -> None:
    plain, compressed = families("qwen3_moe")
    old = as_compressed_tensors(compressed, tmp_path / "old", form)
    same(ask(old, dtype="float32", kernel="dense"), ask(plain, dtype="float32"))
