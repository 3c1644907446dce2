"""Large matrices in files: the same bits, no file left, and a full disk is an error of one line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify import offload
from sparsify.errors import OutputError
from sparsify.offload import offloaded, zeros
from sparsify.prune import prune
from sparsify.recipe import Recipe
from tests.test_prune import source, tree


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every matrix counts as large; the folders in which files were made."""
    made: list[Path] = []
    original = torch.from_file

    def from_file(name: str, **options: object) -> torch.Tensor:
        made.append(Path(name).parent)
        return original(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "from_file", from_file)
    monkeypatch.setattr(offload, "LARGE_BYTES", 1)
    return made


def test_matrices_are_zeros_in_files_without_a_name(small: list[Path], tmp_path: Path) -> None:
    assert zeros(3, 5, "cpu").shape == (3, 5)
    assert not small
    with offloaded(tmp_path):
        matrix = zeros(3, 5, "cpu")
        with offloaded(None):
            assert zeros(2, 2, "cpu").sum() == 0
    assert small == [tmp_path, tmp_path]
    assert not list(tmp_path.iterdir())
    assert torch.equal(matrix, torch.zeros(3, 5))
    matrix += 1
    assert matrix.sum() == 15
    zeros(3, 5, "cpu")
    assert len(small) == 2


@pytest.mark.parametrize("method", ["sparsegpt", "fast"])
def test_bits_do_not_depend_on_where_matrices_lie(
    method: str,
    small: list[Path],
    random_models: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With matrices that are wide too, which have others derived from them."""
    monkeypatch.setattr("sparsify.solvers.quadratic.WIDE", 16)
    model, how = source(random_models("llama")), Recipe("2:4", method, calibration=ids_file)
    plain = prune(model, how, tmp_path / "plain")
    assert not small
    out = prune(model, how, tmp_path / "files", offload=True)
    assert tree(out) == tree(plain)
    assert len(small) > 2 * 4
    assert set(small) == {tmp_path / "files.partial"}
    zeros(3, 5, "cpu")
    assert not list(tmp_path.glob("**/matrix.*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_told_of(small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with offloaded(tmp_path), pytest.raises(OutputError, match="the disk is full"):
        zeros(3, 5, "cpu")
    assert not list(tmp_path.iterdir())
