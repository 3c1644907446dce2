"""What ADMM, ALPS and FISTAPruner share: counts, symmetries, odd inputs, nearness to the best of all masks."""

from itertools import combinations

import numpy as np
import pytest
import torch

from sparsify.solvers.admm import admm
from sparsify.solvers.alps import alps
from sparsify.solvers.fista import fista
from sparsify.solvers.quadratic import Gram, Solution
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.types import NofM, Pattern, parse_pattern
from tests.problems import (
    DIRECT,
    INPUT_KINDS,
    Solver,
    activations,
    assert_exact,
    each_pattern,
    error,
    gram_of,
    layer_problem,
    on_mask,
    pattern_of,
    rounded,
    weights,
)

SOLVERS: dict[str, Solver] = {
    "admm": admm,
    "alps": alps,
    "fista": lambda w, g, p: fista(w, g, p, sparsegpt(w, g, p).weight),
}


def _fista_from_rounded(w: torch.Tensor, g: Gram, p: Pattern) -> Solution:
    return fista(w, g, p, rounded(w, g, p, True))


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_counts_are_exact_and_weights_finite_whatever_the_inputs(solver: str, kind: str, text: str, group: str) -> None:
    for n_out in (6, 1):
        w, x = weights(n_out, n_out, 16), INPUT_KINDS[kind](activations(3, 16, 64))
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
    w, gram = layer_problem(0, n_in=1)
    solution = SOLVERS[solver](w, gram, pattern_of("0.5", group))
    assert_exact(solution.keep, "0.5", group)
    # One input: least squares on it is the dense weight.
    torch.testing.assert_close(solution.weight, w * solution.keep, rtol=2e-3, atol=0)
    w, gram = layer_problem(0)
    torch.testing.assert_close(SOLVERS[solver](w, gram, pattern_of("0", group)).weight, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_the_weights_are_not_changed_in_place(solver: str, text: str, group: str) -> None:
    w, gram = layer_problem(0)
    before, matrix = w.clone(), gram.matrix.clone()
    SOLVERS[solver](w, gram, pattern_of(text, group))
    assert torch.equal(w, before)
    assert torch.equal(gram.matrix, matrix)


@pytest.mark.parametrize("solver", ["admm", "alps"])
@each_pattern
def test_the_mean_over_correlated_problems_is_better_than_sparsegpt(solver: str, text: str, group: str) -> None:
    pattern, ratios = pattern_of(text, group), []
    for seed in range(12):
        w, gram = layer_problem(seed, n_out=12, n_in=32, n_tokens=128)
        before = error(w, sparsegpt(w, gram, pattern).weight, gram.damped)
        ratios.append(error(w, SOLVERS[solver](w, gram, pattern).weight, gram.damped) / before)
    assert np.mean(ratios) < 0.95


@pytest.mark.parametrize("solver", SOLVERS)
@each_pattern
def test_the_scale_of_an_input_changes_nothing_but_its_weights(solver: str, text: str, group: str) -> None:
    pattern = pattern_of(text, group)
    solve: Solver = {**SOLVERS, "fista": _fista_from_rounded}[solver]
    w, gram = layer_problem(6, damping=0.0)
    # Powers of two, so that not even rounding differs.
    a = 2.0 ** torch.randint(-2, 3, (16,), generator=torch.Generator().manual_seed(0))
    solution = solve(w, gram, pattern)
    scaled = solve(w * a, Gram(gram.matrix / a / a[:, None], gram.n_tokens, 0.0), pattern)
    assert torch.equal(scaled.keep, solution.keep)
    torch.testing.assert_close(scaled.weight, solution.weight * a, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", [*SOLVERS, *DIRECT])
@pytest.mark.parametrize("faint", [1e-2, 1e-3, 1e-4, 1e-8])
def test_a_faint_echo_of_a_loud_input_gets_no_weight_without_bounds(solver: str, faint: float) -> None:
    w, x = weights(0, 8, 16), activations(0, 16, 64)
    # Undamped, an echo could stand in for a removed input with weights of 1 / faint; N:M keeps half of the echoes.
    x[:, 8:] = faint * x[:, :8]
    gram, pattern = gram_of(x), NofM(2, 4)
    found = (SOLVERS | DIRECT)[solver](w, gram, pattern).weight
    assert float(found.abs().max()) < (160 if solver == "admm" else 10) * float(w.abs().max())


@pytest.mark.parametrize("solver", ["admm", "alps"])
@pytest.mark.parametrize("group", ["layer", "row"])
def test_permuted_inputs_and_rows_permute_the_result(solver: str, group: str) -> None:
    for seed in range(3):
        w, gram = layer_problem(seed)
        columns = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        solution = SOLVERS[solver](w, gram, pattern_of("0.5", group))
        permuted = SOLVERS[solver](w[rows][:, columns], gram.permuted(columns), pattern_of("0.5", group))
        assert torch.equal(permuted.keep, solution.keep[rows][:, columns])
        torch.testing.assert_close(permuted.weight, solution.weight[rows][:, columns], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_group_is_used_where_the_pattern_leaves_it_open(solver: str) -> None:
    w, gram = layer_problem(0)
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
        w, gram = layer_problem(seed, n_out=16, n_in=8)
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


@pytest.mark.parametrize("solver", ["admm", "alps"])
def test_one_of_two_equal_inputs_takes_over_the_weight_of_both(solver: str) -> None:
    w, x = weights(0, 6, 16), activations(0, 8, 64)
    gram = gram_of(x[:, torch.arange(16) // 2], damping=1e-6)
    solution = SOLVERS[solver](w, gram, NofM(1, 2))
    ends = refit(w, gram, solution.keep, start=solution.weight, n_iter=200).weight
    torch.testing.assert_close(ends.reshape(6, 8, 2).sum(dim=2), w.reshape(6, 8, 2).sum(dim=2), rtol=1e-2, atol=1e-2)
    share = {"admm": 0.05, "alps": 1e-4}[solver]
    assert error(w, solution.weight, gram.matrix) < share * error(w, w * solution.keep, gram.matrix)
