"""What it costs a method to see the dense model's hidden states, which lets blocks be pruned at the same time.

    python benchmarks/inputs_accuracy.py --model smollm2-135m --calibration FILE --eval FILE --out FILE

Each method prunes the same model on the same windows twice for every seed: with `--inputs pruned`, where a block sees
what the pruned ones before it put out, and with `--inputs dense`. Perplexity is measured in PyTorch, float32, on the
first windows of `--eval`; its standard error and that of the paired increase (of perplexity, from pruned to dense
inputs) are over those windows. Without `--calibration` and `--eval` both texts are Python's own help, its topics
divided between them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PRUNED, DENSE = "pruned", "dense"
# Name -> for either inputs, the method's other parts. Of those aimed at the residual stream, `fast` is aimed at the
# dense output where blocks see dense inputs, since the stream that enters them has no error.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "wanda": {PRUNED: {}, DENSE: {}},
    "sparsegpt": {PRUNED: {}, DENSE: {}},
    "fast": {PRUNED: {}, DENSE: {"aim": "dense"}},
    "fistapruner": {PRUNED: {}, DENSE: {}},
}


def main() -> None:
    """Run, print a line per figure, and write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--eval", default="pydoc")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--eval-length", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from sparsify.bench.perplexity import Perplexity, paired_increase, perplexity
    from sparsify.data import load_windows
    from sparsify.files import read_json
    from sparsify.manifest import versions
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.source import resolve

    source = resolve(options.model)
    text = load_windows(
        options.eval, source.folder, n_windows=options.eval_windows, length=options.eval_length, split="evaluation"
    )

    def measure(folder: Path) -> Perplexity:
        with TorchSession(folder) as session:
            return perplexity(session, text.ids)

    def figures(found: Perplexity) -> dict[str, Any]:
        return {
            "perplexity": found.perplexity,
            "standard_error": found.standard_error,
            "window_nll": found.window_nll,
        }

    dense = measure(source.folder)
    print(f"dense {dense.perplexity:.3f} +- {dense.standard_error or 0:.3f}", flush=True)
    body: dict[str, Any] = {
        "benchmark": "inputs_accuracy",
        "commit": commit(),
        "versions": versions("torch", "transformers"),
        # Where files lie on this machine is nobody's business.
        "arguments": {
            key: Path(value).name if key in ("model", "calibration", "eval") else value
            for key, value in vars(options).items()
            if key != "out"
        },
        "evaluated_on": {**text.describe(), "source": Path(text.source).name},
        "dense": figures(dense),
        "records": [],
        "paired": [],
    }
    for pattern in options.patterns:
        for method in options.methods:
            increases = []
            for seed in options.seeds:
                found: dict[str, Perplexity] = {}
                for inputs, parts in METHODS[method].items():
                    recipe = Recipe(
                        pattern, method, calibration=options.calibration, windows=options.windows,
                        length=options.length, seed=seed, inputs=inputs, **parts,
                    )  # fmt: skip
                    with tempfile.TemporaryDirectory() as scratch:
                        out = prune(source, recipe, Path(scratch) / "out")
                        found[inputs], run = measure(out), read_json(out / "run.json")
                    row = {"pattern": pattern, "method": method, "inputs": inputs, "aim": recipe.plan.aim, "seed": seed}
                    body["records"].append(
                        {**row, **figures(found[inputs]), "user_cpu_seconds": run["user_cpu_seconds"],
                         "threads": run["threads"]}
                    )  # fmt: skip
                    error = found[inputs].standard_error
                    print(*row.values(), f"{found[inputs].perplexity:.3f} +- {error or 0:.3f}", flush=True)
                before, after = found[PRUNED], found[DENSE]
                increase, error = paired_increase(before.window_nll, after.window_nll, before.window_tokens)
                increases.append(increase)
                body["paired"].append(
                    {"pattern": pattern, "method": method, "seed": seed, "increase": increase, "standard_error": error}
                )
                print(f"{pattern} {method} seed {seed}: dense inputs {increase:+.2%} +- {error or 0:.2%}", flush=True)
                options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            spread = f"{min(increases):+.2%} to {max(increases):+.2%}"
            print(f"{pattern} {method}: median of {len(increases)} seeds {statistics.median(increases):+.2%}, {spread}")


if __name__ == "__main__":
    main()
