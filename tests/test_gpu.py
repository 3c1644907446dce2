"""Solvers on a GPU against the CPU."""

import pytest
import torch

from sparsify.layer import prune_layer
from sparsify.methods import resolve
from sparsify.solvers.quadratic import Gram
from sparsify.stats import InputStats
from sparsify.types import parse_pattern

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")]


def objective(device: str, method: str, changes: dict[str, str | None], pattern: str) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight = torch.randn(96, 128, generator=generator).to(device)
    matrix = (x.T @ x).to(device)
    stats = InputStats(matrix.diagonal().clone(), len(x), gram=matrix)
    plan = resolve(method, changes, {}, grouped=":" in pattern)
    outcome = prune_layer(weight, stats, Gram(matrix, len(x), 0.01), parse_pattern(pattern), plan)
    assert outcome.objective is not None
    return outcome.objective


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
@pytest.mark.parametrize("method", ["sparsegpt", "mrp", "fistapruner", "admm", "alps"])
def test_solvers_reach_the_objective_of_the_cpu(method: str, pattern: str) -> None:
    # Masks may differ where scores nearly tie.
    on_cpu = objective("cpu", method, {}, pattern)
    assert objective(GPU, method, {}, pattern) == pytest.approx(on_cpu, rel=1e-2)


def test_the_optimum_of_a_mask_is_that_of_the_cpu() -> None:
    changes: dict[str, str | None] = {"refit": "exact"}
    on_cpu = objective("cpu", "magnitude", changes, "2:4")
    assert objective(GPU, "magnitude", changes, "2:4") == pytest.approx(on_cpu, rel=1e-4)
