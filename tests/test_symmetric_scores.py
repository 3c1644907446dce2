"""stochRIA and SymWanda against their objectives and formulas, in float64."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsify.masks import keep_mask
from sparsify.scores import magnitude, output_norms, relative_importance, ria, stochria, symwanda, wanda
from sparsify.stats import InputStats, Wanted
from sparsify.sums import Accumulator
from sparsify.types import parse_pattern

Array = npt.NDArray[np.float64]
N_OUT, N_IN, N_TOKENS = 5, 8, 40
NORMS = ("input", "output", "both", "squared", "weights", "lp")


def example(seed: int = 0, n_out: int = N_OUT, n_in: int = N_IN) -> tuple[torch.Tensor, torch.Tensor, InputStats]:
    """Weights, tokens that are correlated and of different size, and their statistics."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n_out, n_in, generator=g) * torch.randn(n_out, 1, generator=g).exp()
    x = torch.randn(N_TOKENS, n_in, generator=g) @ torch.randn(n_in, n_in, generator=g)
    return w, x, stats_of(x)


def stats_of(x: torch.Tensor) -> InputStats:
    accumulator = Accumulator(x.shape[1], wanted=Wanted(gram=True))
    accumulator.add(x)
    return accumulator.result("x")


def to_numpy(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def alone(w: Array, i: int, j: int) -> Array:
    """The change of the weight when only entry (i, j) is removed."""
    delta = np.zeros_like(w)
    delta[i, j] = -w[i, j]
    return delta


def objective(delta: Array, x: Array, y: Array, output: float, power: int) -> float:
    """||X Dᵀ||^power + (output ||Y D||)^power, X [tokens, in] and Y [tokens, out]: the error on either side."""
    return float(np.linalg.norm(x @ delta.T) ** power + (output * np.linalg.norm(y @ delta)) ** power)


def of_each_entry(w: Array, x: Array, y: Array, output: float, power: int) -> Array:
    return np.array(
        [[objective(alone(w, i, j), x, y, output, power) for j in range(w.shape[1])] for i in range(w.shape[0])]
    )


# --- SymWanda ------------------------------------------------------------------------------------------------------


def test_output_norms_are_those_of_the_outputs() -> None:
    weight, tokens, stats = example()
    w, x = to_numpy(weight, tokens)
    np.testing.assert_allclose(output_norms(weight, stats), np.sqrt(((x @ w.T) ** 2).mean(axis=0)), rtol=1e-5)
    with pytest.raises(ValueError, match="Gram"):
        output_norms(weight, InputStats(stats.sq_norm, stats.n_tokens))


@pytest.mark.parametrize("seed", range(3))
def test_a_score_is_the_objective_when_only_that_entry_is_removed(seed: int) -> None:
    weight, tokens, stats = example(seed)
    w, x = to_numpy(weight, tokens)
    y = x @ w.T
    size = np.linalg.norm(x, axis=0).mean()
    # Norms are divided by their means, so the plain sum of norms has the ratio of means as its output weight.
    ratio = np.linalg.norm(y, axis=0).mean() / size
    both = symwanda(weight, stats, norms="both", output=ratio).double().numpy()
    np.testing.assert_allclose(both * size, of_each_entry(w, x, y, 1, 1), rtol=1e-5)
    squared = symwanda(weight, stats, norms="squared", output=ratio).double().numpy()
    np.testing.assert_allclose((squared * size) ** 2, of_each_entry(w, x, y, 1, 2), rtol=1e-5)
    assert (both.argsort(axis=None) != squared.argsort(axis=None)).any()


@pytest.mark.parametrize("output", [0.3, 1.0, 2.5])
def test_the_output_weight_multiplies_the_output_side(output: float) -> None:
    weight, tokens, stats = example(3)
    w, x = to_numpy(weight, tokens)
    y = x @ w.T
    x /= np.linalg.norm(x, axis=0).mean()
    y /= np.linalg.norm(y, axis=0).mean()
    for norms, power in (("both", 1), ("squared", 2)):
        score = symwanda(weight, stats, norms=norms, output=output).double().numpy()
        np.testing.assert_allclose(score**power, of_each_entry(w, x, y, output, power), rtol=1e-5)
    np.testing.assert_allclose(symwanda(weight, stats, norms="input"), of_each_entry(w, x, y, 0, 1), rtol=1e-5)
    np.testing.assert_allclose(symwanda(weight, stats, norms="output"), of_each_entry(w, x * 0, y, 1, 1), rtol=1e-5)


def test_the_weights_variant_has_the_weights_for_inputs_and_outputs() -> None:
    weight, _, _ = example(4)
    (w,) = to_numpy(weight)
    score = symwanda(weight, InputStats(torch.zeros(N_IN), 0), norms="weights").double().numpy()
    np.testing.assert_allclose(score**2, of_each_entry(w, w, w.T, 1, 2), rtol=1e-5)
    torch.testing.assert_close(
        symwanda(weight.t(), InputStats(torch.ones(N_OUT), 1), norms="weights").t(),
        symwanda(weight, InputStats(torch.ones(N_IN), 1), norms="weights"),
    )


def test_a_mask_costs_no_more_than_its_scores_and_as_much_for_one_entry() -> None:
    weight, tokens, stats = example(5)
    w, x = to_numpy(weight, tokens)
    y = x @ w.T
    size = np.linalg.norm(x, axis=0).mean()
    score = symwanda(weight, stats, output=np.linalg.norm(y, axis=0).mean() / size).double().numpy() * size
    rng = np.random.default_rng(0)
    ratios = []
    for n_removed in (1, 1, 1, 2, 5, 20, 40):
        gone = rng.permutation(w.size).reshape(w.shape) < n_removed
        ratios.append(objective(-w * gone, x, y, 1, 1) / score[gone].sum())
    assert ratios[:3] == pytest.approx([1, 1, 1], rel=1e-5)
    assert max(ratios[3:]) < 0.99


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_scores_rank_best_for_any_budget_where_nothing_is_correlated(text: str) -> None:
    # With XᵀX and YYᵀ diagonal the squared objective is a sum over entries; all masks are tried.
    g = torch.Generator().manual_seed(6)
    weight = torch.linalg.qr(torch.randn(4, 4, generator=g))[0][:3] * torch.tensor([[1.0], [2.0], [0.3]])
    x = torch.eye(4) * 1.7
    w, dense = to_numpy(weight, x)
    y = dense @ w.T
    ratio = np.linalg.norm(y, axis=0).mean() / np.linalg.norm(dense, axis=0).mean()
    keep = keep_mask(symwanda(weight, stats_of(x), norms="squared", output=ratio), parse_pattern(text)).numpy()
    best = np.inf
    for removed in combinations(range(12), 6):
        gone = np.isin(np.arange(12), removed).reshape(3, 4)
        if text == "0.5" or (gone.sum(axis=1) == 2).all():
            best = min(best, objective(-w * gone, dense, y, 1, 2))
    assert objective(-w * ~keep, dense, y, 1, 2) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_without_output_norms_it_is_wanda(text: str) -> None:
    for seed in range(5):
        weight, _, stats = example(seed, 12, 16)
        score = symwanda(weight, stats, norms="input")
        torch.testing.assert_close(score * stats.rms.mean(), wanda(weight, stats))
        assert torch.equal(symwanda(weight, stats, norms="both", output=0.0), score)
        pattern = parse_pattern(text)
        assert torch.equal(keep_mask(score, pattern), keep_mask(wanda(weight, stats), pattern))
        squared = symwanda(weight, stats, norms="squared", output=0.0)
        assert torch.equal(keep_mask(squared, pattern), keep_mask(wanda(weight, stats), pattern))
        assert not torch.equal(keep_mask(symwanda(weight, stats), pattern), keep_mask(score, pattern))


def test_with_equal_norms_it_is_magnitude() -> None:
    # Orthonormal rows and inputs: every input and output has norm 1.
    weight = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0][:5]
    stats = stats_of(torch.eye(8))
    for norms, factor in (("input", 1), ("output", 1), ("both", 2), ("squared", 2**0.5)):
        torch.testing.assert_close(symwanda(weight, stats, norms=norms), factor * magnitude(weight))


@pytest.mark.parametrize("norms", ["both", "squared"])
@pytest.mark.parametrize("output", [0.5, 1.0, 3.0])
def test_transposing_the_problem_transposes_the_scores(norms: str, output: float) -> None:
    # Outputs of an orthogonal layer, sent back through its transpose, are its inputs: the two sides change places.
    g = torch.Generator().manual_seed(1)
    weight = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    x = torch.randn(30, 8, generator=g) * torch.randn(8, generator=g).exp()
    score = symwanda(weight, stats_of(x), norms=norms, output=output)
    back = symwanda(weight.t().contiguous(), stats_of(x @ weight.t()), norms=norms, output=1 / output)
    torch.testing.assert_close(back.t() * output, score, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(score, score.t(), rtol=0.1)


@pytest.mark.parametrize("norms", NORMS)
def test_the_scale_of_weights_and_inputs_changes_no_ranking(norms: str) -> None:
    weight, x, stats = example(2)
    score = symwanda(weight, stats, norms=norms)
    order = score.flatten().argsort()
    assert torch.equal(symwanda(weight * 8, stats, norms=norms).flatten().argsort(), order)
    assert torch.equal(symwanda(weight, stats_of(x * 4), norms=norms).flatten().argsort(), order)
    twice = stats_of(torch.cat([x, x]))
    torch.testing.assert_close(symwanda(weight, twice, norms=norms), score)


@pytest.mark.parametrize("norms", NORMS)
def test_permuted_rows_and_inputs_permute_the_scores(norms: str) -> None:
    weight, _, stats = example(7)
    g = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(N_OUT, generator=g), torch.randperm(N_IN, generator=g)
    assert stats.gram is not None
    moved = replace(stats.permuted(columns), gram=stats.gram[columns][:, columns])
    permuted = symwanda(weight[rows][:, columns], moved, norms=norms)
    torch.testing.assert_close(permuted, symwanda(weight, stats, norms=norms)[rows][:, columns])


# --- relative importance as a symmetric score, and its l_p relatives -----------------------------------------------


def test_relative_importance_is_the_objective_with_reciprocal_masses() -> None:
    weight, _, _ = example(8)
    (w,) = to_numpy(weight)
    x, y = np.diag(1 / np.abs(w).sum(axis=0)), np.diag(1 / np.abs(w).sum(axis=1))
    np.testing.assert_allclose(relative_importance(weight), of_each_entry(w, x, y, 1, 1), rtol=1e-5)


def test_ria_is_among_the_lp_scores() -> None:
    weight, _, stats = example(9)
    data = InputStats(stats.sq_norm, stats.n_tokens)
    ri = symwanda(weight, data, norms="lp", p=1, strategy=1, exponent=0)
    torch.testing.assert_close(ri, relative_importance(weight))
    for exponent in (0.5, 1.0, 1.7):
        score = symwanda(weight, data, norms="lp", p=1, strategy=1, exponent=exponent)
        torch.testing.assert_close(score, ria(weight, data, exponent=exponent))
    torch.testing.assert_close(symwanda(weight, data, norms="lp"), ria(weight, data))


@pytest.mark.parametrize("strategy", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 3, 4, 20, float("inf")])
def test_lp_scores_against_their_formulas(p: float, strategy: int) -> None:
    weight, tokens, stats = example(10)
    w, x = to_numpy(weight, tokens)
    size = np.abs(w)
    columns = np.linalg.norm(size, ord=p, axis=0)[None]
    rows = np.linalg.norm(size, ord=p, axis=1)[:, None]
    factor = {
        1: 1 / columns + 1 / rows,
        2: columns + rows,
        3: 1 / (columns + rows),
        4: 1 / (1 / columns + 1 / rows),
    }[strategy]
    for exponent in (0.0, 0.5, 2.0):
        expected = size * factor * np.sqrt((x**2).mean(axis=0)) ** exponent
        score = symwanda(weight, stats, norms="lp", p=p, strategy=strategy, exponent=exponent)
        np.testing.assert_allclose(score, expected, rtol=1e-4)


@pytest.mark.parametrize("strategy", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [30, 64])
def test_high_orders_do_not_lose_small_weights(p: float, strategy: int) -> None:
    # 0.02^30 is below the least float32, and weights of language models are no larger.
    weight, _, stats = example(11)
    weight = weight / weight.abs().max() * 0.02
    (w,) = to_numpy(weight.abs())
    columns, rows = (w**p).sum(0)[None] ** (1 / p), (w**p).sum(1)[:, None] ** (1 / p)
    factor = [1 / columns + 1 / rows, columns + rows, 1 / (columns + rows), 1 / (1 / columns + 1 / rows)][strategy - 1]
    score = symwanda(weight, stats, norms="lp", p=p, strategy=strategy, exponent=0)
    np.testing.assert_allclose(score, w * factor, rtol=1e-4)


def test_counting_non_zeros_ranks_dense_weights_like_wanda() -> None:
    weight, _, stats = example(12)
    for strategy in (1, 2, 3, 4):
        score = symwanda(weight, stats, norms="lp", p=0, strategy=strategy, exponent=1)
        assert torch.equal(score.flatten().argsort(), wanda(weight, stats).flatten().argsort())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_lp_ranking_of_a_weight_does_not_depend_on_its_unit(p: float) -> None:
    weight, _, stats = example(13)
    for strategy in (1, 2, 3, 4):
        small, large = (
            symwanda(weight * unit, stats, norms="lp", p=p, strategy=strategy, exponent=0) for unit in (1, 32)
        )
        # S1 and S3 are relative to the layer, S2 and S4 are not.
        torch.testing.assert_close(large, small * (1 if strategy in (1, 3) else 32**2))
        back = symwanda(weight.t(), InputStats(torch.ones(N_OUT), 1), norms="lp", p=p, strategy=strategy, exponent=0)
        torch.testing.assert_close(back.t(), small)


# --- stochRIA ------------------------------------------------------------------------------------------------------


def sampled(w: Array, rows: tuple[int, ...], columns: tuple[int, ...]) -> Array:
    """Relative importance with column masses from ``rows`` and row masses from ``columns``, scaled up."""
    size = np.abs(w)
    column_mass = size[list(rows)].sum(axis=0, keepdims=True) * w.shape[0] / len(rows)
    row_mass = size[:, list(columns)].sum(axis=1, keepdims=True) * w.shape[1] / len(columns)
    return np.asarray(size / column_mass + size / row_mass)


@pytest.mark.parametrize(("n_out", "n_in"), [(5, 8), (8, 5), (6, 6)])
def test_every_score_comes_from_some_sample_and_all_samples_come_up(n_out: int, n_in: int) -> None:
    weight, _, _ = example(0, n_out, n_in)
    stats = InputStats(torch.ones(n_in), 1)
    (w,) = to_numpy(weight)
    # 0.4 of the shorter side is 2.
    tables = {
        (rows, columns): sampled(w, rows, columns)
        for rows in combinations(range(n_out), 2)
        for columns in combinations(range(n_in), 2)
    }
    tried = np.stack(list(tables.values()))
    seen = []
    for seed in range(300):
        score = stochria(weight, stats, share=0.4, seed=seed).double().numpy()
        matches = np.flatnonzero((np.abs(tried - score) < 1e-4 * score).all(axis=(1, 2)))
        assert len(matches) == 1
        seen.append(list(tables)[matches[0]])
    assert {rows for rows, _ in seen} == set(combinations(range(n_out), 2))
    assert {columns for _, columns in seen} == set(combinations(range(n_in), 2))
    assert len(set(seen)) > 100


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_sampled_masses_are_those_of_the_whole_in_the_mean(share: float) -> None:
    # With equal rows every column's mass is known whatever the sample, and what is left of the score is the row's.
    stats, base = InputStats(torch.ones(20), 1), torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.1
    for transposed in (False, True):
        weight = base.expand(10, 20)
        known = 1 / (10 * base)
        if transposed:
            weight, known, stats = weight.t().contiguous(), known[:, None], InputStats(torch.ones(10), 1)
        masses = []
        for seed in range(600):
            left = stochria(weight, stats, share=share, seed=seed) / weight - known
            assert float(left.std()) < 1e-4 * float(left.mean())
            masses.append(1 / float(left.mean()))
        spread = np.std(masses) / len(masses) ** 0.5
        assert spread > 0
        assert abs(np.mean(masses) - float(base.sum())) < 4 * spread
        # More of it tells more: the relative error of a sum of tau of n is cv sqrt((1 - tau/n) / tau).
        tau = int(share * 10)
        expected = float(base.double().std() / base.double().mean()) * ((1 - tau / 20) / tau) ** 0.5
        assert np.std(masses) / np.mean(masses) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("n_out", "n_in"), [(5, 8), (8, 5), (1, 8), (8, 1), (1, 1)])
def test_the_whole_sample_is_ria(n_out: int, n_in: int) -> None:
    weight, _, stats = example(1, n_out, n_in)
    for exponent in (0.0, 0.5, 1.0):
        assert torch.equal(
            stochria(weight, stats, share=1.0, exponent=exponent, seed=3), ria(weight, stats, exponent=exponent)
        )
    assert torch.equal(stochria(weight, stats, share=1.0), ria(weight, stats, exponent=1.0))


def test_the_seed_decides_the_sample_and_nothing_else_does() -> None:
    weight, _, stats = example(2, 12, 16)
    first = stochria(weight, stats, share=0.5, seed=5)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(stochria(weight, stats, share=0.5, seed=5), first)
    assert not torch.equal(stochria(weight, stats, share=0.5, seed=6), first)
    state = torch.get_rng_state()
    stochria(weight, stats, share=0.5, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_input_norms_enter_by_their_power_and_scale_by_none() -> None:
    weight, _, stats = example(3, 12, 16)
    bare = stochria(weight, stats, share=0.3, exponent=0.0)
    for exponent in (0.5, 1.0, 2.0):
        torch.testing.assert_close(stochria(weight, stats, share=0.3, exponent=exponent), bare * stats.rms**exponent)
    torch.testing.assert_close(stochria(weight * 16, stats, share=0.3, exponent=0.0), bare)


def test_it_comes_closer_to_ria_with_the_share() -> None:
    weight, _, stats = example(4, 64, 96)
    whole = ria(weight, stats, exponent=1.0)
    distances = [
        np.mean([float(((stochria(weight, stats, share=s, seed=k) / whole).log()).abs().mean()) for k in range(8)])
        for s in (0.05, 0.2, 0.6, 0.95)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.3 * distances[0]


# --- what must not happen ------------------------------------------------------------------------------------------


def all_scores(weight: torch.Tensor, stats: InputStats) -> dict[str, torch.Tensor]:
    scores = {norms: symwanda(weight, stats, norms=norms) for norms in NORMS}
    for p in (0, 1, 2, 64, float("inf")):
        for strategy in (1, 2, 3, 4):
            scores[f"lp {p} S{strategy}"] = symwanda(weight, stats, norms="lp", p=p, strategy=strategy)
    for share in (0.05, 0.3, 1.0):
        for seed in range(4):
            scores[f"stochria {share} {seed}"] = stochria(weight, stats, share=share, seed=seed)
    return scores


def test_zero_rows_columns_and_inputs_give_finite_scores_that_go_first() -> None:
    weight, x, _ = example(5, 10, 16)
    weight[2] = 0
    weight[:, 7] = 0
    x[:, 11] = 0
    before = weight.clone()
    for name, score in all_scores(weight, stats_of(x)).items():
        assert torch.isfinite(score).all(), name
        assert (score >= 0).all(), name
        assert not score[2].any(), name
        assert not score[:, 7].any(), name
        keep = keep_mask(score, parse_pattern("2:4"))
        assert not keep[[0, 1, *range(3, 10)], 7].any(), name
    assert torch.equal(weight, before)
    for norms in ("input", "lp"):
        assert not symwanda(weight, stats_of(x), norms=norms)[:, 11].any()


def test_nothing_at_all_gives_zeros() -> None:
    stats = stats_of(torch.zeros(3, N_IN))
    for name, score in all_scores(torch.zeros(N_OUT, N_IN), stats).items():
        assert not score.any(), name
    for name, score in all_scores(torch.ones(N_OUT, N_IN), stats).items():
        assert torch.isfinite(score).all(), name


@pytest.mark.parametrize("norms", ["input", "output", "both", "squared"])
def test_without_tokens_all_norms_count_the_same(norms: str) -> None:
    weight, _, _ = example(6)
    nothing = InputStats(torch.zeros(N_IN), 0, gram=torch.zeros(N_IN, N_IN))
    score = symwanda(weight, nothing, norms=norms)
    assert torch.equal(score.flatten().argsort(), magnitude(weight).flatten().argsort())


def test_scores_do_not_depend_on_a_low_precision_storage() -> None:
    weight, _, stats = example(7)
    stored = weight.bfloat16()
    expected = all_scores(stored.float(), stats)
    for name, score in all_scores(stored, stats).items():
        assert score.dtype == torch.float32, name
        torch.testing.assert_close(score, expected[name], rtol=0, atol=0)


def test_raw_units_are_the_plain_sum_of_both_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    x *= torch.arange(1, 9)
    stats = InputStats(x.square().sum(dim=0), len(x), gram=x.T @ x)
    x_norm, y_norm = (torch.linalg.vector_norm(v, dim=0) / len(x) ** 0.5 for v in (x, x @ weight.T))
    found = symwanda(weight, stats, units="raw")
    torch.testing.assert_close(found, weight.abs() * (x_norm + y_norm[:, None]))
    assert not torch.allclose(found, symwanda(weight, stats), rtol=1e-2)
