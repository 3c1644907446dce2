"""Dense and residual aims, allocation and the order of the stream, against a whole model in memory."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import manifest
from sparsify.allocate import Curve, fitted, grid, least_error, outliers, owl
from sparsify.checkpoint import read_permutations
from sparsify.errors import UsageError
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.solvers.quadratic import Gram
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.source import Source
from sparsify.types import parse_pattern
from sparsify.verify import verify
from tests import conftest


def source(folder: Path) -> Source:
    return Source(folder.name, folder, "folder")


@pytest.fixture(scope="module")
def stories_ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(3, 512, (8, 96), generator=torch.Generator().manual_seed(2))}, path)
    return f"{path}:ids"


def inputs_of(model: Any, block: int, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of linears and of norms of one block, [tokens, width] float64."""
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[block]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _m, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2).double())
        )
        for name in names
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "aim", [pytest.param("own", marks=pytest.mark.slow), pytest.param("dense", marks=pytest.mark.slow), "residual"]
)
def test_the_driver_solves_for_the_stated_targets(aim: str, stories: Path, stories_ids: str, tmp_path: Path) -> None:
    """Group by group with SparseGPT, targets from explicit inputs by least squares in float64."""
    from safetensors.torch import load_file

    file, key = stories_ids.rsplit(":", 1)
    ids = load_file(file)[key].long()
    shares: dict[str, Any] = {"own": {}, "dense": {"aim.share": 0.7}}.get(
        aim, {"aim.share": 0.7, "aim.residual_share": 0.4}
    )
    recipe = Recipe("2:4", "sparsegpt", order="group", aim=aim, settings=shares, calibration=stories_ids)
    out = prune(source(stories), recipe, tmp_path / "out")
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    stream = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
    compared = 0
    with torch.inference_mode():
        for block in range(2):
            layer = model.model.layers[block]
            for group in groups:
                paths = [("mlp." if name[0] in "gud" else "self_attn.") + name for name in group]
                watched = [paths[0], *(["input_layernorm", "post_attention_layernorm"])]
                x, d = inputs_of(model, block, watched, ids), inputs_of(dense, block, watched, ids)
                for name, path in zip(group, paths, strict=True):
                    linear = layer.get_submodule(path)
                    a = x[paths[0]]
                    gram = Gram((a.T @ a).float(), len(a))
                    wanted = a @ linear.weight.double().T
                    if aim != "own":
                        wanted += 0.7 * (d[paths[0]] - a) @ linear.weight.double().T
                    if aim == "residual" and name in stream:
                        wanted += 0.4 * (d[stream[name]] - x[stream[name]])
                    extra = 0.01 * (a * a).sum(0).mean().sqrt() ** 2
                    # Damping pulls towards the dense weight: rows of sqrt(extra) I below the inputs.
                    below = torch.sqrt(extra) * torch.eye(a.shape[1], dtype=torch.float64)
                    target = torch.linalg.lstsq(
                        torch.cat([a, below]), torch.cat([wanted, below @ linear.weight.double().T])
                    ).solution.T
                    linear.weight.copy_(sparsegpt(target.float(), gram, parse_pattern("2:4")).weight)
                    ours = pruned.get_submodule(f"model.layers.{block}.{path}").weight
                    error = torch.linalg.vector_norm(ours - linear.weight) / torch.linalg.vector_norm(linear.weight)
                    # A near-tie may fall the other way; a wrong target would change everything.
                    assert float(error) < 0.03, (block, name, float(error))
                    linear.weight.copy_(ours)
                    compared += 1
    assert compared == 14
    aims = {row["name"].rpartition(".")[2]: row["aim"] for row in manifest.read(out)["linears"]}
    assert aims["q_proj"] == ("own" if aim == "own" else "dense")
    assert aims["down_proj"] == aim


@pytest.mark.slow
def test_full_aims_help_a_trained_model(trained: Path, stories_ids: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file, key = stories_ids.rsplit(":", 1)
    ids = load_file(file)[key].long()

    def distance(recipe: Recipe, name: str) -> float:
        out = prune(source(trained), recipe, tmp_path / name)
        pruned = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        dense = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
        with torch.inference_mode():
            difference = pruned(ids, output_hidden_states=True).hidden_states[-1]
            difference = difference - dense(ids, output_hidden_states=True).hidden_states[-1]
        return float(difference.square().sum())

    base = Recipe("2:4", "alps", calibration=stories_ids, order="group")
    aimed = Recipe("2:4", "alps", calibration=stories_ids, order="group", aim="residual")
    assert distance(aimed, "aimed") < distance(base, "base")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_owl_meets_the_budget_and_follows_the_outliers(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    ratios = {i: data.draw(st.floats(0, 0.2)) for i in range(n)}
    sizes = {i: data.draw(st.sampled_from([1000, 4096, 100_000])) for i in range(n)}
    sparsity = data.draw(st.sampled_from([Fraction(1, 2), Fraction(7, 10), Fraction(1, 10), Fraction(95, 100)]))
    grains = {str(i): data.draw(st.sampled_from([1, 8, 50])) for i in range(n)}
    wanted = owl(ratios, sparsity, 0.08)
    found = fitted(
        {str(i): s for i, s in wanted.items()}, {str(i): size for i, size in sizes.items()}, grains, sparsity, 0.16
    )
    counts = {name: sizes[int(name)] * s for name, s in found.items()}
    assert all(count.denominator == 1 and count % grains[name] == 0 for name, count in counts.items())
    missing = int(sparsity * sum(sizes.values())) - sum(counts.values())
    full = all(counts[name] + grain >= sizes[int(name)] for name, grain in grains.items() if grain <= missing)
    assert missing >= 0
    assert missing < min(grains.values()) or full
    assert all(0 <= s < 1 for s in found.values())
    # Rounding moves a grain each, and the finest by what is left.
    order = sorted(range(n), key=lambda i: ratios[i])
    assert all(found[str(a)] >= found[str(b)] - Fraction(11, 100) for a, b in pairwise(order))


def test_an_allocation_stays_within_a_grain_of_the_spread() -> None:
    sizes, grains = {"a": 64, "b": 1152, "c": 16384}, {"a": 8, "b": 24, "c": 128}
    found = fitted(dict.fromkeys(sizes, 0.97), sizes, grains, Fraction(97, 100), 0.0)
    assert all(abs(found[name] - Fraction(97, 100)) < Fraction(grains[name], sizes[name]) for name in sizes)
    # A budget above the usual ceiling is met all the same.
    assert fitted({"a": 0.9995}, {"a": 10_000}, {"a": 1}, Fraction(9995, 10_000), 0.1) == {"a": Fraction(9995, 10_000)}


def test_outliers_are_those_of_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, 32, generator=generator) * scale for n, scale in ((16, 1.0), (64, 1.0), (8, 40.0))]
    together = torch.cat([score.flatten() for score in scores])
    expected = float((together > 5 * together.mean()).float().mean())
    assert outliers(scores, 5.0) == pytest.approx(expected)
    # Taken by itself no linear has any: it is the block that makes the third one stand out.
    assert expected > 0.05
    assert all(outliers([score], 5.0) == 0 for score in scores)


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_nothing_to_allocate_is_refused(allocate: str, stories: Path, stories_ids: str, tmp_path: Path) -> None:
    recipe = Recipe("0.5", "wanda", allocate=allocate, overrides={"*": "0.6"}, calibration=stories_ids)
    with pytest.raises(UsageError, match=f"allocate {allocate}: overrides leave no linear"):
        prune(Source("stories", stories, "folder"), recipe, tmp_path / "out")


def test_least_error_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        points = [float(p) for p in grid(Fraction(1, 2), 0.2, 9)]
        scales, rates = generator.uniform(0.2, 3, 3), generator.uniform(2, 8, 3)
        curves = {
            str(i): Curve(10_000, tuple(points), tuple(float(s * np.exp(r * p)) for p in points))
            for i, (s, r) in enumerate(zip(scales, rates, strict=True))
        }
        sizes = {name: curve.n_weights for name, curve in curves.items()}
        found = fitted(least_error(curves, Fraction(1, 2), 0.2), sizes, dict.fromkeys(curves, 1), Fraction(1, 2), 0.2)
        assert sum(int(10_000 * s) for s in found.values()) == 15_000

        def total(values: list[float], scales: Any = scales, rates: Any = rates) -> float:
            return float(sum(s * np.exp(r * v) for s, r, v in zip(scales, rates, values, strict=True)))

        steps = np.linspace(0.3, 0.7, 81)
        best = min(total([a, b, 1.5 - a - b]) for a in steps for b in steps if 0.3 <= 1.5 - a - b <= 0.7)
        assert total([float(found[str(i)]) for i in range(3)]) <= best * 1.01


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_allocations_survive_an_interruption(
    allocate: str, llama: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify import prune as driver

    recipe = Recipe("0.5", "wanda", allocate=allocate, calibration=ids_file)
    whole = prune(source(llama), recipe, tmp_path / "whole")
    conftest.interrupt(monkeypatch, "sparsify.prune._Run.blocks")
    with pytest.raises(KeyboardInterrupt):
        prune(source(llama), recipe, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(driver, "allocated", lambda *args: pytest.fail("measured again"))
    out = prune(source(llama), recipe, tmp_path / "out")
    rows = manifest.read(out)["linears"]
    assert rows == manifest.read(whole)["linears"]
    assert len({row["pattern"] for row in rows}) > 1
    assert verify(out)[1] == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral"])
def test_an_order_of_the_stream_leaves_the_dense_model_as_it_was(
    model_type: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    """Every weight that was kept stands where the orders say; putting the others back gives the dense logits."""
    folder = random_models(model_type)
    recipe = Recipe("2:4", "wanda", permute="residual", calibration=ids_file)
    out = prune(source(folder), recipe, tmp_path / "out")
    assert verify(out)[1] == []
    perm = read_permutations(out / manifest.PERMUTATIONS)["residual"]
    assert not torch.equal(perm, torch.arange(32))
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    changed, before = pruned.state_dict(), dense.state_dict()
    orders = read_permutations(out / manifest.PERMUTATIONS)
    restored = 0
    for name, value in changed.items():
        leaf = name.split(".")[-2]
        if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and name.endswith("weight"):
            rows = _rows(name, leaf, orders, before)
            full = before[name][rows][:, perm]
        elif leaf in ("o_proj", "down_proj") and name.endswith("weight"):
            full = before[name][perm][:, orders[name.removesuffix(".weight")]]
        else:
            continue
        kept = value != 0
        assert torch.equal(value[kept], full[kept]), name
        value.copy_(full)
        restored += 1
    assert restored == 14
    with torch.inference_mode():
        ids = torch.arange(3, 40)[None]
        # Norms compute in float32 whatever the model's dtype.
        torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def _rows(name: str, leaf: str, orders: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    """The order of a linear's rows, from that of the inputs they deliver."""
    stem = name.rsplit(".", 3)[0]
    n_rows = len(before[name])
    if leaf in ("gate_proj", "up_proj"):
        return orders[f"{stem}.mlp.down_proj"]
    if leaf == "v_proj":
        order = orders[f"{stem}.self_attn.o_proj"]
        # Two query heads of 8 read each key-value head; the first of them shows its order.
        return torch.cat([order[16 * k : 16 * k + 8] - 8 * k for k in range(n_rows // 8)])
    return torch.arange(n_rows)


def test_an_order_of_the_stream_is_refused_where_the_stream_is_not_known(
    random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe("2:4", "wanda", permute="residual", calibration=ids_file)
    with pytest.raises(UsageError, match="permute=fold"):
        prune(source(random_models("opt")), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_configs_have_the_heads_this_file_assumes() -> None:
    config = conftest.CONFIGS["llama"]()
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (4, 2, 32)


def test_owl_is_the_paper_s_formula_where_blocks_are_of_one_size() -> None:
    """Kept share = d − mean(d) + 1 − s, with d the outlier shares scaled to [0, 2λ]."""
    ratios = {0: 0.01, 1: 0.05, 2: 0.02, 3: 0.09}
    spread, size = 0.08, 100_000
    found = fitted(
        {str(b): s for b, s in owl(ratios, Fraction(7, 10), spread).items()},
        dict.fromkeys(map(str, ratios), size),
        dict.fromkeys(map(str, ratios), 1),
        Fraction(7, 10),
        2 * spread,
    )
    d = [(r - 0.01) / 0.08 * 2 * spread for r in ratios.values()]
    for share, entry in zip(found.values(), d, strict=True):
        assert float(1 - share) == pytest.approx(entry - sum(d) / 4 + 0.3, abs=2 / size)
