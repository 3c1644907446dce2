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
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Our names in the table of the peers' page; a rule that differs is marked, and its deviation means nothing.
ROWS = {
    ("magnitude", "0.5"): ("50 %", "magnitude", "ties differ"),
    ("wanda", "0.5"): ("50 %", "Wanda (per row)", ""),
    ("ria", "0.5"): ("50 %", "RIA (layer-wide, exponent 0.5)", ""),
    ("magnitude", "0.6"): ("60 %", "magnitude", "ties differ"),
    ("wanda", "0.6"): ("60 %", "Wanda", "they round down per row"),
    ("ria", "0.6"): ("60 %", "RIA", ""),
    ("magnitude", "2:4"): ("2:4", "magnitude", "ties differ"),
    ("wanda", "2:4"): ("2:4", "Wanda", ""),
    ("ria", "2:4"): ("2:4", "RIA", ""),
}


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
    parser.add_argument("--only", nargs="*", help="method:pattern with / for the colon of N:M, as in wanda:2/4")
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
        columns = (record["pattern"], record["method"], f"{ours:.3f}", f"{theirs_}", deviation, record["note"])
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
    for (method, pattern), (their_pattern, their_name, note) in ROWS.items():
        if wanted and f"{method}:{pattern.replace(':', '/')}" not in wanted:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            recipe = Recipe(pattern, method, calibration=f"{options.peers}/ids.safetensors:calibration_ids")
            out = prune(source, recipe, Path(scratch) / "out")
            covered = read_manifest(out)["coverage"]
            keep(
                {
                    "pattern": pattern,
                    "method": method,
                    "perplexity": measure(out),
                    "theirs": reference[their_pattern, their_name],
                    "note": note,
                    "rounding": "official" if options.official_rounding else "ours",
                    "threshold": "official" if options.official_threshold else "ours",
                    "sparsity": covered["zeros"] / covered["selected"],
                    "threads": read_json(out / "run.json")["threads"],
                }
            )


def use_official_rounding() -> None:
    """Replace our accumulator and RIA's expression by the official order of operations."""
    import torch

    from sparsify import scores, stats

    class RunningMean(stats.Accumulator):
        def add(self, x: torch.Tensor) -> None:
            tokens = x.reshape(-1, x.shape[-1]).float()
            seen = self.n_tokens // tokens.shape[0]
            mean = (self.sq_norm / max(self.n_tokens, 1)).float() * tokens.shape[0]
            mean = mean * (seen / (seen + 1)) + torch.norm(tokens.t(), p=2, dim=1) ** 2 / (seen + 1)
            self.n_tokens += tokens.shape[0]
            self.sq_norm = mean.double() / tokens.shape[0] * self.n_tokens

    def ria(weight: torch.Tensor, given: stats.InputStats | None, exponent: float | None) -> torch.Tensor:
        assert given is not None
        size, norm = weight.abs(), torch.sqrt(given.sq_norm / given.n_tokens * 512)
        importance = size / size.sum(dim=0) + size / size.sum(dim=1).reshape(-1, 1)
        return importance * norm.reshape(1, -1) ** 0.5

    stats.Accumulator = RunningMean  # type: ignore[misc]
    scores.SCORES["ria"] = ria


def use_official_threshold() -> None:
    """Replace the layer-wide mask by a threshold at the value that the official code sorts out."""
    import torch

    from sparsify import prune
    from sparsify.types import Pattern, Unstructured

    ours = prune.keep_mask

    def keep_mask(score: torch.Tensor, pattern: Pattern, *, default_group: str = "layer") -> torch.Tensor:
        if isinstance(pattern, Unstructured) and default_group == "layer":
            ordered = score.flatten().sort().values
            return score > ordered[int(pattern.sparsity * score.numel())]
        return ours(score, pattern, default_group=default_group)

    prune.keep_mask = keep_mask


if __name__ == "__main__":
    main()
