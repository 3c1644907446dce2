"""Layers that give a solver little to go by, through the whole of pruning, by every method: nothing is silent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.checkpoint import CheckpointReader
from sparsify.methods import METHODS, resolve
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from tests.fakes import Notices

# What needs groups of inputs to reorder is for N:M alone.
UNGROUPED = [name for name, method in METHODS.items() if method.permute == "none"]
DOWN = "model.layers.0.mlp.down_proj"


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Source:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return Source(folder.name, folder, "folder")


def run(source: Source, pattern: str, method: str, ids: str, out: Path) -> tuple[dict[str, Any], str]:
    """The row of block 0's down_proj, and all notices; every weight is finite and no linear has too few zeros."""
    progress = Notices()
    prune(source, Recipe(pattern, method, calibration=ids), out, progress=progress)
    body = manifest.read(out)
    reader = CheckpointReader(out)
    assert all(bool(torch.isfinite(tensor).all()) for _, tensor in reader.read(reader.tensors))
    least = {"0.25": 0.25, "2:4": 0.5}[pattern]
    for row in body["linears"]:
        assert row["zeros"] >= int(least * row["shape"][0] * row["shape"][1])
    found = next(row for row in body["linears"] if row["name"] == DOWN)
    return found, " ".join(progress.texts)


def solves(method: str, *, grouped: bool) -> bool:
    return resolve(method, {}, {}, grouped=grouped).solver != "none"


@pytest.mark.parametrize("method", UNGROUPED)
def test_weights_of_inputs_that_are_always_zero(method: str, llama: Path, ids_file: str, tmp_path: Path) -> None:
    def some(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:20] = 0

    row, notices = run(damage(llama, some), "0.25", method, ids_file, tmp_path / "out")
    if solves(method, grouped=False):
        n_in = row["shape"][1]
        assert row["status"].startswith(f"fallback: inputs that are always 0 lose all weights, 20 of {n_in}")
        assert row["zeros"] >= 20 * row["shape"][0]
        assert f"{DOWN}: fallback: inputs that are always 0 lose all weights, 20 of {n_in}" in notices
    else:
        assert not row["status"].startswith("fallback")
        assert row["zeros"] == row["shape"][0] * row["shape"][1] // 4


@pytest.mark.parametrize("method", UNGROUPED)
def test_a_linear_whose_inputs_are_all_zero_keeps_its_share(
    method: str, llama: Path, ids_file: str, tmp_path: Path
) -> None:
    def all_of_them(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].zero_()

    row, notices = run(damage(llama, all_of_them), "0.25", method, ids_file, tmp_path / "out")
    assert row["zeros"] == row["shape"][0] * row["shape"][1] // 4
    if METHODS[method].needs_data:
        assert row["status"] == "fallback: its inputs are always 0, all counted as equal"
        assert f"{DOWN}: fallback: its inputs are always 0" in notices


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_of_zeros_stays_one(method: str, llama: Path, ids_file: str, tmp_path: Path) -> None:
    def zeros(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight"].zero_()

    row, _ = run(damage(llama, zeros), "2:4", method, ids_file, tmp_path / "out")
    # Aiming at the residual stream of the dense model gives even weights of nothing something to make up for.
    if METHODS[method].aim != "residual":
        assert row["zeros"] == row["shape"][0] * row["shape"][1]


@pytest.mark.parametrize("method", METHODS)
def test_pairs_of_equal_inputs(method: str, llama: Path, ids_file: str, tmp_path: Path) -> None:
    def pairs(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up"):
            weight = tensors[f"model.layers.0.mlp.{part}_proj.weight"]
            weight[1::2] = weight[::2]

    row, _ = run(damage(llama, pairs), "2:4", method, ids_file, tmp_path / "out")
    assert row["zeros"] == row["shape"][0] * row["shape"][1] // 2
    assert row["relative_error"] < 1
