"""A process that measures by how much its resident memory grows while solvers work; run by test_solver_memory.py.

Arguments: rows and columns of the weight, pattern. Prints a JSON object: solver -> bytes at the peak, beyond Gram
matrix, weight and start. Pieces of a fixed size are made small, so that what remains are multiples of the matrices.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsify import chunks, memory
from sparsify.masks import keep_mask
from sparsify.solvers import factor, mrp, quadratic, swaps
from sparsify.solvers.admm import admm
from sparsify.solvers.alps import alps
from sparsify.solvers.dsnot import dsnot
from sparsify.solvers.exact import exact
from sparsify.solvers.fista import fista
from sparsify.solvers.quadratic import Gram, relative_error
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.solvers.targets import correction, retarget_
from sparsify.stats import InputStats
from sparsify.types import parse_pattern


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def main(n_out: int, n_in: int, text: str) -> None:
    torch.set_num_threads(1)
    # Masks and chunks are small here, and what they leave in the heap would count.
    memory._THRESHOLD_BYTES = 1 << 16
    memory.return_large_frees()
    pattern = parse_pattern(text)
    generator = torch.Generator().manual_seed(0)

    def problem(n_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(width + 64, width, generator=generator)
        weight = torch.randn(n_rows, width, generator=generator)
        return x.t() @ x, weight, keep_mask(weight.abs(), pattern)

    def stats_of(w: torch.Tensor) -> InputStats:
        one = torch.ones(w.shape[1])
        return InputStats(one, 9, one, scatter=one)

    def cases(matrix: torch.Tensor, w: torch.Tensor, keep: torch.Tensor) -> dict[str, Callable[[], object]]:
        def gram() -> Gram:
            return Gram(matrix, 9)

        return {
            "keep_mask": lambda: keep_mask(w, pattern),
            "sparsegpt": lambda: sparsegpt(w, gram(), pattern),
            "admm": lambda: admm(w, gram(), pattern, n_iter=3),
            "alps": lambda: alps(w, gram(), pattern, n_iter=4),
            "fista": lambda: fista(w, gram(), pattern, w, n_iter=2, patience=1),
            "mrp": lambda: mrp.mrp(w, gram(), pattern, free="right", variant="SM"),
            "refit": lambda: refit(w, gram(), keep, start=w, n_iter=2),
            "exact": lambda: exact(w, gram(), torch.arange(w.shape[1]).expand_as(w) < 16, budget=1 << 18),
            "swaps": lambda: swaps.swaps(w, gram(), keep, pattern, n_iter=2),
            "dsnot": lambda: dsnot(w, stats_of(w), keep, pattern, n_iter=2, reweight="both"),
            "permuted": lambda: gram().permuted(torch.arange(w.shape[1]).flip(0), in_place=True),
            "retarget": lambda: retarget_(w, gram(), correction(w, matrix, 0.5)),
            "relative_error": lambda: relative_error(w, w, matrix),
        }

    # What libraries load or set up at the first call is not counted.
    solved: Any = quadratic
    solved.WIDE, factor.PANEL, chunks.CHUNK_BYTES, chunks._LEAST = 0, 32, 1 << 18, 8
    mrp._BUDGET = swaps._BUDGET = 1 << 18
    for call in cases(*problem(64, 128)).values():
        call()
    peaks = {}
    for name, call in cases(*problem(n_out, n_in)).items():
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        call()
        peaks[name] = memory.peak_memory_bytes() - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
