import numpy as np
import pytest
import torch

from sparsify.layer import SOLVERS
from sparsify.masks import keep_mask
from sparsify.methods import METHODS, PARTS
from sparsify.scores import SCORES, magnitude, relative_importance, ria, wanda
from sparsify.stats import InputStats, Wanted
from sparsify.sums import Accumulator
from sparsify.types import parse_pattern


def example(seed: int = 0, n_out: int = 12, n_in: int = 8) -> tuple[torch.Tensor, InputStats]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator)
    return weight, InputStats(torch.rand(n_in, generator=generator) * 50 + 0.1, 30)


def test_registries_and_parts_agree() -> None:
    assert SCORES.keys() == PARTS["score"].keys() - {"own"}
    assert SOLVERS.keys() == PARTS["solver"].keys() - {"none"}


def test_scores_against_their_formulas_in_numpy_float64() -> None:
    weight, stats = example()
    w, x = np.abs(weight.double().numpy()), np.sqrt(stats.sq_norm.double().numpy() / 30)
    importance = w / w.sum(axis=0, keepdims=True) + w / w.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(magnitude(weight), w, rtol=1e-6)
    np.testing.assert_allclose(wanda(weight, stats), w * x, rtol=1e-5)
    np.testing.assert_allclose(ria(weight, stats), importance * np.sqrt(x), rtol=1e-5)
    np.testing.assert_allclose(ria(weight, stats, exponent=1.3), importance * x**1.3, rtol=1e-5)


def test_relative_importance_sums_to_rows_plus_columns() -> None:
    weight, _ = example()
    assert relative_importance(weight).sum().item() == pytest.approx(12 + 8, rel=1e-6)
    weight[3] = 0
    weight[:, 2] = 0
    assert relative_importance(weight).sum().item() == pytest.approx(11 + 7, rel=1e-6)


def test_relative_importance_ignores_scale_and_follows_permutations() -> None:
    weight, stats = example()
    rows, columns = torch.randperm(12), torch.randperm(8)
    torch.testing.assert_close(relative_importance(weight * 7), relative_importance(weight))
    permuted = InputStats(stats.sq_norm[columns], stats.n_tokens)
    torch.testing.assert_close(ria(weight[rows][:, columns], permuted), ria(weight, stats)[rows][:, columns])


def test_masks_ignore_the_scale_of_the_inputs() -> None:
    weight, stats = example()
    louder = InputStats(stats.sq_norm * 16, stats.n_tokens)
    for score in (wanda, ria):
        for text in ("2:4", "0.5"):
            pattern = parse_pattern(text)
            assert torch.equal(keep_mask(score(weight, stats), pattern), keep_mask(score(weight, louder), pattern))


def test_exponent_zero_needs_no_data() -> None:
    weight, stats = example()
    torch.testing.assert_close(ria(weight, stats, exponent=0), relative_importance(weight))


def test_exponent_one_ranks_like_wanda_on_doubly_stochastic_weights() -> None:
    weight = torch.rand(8, 8, dtype=torch.float64) + 0.1
    for _ in range(200):
        weight /= weight.sum(dim=0, keepdim=True)
        weight /= weight.sum(dim=1, keepdim=True)
    stats = InputStats(torch.rand(8) + 0.5, 10)
    order = ria(weight, stats, exponent=1).flatten().argsort()
    assert torch.equal(order, wanda(weight, stats).flatten().argsort())


@pytest.mark.parametrize("method", SCORES)
def test_dead_rows_columns_and_inputs_give_finite_scores_and_go_first(method: str) -> None:
    weight, stats = example()
    weight[1] = 0
    weight[:, 3] = 0
    dead_input = stats.sq_norm.clone()
    dead_input[5] = 0
    gram = torch.diag(dead_input)
    score = SCORES[method](weight, InputStats(dead_input, stats.n_tokens, gram=gram), METHODS[method], 0)
    assert torch.isfinite(score).all()
    assert (score >= 0).all()
    assert not score[1].any()
    keep = keep_mask(score, parse_pattern("2:4"))
    assert not keep[[0, *range(2, 12)], 3].any()


def test_scores_do_not_depend_on_a_low_precision_storage() -> None:
    weight, stats = example()
    stored = weight.bfloat16()
    stats = InputStats(stats.sq_norm, stats.n_tokens, gram=torch.diag(stats.sq_norm))
    for name, score in SCORES.items():
        plan = METHODS[name]
        torch.testing.assert_close(score(stored, stats, plan, 0), score(stored.float(), stats, plan, 0), rtol=0, atol=0)


def test_relative_importance_keeps_channels_alive_where_magnitude_empties_them() -> None:
    # RIA's motivation, on a layer whose channels differ in scale by a log-normal factor.
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        scale = torch.randn(256, 1, generator=g).exp() * torch.randn(1, 256, generator=g).exp()
        weight = torch.randn(256, 256, generator=g) * scale
        stats = InputStats(torch.full((256,), 10.0), 10)
        empty = {}
        for name, score in (("magnitude", magnitude(weight)), ("ria", ria(weight, stats))):
            keep = keep_mask(score, parse_pattern("0.9", "layer"))
            empty[name] = (int((~keep.any(dim=1)).sum()), int((~keep.any(dim=0)).sum()))
        assert empty["ria"][0] == 0
        assert empty["ria"][1] < empty["magnitude"][1]
        assert empty["magnitude"][0] > 0


def test_statistics_do_not_depend_on_how_tokens_are_split() -> None:
    x = torch.randn(5, 40, 16)
    whole, parts = Accumulator(16), Accumulator(16)
    whole.add(x)
    for piece in torch.split(x.reshape(-1, 16), [1, 7, 92, 100]):
        parts.add(piece)
    expected = x.double().square().sum(dim=(0, 1))
    for accumulator in (whole, parts):
        stats = accumulator.result("x")
        assert stats.n_tokens == 200
        torch.testing.assert_close(stats.sq_norm, expected.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.rms, (expected / 200).sqrt().float(), rtol=1e-6, atol=0)


def test_the_variance_of_a_channel_with_a_large_mean() -> None:
    x = torch.randn(3, 500, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 10.0, 300.0, 3000.0])
    accumulator = Accumulator(4, wanted=Wanted(mean=True))
    for window in x:
        accumulator.add(window)
    stats = accumulator.result("x")
    tokens = x.reshape(-1, 4).double().numpy()
    np.testing.assert_allclose(stats.variance, tokens.var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(stats.mean, tokens.mean(axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="not collected"):
        _ = InputStats(torch.ones(4), 3).variance
