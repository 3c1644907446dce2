"""Stored weights cut to what a rank computes: against slices of the dense weights, for every rank."""

import itertools

import pytest
import torch

from sparsify.errors import ModelError
from sparsify.format.packed import Packed, decode, encode
from sparsify.format.record import to_tensors
from sparsify.masks import keep_mask
from sparsify.plugins.shards import Cut, Key, Shards
from sparsify.types import NofM, Unstructured, parse_pattern

WIDTH = 48
TWO_OF_FOUR = NofM(2, 4)


def weight(rows: int, pattern: str, seed: int, columns: int = WIDTH) -> torch.Tensor:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    parsed = parse_pattern(pattern)
    return torch.where(keep_mask(dense.abs().float(), parsed), dense, torch.zeros((), dtype=dense.dtype))


def parts_of(dense: torch.Tensor, pattern: str, perm: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of it: ``dense`` as it is, or packed."""
    if pattern == "dense":
        return {"weight": dense}
    parsed = parse_pattern(pattern)
    return to_tensors(encode(dense, None if isinstance(parsed, Unstructured) else parsed, perm))


def cut(rows: list[int], sections: list[int], rank: int, world: int, **more: int) -> Cut:
    names = [f"layer.{'qkv'[i]}_proj" for i in range(len(rows))]
    sizes = {"n_in": WIDTH, "total_in": WIDTH, **more}
    return Cut(
        names=names, rows=rows, sections=sections, rank=rank, world=world, dtype=torch.bfloat16,
        device=torch.device("cpu"), **sizes,
    )  # fmt: skip


def collect(shards: Shards, arrivals: list[tuple[Key, dict[str, torch.Tensor]]]) -> Packed | torch.Tensor:
    for key, parts in arrivals:
        # Last first: the order of arrival is the file's.
        for part, tensor in reversed(parts.items()):
            shards.add(part, tensor, key)
    return shards.finish()


def dense_of(found: Packed | torch.Tensor) -> torch.Tensor:
    return decode(found) if isinstance(found, Packed) else found


def place(key: Key) -> list[int]:
    if isinstance(key, tuple):
        return list(key)
    return [0, 1, 2] if key is None else [{"q": 0, "k": 1, "v": 2}[key] if isinstance(key, str) else key]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5", "dense"])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_rows_and_columns_of_one_weight(pattern: str, world: int) -> None:
    dense = weight(24, "2:4" if pattern == "dense" else pattern, 1)
    for rank in range(world):
        step, width = 24 // world, WIDTH // world
        by_rows = collect(Shards(cut([step], [24], rank, world), lambda key: [0]), [(None, parts_of(dense, pattern))])
        assert torch.equal(dense_of(by_rows), dense[rank * step : (rank + 1) * step])
        across = Shards(cut([24], [24], rank, world, n_in=width), lambda key: [0])
        by_columns = collect(across, [(None, parts_of(dense, pattern))])
        assert torch.equal(dense_of(by_columns), dense[:, rank * width : (rank + 1) * width])
        assert isinstance(by_rows, Packed) == isinstance(by_columns, Packed) == (pattern != "dense")
        if isinstance(by_columns, Packed) and pattern == "2:4":
            assert by_columns.pattern == TWO_OF_FOUR


def test_columns_cut_through_a_group_become_unstructured() -> None:
    dense = weight(8, "4:8", 2)
    shards = Shards(cut([8], [8], 1, 4, n_in=12), lambda key: [0])
    found = collect(shards, [(None, parts_of(dense, "4:8"))])
    assert isinstance(found, Packed)
    assert found.pattern is None
    assert torch.equal(decode(found), dense[:, 12:24])


@pytest.mark.parametrize("patterns", list(itertools.product(["2:4", "0.5", "dense"], repeat=3)))
def test_q_k_and_v_fused_with_repeated_key_heads(patterns: tuple[str, str, str]) -> None:
    """Two key heads on four ranks: each is on two of them."""
    q, k, v = (weight(n, "2:4", seed) for seed, n in enumerate((32, 8, 8)))
    stored = [parts_of(w, pattern) for w, pattern in zip((q, k, v), patterns, strict=True)]
    for rank in range(4):
        shards = Shards(cut([8, 4, 4], [32, 8, 8], rank, 4), place)
        found = collect(shards, list(zip(("v", "q", "k"), (stored[2], stored[0], stored[1]), strict=True)))
        head = 4 * (rank // 2)
        expected = torch.cat((q[8 * rank : 8 * rank + 8], k[head : head + 4], v[head : head + 4]))
        assert torch.equal(dense_of(found), expected)
        assert isinstance(found, Packed) == ("dense" not in patterns)
        if isinstance(found, Packed):
            assert found.pattern == (TWO_OF_FOUR if set(patterns) == {"2:4"} else None)
        elif set(patterns) != {"dense"}:
            assert shards.notes == ["some of the weights fused into it are stored dense"]


@pytest.mark.parametrize("key", [None, (0, 1, 2)])
def test_weights_fused_on_disk(key: Key) -> None:
    q, k, v = (weight(n, "2:4", seed) for seed, n in enumerate((32, 8, 8)))
    parts = parts_of(torch.cat((q, k, v)), "2:4")
    for rank in range(2):
        found = collect(Shards(cut([16, 4, 4], [32, 8, 8], rank, 2), place), [(key, parts)])
        expected = (w[rank * len(w) // 2 : (rank + 1) * len(w) // 2] for w in (q, k, v))
        assert torch.equal(dense_of(found), torch.cat(list(expected)))


def test_columns_in_another_order() -> None:
    perm = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    stored = weight(16, "2:4", 3)
    dense = torch.empty_like(stored)
    dense[:, perm] = stored
    parts = parts_of(dense, "2:4", perm)
    assert "weight_perm" in parts
    by_rows = collect(Shards(cut([8], [16], 1, 2), lambda key: [0]), [(None, parts)])
    assert isinstance(by_rows, Packed)
    assert torch.equal(decode(by_rows), dense[8:])
    shards = Shards(cut([16], [16], 1, 2, n_in=24), lambda key: [0])
    assert torch.equal(dense_of(collect(shards, [(None, parts)])), dense[:, 24:])
    assert shards.notes == ["its inputs are stored in another order, which ranks cannot share out"]
    # Two orders in one linear.
    other = parts_of(stored, "2:4")
    shards = Shards(cut([16, 16], [16, 16], 0, 1), place)
    found = collect(shards, [(0, parts), (1, other)])
    assert torch.equal(dense_of(found), torch.cat((dense, stored)))
    assert shards.notes == ["the weights fused into it store their inputs in different orders"]


def test_what_is_kept_is_a_copy_in_the_dtype_that_runs() -> None:
    dense = weight(8, "2:4", 4)
    for pattern in ("2:4", "0.5", "dense"):
        parts = {name: tensor.clone() for name, tensor in parts_of(dense, pattern).items()}
        shards = Shards(cut([8], [8], 0, 1), lambda key: [0])
        for name, tensor in parts.items():
            shards.add(name, tensor)
        for tensor in parts.values():
            tensor.zero_()
        assert torch.equal(dense_of(shards.finish()), dense)


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "dense"])
@pytest.mark.parametrize(("rows", "columns"), [(48, WIDTH), (12, WIDTH), (24, 24), (24, 96)])
def test_weights_of_another_size_are_refused(pattern: str, rows: int, columns: int) -> None:
    """Half as many rows on two ranks would look like rows that both compute."""
    parts = parts_of(weight(rows, "2:4", 5, columns), pattern)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        with pytest.raises(ModelError, match=r"tensor layer.q_proj.weight"):
            collect(Shards(cut([24 // world], [24], rank, world), lambda key: [0]), [(None, parts)])


@pytest.mark.parametrize("part", ["weight", "weight_mask", "weight_check", None])
def test_what_has_not_arrived_is_named(part: str | None) -> None:
    shards = Shards(cut([8, 8], [8, 8], 0, 1), place)
    for name, tensor in parts_of(weight(8, "2:4", 6), "2:4").items():
        shards.add(name, tensor, 0)
    for name, tensor in parts_of(weight(8, "2:4", 7), "2:4").items():
        if part is not None and name != part:
            shards.add(name, tensor, 1)
    with pytest.raises(ModelError, match=rf"tensor layer.k_proj.{part or 'weight'} is missing"):
        shards.finish()


def test_a_world_that_does_not_divide_the_rows() -> None:
    with pytest.raises(ModelError, match="24 rows do not split into 5 on each of 5 ranks"):
        collect(Shards(cut([5], [24], 0, 5), lambda key: [0]), [(None, parts_of(weight(24, "2:4", 8), "2:4"))])
