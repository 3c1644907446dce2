"""Zero-shot tasks through lm-eval: its own definitions, prompts and metrics, asked of a runtime session.

Tasks are lm-eval's standard ones, whose data it downloads, or come from a folder: lm-eval task files (YAML) that lie
there, and for the tasks of ``tasks/`` beside this file the data alone.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.bench.perplexity import ratio
from sparsify.bench.task_files import READY, check_files, first_broken
from sparsify.errors import DataError, SparsifyError, UsageError
from sparsify.extras import require

if TYPE_CHECKING:
    from sparsify.bench.lm_eval_model import Generate, Progress, Score


def ready_tasks() -> list[str]:
    """Names of the tasks that need nothing but their data file."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def load_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """lm-eval's tasks, with their data.

    Args:
        names: of tasks, groups or tags.
        folder: with task files, whose ``data_files`` are relative to it, and with the data of ``ready_tasks``; None
            takes lm-eval's standard tasks. Functions that a task file names (``!function``) are run.

    Raises:
        MissingExtraError: lm-eval is not installed.
        UsageError: no names, or one that lm-eval does not know.
        DataError: no such folder; a broken task file in it that is named after one of ``names`` or names it, so that
            lm-eval would pass it over and take another or none; data that is missing or cannot be downloaded.
    """
    require("eval", "accuracy on tasks")
    if not names:
        raise UsageError("no tasks to ask; name some")
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder of task files")
    # lm-eval opens task files only once it needs them, when the process may be elsewhere.
    at = None if folder is None else folder.resolve()
    with _still(), _warnings_off():
        manager = _manager(names, folder, at)
        for name in names:
            if name not in manager.all_tasks:
                raise _unknown(name, manager.all_tasks, folder)
        # Relative names of data files are relative to where the process is.
        with chdir(at or Path.cwd()):
            found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in names:
                try:
                    for key, value in manager.load([name]).items():
                        found[key].update(value)
                except Exception as error:  # of lm-eval, datasets, YAML, and of what a task file runs
                    raise DataError(_cannot_load(name, error, folder)) from error
    if folder is not None:
        # What groups and tags have brought.
        check_files(folder, [*found["tasks"], *found["groups"]], manager)
    return found


def _manager(names: Sequence[str], folder: Path | None, at: Path | None) -> Any:
    """lm-eval's list of what there is in ``folder``, whose full path is ``at``."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        check_files(folder, names)
    try:
        manager = TaskManager(include_path=None if at is None else [READY, at], include_defaults=at is None)
    except Exception as error:  # one file can break the list
        broken = None if folder is None else first_broken(folder)
        raise broken or DataError(f"{folder or 'lm-eval'}: its tasks cannot be listed ({_reason(error)})") from error
    if folder is not None:
        check_files(folder, names, manager)
    return manager


def run_tasks(
    score: Score,
    tokenizer: Any,
    tasks: Any,
    *,
    max_length: int,
    generate: Generate | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cut: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask a session; arguments as of ``sparsify.bench.lm_eval_model.SessionLM`` and ``ask``.

    ``cut`` is called with (requests that were longer than ``max_length``, requests) if there were any.
    """
    with _warnings_off():
        from sparsify.bench.lm_eval_model import SessionLM

    tick = None if progress is None else _outside(progress)
    model = SessionLM(score, tokenizer, max_length=max_length, generate=generate, progress=tick)
    rows = ask(model, tasks, limit=limit, seed=seed)
    if cut is not None and model.cut:
        cut(model.cut, model.asked)
    return rows


def ask(model: Any, tasks: Any, *, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """One dict for each task and metric, of the tasks in a group each by itself.

    Args:
        model: a model of lm-eval (``lm_eval.api.model.LM``).
        tasks: from ``load_tasks``.
        limit: questions of each task, the first ones; None is all.
        seed: for the choice of examples, in tasks that show some.

    Returns:
        ``task``; ``metric`` (``acc``; with the name of lm-eval's filter, if it has one: ``exact_match,strict-match``);
        ``value``; ``standard_error`` over questions, by the delta method for perplexities, None for one question and
        for metrics that are no means; ``n`` questions; ``higher_is_better``; ``harness``; ``samples_sha256`` of the
        questions, prompts and answers in order; ``samples``, what each question adds to the value, for paired
        differences.

    Raises:
        UsageError: ``limit`` below 1, or the session cannot do what a task asks for.
        DataError: lm-eval cannot evaluate a task.
        NumericsError, ModelError: what the session raises.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: want at least 1 question")
    from lm_eval import __version__
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed)
    try:
        with _still():
            # Without lm-eval's own standard errors, which are bootstrapped in a process for each core.
            found = evaluate(model, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    except SparsifyError:
        raise
    except Exception as error:  # of lm-eval, and of templates and functions of task files
        reason = _reason(error)
        raise DataError(f"tasks {', '.join(tasks['tasks'])}: lm-eval cannot evaluate them ({reason})") from error
    rows = []
    for name, task in tasks["tasks"].items():
        samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
        for metric, kept in _metrics(samples):
            of_filter = [sample for sample in samples if sample["filter"] == kept and metric in sample]
            values = [sample[metric] for sample in of_filter]
            rows.append(
                {
                    "task": name,
                    "metric": metric if kept == "none" else f"{metric},{kept}",
                    "value": float(found["results"][name][f"{metric},{kept}"]),
                    "standard_error": standard_error(task.aggregation().get(metric), values),
                    "n": len(values),
                    "higher_is_better": task.higher_is_better().get(metric),
                    "harness": f"lm-eval {__version__}",
                    "samples_sha256": _hash(of_filter),
                    "samples": values,
                }
            )
    return rows


def standard_error(aggregate: Any, values: Sequence[Any]) -> float | None:
    """Standard error over questions of ``aggregate(values)``, a function of lm-eval; None where it is not known."""
    from lm_eval.api import metrics

    if len(values) < 2:
        return None
    if aggregate in (metrics.mean, metrics.perplexity):
        mean, error = ratio([float(value) for value in values], [1.0] * len(values))
        scale = 1.0 if aggregate is metrics.mean else math.exp(-mean)
    elif aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        # Pairs of a log-likelihood and what it counts for.
        mean, error = ratio(*zip(*values, strict=True))
        scale = math.exp(-mean) if aggregate is metrics.weighted_perplexity else 1 / math.log(2)
    else:
        return None
    return None if error is None else scale * error


def _metrics(samples: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(metric, filter) of the samples, in their order."""
    return list(dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"]))


def _hash(samples: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for key in ("doc_hash", "prompt_hash", "target_hash"):
            digest.update(str(sample[key]).encode())
    return digest.hexdigest()


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> SparsifyError:
    where = f"{folder}: has no task" if folder is not None else "lm-eval has no task"
    near = difflib.get_close_matches(name, known, n=3)
    listed = near or (known if folder is not None else ["its list: lm-eval ls tasks"])
    broken = None if folder is None else first_broken(folder)
    return UsageError(f"{where} {name!r}; choose {', '.join(listed)}" + (f"; or else {broken}" if broken else ""))


def _cannot_load(name: str, error: Exception, folder: Path | None) -> str:
    reason = _reason(error)
    if folder is None:
        return (
            f"task {name}: lm-eval could not load it ({reason}); without a network, give task files and data with "
            f"--task-files DIR (data alone is enough for {', '.join(ready_tasks())})"
        )
    return f"{folder}: task {name} cannot be loaded ({reason}); mend its task file or its data"


def _reason(error: BaseException) -> str:
    # What datasets wraps says more than its own "An error occurred".
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__


_LOG = logging.getLogger("lm_eval")


@contextmanager
def _still() -> Iterator[None]:
    """Keep lm-eval's and datasets' bars, prints and log off the terminal."""
    level = _LOG.level
    _LOG.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        _LOG.setLevel(level)


@contextmanager
def _warnings_off() -> Iterator[None]:
    from sparsify.model import quiet

    with quiet():
        yield


def _outside(progress: Progress) -> Progress:
    """``progress`` on the terminal, though what lm-eval prints is kept from it."""
    import sys

    out, err = sys.stdout, sys.stderr

    def tick(done: int, total: int) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            progress(done, total)

    return tick
