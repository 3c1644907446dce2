"""Zero-shot accuracy of models side by side, and our model of lm-eval beside its own.

    python benchmarks/zeroshot.py --data DIR --limit 1000 --out FILE dense=smollm2-135m alps=OUT best=OUT
    python benchmarks/zeroshot.py --data DIR --limit 40 --compare --out FILE dense=smollm2-135m

`--data` holds task files of lm-eval, or the data of those in sparsify/bench/tasks. All models answer the same first
`--limit` questions of each task, in float32; differences to the last model are paired, question by question. With
`--compare`, lm-eval's own HFLM answers them too: another accuracy, or a log-likelihood of a choice that is not ours up
to rounding, is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from provenance import commit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Nats by which our log-likelihood of a choice may differ from lm-eval's: rounding, of float32 logits in another order.
_TOLERANCE = 2e-3


def main() -> None:
    """Ask every model, print and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["lambada_openai", "hellaswag", "arc_easy"])
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()

    import numpy as np
    from transformers import AutoConfig, AutoTokenizer

    from sparsify.bench.scoring import score
    from sparsify.bench.zero_shot_tasks import load_tasks, run_tasks
    from sparsify.manifest import versions
    from sparsify.runtimes.torch_session import TorchSession
    from sparsify.source import resolve

    tasks = load_tasks(options.tasks, options.data)
    records: list[dict[str, Any]] = []
    hits: dict[tuple[str, str], Any] = {}
    for entry in options.models:
        name, _, model = entry.partition("=")
        folder = resolve(model).folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        length = AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
        with TorchSession(folder) as session:
            rows = run_tasks(partial(score, session), tokenizer, tasks, max_length=length, limit=options.limit)
        if options.compare:
            _compare(rows, folder, tasks, options.limit)
        for row in rows:
            samples = row.pop("samples")
            if row["metric"] == "acc":
                hits[name, row["task"]] = np.array(samples, dtype=float)
            records.append({"model": name, **row})
            print(json.dumps(records[-1]), flush=True)
    last = options.models[-1].partition("=")[0]
    paired = []
    for name, task in hits:
        if name != last:
            difference = hits[last, task] - hits[name, task]
            stderr = float(difference.std(ddof=1) / len(difference) ** 0.5)
            paired.append(
                {"task": task, "model": last, "baseline": name, "acc": float(difference.mean()), "stderr": stderr}
            )
            print(json.dumps(paired[-1]), flush=True)
    body = {
        "commit": commit(),
        "versions": versions("torch", "transformers", "lm_eval"),
        "limit": options.limit,
        "records": records,
        "paired": paired,
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if any(record.get("agrees") is False for record in records):
        sys.exit("our model and lm-eval's disagree")


def _compare(rows: list[dict[str, Any]], folder: Path, tasks: Any, limit: int) -> None:
    """Put lm-eval's value beside ours, and the greatest difference of a log-likelihood in nats."""
    from lm_eval.models.huggingface import HFLM

    from sparsify.bench.zero_shot_tasks import ask

    ours = _answers(tasks)
    theirs = ask(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1), tasks, limit=limit)
    worst = {
        name: max(abs(a - b) for a, b in zip(ours[name], values, strict=True))
        for name, values in _answers(tasks).items()
    }
    for row, other in zip(rows, theirs, strict=True):
        # Accuracies have to be the same; a perplexity is as close as the log-likelihoods are.
        same = row["value"] == other["value"] or row["metric"] == "perplexity"
        row["hflm"], row["worst_nats"] = other["value"], worst[row["task"]]
        row["agrees"] = same and worst[row["task"]] <= _TOLERANCE


def _answers(tasks: Any) -> dict[str, list[float]]:
    """Log-likelihoods of every choice of every question, as the last model gave them."""
    return {
        name: [float(answer[0]) for instance in task.instances for answer in instance.resps]
        for name, task in tasks["tasks"].items()
    }


if __name__ == "__main__":
    main()
