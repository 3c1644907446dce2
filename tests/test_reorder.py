"""The driver's ways to reorder inputs, against models taken apart."""

import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sparsify import manifest
from sparsify.checkpoint import CheckpointReader
from sparsify.errors import UsageError
from sparsify.layer import prune_layer
from sparsify.masks import keep_mask, satisfies
from sparsify.model import load_skeleton
from sparsify.naming import linear_weights
from sparsify.permute import inverse, retained
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.stats import InputStats
from sparsify.types import NofM
from sparsify.verify import verify
from tests import conftest
from tests.coupled import (
    FOLDABLE,
    STREAMED,
    all_couplings,
    difference,
    kinds,
    logits,
    open_model,
    orders_in,
    run,
    unfolded,
    weight_of,
)
from tests.fakes import Notices

SOLVED = [(name, "alps") for name in ("llama", "qwen2", "phi3", "opt", "gpt2", "olmoe")] + [("llama", "fistapruner")]


@pytest.mark.parametrize(("name", "method"), [*((name, "ria") for name in FOLDABLE), *SOLVED])
def test_folded_the_pattern_holds_plainly_and_taken_apart_it_is_the_same_model(
    name: str, method: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    out = run(random_models(name), Recipe("2:4", method, permute="fold", calibration=ids_file), tmp_path / "out")
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
        dense = {spec.name: weight for spec, weight in linear_weights(random_models(name))}
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
    mode: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    folder = random_models("llama")
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
    name: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    out = run(random_models(name), Recipe("2:4", "ria", permute="residual", calibration=ids_file), tmp_path / "out")
    assert verify(out)[1] == []
    orders, folded = orders_in(out), {c.consumer.name for c in all_couplings(load_skeleton(out))}
    assert orders.keys() == folded | {"residual"}
    # Every linear reads either what its neighbours put out or the stream.
    assert set(kinds(out).values()) == {"folded"}
    linears = {spec.name: (spec, weight) for spec, weight in linear_weights(out)}
    assert all(satisfies(weight, NofM(2, 4)) for _, weight in linears.values())
    back = unfolded(out, torch.float64)
    assert difference(logits(back), logits(open_model(out))) <= 1e-5
    dense = open_model(random_models(name), torch.float64).model.state_dict()
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
    name: str, options: Any, match: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        run(
            random_models(name),
            Recipe("2:4", "ria", permute="residual", calibration=ids_file, **options),
            tmp_path / "o",
        )
    assert not list(tmp_path.iterdir())


SAME = [(name, "ria") for name in ("llama", "phi3", "gpt2", "opt", "qwen2_moe", "llama-one-head")]
SAME += [("llama", "alps"), ("olmoe", "mrp"), ("llama-one-head", "alps"), ("llama", "fistapruner")]


@pytest.mark.parametrize(("name", "method"), SAME)
def test_folding_computes_what_the_same_mask_computes_where_it_was(
    name: str, method: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    skeleton = load_skeleton(random_models(name))
    # With a single head, an order within heads is any order.
    consumers = [
        c.consumer.name for c in all_couplings(skeleton) if c.heads is None or (c.heads.n_query == c.heads.n_key == 1)
    ]
    assert len(consumers) >= 2 * (1 + ("one-head" in name))
    runs = {
        mode: run(
            random_models(name),
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
    mode: str, name: str, method: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe("2:4", method, permute=mode, settings={"permute.parts": 3}, calibration=ids_file)
    out = run(random_models(name), recipe, tmp_path / "out")
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
    random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    for mode in ("gather", "simulate"):
        recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
        orders = orders_in(run(random_models("llama"), recipe, tmp_path / mode))
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
    random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    plain, folded = (
        run(random_models("bloom"), Recipe("2:4", "ria", permute=mode, calibration=ids_file), tmp_path / mode)
        for mode in ("none", "fold")
    )
    assert set(kinds(folded).values()) == {"no"}
    assert not (folded / manifest.PERMUTATIONS).exists()
    reader = CheckpointReader(plain)
    for name, value in CheckpointReader(folded).read(reader.tensors):
        assert torch.equal(value, dict(reader.read([name]))[name])


@pytest.mark.parametrize(
    "mode",
    ["fold", "gather"],
)
def test_heads_that_m_does_not_divide_are_not_folded(
    mode: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    notices = Notices()
    folder = random_models("llama")
    recipe = Recipe("8:16", "ria", permute=mode, calibration=ids_file)
    out = prune(Source("llama", folder, "folder"), recipe, tmp_path / "out", progress=notices)
    assert verify(out)[1] == []
    assert any("heads of 8 are no multiple of 16" in text for text in notices.texts) == (mode == "fold")
    expected = {"o_proj": "no" if mode == "fold" else "recorded", "down_proj": "folded"}
    for name, kind in kinds(out).items():
        assert kind == expected.get(name.rpartition(".")[2], "no" if mode == "fold" else "recorded"), name


@pytest.mark.parametrize("mode", ["fold", "simulate"])
def test_a_score_without_text_is_permuted_too(
    mode: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe("2:4", "magnitude", permute=mode, calibration=ids_file)
    out = run(random_models("llama"), recipe, tmp_path / "out")
    assert manifest.read(out)["calibration"] is None
    assert verify(out)[1] == []
    found = {name.rpartition(".")[2]: kind for name, kind in kinds(out).items()}
    others, folded = ("recorded", "recorded") if mode == "simulate" else ("no", "folded")
    assert found == {**dict.fromkeys(found, others), "o_proj": folded, "down_proj": folded}
    weights = dict(unfolded(out).model.state_dict())
    dense = open_model(random_models("llama"), torch.float32).model.state_dict()
    assert all(torch.equal(value, torch.where(value == 0, value, dense[key])) for key, value in weights.items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_each_linear_is_solved_with_the_gram_matrix_of_its_own_inputs(
    name: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    folder = random_models(name)
    run(folder, Recipe("2:4", "sparsegpt", permute="gather", calibration=ids_file), tmp_path / "out")
    assert n_solved == sum(len(block) for block in load_skeleton(folder).linears)


@pytest.mark.parametrize("mode", ["fold", "gather", "simulate", "residual"])
def test_an_order_without_groups_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match=f"permute {mode}.*N:M only"):
        Recipe("0.5", "ria", permute=mode)
    assert Recipe("0.5", "ria", permute=mode, overrides={"*.down_proj": "2:4"}).plan.permute == mode
