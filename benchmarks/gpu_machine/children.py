"""Processes of their own, for what may crash or poison a CUDA context."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_machine.record import Record

# Yields what it finds as it goes.
Task = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Done:
    """Of a task in a process of its own.

    Attributes:
        found: what it yielded, also where it crashed afterwards.
        why: the reason it failed or had nothing to say, or "".
        log: everything that it printed.
    """

    found: list[dict[str, Any]]
    why: str
    log: str


def scratch_folder(folder: Path, task: str) -> Path:
    """A new folder below ``folder`` for one run of ``task``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder, prefix=f"{task}-"))


def run_process(
    record: Record,
    what: str,
    task: str,
    arguments: dict[str, Any],
    scratch: Path,
    timeout_s: float,
    *,
    tool: Path,
    variables: Mapping[str, str],
) -> Done:
    """Run ``task`` of ``tool``, a folder that Python can run, and end all that it started.

    Where it crashes, has to be stopped or gives no answer, the record says so, and what it printed last.

    Args:
        record: told of failures.
        what: the task's name in the record.
        task: one that ``tool`` hands to ``child``.
        arguments: JSON values for it.
        scratch: folder for arguments, answer and log.
        timeout_s: after which it is stopped.
        tool: the benchmark's own package.
        variables: its environment.
    """
    from sparsify.runtimes.vllm_settings import cause

    (scratch / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    log = scratch / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(tool), "child", task, str(scratch)], env=dict(variables), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        status = None
        try:
            status = process.wait(max(timeout_s, 1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            # An engine may have processes of its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    answer = scratch / "answer"
    # The last line of a process that was killed may be half a line.
    lines = answer.read_text(encoding="utf-8").split("\n")[:-1] if answer.exists() else []
    text = log.read_text(encoding="utf-8", errors="replace")
    why = "" if lines else "no answer"
    if status is None:
        why = f"not finished after {timeout_s:.0f} s"
    elif status:
        why = f"exit status {status}: {cause(text)}"
    if why:
        note = record.not_run if status is None else record.failed
        note(what, why)
        record.body["logs"][what] = text.splitlines()[-40:]
    return Done([json.loads(line) for line in lines], why, text)


def child(task: Task, scratch: Path) -> None:
    """Run a task; what it yields is written at once, a line each."""
    arguments = json.loads((scratch / "arguments.json").read_text(encoding="utf-8"))
    with (scratch / "answer").open("w", encoding="utf-8") as file:
        for found in task(arguments):
            file.write(json.dumps(found) + "\n")
            file.flush()
