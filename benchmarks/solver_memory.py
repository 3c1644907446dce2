"""Peak memory of every part of a method on one linear, as multiples of its Gram matrix and of its weight.

    OMP_NUM_THREADS=1 python benchmarks/solver_memory.py --out benchmarks/results/solver_memory.json

Each part runs in a process of its own, on one linear after the other; what its resident size grows by at most and
what stays when it is done are fitted by multiples of gram and weight (both float32), and a constant, that are no less
than any measurement. So that small linears tell of large ones, pieces of a fixed size (chunks, panels, batches) are
made smaller in proportion, and the constant is given in units of a chunk, or of MiB for the batches of ``exact``.
``sparsify.budget.working.WORKING`` holds these figures, and ``tests/test_budget.py`` measures again against it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import commit

# Rows and columns: more gram than weight, the reverse, and small, where what is constant shows.
SHAPES = ((384, 1536), (3072, 768), (512, 512))
# Pieces of a fixed size are this many times smaller here.
_SMALLER = 64
# Part -> what is measured of it: ordinary Gram matrices, wide ones (``Gram.wide``), or neither where it has none.
BOTH, NONE = ("narrow", "wide"), ("narrow",)
PARTS = {
    "score=magnitude": NONE,
    "score=wanda": NONE,
    "score=ria": NONE,
    "score=stochria": NONE,
    "score=symwanda": NONE,
    "refine=dsnot": NONE,
    "refine=r2-dsnot": NONE,
    "refine=swaps": BOTH,
    "solver=sparsegpt": BOTH,
    "solver=mrp": BOTH,
    "solver=fista": BOTH,
    "solver=admm": BOTH,
    "solver=alps": BOTH,
    "refit=cg": BOTH,
    "refit=exact": BOTH,
    "aim=residual": BOTH,
    "permute=by solver": BOTH,
    "permute=by score": NONE,
}
# Parts with batches of systems, of a fixed size that is made smaller by less: one system has to fit.
SMALLER_BATCHES = 16
BATCHES = ("solver=mrp", "refit=exact")
# What a fit adds to what was measured.
_MARGIN = 1.05


def run_part(part: str, n_out: int, n_in: int, pattern: str) -> Callable[[], Any]:
    """A call that does what ``part`` does to a linear, and returns what it leaves behind."""
    import torch

    from sparsify.grams import Grams
    from sparsify.layer import prune_layer, pull, salience, target
    from sparsify.methods import Method
    from sparsify.permute import search
    from sparsify.stats import InputStats
    from sparsify.types import parse_pattern

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n_in + 64, n_in, generator=generator)
    gram = tokens.t() @ tokens
    mean = tokens.sum(dim=0)
    # As models store them: where a part needs float32, it makes a copy.
    weight = torch.randn(n_out, n_in, generator=generator).bfloat16()
    kind, _, name = part.partition("=")
    aimed = kind == "aim"
    stats = InputStats(
        gram.diagonal().clone(),
        len(tokens),
        mean,
        gram,
        gram * 0.01 if aimed else None,
        weight.float() * 0.01 if aimed else None,
        gram.diagonal().clone(),
    )
    del tokens
    options: dict[str, Any] = {} if kind == "permute" else {kind: name}
    if kind in ("refine", "refit"):
        options["score"] = "wanda"
    if name == "by score":
        options["score"] = "ria"
    elif kind in ("aim", "permute"):
        options["solver"] = "sparsegpt"
    plan = Method("", "", **options)
    parsed = parse_pattern(pattern)
    grams = Grams(0.01)

    def call() -> Any:
        with torch.inference_mode():
            if kind == "aim":
                return target(weight, grams.of(stats, part), pull(weight, stats, plan)[0]), grams
            if kind == "permute":
                own = grams.of(stats, part) if plan.needs_gram else None
                worth = salience(weight, stats, own, plan)
                if own is not None:
                    own.release()
                return grams.reordered(stats, search(worth, parsed, n_sweeps=2).perm), grams  # type: ignore[arg-type]
            needs = plan.needs_gram
            outcome = prune_layer(weight, stats, grams.of(stats, part) if needs else None, parsed, plan)
            return outcome, grams

    return call


def status_bytes(key: str) -> int:
    """A size of this process in /proc, ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def make_smaller(width: str) -> None:
    """Shrink pieces of a fixed size, and have every Gram matrix count as wide, or none."""
    from sparsify import chunks, memory, permute
    from sparsify.solvers import exact, factor, mrp, quadratic, sparsegpt, swaps

    # Pieces are as far from the size that goes back to the system at once as they really are.
    memory._THRESHOLD_BYTES //= _SMALLER
    memory.return_large_frees()
    chunks.CHUNK_BYTES //= _SMALLER
    factor.PANEL //= 8
    sparsegpt.BLOCK //= 8
    mrp._PANEL //= 8
    assert exact.exact.__kwdefaults__ is not None
    exact.exact.__kwdefaults__["budget"] //= SMALLER_BATCHES
    solved: Any = quadratic
    solved.WIDE = 0 if width == "wide" else 1 << 30
    modules: tuple[Any, ...] = (permute, mrp, swaps)
    for module in modules:
        if hasattr(module, "_BUDGET"):
            module._BUDGET //= _SMALLER


def measure(part: str, n_out: int, n_in: int, pattern: str) -> dict[str, int]:
    """By how much this process grows at most while ``part`` runs, and how much of it is left behind; bytes."""
    from sparsify.memory import return_freed_memory

    # Libraries load code and set buffers up at the first call; the budget counts those once, for all parts.
    run_part(part, n_out, n_in, pattern)()
    call = run_part(part, n_out, n_in, pattern)
    gc.collect()
    return_freed_memory()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    left_behind = call()
    peak = status_bytes("VmHWM") - before
    gc.collect()
    return_freed_memory()
    left = status_bytes("VmRSS") - before
    del left_behind
    return {"peak": peak, "left": max(left, 0)}


def fitted(rows: list[dict[str, Any]], figure: str) -> tuple[float, float, float]:
    """The least multiples of gram, weight and MiB that no measurement is above, with a margin."""
    import numpy as np
    from scipy.optimize import linprog

    sizes = np.array([[4.0 * r["n_in"] ** 2, 4.0 * r["n_in"] * r["n_out"], 2.0**20] for r in rows])
    measured = np.array([r[figure] for r in rows]) * _MARGIN
    # Some have to do with no Gram matrix, and what stays behind has no pieces.
    no_gram = PARTS[rows[0]["part"]] == NONE
    most = [(0, 0 if no_gram else None), (0, None), (0, 0 if figure == "left" else None)]
    found = linprog((sizes / measured.clip(1)[:, None]).sum(axis=0), A_ub=-sizes, b_ub=-measured, bounds=most).x
    gram, weight, mib = (math.ceil(10 * each) / 10 for each in found)
    return gram, weight, mib


def main() -> None:
    """Every part and shape; the table, and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, width, patterns = options.child
        make_smaller(width)
        cases = [(pattern, *shape) for pattern in patterns.split(",") for shape in SHAPES]
        found = [{"pattern": p, "n_out": n_out, "n_in": n_in, **measure(part, n_out, n_in, p)}
                 for p, n_out, n_in in cases]  # fmt: skip
        print(json.dumps(found))
        return
    records: list[dict[str, Any]] = []
    print("| part | width | peak: gram | weight | MiB | left: gram | weight |\n|---|---|--:|--:|--:|--:|--:|")
    table: dict[str, Any] = {}
    for part, width in [(name, width) for name in options.parts for width in PARTS[name]]:
        # Only N:M has anything to gain from another order of inputs.
        patterns = ",".join(p for p in options.patterns if ":" in p or not part.startswith("permute"))
        command = [sys.executable, __file__, "--child", part, width, patterns]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows = [{"part": part, "width": width, **row} for row in json.loads(done.stdout)]
        records += rows
        peak, left = fitted(rows, "peak"), fitted(rows, "left")
        pieces = {"fixed_mib": peak[2] * SMALLER_BATCHES} if part in BATCHES else {"chunks": peak[2]}
        table.setdefault(part, {})[width] = {
            "gram": peak[0], "weight": peak[1], **pieces, "left_gram": left[0], "left_weight": left[1]
        }  # fmt: skip
        print(f"| {part} | {width} | {' | '.join(map(str, (*peak, *left[:2])))} |", flush=True)
    if options.out:
        body = {"commit": commit(), "table": table, "records": records}
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
