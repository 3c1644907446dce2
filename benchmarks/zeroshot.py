"""Zero-shot accuracy of models side by side, and our scoring beside lm-eval's.

    python benchmarks/zeroshot.py --data DIR --limit 1000 --out FILE dense=smollm2-135m alps=OUT best=OUT
    python benchmarks/zeroshot.py --data DIR --limit 40 --out FILE --python ENV/bin/python dense=smollm2-135m

`--data` holds lambada_test.jsonl, hellaswag.validation.jsonl.gz and arc_easy.test.jsonl.gz. All models answer the same
first `--limit` questions of each, in float32; differences to the last model are paired, question by question. With
`--python`, an environment that has lm-eval, its accuracies and its log-likelihood of every choice are compared with
ours, and a disagreement is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Nats by which our log-likelihood of a choice may differ from lm-eval's: rounding, of float32 logits in another order.
_TOLERANCE = 2e-3


def main() -> None:
    """Ask every model, print and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()

    import numpy as np
    from transformers import AutoConfig, AutoTokenizer

    from sparsify.bench import zeroshot
    from sparsify.manifest import versions
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.source import resolve

    questions = {
        "lambada": zeroshot.lambada(options.data / "lambada_test.jsonl"),
        "hellaswag": zeroshot.hellaswag(options.data / "hellaswag.validation.jsonl.gz"),
        "arc_easy": zeroshot.multiple_choice(options.data / "arc_easy.test.jsonl.gz"),
    }
    records: list[dict[str, Any]] = []
    hits: dict[tuple[str, str], Any] = {}
    for entry in options.models:
        name, _, model = entry.partition("=")
        folder = resolve(model).folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        length = AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
        theirs = _lm_eval(options.python, folder, options) if options.python else None
        with TorchSession(folder) as session:
            for task, asked in questions.items():
                found = zeroshot.accuracy(session, encode, asked[: options.limit], context_length=length)
                record = {
                    "model": name,
                    "task": task,
                    "n": found.n,
                    "acc": found.acc,
                    "acc_stderr": found.acc_stderr,
                    "acc_norm": found.acc_norm,
                    "acc_norm_stderr": found.acc_norm_stderr,
                }
                hits[name, task] = np.array(found.hits)
                if theirs is not None:
                    record |= _compare(found, theirs[task])
                    record["lm_eval"] = theirs["version"]
                records.append(record)
                print(json.dumps(record), flush=True)
    last = options.models[-1].partition("=")[0]
    paired = []
    for name, task in hits:
        if name != last:
            difference = hits[last, task].astype(float) - hits[name, task].astype(float)
            stderr = float(difference.std(ddof=1) / len(difference) ** 0.5)
            paired.append(
                {"task": task, "model": last, "baseline": name, "acc": float(difference.mean()), "stderr": stderr}
            )
            print(json.dumps(paired[-1]), flush=True)
    body = {
        "commit": commit(),
        "versions": versions("torch", "transformers"),
        "limit": options.limit,
        "records": records,
        "paired": paired,
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if any(record.get("agrees") is False for record in records):
        sys.exit("our scoring and lm-eval's disagree")


def _lm_eval(python: Path, folder: Path, options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "theirs.json"
        command = [str(python), str(Path(__file__).parent / "peer_lmeval.py"), "--model", str(folder)]
        command += ["--data", str(options.data), "--limit", str(options.limit), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        return json.loads(out.read_text(encoding="utf-8"))


def _compare(ours: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours beside lm-eval's: accuracies, and the greatest difference of a log-likelihood in nats."""
    flat = [value for question in theirs["log_likelihoods"] for value in question]
    worst = max(abs(a - b) for a, b in zip(ours.log_likelihoods, flat, strict=True))
    same = ours.acc == theirs["acc"] and theirs["acc_norm"] in (None, ours.acc_norm)
    return {
        "theirs_acc": theirs["acc"],
        "theirs_acc_norm": theirs["acc_norm"],
        "worst_nats": worst,
        "agrees": same and worst <= _TOLERANCE,
    }


if __name__ == "__main__":
    main()
