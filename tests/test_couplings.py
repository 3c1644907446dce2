"""Which linears are coupled, and folding orders of inputs: the model computes what it did."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.couplings import Coupling, couplings, fold_attention, fold_mlp
from sparsify.errors import UsageError
from sparsify.masks import keep_mask, satisfies
from sparsify.model import Skeleton, load_skeleton
from sparsify.types import NofM
from tests.coupled import (
    EXPECTED,
    FOLDABLE,
    IDS,
    STREAMED,
    all_couplings,
    difference,
    logits,
    open_model,
    reorder_stream,
    weight_of,
)

IMMOVABLE = [name for name, (attention, _, _) in EXPECTED.items() if attention == "-"]


def decode(skeleton: Skeleton) -> torch.Tensor:
    """The logits of ``IDS``, all but the first tokens one by one."""
    with torch.inference_mode():
        step = skeleton.model(IDS[:, :9], use_cache=True)
        parts = [step.logits]
        for token in torch.split(IDS[:, 9:], 1, dim=1):
            step = skeleton.model(token, past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    return torch.cat(parts, dim=1)


def fold_at_random(skeleton: Skeleton, coupling: Coupling, seed: int, *, whole_heads: bool) -> torch.Tensor:
    """Fold a random order, in attention by every move there is; returns it."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)

    heads = coupling.heads
    if heads is None:
        perm = shuffled(coupling.consumer.in_features)
        fold_mlp(skeleton.model, coupling, perm)
        return perm
    within = [shuffled(heads.head_dim) for _ in range(heads.n_key)]
    if not whole_heads:
        return fold_attention(skeleton.model, coupling, within)
    # A turn by one is an order that no head keeps, and for three heads not its own inverse.
    keys = [*range(1, heads.n_key), 0]
    queries = [[*range(1, heads.n_query // heads.n_key), 0] for _ in range(heads.n_key)]
    return fold_attention(skeleton.model, coupling, within, keys, queries)


# --- which there are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_couplings_of_a_block(name: str, random_models: Callable[[str], Path]) -> None:
    attention, n_mlp, n_producers = EXPECTED[name]
    skeleton = load_skeleton(random_models(name))
    for index in range(skeleton.n_blocks):
        found = couplings(skeleton, index)
        assert all(key.startswith(skeleton.prefix(index)) and key == c.consumer.name for key, c in found.items())
        mlps = [coupling for coupling in found.values() if coupling.heads is None]
        heads = [coupling.heads for coupling in found.values() if coupling.heads is not None]
        assert ["+" if each.movable else "-" for each in heads] == list(attention)
        assert len(mlps) == n_mlp
        assert all(len(coupling.producers) == n_producers for coupling in mlps)
        config = skeleton.text_config
        for each in heads:
            n_key = getattr(config, "num_key_value_heads", config.num_attention_heads)
            assert (each.n_query, each.n_key) == (config.num_attention_heads, n_key)


def test_no_couplings_where_the_architecture_is_unknown_or_values_are_normed(
    random_models: Callable[[str], Path],
) -> None:
    skeleton = load_skeleton(random_models("llama"))
    assert couplings(skeleton, 0)
    assert not couplings(replace(skeleton, config={**skeleton.config, "model_type": "unheard-of"}), 0)
    skeleton.model.get_submodule("model.layers.0.self_attn").register_module(
        "v_norm", torch.nn.RMSNorm(8, device="meta")
    )
    assert [coupling.heads for coupling in couplings(skeleton, 0).values()] == [None]


# --- the model computes what it did ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_keeps_the_logits_and_no_producer_can_be_left_out(
    name: str, random_models: Callable[[str], Path]
) -> None:
    skeleton = open_model(random_models(name))
    dense = logits(skeleton)
    for seed, coupling in enumerate(couplings(skeleton, 0).values()):
        for left_out in range(len(coupling.producers)):
            broken = replace(skeleton, model=deepcopy(skeleton.model))
            rest = tuple(entry for i, entry in enumerate(coupling.producers) if i != left_out)
            fold_at_random(broken, replace(coupling, producers=rest), seed, whole_heads=False)
            assert difference(logits(broken), dense) > 1e-3, coupling.producers[left_out][0].name
    for seed, coupling in enumerate(all_couplings(skeleton)):
        before = weight_of(skeleton, coupling.consumer).clone()
        movable = coupling.heads is not None and coupling.heads.movable
        perm = fold_at_random(skeleton, coupling, seed, whole_heads=movable)
        assert perm.tolist() != list(range(len(perm)))
        assert torch.equal(weight_of(skeleton, coupling.consumer), before[:, perm])
    assert difference(logits(skeleton), dense) <= 1e-10


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_in_single_precision_is_rounding(name: str, random_models: Callable[[str], Path]) -> None:
    skeleton = open_model(random_models(name), torch.float32)
    dense = logits(skeleton)
    for seed, coupling in enumerate(all_couplings(skeleton)):
        fold_at_random(skeleton, coupling, seed, whole_heads=coupling.heads is not None and coupling.heads.movable)
    assert difference(logits(skeleton), dense) <= 2e-5


@pytest.mark.parametrize("name", FOLDABLE)
def test_decoding_with_a_cache_after_folding_is_the_dense_prefill(
    name: str, random_models: Callable[[str], Path]
) -> None:
    skeleton = open_model(random_models(name))
    prefill, decoded = logits(skeleton), decode(skeleton)
    for seed, coupling in enumerate(all_couplings(skeleton)):
        fold_at_random(skeleton, coupling, seed, whole_heads=coupling.heads is not None and coupling.heads.movable)
    folded = decode(skeleton)
    assert difference(folded, decoded) <= 1e-10
    # Some families take their softmax in single precision, whatever the weights are.
    assert difference(folded, prefill) <= 1e-6


def test_the_order_returned_is_that_of_the_inputs(random_models: Callable[[str], Path]) -> None:
    skeleton = open_model(random_models("llama-nine-heads"))
    seen: dict[str, list[torch.Tensor]] = {}
    orders: dict[str, torch.Tensor] = {}
    for round_ in range(2):
        for seed, coupling in enumerate(couplings(skeleton, 0).values()):
            name = coupling.consumer.name
            if round_:
                orders[name] = fold_at_random(skeleton, coupling, seed, whole_heads=True)
            else:
                skeleton.model.get_submodule(name).register_forward_pre_hook(
                    lambda _m, x, name=name: seen.setdefault(name, []).append(x[0].detach())
                )
        logits(skeleton)
    assert len(orders) == 2
    for name, perm in orders.items():
        before, after = seen[name]
        torch.testing.assert_close(after, before[..., perm], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", IMMOVABLE)
def test_whole_heads_stay_where_norms_belong_to_single_heads(name: str, random_models: Callable[[str], Path]) -> None:
    skeleton = open_model(random_models(name))
    dense = logits(skeleton)
    before = deepcopy(skeleton.model.state_dict())
    coupling = next(c for c in couplings(skeleton, 0).values() if c.heads)
    heads = coupling.heads
    assert heads is not None
    same = [torch.arange(heads.head_dim)] * heads.n_key
    turned = [[*range(1, heads.n_query // heads.n_key), 0]] * heads.n_key
    moves: list[dict[str, Any]] = [{"key_order": [*range(1, heads.n_key), 0]}]
    if heads.n_query > heads.n_key:
        moves.append({"query_order": turned})
    for move in moves:
        with pytest.raises(UsageError, match="whole heads cannot move"):
            fold_attention(skeleton.model, coupling, same, **move)
        assert all(torch.equal(value, before[key]) for key, value in skeleton.model.state_dict().items())
        # The refusal is warranted.
        forced = replace(skeleton, model=deepcopy(skeleton.model))
        fold_attention(forced.model, replace(coupling, heads=replace(heads, movable=True)), same, **move)
        assert difference(logits(forced), dense) > 1e-3
    # Orders that move nothing are no move.
    perm = fold_attention(
        skeleton.model,
        coupling,
        same,
        list(range(heads.n_key)),
        [list(range(heads.n_query // heads.n_key))] * heads.n_key,
    )
    assert perm.tolist() == list(range(len(perm)))


@pytest.mark.parametrize("name", STREAMED)
def test_a_reordered_stream_keeps_the_logits(name: str, random_models: Callable[[str], Path]) -> None:
    skeleton = open_model(random_models(name))
    dense = logits(skeleton)
    perm = torch.randperm(skeleton.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = replace(skeleton, model=deepcopy(skeleton.model))
    changed = reorder_stream(whole, perm)
    # Norms are in single precision whatever the weights are, and sum in another order.
    assert difference(logits(whole), dense) <= 1e-5
    assert len(changed) >= 2 * 9 + 2
    if name in ("llama-nine-heads", "gemma2"):
        for left_out in changed:
            broken = replace(skeleton, model=deepcopy(skeleton.model))
            reorder_stream(broken, perm, left_out)
            assert difference(logits(broken), dense) > 1e-3, left_out


@pytest.mark.parametrize("alike", [True, False])
def test_query_heads_that_share_a_key_head_have_to_share_its_order(
    alike: bool, random_models: Callable[[str], Path]
) -> None:
    skeleton = open_model(random_models("llama"))
    dense = logits(skeleton)
    attention = skeleton.model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randperm(8, generator=generator), torch.randperm(8, generator=generator)
    assert not torch.equal(first, second)
    # Query heads 0 and 1 read key head 0.
    columns = torch.cat([first, 8 + (first if alike else second), torch.arange(16, 32)])
    attention.o_proj.weight.data = attention.o_proj.weight.data[:, columns]
    attention.v_proj.weight.data = attention.v_proj.weight.data[torch.cat([first, torch.arange(8, 16)])]
    changed = difference(logits(skeleton), dense)
    assert changed <= 1e-10 if alike else changed > 1e-2


def test_reordered_rows_of_a_pruned_producer_keep_its_pattern(random_models: Callable[[str], Path]) -> None:
    skeleton = open_model(random_models("qwen2_moe"))
    for coupling in all_couplings(skeleton):
        for spec, _ in coupling.producers:
            weight = weight_of(skeleton, spec)
            weight.mul_(keep_mask(weight.abs(), NofM(2, 4)))
    pruned = logits(skeleton)
    n_checked = 0
    for seed, coupling in enumerate(all_couplings(skeleton)):
        fold_at_random(skeleton, coupling, seed, whole_heads=True)
        for spec, _ in coupling.producers:
            assert satisfies(weight_of(skeleton, spec), NofM(2, 4))
            n_checked += 1
    assert n_checked == 2 * (1 + 2 * 5)
    assert difference(logits(skeleton), pruned) <= 1e-10
