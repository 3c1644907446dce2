"""What each part of `fast` and `best` is worth: perplexity of variants over models, patterns and calibration seeds.

    python benchmarks/ablation.py --model smollm2-135m --calibration TRAIN.txt --eval TEST.txt \
        --patterns 2:4 0.5 --out benchmarks/results/ablation_smollm2.json
    python benchmarks/ablation.py --model DIR --calibration self --eval self --seeds 0 1 2 --out FILE

Every variant prunes the same model with the same windows per seed, drawn from `--calibration`; perplexity is measured
in PyTorch, float32, on the first windows of `--eval` (`self`: sampled from the model itself, with another seed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HALF = {"aim.share": 0.5, "aim.residual_share": 0.5}
# Name -> (method, parts and settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, by group": ("sparsegpt", {"order": "group"}),
    "sparsegpt, aim dense, half": ("sparsegpt", {"order": "group", "aim": "dense", "settings": {"aim.share": 0.5}}),
    "sparsegpt, aim residual, half": ("sparsegpt", {"order": "group", "aim": "residual", "settings": _HALF}),
    "fast": ("fast", {}),
    "admm": ("admm", {}),
    "admm, aim residual, half": ("admm", {"order": "group", "aim": "residual", "settings": _HALF}),
    "alps": ("alps", {}),
    "alps, by group": ("alps", {"order": "group"}),
    "alps, aim dense": ("alps", {"order": "group", "aim": "dense"}),
    "alps, aim dense, half": ("alps", {"order": "group", "aim": "dense", "settings": {"aim.share": 0.5}}),
    "alps, aim residual": ("alps", {"order": "group", "aim": "residual"}),
    "alps, aim residual, half": ("alps", {"order": "group", "aim": "residual", "settings": _HALF}),
    "alps, inputs folded": ("alps", {"permute": "fold"}),
    "alps, stream ordered": ("alps", {"permute": "residual"}),
    "alps, owl": ("alps", {"allocate": "owl"}),
    "alps, error allocated": ("alps", {"allocate": "error"}),
    "best": ("best", {}),
    "best, by block": ("best", {"order": "block"}),
    "best, solved by admm": ("best", {"solver": "admm"}),
    "best, solved by alps": ("best", {"solver": "alps"}),  # shortened, as for a sparsity
    "best, solved by alps to the end": (
        "best",
        {"solver": "alps", "settings": {"alps.penalty": 0.1, "alps.iterations": 300}},
    ),
    "best, stream ordered": ("best", {"permute": "residual"}),
    "best, owl": ("best", {"allocate": "owl"}),
    "best, refit": ("best", {"refit": "cg", "settings": {"refit.iterations": 10}}),
    **{
        f"best, aims {share:g}": ("best", {"settings": {"aim.share": share, "aim.residual_share": share}})
        for share in (0.2, 0.35, 0.7, 1.0)
    },
    "best, damping 0.1": ("best", {"settings": {"damping": 0.1}}),
    "wanda": ("wanda", {}),
    "dsnot": ("dsnot", {}),
    "dsnot, safe": ("dsnot", {"settings": {"dsnot.safe": True}}),
    "r2-dsnot": ("r2-dsnot", {}),
    **{
        f"r2-dsnot, {'safe' if safe else 'unsafe'}, {where}": (
            "r2-dsnot",
            {"settings": {"dsnot.safe": safe, "r2.reweight": where}},
        )
        for safe in (True, False)
        for where in ("grow", "prune", "both")
    },
}


def main() -> None:
    """Run, print a line per figure, and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--patterns", nargs="*", default=["2:4", "0.5", "0.6"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--include", nargs="*", default=[], help="globs of linears to prune, where the model is large")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="variants by name")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from sparsify.bench.perplexity import perplexity
    from sparsify.data import load_windows
    from sparsify.errors import UsageError
    from sparsify.files import read_json
    from sparsify.manifest import versions
    from sparsify.methods import Method
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.source import resolve

    source, version = resolve(options.model), commit()
    ids = load_windows(
        options.eval,
        source.folder,
        n_windows=options.eval_windows,
        length=options.eval_length,
        split="evaluation",
        seed=1000,
    ).ids

    def measure(folder: Path) -> float:
        with TorchSession(folder) as session:
            return perplexity(session, ids).perplexity

    records: list[dict[str, Any]] = [{"variant": "dense", "perplexity": measure(source.folder)}]
    print(json.dumps(records[-1]), flush=True)
    for pattern in options.patterns:
        measured: list[Method] = []
        for name, (method, changes) in VARIANTS.items():
            if options.only and name not in options.only:
                continue
            figures: list[float] = []
            for seed in options.seeds:
                try:
                    recipe = Recipe(
                        pattern,
                        method,
                        calibration=options.calibration,
                        windows=options.windows,
                        length=options.length,
                        seed=seed,
                        include=tuple(options.include),
                        **changes,
                    )
                except UsageError:
                    continue  # a part that the pattern has no use for
                plan = replace(recipe.plan, summary="", cost="", paper="")
                if not figures and plan in measured:
                    break  # the same under another name
                measured.append(plan)
                with tempfile.TemporaryDirectory() as scratch:
                    out = prune(source, recipe, Path(scratch) / "out")
                    figures.append(measure(out))
                    run = read_json(out / "run.json")
                records.append(
                    {
                        "variant": name,
                        "pattern": pattern,
                        "seed": seed,
                        "perplexity": figures[-1],
                        "user_cpu_seconds": run["user_cpu_seconds"],
                    }
                )
            if figures:
                spread = f"{min(figures):.3f} to {max(figures):.3f}"
                print(f"| {pattern} | {name} | {statistics.mean(figures):.3f} | {spread} |", flush=True)
                body = {
                    "commit": version,
                    "versions": versions("torch", "transformers"),
                    # Where files lie on this machine is nobody's business.
                    "model": Path(source.name).name,
                    "options": {
                        key: Path(value).name if key in ("calibration", "eval") else value
                        for key, value in vars(options).items()
                        if key not in ("out", "model")
                    },
                    "records": records,
                }
                options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
