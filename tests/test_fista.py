"""FISTAPruner and its inner solver, against scikit-learn's lasso and loops in float64."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from sparsify.solvers.fista import Round, fista, lipschitz, proximal_gradient
from sparsify.solvers.quadratic import Gram
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.solvers.targets import retarget
from sparsify.types import parse_pattern
from tests.problems import (
    activations,
    assert_exact,
    each_pattern,
    error,
    gram_of,
    layer_problem,
    pattern_of,
    rounded,
    weights,
)

# --- the inner solver --------------------------------------------------------------------------------------------


def lasso(seed: int, n_out: int = 3, n_in: int = 12, n_tokens: int = 60) -> tuple[torch.Tensor, ...]:
    """Inputs, weights, A, B and the Lipschitz constant, all float64."""
    x, w = activations(seed, n_in, n_tokens), weights(seed, n_out, n_in).double()
    a = x.t() @ x
    return x, w, a, w @ a, torch.linalg.eigvalsh(a)[-1]


def by_sklearn(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """min 1/2 ||y - x Vᵀ||² + penalty Σ|V|, a fit per row; scikit-learn divides by the number of tokens."""
    model = Lasso(alpha=penalty / len(x), fit_intercept=False, tol=1e-13, max_iter=10**6)
    return torch.from_numpy(np.stack([model.fit(x.numpy(), row.numpy()).coef_ for row in y.t()]))


def lasso_value(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, penalty: float) -> float:
    return float(0.5 * ((v @ a) * v).sum() - (v * b).sum() + penalty * v.abs().sum())


@pytest.mark.parametrize("share", [1e-3, 1e-2, 0.1, 0.5])
def test_proximal_gradient_solves_the_lasso_of_every_row(share: float) -> None:
    x, w, a, b, top = lasso(0)
    penalty = share * float(b.abs().max())
    v = proximal_gradient(b, a, torch.zeros_like(b), penalty, float(top), 6000)
    expected = by_sklearn(x, x @ w.t(), penalty)
    assert lasso_value(v, a, b, penalty) == pytest.approx(lasso_value(expected, a, b, penalty), rel=1e-9)
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-7)
    gradient, zero = v @ a - b, v == 0
    torch.testing.assert_close(gradient[~zero], -penalty * v[~zero].sign(), rtol=1e-6, atol=0)
    assert (gradient[zero].abs() <= penalty * (1 + 1e-9)).all()
    assert zero.any() or share < 0.1


@pytest.mark.parametrize("start", ["zero", "dense", "random"])
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1])
def test_proximal_gradient_keeps_its_rate_at_every_step(start: str, share: float) -> None:
    x, w, a, b, top = lasso(1)
    penalty = share * float(b.abs().max())
    v0 = {"zero": torch.zeros_like(w), "dense": w, "random": weights(2, *w.shape).double()}[start]
    best = by_sklearn(x, x @ w.t(), penalty) if share else w
    least = lasso_value(best, a, b, penalty)
    distance = float((v0 - best).square().sum())
    for k in (*range(1, 30), *range(30, 200, 7)):
        v = proximal_gradient(b, a, v0, penalty, float(top), k)
        bound = 2 * float(top) * distance / (k + 1) ** 2
        assert lasso_value(v, a, b, penalty) - least <= bound + 1e-9 * abs(least)


def test_momentum_gets_to_the_optimum_long_before_plain_gradients() -> None:
    x, w, a, b, top = lasso(1)
    penalty = 1e-3 * float(b.abs().max())
    least = lasso_value(by_sklearn(x, x @ w.t(), penalty), a, b, penalty)
    plain = torch.zeros_like(b)
    for _ in range(100):
        plain = proximal_gradient(b, a, plain, penalty, float(top), 1)
    with_momentum = proximal_gradient(b, a, torch.zeros_like(b), penalty, float(top), 100)
    gap = lasso_value(with_momentum, a, b, penalty) - least
    assert gap < 0.5 * (lasso_value(plain, a, b, penalty) - least)


def test_the_largest_penalty_that_leaves_anything_is_the_largest_entry_of_b() -> None:
    _, _, a, b, top = lasso(2)
    largest = float(b.abs().max())
    zero = torch.zeros_like(b)
    for start in (zero, weights(3, *b.shape).double()):
        assert not proximal_gradient(b, a, start, largest, float(top), 6000).any()
    assert proximal_gradient(b, a, zero, largest * 0.999, float(top), 6000).count_nonzero() == 1


def test_without_penalty_it_converges_to_least_squares() -> None:
    x, _, a, _, top = lasso(3)
    target = weights(4, 3, 12).double() @ (x.t() @ activations(5, 12, 60))
    v = proximal_gradient(target, a, torch.zeros_like(target), 0.0, float(top), 6000)
    torch.testing.assert_close(v, torch.linalg.solve(a, target.t()).t(), rtol=1e-6, atol=1e-8)


def test_one_step_with_unit_inputs_is_the_soft_threshold() -> None:
    b = weights(0, 5, 7).double()
    eye, zero = torch.eye(7).double(), torch.zeros(5, 7).double()
    v = proximal_gradient(b, eye, zero, 0.4, 1.0, 1)
    torch.testing.assert_close(v, b.sign() * (b.abs() - 0.4).clamp_min(0), rtol=0, atol=1e-15)
    assert torch.equal(proximal_gradient(-b, eye, zero, 0.4, 1.0, 1), -v)


def test_a_larger_penalty_gives_a_smaller_sum_and_a_larger_residual() -> None:
    _, w, a, b, top = lasso(4)
    solutions = [
        proximal_gradient(b, a, w, share * float(b.abs().max()), float(top), 4000)
        for share in (0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.7, 1.1)
    ]
    sums = [float(v.abs().sum()) for v in solutions]
    residuals = [error(w, v, a) for v in solutions]
    assert all(later < earlier for earlier, later in pairwise(sums))
    assert all(later > earlier for earlier, later in pairwise(residuals))


def test_scaling_the_inputs_scales_the_penalty_by_its_square() -> None:
    _, _, a, b, top = lasso(5)
    zero = torch.zeros_like(b)
    for n_iter in (1, 7, 500):
        louder = proximal_gradient(9 * b, 9 * a, zero, 9 * 20.0, 9 * float(top), n_iter)
        torch.testing.assert_close(louder, proximal_gradient(b, a, zero, 20.0, float(top), n_iter), rtol=1e-8, atol=0)


def test_proximal_gradient_follows_permutations() -> None:
    _, _, a, b, top = lasso(6)
    zero = torch.zeros_like(b)
    rows, columns = torch.tensor([2, 0, 1]), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    v = proximal_gradient(b, a, zero, 30.0, float(top), 50)
    permuted = proximal_gradient(b[rows][:, columns], a[columns][:, columns], zero, 30.0, float(top), 50)
    torch.testing.assert_close(permuted, v[rows][:, columns], rtol=1e-9, atol=1e-12)
    assert (v == 0).any()


def literal_fista(
    b: torch.Tensor, m: torch.Tensor, start: torch.Tensor, penalty: float, step: float, n_iter: int
) -> torch.Tensor:
    """Eq. 4a to 4d and 5 as printed, with the gradient V m - b."""
    y = last = start.double()
    t = 1.0
    for _ in range(n_iter):
        z = y - (y @ m - b) / step
        x = z.sign() * (z.abs() - penalty / step).clamp_min(0)
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = x + (t - 1) / t_next * (x - last)
        last, t = x, t_next
    return last


def test_the_gradient_is_that_of_equation_3_and_not_the_printed_4a() -> None:
    dense, w = activations(7, 12, 60), weights(7, 3, 12).double()
    seen = dense + 0.3 * dense.std() * torch.randn(60, 12, generator=torch.Generator().manual_seed(8)).double()
    a, c = seen.t() @ seen, dense.t() @ seen
    b, top = w @ c, float(torch.linalg.eigvalsh(a)[-1])
    penalty = 1e-3 * float(b.abs().max())
    zero = torch.zeros_like(b)

    def objective(v: torch.Tensor) -> float:
        return float(0.5 * (seen @ v.t() - dense @ w.t()).square().sum() + penalty * v.abs().sum())

    for n_iter in (1, 2, 3, 20, 3000):
        ours = proximal_gradient(b, a, zero, penalty, top, n_iter)
        torch.testing.assert_close(ours, literal_fista(b, a, zero, penalty, top, n_iter), rtol=1e-9, atol=1e-12)
    printed = literal_fista(b, c, zero, penalty, top, 3000)
    assert objective(printed) > 1.001 * objective(ours)
    torch.testing.assert_close(ours, by_sklearn(seen, dense @ w.t(), penalty), rtol=1e-5, atol=1e-7)


def test_dense_targets_are_the_paper_s_problem_up_to_a_constant() -> None:
    dense, w = activations(9, 12, 80), weights(9, 6, 12)
    seen = dense + 0.3 * torch.randn(80, 12, generator=torch.Generator().manual_seed(1)).double()
    gram = gram_of(seen, damping=0.0)
    aim = retarget(w, gram, ((dense - seen).t() @ seen).float())
    torch.testing.assert_close(aim.double() @ (seen.t() @ seen), w.double() @ (dense.t() @ seen), rtol=1e-4, atol=1e-2)

    def wanted(v: torch.Tensor) -> float:
        return 0.5 * float((seen @ v.double().t() - dense @ w.double().t()).square().sum())

    constants = [wanted(v) - error(aim, v, gram.matrix) for v in (w, aim, weights(10, 6, 12), torch.zeros(6, 12))]
    assert constants == pytest.approx([constants[0]] * 4, rel=1e-3)
    assert constants[0] > 0
    pattern = parse_pattern("0.5")
    to_dense, to_own = (fista(t, gram, pattern, sparsegpt(t, gram, pattern).weight) for t in (aim, w))
    assert wanted(to_dense.weight) < wanted(to_own.weight)


# --- FISTAPruner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
@each_pattern
def test_fista_is_never_worse_than_the_rounded_warm_start(text: str, group: str, scaled: bool) -> None:
    pattern, gained = pattern_of(text, group), False
    for seed in range(2):
        w, gram = layer_problem(seed)
        for start in (w, sparsegpt(w, gram, pattern).weight, weights(seed + 50, *w.shape)):
            before = error(w, rounded(start, gram, pattern, scaled), gram.damped)
            for n_iter, patience, threshold in ((1, 1, 0.3), (20, 3, 0.3), (60, 2, 0.0), (3, 4, 1.0)):
                solution = fista(
                    w, gram, pattern, start, n_iter=n_iter, patience=patience, threshold=threshold, scaled=scaled
                )
                after = error(w, solution.weight, gram.damped)
                assert after <= before * (1 + 1e-5)
                gained |= after < 0.9 * before
                assert_exact(solution.keep, text, group)
                assert not solution.weight[~solution.keep].any()
    assert gained


@each_pattern
def test_fista_gains_on_a_wanda_start_in_the_mean(text: str, group: str) -> None:
    pattern, ratios = pattern_of(text, group), []
    for seed in range(10):
        w, gram = layer_problem(seed, n_out=12, n_in=32, n_tokens=128)
        start = rounded(w, gram, pattern, True)
        after = error(w, fista(w, gram, pattern, start).weight, gram.damped)
        ratios.append(after / error(w, start, gram.damped))
    assert np.mean(ratios) < 0.8


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("nothing", [{"n_iter": 0}, {"patience": 0}])
@each_pattern
def test_fista_without_steps_or_patience_returns_the_rounded_start(
    text: str, group: str, nothing: dict[str, Any], scaled: bool
) -> None:
    w, gram = layer_problem(1)
    pattern, start = pattern_of(text, group), weights(2, *w.shape)
    solution = fista(w, gram, pattern, start, scaled=scaled, **nothing)
    torch.testing.assert_close(solution.weight, rounded(start, gram, pattern, scaled), rtol=1e-6, atol=0)
    assert solution.n_iter == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_the_first_round_is_the_paper_s(scaled: bool) -> None:
    w, gram = layer_problem(3)
    pattern = parse_pattern("0.5", "row")
    start = sparsegpt(w, gram, pattern).weight
    rounds: list[Round] = []
    fista(w, gram, pattern, start, scaled=scaled, rounds=rounds)
    damped = gram.damped.double()
    scale = damped.diagonal().sqrt() if scaled else torch.ones(16).double()
    a, dense = damped / scale / scale[:, None], w.double() * scale
    penalty = 1e-4 * float((dense @ a).abs().max()) if scaled else 1e-5
    step = lipschitz(gram.scaled[1] if scaled else gram.damped)
    first = rounded(start, gram, pattern, scaled).double() * scale
    soft = literal_fista(dense @ a, a, first, penalty, step, 20)
    hard = rounded(soft, Gram(torch.eye(16), 1), pattern, False)
    total = error(dense, hard, a)
    assert rounds[0].penalty == pytest.approx(penalty, rel=1e-5)
    assert rounds[0].objective == pytest.approx(total, rel=1e-4)
    assert rounds[0].ratio == pytest.approx((total**0.5 - error(dense, soft, a) ** 0.5) / total**0.5, abs=1e-3)
    assert rounds[0].sparsity == pytest.approx(float((soft == 0).double().mean()), abs=0.02)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_the_penalty_is_bisected_by_the_share_of_rounding(scaled: bool, threshold: float) -> None:
    turns = set()
    for seed in range(6):
        w, gram = layer_problem(seed)
        rounds: list[Round] = []
        start = rounded(w, gram, parse_pattern("0.5"), scaled)
        solution = fista(
            w, gram, parse_pattern("0.5"), start, patience=8, improvement=0.0, threshold=threshold, scaled=scaled,
            rounds=rounds,
        )  # fmt: skip
        assert solution.n_iter == len(rounds) >= 8
        low, high, first = (1e-8, 1.0, 1e-4) if scaled else (0.0, 1e6, 1e-5)
        unit = rounds[0].penalty / first
        for earlier, later in pairwise(rounds):
            raised = earlier.ratio > threshold
            turns.add(raised)
            assert (later.penalty > earlier.penalty) == raised
            low, high = (earlier.penalty / unit, high) if raised else (low, earlier.penalty / unit)
            assert low < later.penalty / unit < high
            middle = (low * high) ** 0.5 if scaled else (low + high) / 2
            assert later.penalty / unit == pytest.approx(middle, rel=1e-9)
    assert turns == ({False} if threshold == 1 else {True, False})


def test_fista_ends_after_its_patience_or_a_small_gain_and_keeps_the_best_round() -> None:
    ended_by_gain = 0
    for seed in range(8):
        w, gram = layer_problem(seed)
        pattern = parse_pattern("0.6")
        start = sparsegpt(w, gram, pattern).weight
        for patience, improvement in ((1, 1e-3), (3, 1e-3), (4, 0.2)):
            rounds: list[Round] = []
            solution = fista(w, gram, pattern, start, patience=patience, improvement=improvement, rounds=rounds)
            best, fruitless = error(w, rounded(start, gram, pattern, True), gram.damped), 0
            for at, entry in enumerate(rounds, 1):
                gain = 1 - entry.objective / best
                fruitless = 0 if gain > 0 else fruitless + 1
                best = min(best, entry.objective)
                assert (at == len(rounds)) == (fruitless == patience or 0 < gain < improvement)
                ended_by_gain += 0 < gain < improvement
            assert error(w, solution.weight, gram.damped) == pytest.approx(best, rel=1e-4)
            assert solution.n_iter == len(rounds)
    assert ended_by_gain > 0


@pytest.mark.parametrize("text", ["0.5", "2:4", "0"])
@pytest.mark.parametrize("scaled", [True, False])
def test_fista_has_nothing_to_do_without_error(text: str, scaled: bool) -> None:
    w, gram = layer_problem(4)
    pattern = parse_pattern(text)
    w = rounded(w, gram, pattern, scaled)
    for dense, matrix in ((w, gram), (torch.zeros_like(w), gram), (w, Gram(torch.zeros(16, 16), 9))):
        rounds: list[Round] = []
        solution = fista(dense, matrix, pattern, dense, scaled=scaled, rounds=rounds)
        expected = torch.zeros_like(w) if matrix is not gram else dense
        torch.testing.assert_close(solution.weight, expected, rtol=1e-6, atol=0)
        assert rounds == []
        assert_exact(solution.keep, text, "layer")


@pytest.mark.parametrize("group", ["layer", "row"])
def test_fista_follows_permutations_of_inputs_and_rows(group: str) -> None:
    pattern = pattern_of("0.5", group)
    for seed in range(4):
        w, gram = layer_problem(seed)
        columns = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        start = rounded(w, gram, pattern, True)
        solution = fista(w, gram, pattern, start)
        permuted = fista(w[rows][:, columns], gram.permuted(columns), pattern, start[rows][:, columns])
        assert torch.equal(permuted.keep, solution.keep[rows][:, columns])
        torch.testing.assert_close(permuted.weight, solution.weight[rows][:, columns], rtol=1e-3, atol=1e-4)
        assert not torch.equal(solution.keep, start != 0)


def test_fista_has_no_unit_where_it_is_scaled() -> None:
    w, gram = layer_problem(5)
    start = sparsegpt(w, gram, parse_pattern("0.5")).weight
    louder = Gram(gram.matrix * 64, gram.n_tokens)
    mine, theirs = (fista(w, g, parse_pattern("0.5"), start) for g in (gram, louder))
    assert torch.equal(mine.weight, theirs.weight)
    assert not torch.equal(mine.weight, start)


@pytest.mark.parametrize("scaled", [True, False])
def test_fista_survives_singular_inputs_without_damping(scaled: bool) -> None:
    # Errors of zero come out of a float32 product as a little less than zero.
    for seed in range(8):
        w, gram = layer_problem(seed, n_in=32, n_tokens=2, damping=0.0)
        pattern = parse_pattern("0.1")
        solution = fista(w, gram, pattern, w, n_iter=60, patience=3, improvement=0, threshold=1, scaled=scaled)
        assert torch.isfinite(solution.weight).all()
