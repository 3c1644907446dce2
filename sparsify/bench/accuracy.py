"""Perplexity and zero-shot tasks of what a worker holds open, as fields of records."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.bench.request import Request
from sparsify.bench.subjects import Subject
from sparsify.bench.workers import WorkerProcess
from sparsify.checkpoint import read_config
from sparsify.errors import ModelError

# A model's own limit can be a hundred times what a task asks; requests beyond this lose tokens at their start.
TASK_LENGTH = 2048


def perplexity_record(worker: WorkerProcess, request: Request, reference: Subject | None) -> tuple[dict[str, Any], str]:
    """Perplexity on the windows of ``request``, and the KL divergence from ``reference`` in float32 PyTorch.

    Returns:
        The fields; why the divergence among them is None, if it is.

    Raises:
        SparsifyError: what the worker met: NaN, a text longer than the model takes, its death.
        OSError: no room for the windows.
    """
    windows = request.windows
    assert windows is not None
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, windows.ids, allow_pickle=False)
        file.flush()
        found = worker.ask(
            "perplexity",
            windows=file.name,
            stride=request.stride or int(windows.ids.shape[1]),
            reference=None if reference is None else str(reference.folder),
            trust_remote_code=request.trust_remote_code,
        )
    measured, kl, text = found["perplexity"], found["kl"], windows.describe()
    fields = ("perplexity", "nll_mean", "standard_error", "window_nll", "window_tokens", "n_tokens")
    record: dict[str, Any] = {key: measured[key] for key in fields}
    record["text"] = {key: text[key] for key in ("source", "windows", "length", "bos", "sha256")}
    record["text"]["stride"] = measured["stride"]
    record["kl"] = None
    if kl is not None and reference is not None:
        parts = ("mean_nats", "standard_error_nats", "n_tokens", "top1_agreement")
        record["kl"] = {**{key: kl[key] for key in parts}, "reference": reference.label}
    return record, found["why_no_kl"]


def task_length(folder: Path) -> int:
    """Tokens that a task's requests may have: what the model has positions for, up to ``TASK_LENGTH``."""
    found = read_config(folder).get("max_position_embeddings")
    return min(found, TASK_LENGTH) if isinstance(found, int) and found > 0 else TASK_LENGTH


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in ``folder``.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and what they import raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({reason}); tasks need one") from error


def task_records(
    worker: WorkerProcess, folder: Path, request: Request, cut: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Every task and metric of ``request``; ``cut`` is told how many requests were too long to be asked as a whole.

    Raises:
        SparsifyError: what the worker or lm-eval met.
    """
    from sparsify.bench.zero_shot_tasks import run_tasks

    def score(ids: NDArray[np.int64], last: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        found = worker.ask("score", ids=ids.tolist(), last=last)
        return np.asarray(found["logprobs"]), np.asarray(found["greedy"], dtype=np.bool_)

    def generate(ids: NDArray[np.int64], n: int) -> list[int]:
        tokens: list[int] = worker.ask("generate", ids=ids.tolist(), n=n)["tokens"]
        return tokens

    length = task_length(folder)
    rows = run_tasks(
        score,
        load_tokenizer(folder, trust_remote_code=request.trust_remote_code),
        request.tasks,
        max_length=length,
        generate=generate,
        limit=request.task_limit,
        seed=request.seed,
        cut=lambda n, asked: cut(
            f"{n} of {asked} requests have more than {length} tokens and lost those at their start"
        ),
    )
    for row in rows:
        yield {**row, "samples": samples(row["samples"], row["value"])}


def samples(values: Sequence[Any], value: float) -> list[float] | None:
    """``values`` of questions as a record holds them; None where they are no numbers whose mean is ``value``."""
    if not all(isinstance(each, Real | np.bool_) for each in values):
        return None
    found = [float(each) for each in values]
    mean = math.fsum(found) / len(found)
    return found if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9) else None
