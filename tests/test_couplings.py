"""Folding orders of inputs: the model computes what it did; and the driver's modes, against models taken apart."""

import json
import shutil
import struct
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save

from sparsify import manifest
from sparsify.checkpoint import CheckpointReader, read_permutations, write_permutations
from sparsify.couplings import Coupling, couplings, fold_attention, fold_mlp, in_stream_order
from sparsify.errors import OutputError, UsageError
from sparsify.layer import prune_layer
from sparsify.masks import keep_mask, satisfies
from sparsify.model import Skeleton, load_skeleton, weight_view
from sparsify.naming import linear_weights
from sparsify.permute import inverse, retained
from sparsify.pipeline import export
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.stats import InputStats
from sparsify.types import NofM
from sparsify.verify import verify
from tests import conftest

# What CONFIGS lacks. Three key heads with three query heads each: orders that are not their own inverse.
EXTRA: dict[str, Callable[[], Any]] = {
    "llama-nine-heads": lambda: transformers.LlamaConfig(
        **{**conftest._SIZE, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-mha": lambda: transformers.LlamaConfig(**{**conftest._SIZE, "num_key_value_heads": 4}),
    "llama-mqa": lambda: transformers.LlamaConfig(**{**conftest._SIZE, "num_key_value_heads": 1}),
    "llama-one-head": lambda: transformers.LlamaConfig(
        **{**conftest._SIZE, "num_attention_heads": 1, "num_key_value_heads": 1}
    ),
    "phi-norms": lambda: transformers.PhiConfig(**conftest._SIZE, qk_layernorm=True),
    "starcoder2": lambda: transformers.Starcoder2Config(**conftest._SIZE),
    "olmo2": lambda: transformers.Olmo2Config(**conftest._SIZE),
    "cohere": lambda: transformers.CohereConfig(**conftest._SIZE, use_qk_norm=True),
    "smollm3": lambda: transformers.SmolLM3Config(**conftest._SIZE),
    "stablelm": lambda: transformers.StableLmConfig(**conftest._SIZE, qk_layernorm=True),
}
# Couplings a block: of attention (+ whole heads move, - they do not), of MLPs, and producers of one of those.
EXPECTED = {
    "llama": ("+", 1, 2), "mistral": ("+", 1, 2), "qwen2": ("+", 1, 2), "qwen3": ("+", 1, 2), "gemma": ("+", 1, 2),
    "gemma2": ("+", 1, 2), "gemma3_text": ("+", 1, 2), "phi": ("+", 1, 1), "phi3": ("", 1, 2), "opt": ("+", 1, 1),
    "gpt_neox": ("", 1, 1), "gpt2": ("", 1, 1), "mixtral": ("+", 4, 2), "qwen2_moe": ("+", 5, 2),
    "qwen3_moe": ("+", 4, 2), "olmoe": ("-", 4, 2), "bloom": ("", 0, 0),
    "llama-nine-heads": ("+", 1, 2), "llama-mha": ("+", 1, 2), "llama-mqa": ("+", 1, 2), "llama-one-head": ("+", 1, 2),
    "phi-norms": ("+", 1, 1), "starcoder2": ("+", 1, 1), "olmo2": ("-", 1, 2), "cohere": ("-", 1, 2),
    "smollm3": ("+", 1, 2), "stablelm": ("-", 1, 2),
}  # fmt: skip
FOLDABLE = [name for name, (attention, n_mlp, _) in EXPECTED.items() if attention or n_mlp]
IMMOVABLE = [name for name, (attention, _, _) in EXPECTED.items() if attention == "-"]
# Those whose residual stream can be reordered.
STREAMED = ["llama-nine-heads", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"]
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder_of(random_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in ``EXPECTED`` -> folder of a tiny random model, made once."""
    root = tmp_path_factory.mktemp("extra")

    def get(name: str) -> Path:
        if name not in EXTRA:
            return random_models(name)
        folder = root / name
        return folder if folder.exists() else conftest.save_random_model(folder, EXTRA[name]())

    return get


def open_model(folder: Path, dtype: torch.dtype = torch.float64) -> Skeleton:
    """The model with all its weights, as a skeleton."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return replace(load_skeleton(folder), model=model.eval())


def logits(skeleton: Skeleton, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = skeleton.model(ids, use_cache=False).logits
    return result


def decode(skeleton: Skeleton) -> torch.Tensor:
    """The logits of ``IDS``, all but the first tokens one by one."""
    with torch.inference_mode():
        step = skeleton.model(IDS[:, :9], use_cache=True)
        parts = [step.logits]
        for token in torch.split(IDS[:, 9:], 1, dim=1):
            step = skeleton.model(token, past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    return torch.cat(parts, dim=1)


def all_couplings(skeleton: Skeleton) -> list[Coupling]:
    return [coupling for index in range(skeleton.n_blocks) for coupling in couplings(skeleton, index).values()]


def weight_of(skeleton: Skeleton, spec: Any) -> torch.Tensor:
    return weight_view(skeleton.model.get_parameter(spec.parameter), spec)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


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
def test_couplings_of_a_block(name: str, folder_of: Callable[[str], Path]) -> None:
    attention, n_mlp, n_producers = EXPECTED[name]
    skeleton = load_skeleton(folder_of(name))
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


def test_no_couplings_where_the_architecture_is_unknown_or_values_are_normed(folder_of: Callable[[str], Path]) -> None:
    skeleton = load_skeleton(folder_of("llama"))
    assert couplings(skeleton, 0)
    assert not couplings(replace(skeleton, config={**skeleton.config, "model_type": "unheard-of"}), 0)
    skeleton.model.get_submodule("model.layers.0.self_attn").register_module(
        "v_norm", torch.nn.RMSNorm(8, device="meta")
    )
    assert [coupling.heads for coupling in couplings(skeleton, 0).values()] == [None]


# --- the model computes what it did ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_keeps_the_logits_and_no_producer_can_be_left_out(name: str, folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of(name))
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
def test_folding_in_single_precision_is_rounding(name: str, folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of(name), torch.float32)
    dense = logits(skeleton)
    for seed, coupling in enumerate(all_couplings(skeleton)):
        fold_at_random(skeleton, coupling, seed, whole_heads=coupling.heads is not None and coupling.heads.movable)
    assert difference(logits(skeleton), dense) <= 2e-5


@pytest.mark.parametrize("name", FOLDABLE)
def test_decoding_with_a_cache_after_folding_is_the_dense_prefill(name: str, folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of(name))
    prefill, decoded = logits(skeleton), decode(skeleton)
    for seed, coupling in enumerate(all_couplings(skeleton)):
        fold_at_random(skeleton, coupling, seed, whole_heads=coupling.heads is not None and coupling.heads.movable)
    folded = decode(skeleton)
    assert difference(folded, decoded) <= 1e-10
    # Some families take their softmax in single precision, whatever the weights are.
    assert difference(folded, prefill) <= 1e-6


def test_the_order_returned_is_that_of_the_inputs(folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of("llama-nine-heads"))
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
def test_whole_heads_stay_where_norms_belong_to_single_heads(name: str, folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of(name))
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
def test_a_reordered_stream_keeps_the_logits(name: str, folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of(name))
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
    alike: bool, folder_of: Callable[[str], Path]
) -> None:
    skeleton = open_model(folder_of("llama"))
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


def test_reordered_rows_of_a_pruned_producer_keep_its_pattern(folder_of: Callable[[str], Path]) -> None:
    skeleton = open_model(folder_of("qwen2_moe"))
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


# --- the driver ------------------------------------------------------------------------------------------------------


def run(folder: Path, recipe: Recipe, out: Path) -> Path:
    return prune(Source(folder.name, folder, "folder"), recipe, out)


def orders_in(out: Path) -> dict[str, torch.Tensor]:
    return read_permutations(out / manifest.PERMUTATIONS)


def kinds(out: Path) -> dict[str, str]:
    return {row["name"]: row["permuted"] for row in manifest.read(out)["linears"]}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != manifest.RUN}


def reorder_stream(skeleton: Skeleton, perm: torch.Tensor, left_out: str = "") -> list[str]:
    """Reorder the residual stream in place; the names of the parameters that had to follow."""
    changed = []
    for name, parameter in skeleton.model.named_parameters():
        moved = in_stream_order(skeleton, perm, name, parameter.data).clone()
        if not torch.equal(moved, parameter.data) and name != left_out:
            parameter.data = moved
            changed.append(name)
    return changed


def unfolded(out: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The artifact with every folded order taken back, so that it has the dense model's order throughout."""
    skeleton, orders, folded = open_model(out, dtype), orders_in(out), kinds(out)
    if "residual" in orders:
        reorder_stream(skeleton, inverse(orders["residual"]))
    for coupling in all_couplings(skeleton):
        name = coupling.consumer.name
        if folded.get(name) != "folded":
            continue
        back = inverse(orders[name])
        if coupling.heads is None:
            fold_mlp(skeleton.model, coupling, back)
            continue
        repeat, size = coupling.heads.n_query // coupling.heads.n_key, coupling.heads.head_dim
        within = back.reshape(-1, size) - size * torch.arange(coupling.heads.n_query)[:, None]
        # The driver's orders stay within heads and are alike for query heads that share a key head.
        assert torch.equal(within, within[::repeat].repeat_interleave(repeat, dim=0))
        fold_attention(skeleton.model, coupling, list(within[::repeat]))
    return skeleton


SOLVED = [(name, "alps") for name in ("llama", "qwen2", "phi3", "opt", "gpt2", "olmoe")] + [("llama", "fistapruner")]


@pytest.mark.parametrize(("name", "method"), [*((name, "ria") for name in FOLDABLE), *SOLVED])
def test_folded_the_pattern_holds_plainly_and_taken_apart_it_is_the_same_model(
    name: str, method: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    out = run(folder_of(name), Recipe("2:4", method, permute="fold", calibration=ids_file), tmp_path / "out")
    assert verify(out)[1] == []
    linears = {spec.name: (spec, weight) for spec, weight in linear_weights(out)}
    assert all(satisfies(weight, NofM(2, 4)) for _, weight in linears.values())
    consumers = {c.consumer.name: c for c in all_couplings(load_skeleton(out))}
    assert {key for key, kind in kinds(out).items() if kind == "folded"} == set(orders_in(out)) == set(consumers)
    assert set(kinds(out).values()) <= {"folded", "no"}
    back = unfolded(out, torch.float64)
    assert difference(logits(back), logits(open_model(out))) <= 1e-10
    # In the dense model's order, the pattern holds no longer; and RIA leaves weights as they were.
    plain = {key: weight_of(back, spec).float() for key, (spec, _) in linears.items()}
    broken = {key for key, weight in plain.items() if not satisfies(weight, NofM(2, 4))}
    assert {key for key, coupling in consumers.items() if coupling.heads is None} <= broken <= set(consumers)
    if method == "ria":
        dense = {spec.name: weight for spec, weight in linear_weights(folder_of(name))}
        assert all(torch.equal(weight[weight != 0], dense[key][weight != 0]) for key, weight in plain.items())
        assert all(int((weight == 0).sum()) * 2 == weight.numel() for weight in plain.values())


def textbook(
    folder: Path, ids: torch.Tensor, orders: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A llama pruned block after block by RIA: weights, where they were, with the pattern in ``orders``; scores."""
    scores = {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        for index, block in enumerate(model.model.layers):
            linears = {
                f"model.layers.{index}.{name}": module
                for name, module in block.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            sums: dict[torch.nn.Module, torch.Tensor] = {}

            def hook(module: torch.nn.Module, x: Any, sums: dict[torch.nn.Module, torch.Tensor] = sums) -> None:
                sums[module] = x[0].double().square().sum(dim=(0, 1)).float()

            handles = [module.register_forward_pre_hook(hook) for module in linears.values()]
            model(ids)
            for handle in handles:
                handle.remove()
            for name, module in linears.items():
                size = module.weight.abs()
                score = (size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)) * sums[module] ** 0.25
                scores[name] = score
                perm = orders.get(name, torch.arange(score.shape[1]))
                module.weight *= keep_mask(score[:, perm], NofM(2, 4))[:, inverse(perm)]
    return dict(model.state_dict()), scores


@pytest.mark.parametrize("mode", ["fold", "residual", "gather", "simulate"])
def test_masks_are_those_of_the_textbook_in_the_recorded_order(
    mode: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    folder = folder_of("llama")
    out = run(folder, Recipe("2:4", "ria", permute=mode, calibration=ids_file), tmp_path / "out")
    path, _, key = ids_file.rpartition(":")
    orders = orders_in(out)
    if mode == "residual":
        readers = [name for name in kinds(out) if not name.endswith(("o_proj", "down_proj"))]
        orders |= dict.fromkeys(readers, orders["residual"])
    expected, scores = textbook(folder, load_file(path)[key].long(), orders)
    found = unfolded(out).model.state_dict()
    differing = sum(int((found[key] != value).sum()) for key, value in expected.items())
    # Rounding may flip a near tie; another order would move thousands.
    assert differing <= 1e-3 * sum(value.numel() for value in expected.values())
    gains = []
    for name, perm in orders.items():
        if name in scores:
            # By key-value head, each of which has an order of its own.
            parts = [slice(None)] if "o_proj" not in name or mode == "simulate" else [slice(0, 16), slice(16, 32)]
            for part in parts:
                kept, before = (retained(scores[name], p[part], NofM(2, 4)) for p in (perm, perm.sort().values))
                gains.append(kept / before - 1)
    assert len(gains) >= 2 * 3
    # One order for many linears may cost some of them what it brings the others.
    assert min(gains) > (-1 if mode in ("residual", "gather") else 0)
    assert sum(gains) / len(gains) > 0.01


@pytest.mark.parametrize("name", STREAMED)
def test_with_the_stream_reordered_the_pattern_holds_plainly(
    name: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    out = run(folder_of(name), Recipe("2:4", "ria", permute="residual", calibration=ids_file), tmp_path / "out")
    assert verify(out)[1] == []
    orders, folded = orders_in(out), {c.consumer.name for c in all_couplings(load_skeleton(out))}
    assert orders.keys() == folded | {"residual"}
    # Every linear reads either what its neighbours put out or the stream.
    assert set(kinds(out).values()) == {"folded"}
    linears = {spec.name: (spec, weight) for spec, weight in linear_weights(out)}
    assert all(satisfies(weight, NofM(2, 4)) for _, weight in linears.values())
    back = unfolded(out, torch.float64)
    assert difference(logits(back), logits(open_model(out))) <= 1e-5
    dense = open_model(folder_of(name), torch.float64).model.state_dict()
    for key, value in back.model.state_dict().items():
        assert torch.equal(value, torch.where(value == 0, value, dense[key]))
    for key, (spec, _) in linears.items():
        if not key.endswith(("o_proj", "down_proj")):
            assert not satisfies(weight_of(back, spec), NofM(2, 4))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("gpt2", {}, "not known for model type gpt2"),
        ("olmo2", {}, "not known for model type olmo2"),
        ("bloom", {}, "not known for model type bloom"),
        ("llama", {"overrides": {"*.q_proj": "1:4"}}, "need one N:M pattern"),
    ],
)
def test_a_stream_that_cannot_be_reordered_is_refused(
    name: str, options: Any, match: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        run(folder_of(name), Recipe("2:4", "ria", permute="residual", calibration=ids_file, **options), tmp_path / "o")
    assert not list(tmp_path.iterdir())


SAME = [(name, "ria") for name in ("llama", "phi3", "gpt2", "opt", "qwen2_moe", "llama-one-head")]
SAME += [("llama", "alps"), ("olmoe", "mrp"), ("llama-one-head", "alps"), ("llama", "fistapruner")]


@pytest.mark.parametrize(("name", "method"), SAME)
def test_folding_computes_what_the_same_mask_computes_where_it_was(
    name: str, method: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    skeleton = load_skeleton(folder_of(name))
    # With a single head, an order within heads is any order.
    consumers = [
        c.consumer.name for c in all_couplings(skeleton) if c.heads is None or (c.heads.n_query == c.heads.n_key == 1)
    ]
    assert len(consumers) >= 2 * (1 + ("one-head" in name))
    runs = {
        mode: run(
            folder_of(name),
            Recipe("2:4", method, permute=mode, include=tuple(consumers), calibration=ids_file),
            tmp_path / mode,
        )
        for mode in ("none", "fold", "simulate")
    }
    assert set(kinds(runs["fold"]).values()) == {"folded"}
    assert set(kinds(runs["simulate"]).values()) == {"recorded"}
    models = {mode: open_model(out) for mode, out in runs.items()}
    results = {mode: logits(model) for mode, model in models.items()}
    tolerance = 1e-10 if method == "ria" else 1e-3
    assert difference(results["fold"], results["simulate"]) <= tolerance
    assert difference(results["none"], results["simulate"]) > 5 * tolerance


@pytest.mark.parametrize("mode", ["gather", "simulate"])
@pytest.mark.parametrize(("name", "method"), [("llama", "ria"), ("mixtral", "ria"), ("gpt2", "alps"), ("bloom", "ria")])
def test_recorded_orders_verify_and_weights_stay_where_they_were(
    mode: str, name: str, method: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe("2:4", method, permute=mode, settings={"permute.parts": 3}, calibration=ids_file)
    out = run(folder_of(name), recipe, tmp_path / "out")
    assert verify(out)[1] == []
    skeleton, orders = load_skeleton(out), orders_in(out)
    folded = {c.consumer.name for c in all_couplings(skeleton)} if mode == "gather" else set()
    assert kinds(out) == {
        spec.name: "folded" if spec.name in folded else "recorded" for block in skeleton.linears for spec in block
    }
    assert orders.keys() == kinds(out).keys()
    n_broken = 0
    for spec, weight in linear_weights(out):
        assert satisfies(weight if spec.name in folded else weight[:, orders[spec.name]], NofM(2, 4))
        n_broken += not satisfies(weight, NofM(2, 4))
    assert n_broken >= len(orders) - len(folded) - 2
    if method == "alps":
        # One is measured in the order that was found, the other in the model's.
        for row in manifest.read(out)["linears"]:
            assert row["relative_error"] == pytest.approx(row["objective"], rel=1e-3, abs=1e-6)


def test_gathered_inputs_have_one_order_and_simulated_linears_each_their_own(
    folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    for mode in ("gather", "simulate"):
        recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
        orders = orders_in(run(folder_of("llama"), recipe, tmp_path / mode))
        for index in range(2):
            stem = f"model.layers.{index}"
            for parts in (
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ):
                distinct = {tuple(orders[f"{stem}.{part}"].tolist()) for part in parts}
                assert len(distinct) == (1 if mode == "gather" else len(parts))


def test_folding_moves_stored_values_without_rounding_them(ids_file: str, tmp_path: Path) -> None:
    folder = conftest.save_random_model(tmp_path / "m", conftest.CONFIGS["qwen2"](), dtype=torch.bfloat16)
    out = run(folder, Recipe("2:4", "ria", permute="fold", calibration=ids_file), tmp_path / "out")
    assert {info.dtype for info in CheckpointReader(out).tensors.values()} == {"BF16"}
    back, dense = (
        model.model.state_dict() for model in (unfolded(out, torch.bfloat16), open_model(folder, torch.bfloat16))
    )
    for name, value in back.items():
        assert torch.equal(value, torch.where(value == 0, value, dense[name]))
    assert any("bias" in name for name in back)


def test_unknown_architectures_are_pruned_in_the_order_they_have(
    folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    plain, folded = (
        run(folder_of("bloom"), Recipe("2:4", "ria", permute=mode, calibration=ids_file), tmp_path / mode)
        for mode in ("none", "fold")
    )
    assert set(kinds(folded).values()) == {"no"}
    assert not (folded / manifest.PERMUTATIONS).exists()
    reader = CheckpointReader(plain)
    for name, value in CheckpointReader(folded).read(reader.tensors):
        assert torch.equal(value, dict(reader.read([name]))[name])


class Notices:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, name: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def notice(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    "mode",
    ["fold", "gather"],
)
def test_heads_that_m_does_not_divide_are_not_folded(
    mode: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    notices = Notices()
    folder = folder_of("llama")
    recipe = Recipe("8:16", "ria", permute=mode, calibration=ids_file)
    out = prune(Source("llama", folder, "folder"), recipe, tmp_path / "out", progress=notices)
    assert verify(out)[1] == []
    assert any("heads of 8 are no multiple of 16" in text for text in notices.texts) == (mode == "fold")
    expected = {"o_proj": "no" if mode == "fold" else "recorded", "down_proj": "folded"}
    for name, kind in kinds(out).items():
        assert kind == expected.get(name.rpartition(".")[2], "no" if mode == "fold" else "recorded"), name


@pytest.mark.parametrize(
    "mode",
    [
        "fold",
        "gather",
        "simulate",
    ],
)
def test_a_score_without_text_is_permuted_too(
    mode: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe("2:4", "magnitude", permute=mode, calibration=ids_file)
    out = run(folder_of("llama"), recipe, tmp_path / "out")
    assert manifest.read(out)["calibration"] is None
    assert verify(out)[1] == []
    found = {name.rpartition(".")[2]: kind for name, kind in kinds(out).items()}
    others = {"fold": "no", "residual": "no"}.get(mode, "recorded")
    folded = "recorded" if mode == "simulate" else "folded"
    assert found == {**dict.fromkeys(found, others), "o_proj": folded, "down_proj": folded}
    assert ("residual" in orders_in(out)) == (mode == "residual")
    weights = dict(unfolded(out).model.state_dict())
    dense = open_model(folder_of("llama"), torch.float32).model.state_dict()
    assert all(torch.equal(value, torch.where(value == 0, value, dense[key])) for key, value in weights.items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_each_linear_is_solved_with_the_gram_matrix_of_its_own_inputs(
    name: str, folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_solved = 0
    numbers: dict[int, int] = {}

    def identity(value: Any) -> int:
        """As ``id`` may be: the lowest number that no other living statistics have."""
        if not isinstance(value, InputStats):
            return -id(value)
        if id(value) not in numbers:
            numbers[id(value)] = next(number for number in count() if number not in numbers.values())
            weakref.finalize(value, numbers.pop, id(value))
        return numbers[id(value)]

    def check(weight: torch.Tensor, stats: Any, gram: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_solved
        n_solved += 1
        assert stats.n_tokens
        assert torch.equal(gram.matrix, stats.gram)
        return prune_layer(weight, stats, gram, *args, **options)

    monkeypatch.setattr("sparsify.block.id", identity, raising=False)
    monkeypatch.setattr("sparsify.block.prune_layer", check)
    folder = folder_of(name)
    run(folder, Recipe("2:4", "sparsegpt", permute="gather", calibration=ids_file), tmp_path / "out")
    assert n_solved == sum(len(block) for block in load_skeleton(folder).linears)


@pytest.mark.parametrize("mode", ["fold", "gather", "simulate", "residual"])
def test_an_order_without_groups_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match=f"permute {mode}.*N:M only"):
        Recipe("0.5", "ria", permute=mode)
    assert Recipe("0.5", "ria", permute=mode, overrides={"*.down_proj": "2:4"}).plan.permute == mode


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(folder_of: Callable[[str], Path], ids_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama pruned with recorded orders; not to be written to."""
    recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
    return run(folder_of("llama"), recipe, tmp_path_factory.mktemp("simulated") / "out")


def broken_orders(damage: str, file: Path) -> bytes | None:
    """What ``file`` holds after ``damage``; None if it is gone."""
    orders = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    perm = orders[name]
    if damage == "missing":
        return None
    if damage == "truncated":
        return file.read_bytes()[:-20]
    if damage in ("empty", "garbage"):
        return b"" if damage == "empty" else b"no orders" * 30
    if damage == "dtype of another kind":
        header = json.dumps({name: {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}).encode()
        return struct.pack("<Q", len(header)) + header + bytes(16)
    orders[name] = {
        "int64": perm.long(),
        "floats": perm.float(),
        "twice": perm.clone().index_fill_(0, torch.tensor([0]), int(perm[1])),
        "out of range": perm + 1,
        "negative": perm - 32,
        "short": torch.arange(28, dtype=torch.int32),
        "nothing": torch.arange(0, dtype=torch.int32),
        "two dimensions": perm[None],
        "another": perm.roll(3),
        "left out": perm,
    }[damage]
    if damage == "left out":
        del orders[name]
    return save(orders)


DAMAGES = [
    "missing", "truncated", "empty", "garbage", "int64", "floats", "twice", "out of range", "negative", "short",
    "nothing", "two dimensions", "another", "left out", "dtype of another kind",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orders_are_a_problem_and_no_traceback(damage: str, simulated: Path, tmp_path: Path) -> None:
    assert verify(simulated)[1] == []
    out = Path(shutil.copytree(simulated, tmp_path / "out"))
    file = out / manifest.PERMUTATIONS
    content = broken_orders(damage, file)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    [problem] = verify(out)[1]
    assert problem.startswith(manifest.PERMUTATIONS)
    # And where the manifest was written over the damage, so that hashes fit.
    manifest.write(out, {key: value for key, value in manifest.read(out).items() if key not in ("format", "files")})
    [problem] = verify(out)[1]
    assert manifest.PERMUTATIONS in problem or (damage == "another" and "do not form the pattern" in problem)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C when the linear with that number is to be pruned."""
    numbers = count()

    def fail(*args: Any, **options: Any) -> Any:
        if next(numbers) == after:
            raise KeyboardInterrupt
        return prune_layer(*args, **options)

    monkeypatch.setattr("sparsify.block.prune_layer", fail)


@pytest.mark.parametrize("mode", ["fold", "residual", "simulate"])
def test_an_interrupted_run_keeps_its_orders(
    mode: str,
    folder_of: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
    whole = run(folder_of("llama"), recipe, tmp_path / "whole")
    interrupt(monkeypatch, 7 + 4)
    with pytest.raises(KeyboardInterrupt):
        run(folder_of("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    out = run(folder_of("llama"), recipe, tmp_path / "out")
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == 1
    assert {name.split(".")[2] for name in orders_in(out) if name != "residual"} == {"0", "1"}
    assert tree(out) == tree(whole)
    assert not [path.name for path in out.iterdir() if path.name.startswith("orders")]


def test_interrupted_while_orders_are_joined_none_is_lost(
    folder_of: Callable[[str], Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Path
) -> None:
    recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
    unlink, n_gone = Path.unlink, 0

    def fail(self: Path, missing_ok: bool = False) -> None:
        nonlocal n_gone
        if self.name.startswith("orders") and self.suffix != ".tmp":
            n_gone += 1
            if n_gone == 2:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(KeyboardInterrupt):
        run(folder_of("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    assert tree(run(folder_of("llama"), recipe, tmp_path / "out")) == tree(simulated)


@pytest.mark.parametrize(
    ("mode", "damage"),
    [
        ("simulate", "missing"),
        ("simulate", "another"),
        ("residual", "another"),
    ],
)
def test_damaged_orders_of_an_interrupted_run_are_noticed(
    mode: str,
    damage: str,
    folder_of: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run(folder_of("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    [file] = (tmp_path / "out.partial").glob("orders.residual" if mode == "residual" else "orders.*")
    orders = read_permutations(file)
    file.unlink()
    if damage == "another":
        write_permutations(file, {name: perm.roll(1) for name, perm in orders.items()})
    with pytest.raises(OutputError, match="--overwrite"):
        run(folder_of("llama"), recipe, tmp_path / "out")


def test_exported_to_hf_the_orders_go_along_and_pruned_again_they_do_not(
    simulated: Path, ids_file: str, tmp_path: Path
) -> None:
    body = export(simulated, "hf", tmp_path / "hf")
    assert body["files"].keys() >= {manifest.PERMUTATIONS, "model.safetensors"}
    assert (tmp_path / "hf" / manifest.PERMUTATIONS).read_bytes() == (simulated / manifest.PERMUTATIONS).read_bytes()
    assert verify(tmp_path / "hf")[1] == []
    assert difference(logits(open_model(tmp_path / "hf")), logits(open_model(simulated))) == 0
    again = run(tmp_path / "hf", Recipe("2:4", "ria", calibration=ids_file), tmp_path / "again")
    assert not (again / manifest.PERMUTATIONS).exists()
    assert verify(again)[1] == []
