"""Orders of inputs on disk: damaged, of an interrupted run, exported."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from sparsify import manifest
from sparsify.checkpoint import read_permutations, write_permutations
from sparsify.errors import OutputError
from sparsify.pipeline import export
from sparsify.recipe import Recipe
from sparsify.verify import verify
from tests.conftest import interrupt
from tests.coupled import difference, logits, open_model, orders_in, run


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in manifest.ABOUT_RUN}


@pytest.fixture(scope="module")
def simulated(random_models: Callable[[str], Path], ids_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama pruned with recorded orders; not to be written to."""
    recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)
    return run(random_models("llama"), recipe, tmp_path_factory.mktemp("simulated") / "out")


def broken_orders(damage: str, file: Path) -> bytes | None:
    """What ``file`` holds after ``damage``; None if it is gone."""
    orders = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    perm = orders[name]
    if damage == "missing":
        return None
    if damage == "truncated":
        return file.read_bytes()[:-20]
    if damage in ("empty", "garbage"):
        return b"" if damage == "empty" else b"no orders" * 30
    if damage == "dtype of another kind":
        header = json.dumps({name: {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}).encode()
        return struct.pack("<Q", len(header)) + header + bytes(16)
    orders[name] = {
        "int64": perm.long(),
        "floats": perm.float(),
        "twice": perm.clone().index_fill_(0, torch.tensor([0]), int(perm[1])),
        "out of range": perm + 1,
        "negative": perm - 32,
        "short": torch.arange(28, dtype=torch.int32),
        "nothing": torch.arange(0, dtype=torch.int32),
        "two dimensions": perm[None],
        "another": perm.roll(3),
        "left out": perm,
    }[damage]
    if damage == "left out":
        del orders[name]
    return save(orders)


DAMAGES = [
    "missing", "truncated", "empty", "garbage", "int64", "floats", "twice", "out of range", "negative", "short",
    "nothing", "two dimensions", "another", "left out", "dtype of another kind",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orders_are_a_problem_and_no_traceback(damage: str, simulated: Path, tmp_path: Path) -> None:
    assert verify(simulated)[1] == []
    out = Path(shutil.copytree(simulated, tmp_path / "out"))
    file = out / manifest.PERMUTATIONS
    content = broken_orders(damage, file)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    [problem] = verify(out)[1]
    assert problem.startswith(manifest.PERMUTATIONS)
    # And where the manifest was written over the damage, so that hashes fit.
    manifest.write(out, {key: value for key, value in manifest.read(out).items() if key not in ("format", "files")})
    [problem] = verify(out)[1]
    assert manifest.PERMUTATIONS in problem or (damage == "another" and "do not form the pattern" in problem)


@pytest.mark.parametrize("mode", ["fold", "residual", "simulate"])
def test_an_interrupted_run_keeps_its_orders(
    mode: str,
    random_models: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
    whole = run(random_models("llama"), recipe, tmp_path / "whole")
    interrupt(monkeypatch, "sparsify.block.prune_layer", after=7 + 4)
    with pytest.raises(KeyboardInterrupt):
        run(random_models("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    out = run(random_models("llama"), recipe, tmp_path / "out")
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == 1
    assert {name.split(".")[2] for name in orders_in(out) if name != "residual"} == {"0", "1"}
    assert tree(out) == tree(whole)
    assert not [path.name for path in out.iterdir() if path.name.startswith("orders")]


def test_interrupted_while_orders_are_joined_none_is_lost(
    random_models: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    simulated: Path,
) -> None:
    recipe = Recipe("2:4", "ria", permute="simulate", calibration=ids_file)

    def joined(file: Path, missing_ok: bool = False) -> bool:
        return file.name.startswith("orders") and file.suffix != ".tmp"

    interrupt(monkeypatch, "pathlib.Path.unlink", after=1, when=joined)
    with pytest.raises(KeyboardInterrupt):
        run(random_models("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    assert tree(run(random_models("llama"), recipe, tmp_path / "out")) == tree(simulated)


@pytest.mark.parametrize(
    ("mode", "damage"),
    [
        ("simulate", "missing"),
        ("simulate", "another"),
        ("residual", "another"),
    ],
)
def test_damaged_orders_of_an_interrupted_run_are_noticed(
    mode: str,
    damage: str,
    random_models: Callable[[str], Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe("2:4", "ria", permute=mode, calibration=ids_file)
    interrupt(monkeypatch, "sparsify.block.prune_layer", after=7)
    with pytest.raises(KeyboardInterrupt):
        run(random_models("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    [file] = (tmp_path / "out.partial").glob("orders.residual" if mode == "residual" else "orders.*")
    orders = read_permutations(file)
    file.unlink()
    if damage == "another":
        write_permutations(file, {name: perm.roll(1) for name, perm in orders.items()})
    with pytest.raises(OutputError, match="--overwrite"):
        run(random_models("llama"), recipe, tmp_path / "out")


def test_exported_to_hf_the_orders_go_along_and_pruned_again_they_do_not(
    simulated: Path, ids_file: str, tmp_path: Path
) -> None:
    body = export(simulated, "hf", tmp_path / "hf")
    assert body["files"].keys() >= {manifest.PERMUTATIONS, "model.safetensors"}
    assert (tmp_path / "hf" / manifest.PERMUTATIONS).read_bytes() == (simulated / manifest.PERMUTATIONS).read_bytes()
    assert verify(tmp_path / "hf")[1] == []
    assert difference(logits(open_model(tmp_path / "hf")), logits(open_model(simulated))) == 0
    again = run(tmp_path / "hf", Recipe("2:4", "ria", calibration=ids_file), tmp_path / "again")
    assert not (again / manifest.PERMUTATIONS).exists()
    assert verify(again)[1] == []
