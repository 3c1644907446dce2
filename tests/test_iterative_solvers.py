"""Properties of ADMM, ALPS, FISTAPruner, swaps and DSnoT, against loops and libraries in float64."""

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import Lasso

from sparsify.masks import keep_mask
from sparsify.scores import relative_importance
from sparsify.solvers import swaps as swaps_module
from sparsify.solvers.admm import admm
from sparsify.solvers.alps import alps
from sparsify.solvers.dsnot import dsnot
from sparsify.solvers.fista import Round, fista, proximal_gradient
from sparsify.solvers.quadratic import Gram, Solution, lipschitz, retarget
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.solvers.swaps import swaps
from sparsify.stats import InputStats
from sparsify.types import NofM, Pattern, parse_pattern

Array = npt.NDArray[np.float64]
CASES = [("0.5", "layer"), ("0.5", "row"), ("0.6", "layer"), ("0.6", "row"), ("2:4", ""), ("1:4", ""), ("4:8", "")]
each_pattern = pytest.mark.parametrize(("text", "group"), CASES)


def inputs(seed: int, n_in: int, n_tokens: int) -> torch.Tensor:
    """Tokens [n_tokens, in] float64 whose channels share three directions and differ in size, as activations do."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randn(n_in, generator=g).mul(0.5).exp()
    common = torch.randn(n_tokens, 3, generator=g) @ torch.randn(3, n_in, generator=g)
    return ((torch.randn(n_tokens, n_in, generator=g) + common + 0.3) * size).double()


def weights(seed: int, n_out: int, n_in: int) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1000 + seed))


def gram_of(x: torch.Tensor, damping: float = 0.01) -> Gram:
    return Gram((x.t() @ x).float(), len(x), damping)


def problem(seed: int, n_out: int = 8, n_in: int = 16, n_tokens: int = 64, damping: float = 0.01) -> tuple[
    torch.Tensor, Gram
]:  # fmt: skip
    return weights(seed, n_out, n_in), gram_of(inputs(seed, n_in, n_tokens), damping)


def error(weight: torch.Tensor, pruned: torch.Tensor, matrix: torch.Tensor) -> float:
    """1/2 tr(D G Dᵀ) in float64."""
    delta = (pruned - weight).double()
    return 0.5 * float(((delta @ matrix.double()) * delta).sum())


def pattern_of(text: str, group: str) -> Pattern:
    return parse_pattern(text, "row" if group == "row" else "layer" if group == "layer" else None)


def assert_exact(keep: torch.Tensor, text: str, group: str) -> None:
    n_out, n_in = keep.shape
    if ":" in text:
        n, m = map(int, text.split(":"))
        assert (keep.reshape(n_out, -1, m).sum(dim=2) == n).all()
    elif group == "row":
        assert ((~keep).sum(dim=1) == int(Fraction(text) * n_in)).all()
    else:
        assert int((~keep).sum()) == int(Fraction(text) * keep.numel())


def on_mask(weight: torch.Tensor, matrix: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The least squares optimum of every row on its mask, by normal equations in float64."""
    w, g, k = weight.double().numpy(), matrix.double().numpy(), keep.numpy()
    result = np.zeros_like(w)
    for i, on in enumerate(k):
        result[i, on] = np.linalg.solve(g[np.ix_(on, on)], (w[i] @ g)[on])
    return torch.from_numpy(result)


# --- FISTA's inner solver ------------------------------------------------------------------------------------------


def lasso(seed: int, n_out: int = 3, n_in: int = 12, n_tokens: int = 60) -> tuple[torch.Tensor, ...]:
    """Inputs, weights, A, B and the Lipschitz constant, all float64."""
    x, w = inputs(seed, n_in, n_tokens), weights(seed, n_out, n_in).double()
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
    target = weights(4, 3, 12).double() @ (x.t() @ inputs(5, 12, 60))
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
    dense, w = inputs(7, 12, 60), weights(7, 3, 12).double()
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
    dense, w = inputs(9, 12, 80), weights(9, 6, 12)
    seen = dense + 0.3 * torch.randn(80, 12, generator=torch.Generator().manual_seed(1)).double()
    gram = gram_of(seen, damping=0.0)
    aim = retarget(w, gram, (dense.t() @ seen).float())
    torch.testing.assert_close(aim.double() @ (seen.t() @ seen), w.double() @ (dense.t() @ seen), rtol=1e-4, atol=1e-2)

    def wanted(v: torch.Tensor) -> float:
        return 0.5 * float((seen @ v.double().t() - dense @ w.double().t()).square().sum())

    constants = [wanted(v) - error(aim, v, gram.matrix) for v in (w, aim, weights(10, 6, 12), torch.zeros(6, 12))]
    assert constants == pytest.approx([constants[0]] * 4, rel=1e-3)
    assert constants[0] > 0
    pattern = parse_pattern("0.5")
    to_dense, to_own = (fista(t, gram, pattern, sparsegpt(t, gram, pattern).weight) for t in (aim, w))
    assert wanted(to_dense.weight) < wanted(to_own.weight)


# --- FISTAPruner ---------------------------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, gram: Gram, pattern: Pattern, scaled: bool) -> torch.Tensor:
    """H(weight), by the size of weights or that of weights times input norms."""
    size = weight.double().abs() * (gram.damped.double().diagonal().sqrt() if scaled else 1)
    keep = torch.ones_like(size, dtype=torch.bool)
    groups = size.reshape(-1, pattern.m) if isinstance(pattern, NofM) else size.reshape(1, -1)
    if not isinstance(pattern, NofM) and pattern.group == "row":
        groups = size
    n_remove = int(pattern.sparsity * groups.shape[1])
    keep.reshape(groups.shape).scatter_(1, groups.argsort(dim=1)[:, :n_remove], False)
    return weight * keep


@pytest.mark.parametrize("scaled", [True, False])
@each_pattern
def test_fista_is_never_worse_than_the_rounded_warm_start(text: str, group: str, scaled: bool) -> None:
    pattern, gained = pattern_of(text, group), False
    for seed in range(2):
        w, gram = problem(seed)
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
        w, gram = problem(seed, n_out=12, n_in=32, n_tokens=128)
        start = rounded(w, gram, pattern, True)
        after = error(w, fista(w, gram, pattern, start).weight, gram.damped)
        ratios.append(after / error(w, start, gram.damped))
    assert np.mean(ratios) < 0.8


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("nothing", [{"n_iter": 0}, {"patience": 0}])
@each_pattern
def test_fista_without_steps_or_patience_returns_the_rounded_start(
    text: str, group: str, nothing: dict[str, int], scaled: bool
) -> None:
    w, gram = problem(1)
    pattern, start = pattern_of(text, group), weights(2, *w.shape)
    solution = fista(w, gram, pattern, start, scaled=scaled, **nothing)  # type: ignore[arg-type]
    torch.testing.assert_close(solution.weight, rounded(start, gram, pattern, scaled), rtol=1e-6, atol=0)
    assert solution.n_iter == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_the_first_round_is_the_paper_s(scaled: bool) -> None:
    w, gram = problem(3)
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
        w, gram = problem(seed)
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
        w, gram = problem(seed)
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
    w, gram = problem(4)
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
        w, gram = problem(seed)
        columns = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        start = rounded(w, gram, pattern, True)
        solution = fista(w, gram, pattern, start)
        permuted = fista(w[rows][:, columns], gram.permuted(columns), pattern, start[rows][:, columns])
        assert torch.equal(permuted.keep, solution.keep[rows][:, columns])
        torch.testing.assert_close(permuted.weight, solution.weight[rows][:, columns], rtol=1e-3, atol=1e-4)
        assert not torch.equal(solution.keep, start != 0)


def test_fista_has_no_unit_where_it_is_scaled() -> None:
    w, gram = problem(5)
    start = sparsegpt(w, gram, parse_pattern("0.5")).weight
    louder = Gram(gram.matrix * 64, gram.n_tokens)
    mine, theirs = (fista(w, g, parse_pattern("0.5"), start) for g in (gram, louder))
    assert torch.equal(mine.weight, theirs.weight)
    assert not torch.equal(mine.weight, start)


@pytest.mark.parametrize("scaled", [True, False])
def test_fista_survives_singular_inputs_without_damping(scaled: bool) -> None:
    # Errors of zero come out of a float32 product as a little less than zero.
    for seed in range(8):
        w, gram = problem(seed, n_in=32, n_tokens=2, damping=0.0)
        pattern = parse_pattern("0.1")
        solution = fista(w, gram, pattern, w, n_iter=60, patience=3, improvement=0, threshold=1, scaled=scaled)
        assert torch.isfinite(solution.weight).all()


# --- ADMM and ALPS -------------------------------------------------------------------------------------------------

Solver = Callable[[torch.Tensor, Gram, Pattern], Solution]
SOLVERS: dict[str, Solver] = {
    "admm": admm,
    "alps": alps,
    "fista": lambda w, g, p: fista(w, g, p, sparsegpt(w, g, p).weight),
}
INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x,
    "few tokens": lambda x: x[:5],
    "dead inputs": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
    "all zero": torch.zeros_like,
    "one live": lambda x: x * (torch.arange(x.shape[1]) == 6),
    "duplicated": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "constant": torch.ones_like,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_counts_are_exact_and_weights_finite_whatever_the_inputs(solver: str, kind: str, text: str, group: str) -> None:
    for n_out in (6, 1):
        w, x = weights(n_out, n_out, 16), INPUTS[kind](inputs(3, 16, 64))
        gram = gram_of(x)
        solution = SOLVERS[solver](w, gram, pattern_of(text, group))
        assert_exact(solution.keep, text, group)
        assert solution.weight.dtype == torch.float32
        assert torch.isfinite(solution.weight).all()
        assert not solution.weight[~solution.keep].any()
        assert not solution.weight[:, gram.dead].any()
        assert solution.status in ("converged", "max_iter")
        assert error(w, solution.weight, gram.matrix) <= error(w, torch.zeros_like(w), gram.matrix)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("group", ["layer", "row"])
def test_one_column_and_sparsity_zero(solver: str, group: str) -> None:
    w, gram = problem(0, n_in=1)
    solution = SOLVERS[solver](w, gram, pattern_of("0.5", group))
    assert_exact(solution.keep, "0.5", group)
    # One input: least squares on it is the dense weight.
    torch.testing.assert_close(solution.weight, w * solution.keep, rtol=2e-3, atol=0)
    w, gram = problem(0)
    torch.testing.assert_close(SOLVERS[solver](w, gram, pattern_of("0", group)).weight, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_the_weights_are_not_changed_in_place(solver: str, text: str, group: str) -> None:
    w, gram = problem(0)
    before, matrix = w.clone(), gram.matrix.clone()
    SOLVERS[solver](w, gram, pattern_of(text, group))
    assert torch.equal(w, before)
    assert torch.equal(gram.matrix, matrix)


@pytest.mark.parametrize("solver", ["admm", "alps"])
@each_pattern
def test_the_mean_over_correlated_problems_is_better_than_sparsegpt(solver: str, text: str, group: str) -> None:
    pattern, ratios = pattern_of(text, group), []
    for seed in range(12):
        w, gram = problem(seed, n_out=12, n_in=32, n_tokens=128)
        before = error(w, sparsegpt(w, gram, pattern).weight, gram.damped)
        ratios.append(error(w, SOLVERS[solver](w, gram, pattern).weight, gram.damped) / before)
    assert np.mean(ratios) < 0.95


@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_the_scale_of_an_input_changes_nothing_but_its_weights(solver: str, text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    if solver == "fista":
        solve: Solver = lambda w, g, p: fista(w, g, p, rounded(w, g, p, True))  # noqa: E731
    else:
        solve = SOLVERS[solver]
    w, gram = problem(6, damping=0.0)
    # Powers of two, so that not even rounding differs.
    a = 2.0 ** torch.randint(-4, 5, (16,), generator=torch.Generator().manual_seed(0))
    solution = solve(w, gram, pattern)
    scaled = solve(w * a, Gram(gram.matrix / a / a[:, None], gram.n_tokens, 0.0), pattern)
    assert torch.equal(scaled.keep, solution.keep)
    torch.testing.assert_close(scaled.weight, solution.weight * a, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", ["admm", "alps"])
@pytest.mark.parametrize("group", ["layer", "row"])
def test_permuted_inputs_and_rows_permute_the_result(solver: str, group: str) -> None:
    for seed in range(3):
        w, gram = problem(seed)
        columns = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        solution = SOLVERS[solver](w, gram, pattern_of("0.5", group))
        permuted = SOLVERS[solver](w[rows][:, columns], gram.permuted(columns), pattern_of("0.5", group))
        assert torch.equal(permuted.keep, solution.keep[rows][:, columns])
        torch.testing.assert_close(permuted.weight, solution.weight[rows][:, columns], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_group_is_used_where_the_pattern_leaves_it_open(solver: str) -> None:
    w, gram = problem(0)
    w = w * torch.arange(1, 9)[:, None]
    start = sparsegpt(w, gram, parse_pattern("0.5", "row")).weight
    for group in ("layer", "row"):
        results = []
        for pattern in (parse_pattern("0.5"), pattern_of("0.5", group)):
            other = group if pattern == parse_pattern("0.5") else "layer"
            results.append(
                {
                    "admm": lambda p=pattern, g=other: admm(w, gram, p, group=g),
                    "alps": lambda p=pattern, g=other: alps(w, gram, p, group=g),
                    "fista": lambda p=pattern, g=other: fista(w, gram, p, start, group=g),
                }[solver]().keep
            )
        assert torch.equal(*results)
        assert_exact(results[0], "0.5", group)


def brute_force(w: torch.Tensor, matrix: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """The least error of every row over ``masks`` [in], weights being the optimum for each."""
    w = w.double()
    target = w @ matrix.double()
    errors = []
    for on in masks:
        v = torch.linalg.solve(matrix.double()[on][:, on], target[:, on].t()).t()
        errors.append(0.5 * ((w * target).sum(dim=1) - (v * target[:, on]).sum(dim=1)))
    return torch.stack(errors).min(dim=0).values


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_on_tiny_rows_the_best_of_all_masks_is_mostly_found(text: str) -> None:
    masks = [torch.tensor([j in kept for j in range(8)]) for kept in combinations(range(8), 4)]
    if text == "2:4":
        masks = [mask for mask in masks if int(mask[:4].sum()) == 2]
    pattern = parse_pattern(text, "row" if text == "0.5" else None)
    found, ratios = dict.fromkeys(("admm", "alps", "sparsegpt"), 0), {"admm": [0.0], "alps": [0.0]}
    for seed in range(8):
        w, gram = problem(seed, n_out=16, n_in=8)
        least = brute_force(w, gram.damped, masks)
        for name, solution in (
            ("admm", admm(w, gram, pattern)),
            ("alps", alps(w, gram, pattern)),
            ("sparsegpt", sparsegpt(w, gram, pattern)),
        ):
            delta = on_mask(w, gram.damped, solution.keep) - w.double()
            errors = 0.5 * ((delta @ gram.damped.double()) * delta).sum(dim=1)
            assert (errors >= least * (1 - 1e-6)).all()
            found[name] += int((errors <= least * (1 + 1e-6)).sum())
            if name in ratios:
                ratios[name].append(float(errors.sum() / least.sum()))
    assert found["alps"] > 0.75 * 128
    assert found["admm"] > 0.6 * 128
    assert found["sparsegpt"] < min(found["admm"], found["alps"])
    assert np.mean(ratios["alps"][1:]) < 1.1
    assert np.mean(ratios["admm"][1:]) < 1.25


@each_pattern
def test_admm_is_the_algorithm_of_the_paper(text: str, group: str) -> None:
    w, gram = problem(7)
    solution = admm(w, gram, pattern_of(text, group))
    g = gram.matrix.double()
    scale = g.diagonal().sqrt()
    scaled = g / scale / scale[:, None] + 0.1 * torch.eye(16)
    dense = w.double() * scale
    v, u = dense, torch.zeros_like(dense)
    target = float(Fraction(1, 2) if text in ("2:4", "4:8") else Fraction(3, 4) if text == "1:4" else Fraction(text))
    for t in range(20):
        size = (v + u).abs()
        level = target - target * (1 - (t + 1) / 15) ** 3 if t < 15 else target
        if t < 15:
            if ":" in text:
                n, m = map(int, text.split(":"))
                final = size.reshape(-1, m).argsort(dim=1, descending=True)[:, :n]
                size = size.reshape(-1, m).scatter(1, final, torch.inf).reshape(w.shape)
            groups = size if group == "row" else size.reshape(1, -1)
            gone = groups.argsort(dim=1)[:, : int(level * groups.shape[1] + 1e-9)]
            mask = torch.ones_like(groups).scatter_(1, gone, 0).reshape(w.shape)
        z = (v + u) * mask
        u = u + v - z
        v = torch.linalg.solve(scaled + torch.eye(16), (dense @ scaled + z - u).t()).t()
    assert torch.equal(solution.keep, mask.bool())
    torch.testing.assert_close(solution.weight.double(), (v + u) * mask / scale, rtol=1e-4, atol=1e-4)
    assert solution.n_iter == 20


@pytest.mark.parametrize("n_iter", [1, 2, 9, 14, 15, 16])
@each_pattern
def test_admm_reaches_the_pattern_in_any_number_of_iterations(text: str, group: str, n_iter: int) -> None:
    w, gram = problem(8)
    for n_gradual in (0, 1, 15):
        solution = admm(w, gram, pattern_of(text, group), n_iter=n_iter, n_gradual=n_gradual)
        assert_exact(solution.keep, text, group)
        assert not solution.weight[~solution.keep].any()
        assert solution.n_iter == n_iter


def test_admm_approaches_the_optimum_on_a_given_mask() -> None:
    w, gram = problem(9)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    # The objective that it solves has a tenth of the diagonal added.
    matrix = gram.matrix + 0.1 * gram.matrix.diagonal().diag()
    best = error(w, on_mask(w, matrix, keep), matrix)
    excess = []
    for n_iter in (1, 5, 20, 400):
        solution = admm(w, gram, parse_pattern("0.5"), keep=keep, n_iter=n_iter)
        assert torch.equal(solution.keep, keep)
        assert not solution.weight[~keep].any()
        excess.append(error(w, solution.weight, matrix) / best - 1)
    assert all(-1e-5 < later < earlier for earlier, later in pairwise(excess))
    assert excess[-1] < 1e-4
    torch.testing.assert_close(solution.weight.double(), on_mask(w, matrix, keep), rtol=1e-3, atol=1e-3)
    # A pattern that the mask does not have is not asked.
    assert torch.equal(admm(w, gram, parse_pattern("2:4"), keep=keep).keep, keep)


def test_admm_says_whether_iterates_and_projection_agree() -> None:
    w, gram = problem(9)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    statuses = [admm(w, gram, parse_pattern("0.5"), keep=keep, n_iter=n).status for n in (1, 2, 1000)]
    assert statuses == ["max_iter", "max_iter", "converged"]
    assert admm(torch.zeros_like(w), gram, parse_pattern("0.5")).status == "converged"


@each_pattern
def test_alps_begins_as_in_the_paper(text: str, group: str) -> None:
    # Three iterations, up to the first change of the penalty.
    w, gram = problem(7)
    pattern = pattern_of(text, group)
    damped = gram.damped.double()
    scale = damped.diagonal().sqrt()
    a, dense = damped / scale / scale[:, None], w.double() * scale
    d, u, rho, unit = dense, torch.zeros_like(dense), 0.1, Gram(torch.eye(16), 1)
    for t in range(1, 4):
        b = torch.linalg.solve(a + rho * torch.eye(16), (dense @ a - u + rho * d).t()).t()
        d = rounded(b + u / rho, unit, pattern, False)
        u = u + rho * (b - d)
        solution = alps(w, gram, pattern, n_iter=t, n_refit=0)
        assert torch.equal(solution.keep, rounded(b, unit, pattern, False) != 0)
        torch.testing.assert_close(solution.weight.double(), b / scale * solution.keep, rtol=1e-4, atol=1e-4)
        assert (solution.n_iter, solution.status) == (t, "max_iter")


@each_pattern
def test_the_refit_of_alps_only_helps_and_ends_at_the_optimum_of_its_mask(text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    for seed in range(3):
        w, gram = problem(seed)
        raw, some, full = (alps(w, gram, pattern, n_refit=n) for n in (0, 10, 200))
        assert torch.equal(raw.keep, some.keep)
        assert torch.equal(raw.keep, full.keep)
        before, after, least = (error(w, s.weight, gram.damped) for s in (raw, some, full))
        assert least * (1 - 1e-5) <= after <= before * (1 + 1e-6)
        best = on_mask(w, gram.damped, raw.keep)
        assert least == pytest.approx(error(w, best, gram.damped), rel=1e-4)
        # From the dense weights it is another way to the same place.
        again = refit(w, gram, raw.keep, n_iter=200).weight
        torch.testing.assert_close(full.weight, again, rtol=1e-2, atol=1e-2)


@each_pattern
def test_alps_reports_whether_its_mask_settled(text: str, group: str) -> None:
    w, gram = problem(2)
    pattern = pattern_of(text, group)
    for n_iter in (1, 2, 3, 5):
        short = alps(w, gram, pattern, n_iter=n_iter)
        assert (short.status, short.n_iter) == ("max_iter", n_iter)
        assert_exact(short.keep, text, group)
    settled = alps(w, gram, pattern)
    assert settled.status == "converged"
    assert 5 < settled.n_iter < 300
    # What settled stays: one iteration fewer is cut short, and more change nothing.
    assert alps(w, gram, pattern, n_iter=settled.n_iter - 1).status == "max_iter"
    longer = alps(w, gram, pattern, n_iter=1000)
    assert torch.equal(longer.weight, settled.weight)


def test_alps_may_end_early_where_little_still_moves() -> None:
    w, gram = problem(2, n_out=24, n_in=32, n_tokens=128)
    pattern = parse_pattern("0.6")
    patient = alps(w, gram, pattern, settled=0.0)
    hasty = alps(w, gram, pattern, settled=1.0, n_settled=7)
    assert hasty.n_iter == 9 < patient.n_iter
    assert hasty.status == patient.status == "converged"


@pytest.mark.parametrize("solver", ["admm", "alps"])
def test_one_of_two_equal_inputs_takes_over_the_weight_of_both(solver: str) -> None:
    w, x = weights(0, 6, 16), inputs(0, 8, 64)
    gram = gram_of(x[:, torch.arange(16) // 2], damping=1e-6)
    solution = SOLVERS[solver](w, gram, NofM(1, 2))
    ends = refit(w, gram, solution.keep, start=solution.weight, n_iter=200).weight
    torch.testing.assert_close(ends.reshape(6, 8, 2).sum(dim=2), w.reshape(6, 8, 2).sum(dim=2), rtol=1e-2, atol=1e-2)
    share = {"admm": 0.05, "alps": 1e-4}[solver]
    assert error(w, solution.weight, gram.matrix) < share * error(w, w * solution.keep, gram.matrix)


# --- swaps ---------------------------------------------------------------------------------------------------------


def kept_error(w: torch.Tensor, keep: torch.Tensor, matrix: torch.Tensor) -> Array:
    """uᵀ G u of every row, u its removed weights, in float64."""
    u = (w * ~keep).double()
    return np.asarray(((u @ matrix.double()) * u).sum(dim=1).numpy())


def best_swap(w: torch.Tensor, keep: torch.Tensor, matrix: torch.Tensor, m: int) -> float:
    """The least error of one row after any single swap within groups of ``m``, by trying all."""
    errors = [np.inf]
    for i in keep.nonzero().flatten().tolist():
        for j in (~keep).nonzero().flatten().tolist():
            if i // m == j // m:
                swapped = keep.clone()
                swapped[i], swapped[j] = False, True
                errors.append(float(kept_error(w[None], swapped[None], matrix)[0]))
    return min(errors)


@each_pattern
def test_every_swap_is_the_best_and_a_fixed_point_has_none(text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    m = pattern.m if isinstance(pattern, NofM) else 16
    for seed in range(3):
        w, gram = problem(seed, n_out=4)
        start = keep_mask(w.abs(), pattern)
        final, n_swaps, status = swaps(w, gram, start, pattern, candidates=None)
        assert status == "converged"
        assert n_swaps > 0
        keep = start
        for step in range(1, n_swaps + 2):
            later, done, _ = swaps(w, gram, start, pattern, n_iter=step, candidates=None)
            assert done == min(step, n_swaps)
            assert torch.equal(later.sum(dim=1), start.sum(dim=1))
            assert torch.equal(later.reshape(4, -1, m).sum(dim=2), start.reshape(4, -1, m).sum(dim=2))
            before, after = kept_error(w, keep, gram.matrix), kept_error(w, later, gram.matrix)
            for row in range(4):
                best = best_swap(w[row], keep[row], gram.matrix, m)
                n_changed = int((keep[row] ^ later[row]).sum())
                assert n_changed in (0, 2)
                if n_changed:
                    assert after[row] == pytest.approx(best, rel=1e-4)
                    assert after[row] < before[row]
                else:
                    scale = float((w[row].square() * gram.matrix.diagonal()).sum())
                    assert best >= before[row] - 3e-6 * scale
            keep = later
        assert torch.equal(keep, final)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("candidates", [None, 4])
def test_the_change_that_is_computed_is_the_change_that_happens(
    text: str, candidates: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, gram = problem(3)
    pattern = parse_pattern(text)
    predicted: list[float] = []
    for name in ("_best_pair", "_best_in_group"):
        original = getattr(swaps_module, name)

        def spy(*args: object, original: Callable[..., tuple[torch.Tensor, ...]] = original) -> object:
            found = original(*args)
            predicted.append(float(found[0][0]))
            return found

        monkeypatch.setattr(swaps_module, name, spy)
    n_checked = 0
    for row in range(8):
        keep = keep_mask(w[row, None].abs(), pattern)
        while True:
            later, _, _ = swaps(w[row, None], gram, keep, pattern, n_iter=1, candidates=candidates)
            if torch.equal(later, keep):
                break
            happened = kept_error(w[row, None], later, gram.matrix) - kept_error(w[row, None], keep, gram.matrix)
            assert predicted[-1] == pytest.approx(float(happened[0]), rel=1e-3)
            keep, n_checked = later, n_checked + 1
    assert n_checked > 8


def test_few_candidates_lower_the_error_too_and_all_are_no_worse_at_the_first_swap() -> None:
    w, gram = problem(4, n_out=16, n_in=32, n_tokens=128)
    start = keep_mask(w.abs() * gram.matrix.diagonal().sqrt(), parse_pattern("0.5", "row"))
    before = kept_error(w, start, gram.matrix)
    errors = {}
    for candidates in (1, 4, 32, 64, None):
        first, _, _ = swaps(w, gram, start, parse_pattern("0.5"), n_iter=1, candidates=candidates)
        last, _, _ = swaps(w, gram, start, parse_pattern("0.5"), candidates=candidates)
        errors[candidates] = kept_error(w, first, gram.matrix)
        assert (kept_error(w, last, gram.matrix) <= errors[candidates]).all()
        assert (errors[candidates] <= before).all()
    np.testing.assert_array_equal(errors[32], errors[None])
    np.testing.assert_array_equal(errors[64], errors[None])
    for fewer, more in ((1, 4), (4, 32)):
        assert (errors[more] <= errors[fewer] + 1e-5 * before).all()
        assert errors[more].sum() < errors[fewer].sum()


def test_swaps_find_the_best_of_all_masks_where_one_swap_is_enough() -> None:
    # From a neighbour of the optimum, the best swap leads there or to something as good as any neighbour.
    for seed in range(5):
        w, gram = problem(seed, n_out=1, n_in=8, n_tokens=32)
        masks = []
        for removed in combinations(range(8), 4):
            mask = torch.ones(1, 8, dtype=torch.bool)
            mask[0, list(removed)] = False
            masks.append(mask)
        best = min(masks, key=lambda mask: float(kept_error(w, mask, gram.matrix)[0]))
        assert torch.equal(swaps(w, gram, best, parse_pattern("0.5"), candidates=None)[0], best)
        for mask in masks:
            if int((mask ^ best).sum()) == 2:
                assert torch.equal(swaps(w, gram, mask, parse_pattern("0.5"), n_iter=1, candidates=None)[0], best)


def test_swaps_stop_at_their_limit_and_do_nothing_without_a_choice() -> None:
    w, gram = problem(5)
    start = keep_mask(w.abs(), parse_pattern("0.5", "row"))
    untouched = start.clone()
    assert swaps(w, gram, start, parse_pattern("0.5"), n_iter=1)[1:] == (1, "max_iter")
    zero = swaps(w, gram, start, parse_pattern("0.5"), n_iter=0)
    assert torch.equal(zero[0], start)
    assert zero[1:] == (0, "max_iter")
    for keep in (torch.ones_like(start), torch.zeros_like(start)):
        for text in ("0.5", "2:4"):
            result = swaps(w, gram, keep, parse_pattern(text))
            assert torch.equal(result[0], keep)
            assert result[1:] == (0, "converged")
    assert torch.equal(start, untouched)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_swaps_end_and_do_not_harm_whatever_the_inputs(text: str, candidates: int | None, kind: str) -> None:
    w, gram = weights(6, 6, 16), gram_of(INPUTS[kind](inputs(6, 16, 64)))
    pattern = parse_pattern(text)
    start = keep_mask(w.abs(), pattern)
    keep, n_swaps, status = swaps(w, gram, start, pattern, n_iter=2000, candidates=candidates)
    assert status == "converged"
    before, after = kept_error(w, start, gram.matrix), kept_error(w, keep, gram.matrix)
    assert (after <= before + 1e-5 * (w.square() @ gram.matrix.diagonal()).numpy()).all()
    assert torch.equal(keep.sum(dim=1), start.sum(dim=1))
    if text == "2:4":
        assert_exact(keep, text, "")
    assert (n_swaps == 0) == torch.equal(keep, start)
    assert (kind == "all zero") <= (n_swaps == 0)


# --- DSnoT ---------------------------------------------------------------------------------------------------------


def stats_of(x: torch.Tensor) -> InputStats:
    scatter = (x - x.mean(dim=0)).square().sum(dim=0).float()
    return InputStats(x.square().sum(dim=0).float(), len(x), x.sum(dim=0).float(), scatter=scatter)


def literal_dsnot(
    w: Array,
    x: Array,
    keep: npt.NDArray[np.bool_],
    m: int,
    n_iter: int = 50,
    threshold: float = 0.1,
    length: int = 1,
    importance: tuple[Array, Array] | None = None,
    exponent: float = 1.0,
    gammas: tuple[float, float] = (0.0, 0.0),
    norm: float = 2.0,
    safe: bool = False,
) -> npt.NDArray[np.bool_]:
    """One row and one swap after the other; ``m`` is the group a swap stays in, ``importance`` for grow and prune."""
    mean, variance, rms = x.mean(axis=0), x.var(axis=0), np.sqrt((x**2).mean(axis=0))
    grow_by, prune_by = importance or (np.abs(w), np.abs(w))
    keep = keep.copy()
    for q in range(len(w)):
        c = w[q] * mean * length
        e = c[~keep[q]].sum()
        used: set[int] = set()
        for _ in range(n_iter):
            if abs(e) <= threshold:
                break
            sign = 1 if e > 0 else -1
            grow = sign * np.sign(w[q]) * grow_by[q] * mean / variance + gammas[0] * np.abs(w[q]) ** norm
            prune = prune_by[q] * rms**exponent + gammas[1] * np.abs(w[q]) ** norm
            pruned = [r for r in range(len(c)) if not keep[q, r] and r not in used]
            if not pruned:
                break
            i = max(pruned, key=lambda r: float(grow[r]))
            kept = [r for r in range(len(c)) if keep[q, r] and r not in used and sign * c[r] < 0 and r // m == i // m]
            j = min(kept, key=lambda r: float(prune[r]), default=None)
            if j is None or (safe and abs(e - c[i] + c[j]) >= abs(e)):
                # A group without a partner does not end the row for N:M.
                if m == len(c):
                    break
                used.add(i)
                continue
            keep[q, i], keep[q, j] = True, False
            used |= {i, j}
            e += c[j] - c[i]
    return keep


def dsnot_case(seed: int, text: str = "0.5") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pattern, int]:
    w, x = weights(seed, 10, 24), inputs(seed, 24, 96)
    pattern = parse_pattern(text, None if ":" in text else "row")
    keep = keep_mask(w.abs() * x.square().mean(dim=0).sqrt(), pattern)
    return w, x, keep, pattern, pattern.m if isinstance(pattern, NofM) else 24


def mean_error(w: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> Array:
    """Mean of dense minus sparse output of every row, from the tokens."""
    return np.asarray((x @ (w * ~keep).double().t()).mean(dim=0).numpy())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8", "1:4"])
def test_dsnot_makes_the_swaps_of_a_literal_loop(text: str, safe: bool) -> None:
    n_swapped = 0
    for seed in range(5):
        w, x, keep, pattern, m = dsnot_case(seed, text)
        for n_iter, length in ((1, 1), (3, 1), (50, 1), (50, 64)):
            ours, cycles, status = dsnot(
                w, stats_of(x), keep, pattern, n_iter=n_iter, safe=safe, tokens_per_sequence=length
            )
            expected = literal_dsnot(
                w.double().numpy(), x.numpy(), keep.numpy(), m, n_iter=n_iter, safe=safe, length=length
            )
            np.testing.assert_array_equal(ours.numpy(), expected)
            n_swapped += int((ours & ~keep).sum())
            assert cycles <= n_iter
            assert status == "max_iter" or cycles < n_iter or n_iter < 50
    assert n_swapped > 20


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("reweight", ["none", "grow", "prune", "both"])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (1.0, 2.0)])
def test_r2_dsnot_makes_the_swaps_of_a_literal_loop(text: str, reweight: str, gammas: tuple[float, float]) -> None:
    differs = False
    for seed in range(4):
        w, x, keep, pattern, m = dsnot_case(seed, text)
        size = w.double().abs()
        relative = (size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)).numpy()
        torch.testing.assert_close(torch.from_numpy(relative).float(), relative_importance(w))
        importance = (
            relative if reweight in ("grow", "both") else size.numpy(),
            relative if reweight in ("prune", "both") else size.numpy(),
        )
        ours, _, _ = dsnot(
            w, stats_of(x), keep, pattern, reweight=reweight, exponent=0.5, norm=1.5,
            gamma_grow=gammas[0], gamma_prune=gammas[1],
        )  # fmt: skip
        expected = literal_dsnot(
            w.double().numpy(), x.numpy(), keep.numpy(), m,
            importance=importance, exponent=0.5, norm=1.5, gammas=gammas,
        )  # fmt: skip
        np.testing.assert_array_equal(ours.numpy(), expected)
        differs |= not torch.equal(ours, dsnot(w, stats_of(x), keep, pattern, exponent=0.5)[0])
    assert differs == (reweight != "none" or gammas != (0.0, 0.0))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8"])
def test_every_cycle_keeps_counts_and_moves_the_mean_error(text: str, safe: bool) -> None:
    fell = grew = False
    for seed in range(4):
        w, x, start, pattern, m = dsnot_case(seed, text)
        before = start
        moved = torch.zeros_like(start)
        for n_iter in range(1, 25):
            after, _, _ = dsnot(w, stats_of(x), start, pattern, n_iter=n_iter, safe=safe)
            assert torch.equal(after.reshape(10, -1, m).sum(dim=2), start.reshape(10, -1, m).sum(dim=2))
            restored, removed = after & ~before, before & ~after
            assert int(restored.sum(dim=1).max()) <= 1
            assert torch.equal(restored.sum(dim=1), removed.sum(dim=1))
            # No weight is moved twice.
            assert not (moved & (restored | removed)).any()
            moved |= restored | removed
            e_before, e_after = mean_error(w, x, before), mean_error(w, x, after)
            contribution = w.double().numpy() * x.mean(dim=0).numpy()
            for q in restored.any(dim=1).nonzero().flatten().tolist():
                assert abs(e_before[q]) > 0.1 * (1 - 1e-5)
                i, j = int(restored[q].nonzero()), int(removed[q].nonzero())
                sign = np.sign(e_before[q])
                assert contribution[q, j] * sign < 0
                towards = ~before[q].numpy() & ~moved[q].numpy() & (contribution[q] * sign > 0)
                # For N:M what is restored also needs a partner in its group.
                assert contribution[q, i] * sign > 0 or not towards.any() or ":" in text
                assert e_after[q] == pytest.approx(e_before[q] - contribution[q, i] + contribution[q, j], abs=1e-9)
                fell |= abs(e_after[q]) < abs(e_before[q])
                grew |= abs(e_after[q]) > abs(e_before[q])
                assert abs(e_after[q]) < abs(e_before[q]) or not safe
            before = after
    assert fell
    assert grew != safe


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_rows_within_the_threshold_stay(text: str) -> None:
    w, x, keep, pattern, _ = dsnot_case(1, text)
    size = np.abs(mean_error(w, x, keep))
    threshold = float(np.median(size))
    after, _, _ = dsnot(w, stats_of(x), keep, pattern, threshold=threshold)
    quiet = torch.from_numpy(size <= threshold)
    assert torch.equal(after[quiet], keep[quiet])
    assert (after[~quiet] ^ keep[~quiet]).any()
    result = dsnot(w, stats_of(x), keep, pattern, threshold=float(size.max()) * 1.01)
    assert torch.equal(result[0], keep)
    assert result[1:] == (0, "converged")


def test_dsnot_without_cycles_or_tokens_or_choice_returns_the_mask() -> None:
    w, x, keep, pattern, _ = dsnot_case(2)
    result = dsnot(w, stats_of(x), keep, pattern, n_iter=0)
    assert torch.equal(result[0], keep)
    assert result[1:] == (0, "max_iter")
    nothing = InputStats(torch.zeros(24), 0, torch.zeros(24))
    assert torch.equal(dsnot(w, nothing, keep, pattern)[0], keep)
    for every in (torch.ones_like(keep), torch.zeros_like(keep)):
        for each in (pattern, parse_pattern("2:4")):
            after, _, status = dsnot(w, stats_of(x), every, each)
            assert torch.equal(after, every)
            assert status == "converged"


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_dsnot_leaves_dead_inputs_and_zero_weights_where_they_are(text: str) -> None:
    w, x, _, pattern, _ = dsnot_case(3, text)
    w[:, 5] = 0
    x[:, 11] = 0
    keep = torch.zeros_like(w, dtype=torch.bool)
    keep[:, ::2] = True
    before, original = w.clone(), keep.clone()
    after, _, _ = dsnot(w, stats_of(x), keep, pattern)
    assert torch.equal(after[:, [5, 11]], keep[:, [5, 11]])
    assert not torch.equal(after, keep)
    assert torch.equal(w, before)
    assert torch.equal(keep, original)


def test_the_threshold_of_dsnot_is_that_of_a_sequence_s_sum() -> None:
    w, x, keep, pattern, _ = dsnot_case(4)
    for threshold in (0.0, 0.3, 2.0):
        long, _, _ = dsnot(w, stats_of(x), keep, pattern, threshold=threshold * 32, tokens_per_sequence=32)
        assert torch.equal(long, dsnot(w, stats_of(x), keep, pattern, threshold=threshold)[0])


def test_the_variance_enters_the_choice_of_what_to_restore_only_by_its_power() -> None:
    w, x, keep, pattern, _ = dsnot_case(5)
    louder = x.clone()
    louder[::2] += 3
    louder[1::2] -= 3
    # The same means and other variances: without the power, which then also leaves norms out, nothing changes.
    after = [
        [dsnot(w, stats_of(tokens), keep, pattern, exponent=0, variance_power=power)[0] for tokens in (x, louder)]
        for power in (0.0, 1.0)
    ]
    assert torch.equal(*after[0])
    assert not torch.equal(*after[1])
