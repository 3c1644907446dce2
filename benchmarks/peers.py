"""Our perplexities beside those of other implementations, on the same model, ids and windows.

    python benchmarks/peers.py --peers ../shared/peers --out benchmarks/results/peers.json

`--peers` holds `ids.safetensors` (calibration and evaluation ids) and `README.md`, whose table of other
implementations is read, not copied. Each run prunes the embedded model by one method and pattern in this process and
measures its perplexity in PyTorch, float32.

`--official-rounding` computes in the order of the official implementations: the input norms as a float32 mean updated
after each window (ours is a float64 sum), and RIA's product in their order of operations. Mathematically nothing
changes, so a deviation that this removes was rounding, carried from block to block. `--official-threshold` adds their
layer-wide threshold, which removes one weight of a layer more. Nothing but this script has those switches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Row:
    """One figure: a recipe of ours, and the row of the peers' page it stands beside (none: ours alone)."""

    method: str
    pattern: str
    peer: str = ""
    note: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As given to ``--only``."""
        changes = {key: value for key, value in self.changes.items() if key != "settings"}
        parts = [f"{key}={value}" for key, value in {**changes, **self.changes.get("settings", {})}.items()]
        return ":".join([self.method, self.pattern.replace(":", "/"), *parts])


# DSnoT's official code leaves the MLP's masks alone by default.
_DSNOT = {"settings": {"dsnot.skip": "*.mlp.*"}}
_FOLD = {"permute": "fold"}
_SAFE = {"dsnot.safe": True}
ROWS = [
    Row("magnitude", "0.5", "magnitude", "ties differ"),
    Row("wanda", "0.5", "Wanda (per row)"),
    Row("ria", "0.5", "RIA (layer-wide, exponent 0.5)"),
    Row("sparsegpt", "0.5", "SparseGPT"),
    Row("dsnot", "0.5", "DSnoT from Wanda", "MLP skipped as there", _DSNOT),
    Row("admm", "0.5", "ADMM (Boža)", "our schedule is gradual"),
    Row("alps", "0.5", "ALPS"),
    Row("magnitude", "0.6", "magnitude", "ties differ"),
    Row("wanda", "0.6", "Wanda"),
    Row("ria", "0.6", "RIA"),
    Row("sparsegpt", "0.6", "SparseGPT"),
    Row("dsnot", "0.6", "DSnoT from Wanda", "MLP skipped as there", _DSNOT),
    Row("admm", "0.6", "ADMM (Boža)", "our schedule is gradual"),
    Row("alps", "0.6", "ALPS"),
    Row("magnitude", "2:4", "magnitude", "ties differ"),
    Row("wanda", "2:4", "Wanda"),
    Row("ria", "2:4", "RIA"),
    Row("sparsegpt", "2:4", "SparseGPT"),
    Row("dsnot", "2:4", "DSnoT from Wanda", "MLP skipped as there", _DSNOT),
    Row("admm", "2:4", "ADMM (Boža)"),
    Row("alps", "2:4", "ALPS"),
    Row("ria", "2:4", "RIA + permutation, one per linear, simulated, fast mode", "", {"permute": "simulate"}),
    Row("ria-cp", "2:4"),
    Row("ria", "2:4", changes={"permute": "gather"}),
    Row("r2-dsnot", "2:4"),
    Row("r2-dsnot", "0.6"),
    Row("r2-dsnot", "2:4", changes={"settings": {"r2.reweight": "grow"}}),
    Row("r2-dsnot", "2:4", changes={"settings": _SAFE | {"r2.reweight": "grow"}}),
    Row("dsnot", "2:4"),
    Row("dsnot", "0.6"),
    Row("dsnot", "2:4", changes={"settings": _SAFE}),
    Row("dsnot", "0.6", changes={"settings": _SAFE}),
    Row("stochria", "2:4"),
    Row("symwanda", "2:4"),
    Row("mrp", "2:4"),
    Row("mrp", "0.5"),
    Row("mrp", "0.6"),
    Row("fistapruner", "2:4"),
    Row("fistapruner", "0.5"),
    Row("sparsegpt", "2:4", changes={"inputs": "dense"}),
    Row("sparsegpt", "2:4", changes={"inputs": "dense", "order": "group", "aim": "dense"}),
    Row("sparsegpt", "0.5", changes={"inputs": "dense"}),
    Row("fast", "2:4"),
    Row("fast", "0.5"),
    Row("fast", "0.6"),
    Row("best", "2:4"),
    Row("best", "0.5"),
    Row("best", "0.6"),
    Row("best", "2:4", changes={"solver": "alps"}),
    Row("best", "2:4", changes={"permute": "residual"}),
    Row("best", "0.5", changes={"solver": "admm"}),
    Row("best", "0.5", changes={"settings": {"alps.penalty": 0.4, "alps.iterations": 18}}),
]
_THEIR_PATTERN = {"0.5": "50 %", "0.6": "60 %", "2:4": "2:4"}


def theirs(readme: Path) -> dict[tuple[str, str], float]:
    """(pattern, implementation) -> perplexity, from the page's table."""
    found = {}
    for line in readme.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 7 and re.fullmatch(r"[\d.]+", cells[2]):
            found[cells[0], cells[1]] = float(cells[2])
    return found


def main() -> None:
    """Run, print the table as it grows, and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--official-rounding", action="store_true")
    parser.add_argument("--official-threshold", action="store_true")
    parser.add_argument("--only", nargs="*", help="rows by name, as in wanda:2/4 or ria:2/4:permute=gather")
    parser.add_argument("--keep", type=Path, help="folder for the pruned models, which are otherwise deleted")
    parser.add_argument("--text", type=Path, help="calibrate on this text instead, drawn with each of --seeds")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    reference = theirs(options.peers / "README.md")

    import numpy as np
    from safetensors.numpy import load_file

    from sparsify.bench.perplexity import perplexity
    from sparsify.files import read_json
    from sparsify.manifest import read as read_manifest
    from sparsify.manifest import versions
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.source import resolve

    if options.official_rounding:
        use_official_rounding()
    if options.official_threshold:
        use_official_threshold()
    ids = load_file(options.peers / "ids.safetensors")
    windows = ids["evaluation_ids"].astype(np.int64)
    source = resolve("smollm2-135m")
    version = commit()
    records: list[dict[str, Any]] = []

    def measure(folder: Path) -> float:
        with TorchSession(folder) as session:
            return perplexity(session, windows).perplexity

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        theirs_, ours = record["theirs"], record["perplexity"]
        deviation = f"{ours / theirs_ - 1:+.2%}" if theirs_ else ""
        changes = " ".join(f"{key}={value}" for key, value in record.get("changes", {}).items())
        name = f"{record['method']} {changes}".rstrip()
        columns = (record["pattern"], name, f"{ours:.3f}", f"{theirs_ or ''}", deviation, record["note"])
        print("| " + " | ".join(map(str, columns)) + " |", flush=True)
        body = {
            "commit": version,
            "versions": versions("torch", "transformers"),
            "windows": list(windows.shape),
            "records": records,
        }
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    print("| pattern | method | ours | theirs | deviation | |\n|---|---|--:|--:|--:|---|", flush=True)
    wanted = set(options.only or ())
    if not wanted:
        note = {"note": ""}
        their_dense = reference["\N{EN DASH}", "dense"]
        keep({"pattern": "", "method": "dense", "perplexity": measure(source.folder), "theirs": their_dense} | note)
    unknown = wanted - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {sorted(unknown)[0]}; rows: {', '.join(row.name for row in ROWS)}")
    draws: list[tuple[str, int]] = [(f"{options.peers}/ids.safetensors:calibration_ids", 0)]
    if options.text:
        draws = [(str(options.text), seed) for seed in options.seeds]
    for row in ROWS:
        if wanted and row.name not in wanted:
            continue
        for calibration, seed in draws:
            with tempfile.TemporaryDirectory() as scratch:
                recipe = Recipe(row.pattern, row.method, calibration=calibration, seed=seed, **row.changes)
                kept = options.keep / f"{row.name.replace('/', '_')}-{seed}" if options.keep else None
                out = prune(source, recipe, kept or Path(scratch) / "out")
                body, run = read_manifest(out), read_json(out / "run.json")
                keep(
                    {
                        "pattern": row.pattern,
                        "method": row.method,
                        "changes": row.changes,
                        "perplexity": measure(out),
                        "theirs": reference[_THEIR_PATTERN[row.pattern], row.peer] if row.peer else None,
                        "note": row.note,
                        "calibration": Path(calibration).name,
                        "seed": seed,
                        "rounding": "official" if options.official_rounding else "ours",
                        "threshold": "official" if options.official_threshold else "ours",
                        "sparsity": body["coverage"]["zeros"] / body["coverage"]["selected"],
                        "relative_error": sum(r["relative_error"] for r in body["linears"]) / len(body["linears"]),
                        "statuses": dict(Counter(r["status"] for r in body["linears"])),
                        "threads": run["threads"],
                        "user_cpu_seconds": run["user_cpu_seconds"],
                        "peak_memory_bytes": run["peak_memory_bytes"],
                    }
                )


def use_official_rounding() -> None:
    """Replace our accumulator and RIA's expression by the official order of operations."""
    import torch

    from sparsify import scores, stats, sums, watch

    class RunningMean(sums.Accumulator):
        def add(self, x: torch.Tensor, dense: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> None:
            before, seen = self._sq_norm + self._part_sq_norm, self.n_tokens
            super().add(x, dense, shift)
            tokens = x.reshape(-1, x.shape[-1]).float()
            seen //= tokens.shape[0]
            mean = (before / max(seen, 1)).float()
            mean = mean * (seen / (seen + 1)) + torch.norm(tokens.t(), p=2, dim=1) ** 2 / (seen + 1)
            self._part_sq_norm = mean.double() * (seen + 1) - self._sq_norm

    def ria(weight: torch.Tensor, given: stats.InputStats | None, plan: Any, seed: int) -> torch.Tensor:
        assert given is not None
        size, norm = weight.abs(), torch.sqrt(given.sq_norm / given.n_tokens * 512)
        importance = size / size.sum(dim=0) + size / size.sum(dim=1).reshape(-1, 1)
        return importance * norm.reshape(1, -1) ** 0.5

    replaced: Any = watch
    replaced.Accumulator = RunningMean
    scores.SCORES["ria"] = ria


def use_official_threshold() -> None:
    """Replace the layer-wide mask by a threshold at the value that the official code sorts out."""
    import torch

    from sparsify import layer
    from sparsify.types import Pattern, Unstructured

    replaced: Any = layer
    ours = replaced.keep_mask

    def keep_mask(score: torch.Tensor, pattern: Pattern, *, default_group: str = "layer") -> torch.Tensor:
        if isinstance(pattern, Unstructured) and default_group == "layer":
            ordered = score.flatten().sort().values
            return score > ordered[int(pattern.sparsity * score.numel())]
        kept: torch.Tensor = ours(score, pattern, default_group=default_group)
        return kept

    replaced.keep_mask = keep_mask


if __name__ == "__main__":
    main()
