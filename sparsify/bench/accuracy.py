"""Perplexity and zero-shot tasks of what a worker holds open, as fields of records."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.bench.request import Request
from sparsify.bench.subjects import Subject
from sparsify.bench.workers import WorkerProcess
from sparsify.checkpoint import read_config
from sparsify.data import Windows

# A model's own limit can be a hundred times what a task asks.
TASK_LENGTH = 2048


def perplexity_record(
    worker: WorkerProcess, windows: Windows, stride: int | None, reference: Subject | None
) -> dict[str, Any]:
    """Perplexity on ``windows``, and the KL divergence from ``reference`` in float32 PyTorch.

    The divergence is None where the runtime gives no logits or there is no reference.

    Raises:
        SparsifyError: what the worker met: NaN, a text longer than the model takes, its death.
    """
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, windows.ids, allow_pickle=False)
        file.flush()
        found = worker.ask(
            "perplexity",
            windows=file.name,
            stride=stride or int(windows.ids.shape[1]),
            reference=None if reference is None else str(reference.folder),
        )
    measured, kl, text = found["perplexity"], found["kl"], windows.describe()
    return {
        "text": {**{key: text[key] for key in ("source", "windows", "length", "bos", "sha256")}}
        | {"stride": measured["stride"]},
        **{
            key: measured[key]
            for key in ("perplexity", "nll_mean", "standard_error", "window_nll", "window_tokens", "n_tokens")
        },
        "kl": None
        if kl is None or reference is None
        else {
            **{key: kl[key] for key in ("mean_nats", "standard_error_nats", "n_tokens", "top1_agreement")},
            "reference": reference.label,
        },
    }


def task_length(folder: Path) -> int:
    """Tokens that a task's requests may have: what the model has positions for, up to ``TASK_LENGTH``."""
    found = read_config(folder).get("max_position_embeddings")
    return min(found, TASK_LENGTH) if isinstance(found, int) and found > 0 else TASK_LENGTH


def task_records(worker: WorkerProcess, folder: Path, request: Request) -> Iterator[dict[str, Any]]:
    """Every task and metric of ``request``.

    Raises:
        SparsifyError: what the worker or lm-eval met.
    """
    from transformers import AutoTokenizer

    from sparsify.bench.zero_shot_tasks import run_tasks

    def score(ids: NDArray[np.int64], last: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        found = worker.ask("score", ids=ids.tolist(), last=last)
        return np.asarray(found["logprobs"]), np.asarray(found["greedy"], dtype=np.bool_)

    def generate(ids: NDArray[np.int64], n: int) -> list[int]:
        tokens: list[int] = worker.ask("generate", ids=ids.tolist(), n=n)["tokens"]
        return tokens

    rows = run_tasks(
        score,
        AutoTokenizer.from_pretrained(folder, trust_remote_code=request.trust_remote_code),
        request.tasks,
        max_length=task_length(folder),
        generate=generate,
        limit=request.task_limit,
        seed=request.seed,
    )
    for row in rows:
        yield {key: value for key, value in row.items() if key != "samples"}
