"""The lm-eval side of zeroshot.py; runs in an environment with `pip install "lm_eval[hf]"`.

    ENV/bin/python benchmarks/peer_lmeval.py --model DIR --data DIR --limit 40 --out FILE

Its own task definitions, request building, scoring and metrics, on local files instead of a hub's. Where a file has
other columns than lm-eval's data set (ARC), the definition names them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_CHOICE = {
    "output_type": "multiple_choice",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def definitions(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's definitions, by our name of the task."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    def files(name: str) -> dict[str, Any]:
        return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / name)}}}

    return {
        "lambada": {
            **files("lambada_test.jsonl"),
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "hellaswag": {
            **files("hellaswag.validation.jsonl.gz"),
            **_CHOICE,
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
        },
        "arc_easy": {
            **files("arc_easy.test.jsonl.gz"),
            **_CHOICE,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "choices",
        },
    }


def main() -> None:
    """Evaluate and write accuracies and the log-likelihood of every choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=options.model, dtype="float32", device="cpu", batch_size=1)
    tasks = {
        name: ConfigurableTask(config={"task": name, "test_split": "test", **config})
        for name, config in definitions(options.data).items()
    }
    found = lm_eval.evaluate(lm=model, task_dict=tasks, limit=options.limit, log_samples=True, bootstrap_iters=0)
    body = {
        name: {
            "acc": found["results"][name]["acc,none"],
            "acc_norm": found["results"][name].get("acc_norm,none"),
            "log_likelihoods": [
                [float(answer[0][0]) for answer in sample["resps"]]
                for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            ],
        }
        for name in tasks
    }
    body["version"] = lm_eval.__version__
    options.out.write_text(json.dumps(body) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
