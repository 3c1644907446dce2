"""What the driver lets go of before a linear is solved, and that results are those of a copy of everything."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import chunks, manifest
from sparsify.block import BlockPruner
from sparsify.grams import Grams
from sparsify.layer import prune_layer, pull, target
from sparsify.methods import METHODS, resolve
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.solvers.factor import reorder_columns_
from sparsify.source import Source
from sparsify.stats import InputStats
from sparsify.types import parse_pattern
from tests.problems import CLOSE, gap, inputs, random, seeds


def stats_of(seed: int, n_in: int, width: int) -> InputStats:
    """Statistics of inputs that drifted a little from those of a dense model."""
    x = inputs(seed, 4 * n_in, n_in)
    moved = x + 0.2 * random(seed + 7, *x.shape)
    stream = random(seed + 8, len(x), width)
    return InputStats(
        x.square().sum(dim=0).float(),
        len(x),
        x.sum(dim=0).float(),
        (x.T @ x).float(),
        ((moved - x).T @ x).float(),
        (stream.T @ x).float(),
        (x - x.mean(dim=0)).square().sum(dim=0).float(),
    )


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_as_it_is_stored_is_pruned_as_its_float32_copy_and_only_read(method: str, pattern: str) -> None:
    plan = replace(resolve(method, {}, {}, grouped=":" in pattern), aim="own", permute="none")
    stats = stats_of(0, 24, 12)
    weight = random(1, 12, 24).bfloat16()
    before = weight.clone()
    grams = [Grams(0.01).of(stats, "x") if plan.needs_gram else None for _ in range(2)]
    stored = prune_layer(weight, stats, grams[0], parse_pattern(pattern), plan)
    copied = prune_layer(weight.float(), stats, grams[1], parse_pattern(pattern), plan)
    assert torch.equal(weight, before)
    assert stored.weight.dtype == torch.float32
    assert torch.equal(stored.weight, copied.weight)
    assert (stored.objective, stored.objective_before) == (copied.objective, copied.objective_before)
    assert 0 < int(stored.weight.count_nonzero()) < weight.numel()


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(["dense", "residual"]))
def test_a_target_follows_an_order_of_the_inputs(seed: int, aim: str) -> None:
    """Made once, its columns are those of the target in the other order; what it is made of need not follow."""
    plan = Recipe("0.5", "sparsegpt", aim=aim).plan
    stats, weight = stats_of(seed, 20, 6), random(seed + 3, 6, 20).float()
    if aim == "dense":
        stats = replace(stats, shift=None)
    perm = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert stats.gram is not None
    assert stats.drift is not None
    after = replace(
        stats.permuted(perm),
        gram=stats.gram[perm][:, perm],
        drift=stats.drift[perm][:, perm],
        shift=None if stats.shift is None else stats.shift[:, perm],
    )
    moved, kind = pull(weight, stats, plan)
    assert kind == aim
    made = reorder_columns_(target(weight, Grams(0.01).of(stats, "x"), moved), perm)
    gram = Grams(0.01).of(after, "x")
    assert gram is not None
    again = target(weight[:, perm], gram, pull(weight[:, perm], after, plan)[0])
    assert float((again - weight[:, perm]).abs().max()) > 1e-3
    assert gap(made, again, gram, weight[:, perm]) < CLOSE


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 1000))
def test_columns_are_reordered_in_place_however_many_rows_at_a_time(seed: int, n_rows: int, n: int, size: int) -> None:
    matrix = random(seed, n_rows, n)
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected = matrix[:, perm]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        patch.setattr(chunks, "_LEAST", 1)
        found = reorder_columns_(matrix, perm)
    assert found is matrix
    assert torch.equal(matrix, expected)


def test_statistics_lose_what_targets_are_made_of_and_keep_their_matrix() -> None:
    stats = stats_of(0, 8, 8)
    grams = Grams(0.01)
    gram = grams.of(stats, "x")
    lean = grams.without_drift(stats)
    assert (lean.drift, lean.shift) == (None, None)
    assert lean.gram is stats.gram
    assert grams.of(lean, "x") is gram
    # Nothing here holds the others any more.
    drift = weakref.ref(stats.drift) if stats.drift is not None else None
    del stats
    assert drift is not None
    assert drift() is None
    before = lean.gram.clone() if lean.gram is not None else None
    perm = torch.arange(8).flip(0)
    moved = grams.reordered(lean, perm)
    assert before is not None
    assert moved.gram is not None
    assert torch.equal(moved.gram, before[perm][:, perm])


@pytest.mark.parametrize(("method", "pattern"), [("fast", "2:4"), ("best", "0.5"), ("fistapruner", "2:4")])
def test_a_target_is_made_once_and_what_it_is_made_of_is_gone_when_the_last_of_an_input_is_solved(
    method: str,
    pattern: str,
    random_models: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drifts: dict[str, Any] = {}
    held: dict[str, bool] = {}
    made: Counter[str] = Counter()
    solve, prune_linear = BlockPruner.solve, BlockPruner._prune_linear

    def taking(self: BlockPruner, index: int, specs: Any, stats: Any) -> Any:
        drifts.update({name: weakref.ref(entry.drift) for name, entry in stats.items()})
        found = solve(self, index, specs, stats)
        assert not stats
        return found

    def solving(self: BlockPruner, spec: Any, *rest: Any) -> Any:
        held[spec.name] = drifts[spec.name]() is not None
        return prune_linear(self, spec, *rest)

    def making(weight: torch.Tensor, *rest: Any) -> Any:
        made["target"] += 1
        return pull(weight, *rest)

    monkeypatch.setattr(BlockPruner, "solve", taking)
    monkeypatch.setattr(BlockPruner, "_prune_linear", solving)
    monkeypatch.setattr("sparsify.block.pull", making)
    monkeypatch.setattr("sparsify.reorder.pull", making)
    folder = random_models("llama")
    out = prune(Source("random", folder, "folder"), Recipe(pattern, method, calibration=ids_file), tmp_path / "out")
    n_linears = len(manifest.read(out)["linears"])
    assert n_linears == len(held) == made["target"]
    # Of linears that read the same input, the others still need it.
    kinds = {name.rpartition(".")[2] for name, there in held.items() if not there}
    assert kinds == {"v_proj", "o_proj", "up_proj", "down_proj"}
    assert sum(held.values()) == 3 * n_linears // 7
