"""Whether an interrupted run can be gone on with: its state against the files that it lists."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from sparsify import manifest
from sparsify.cluster.files import entered_of
from sparsify.cluster.job import inputs_of
from sparsify.cluster.plan import run_graph
from sparsify.hidden import file_crc32
from sparsify.recipe import Recipe
from sparsify.types import PrunedLinear


def damage(recipe: Recipe, n_blocks: int, last: int, n_windows: int, folder: Path, state: Any) -> str | None:
    """What is wrong with an interrupted run, or None; raises whatever a malformed record makes Python raise.

    Args:
        recipe: of the run.
        n_blocks: of the model.
        last: block with anything to prune.
        n_windows: of the calibration text.
        folder: where the run's files are.
        state: as it was read.
    """
    if not 1 <= state["threads"] <= 4096:
        return "its number of threads is out of range"
    for text in (state["allocation"] or {}).values():
        if not 0 <= Fraction(text) < 1:
            return "its allocation is out of range"
    for index, block in state["blocks"].items():
        if not index.isdecimal() or int(index) >= n_blocks:
            return f"block {index} is none"
        if Path(block["file"]).name != block["file"] or (folder / block["file"]).stat().st_size != block["bytes"]:
            return f"{block['file']} is truncated"
        for row in block["linears"]:
            PrunedLinear(**row)
    # They are joined into one file at the very end, and then gone.
    parts = (
        []
        if (folder / manifest.PERMUTATIONS).exists()
        else [state["residual"], *(block["orders"] for block in state["blocks"].values())]
    )
    for part in filter(None, parts):
        if Path(part["file"]).name != part["file"] or file_crc32(folder / part["file"]) != part["crc32"]:
            return f"{part['file']} is not what was written"
    for name, crc32 in state["hidden"].items():
        if Path(name).name != name or file_crc32(folder / name) != crc32:
            return f"{name} is not what was written"
    if state["hidden"] or state["blocks"]:
        done, entered = {int(index) for index in state["blocks"]}, entered_of(recipe, state["hidden"], n_windows)
        try:
            run_graph(n_blocks, last, done=done, entered=entered, inputs=inputs_of(recipe), ahead=0)
        except ValueError as error:
            return str(error)
    return None
