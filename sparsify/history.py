"""A journal and a snapshot read back, whatever is in them: values of the wrong kind count as absent."""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sparsify.metrics import Blocks, Snapshot, Stage, Worker

Line = dict[str, Any]
_LAST = 8
# No count or time that we write is larger.
_LARGEST = 1 << 62
_WORDS = 2000


def text(value: Any) -> str | None:
    """A string that can be printed: what a terminal would obey is replaced, and it is cut where it is long."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else "\ufffd" for c in value[:_WORDS])


def number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return None
    return None if math.isnan(value) else float(value)


def integer(value: Any) -> int | None:
    """A count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST else None


def mapping(value: Any) -> dict[str, Any]:
    """An object; JSON's keys are strings."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """A list."""
    return value if isinstance(value, list) else []


def quoted(argument: str) -> str:
    """An argument as a shell takes it, on one line.

    Raises:
        ValueError: it cannot be an argument.
    """
    data = os.fsencode(argument)
    if b"\0" in data:
        raise ValueError("an argument holds no NUL")
    if argument.isprintable():
        return shlex.quote(argument)
    plain = "".join(chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in data)
    return f"$'{plain}'"


@dataclass
class History:
    """What a journal tells; the run is the last that was started.

    Attributes:
        start: the line that began the run; empty where there is none.
        runs: how often one was started or resumed.
        began, last: times of the run's first line and of the last line, in seconds since 1970.
        total: blocks of the model.
        resumed, done: blocks that the run found finished, and those finished since too.
        stage: the last that began.
        end, error: how the run ended, if it says so.
        took, steps: seconds of the run's last blocks; of each step and block of the run.
        tasks, n_failed, n_retried: the last failed tasks of the run, and their numbers.
        notices: the last ones.
    """

    start: Line = field(default_factory=dict)
    runs: int = 0
    began: float | None = None
    last: float | None = None
    total: int | None = None
    resumed: int | None = None
    done: int | None = None
    stage: str | None = None
    end: str | None = None
    error: str | None = None
    took: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    steps: dict[str, list[float]] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    n_failed: int = 0
    n_retried: int = 0
    notices: list[str] = field(default_factory=list)

    @property
    def run(self) -> str | None:
        """Number of the run, which its snapshot has too."""
        return text(self.start.get("run"))

    @property
    def process(self) -> dict[str, Any]:
        """The driver's process, as ``processes.identity`` had it; empty where it is not known."""
        strings = {key: text(self.start.get(key)) for key in ("host", "boot", "namespace")}
        numbers = {key: integer(self.start.get(key)) for key in ("pid", "born")}
        return {**numbers, **strings} if numbers["pid"] is not None else {}

    @property
    def seconds_per_block(self) -> float | None:
        """Median time of the last blocks."""
        return statistics.median(self.took) if self.took else None

    @property
    def seconds_by_step(self) -> dict[str, float]:
        """Mean time by step of the run's blocks."""
        return {step: statistics.fmean(values) for step, values in self.steps.items()}

    def resume(self, folder: str | None) -> str | None:
        """The command that started the run, as it is typed in ``folder``; None where it is not known."""
        words, where = items(self.start.get("command")), self.start.get("cwd")
        if not words or not all(isinstance(word, str) for word in words):
            return None
        try:
            line = " ".join(quoted(word) for word in words)
            return f"cd {quoted(where)} && {line}" if isinstance(where, str) and where != folder else line
        except ValueError:
            return None


def read_history(lines: Iterable[Line], recent: int) -> History:
    """What ``lines`` of a journal tell, with the last ``recent`` notices and failed tasks."""
    found = History()
    for line in lines:
        time, event = number(line.get("time")), line.get("event")
        found.last = found.last if time is None else time
        if event in ("start", "resume"):
            done = integer(line.get("blocks_done"))
            before = found
            found = History(line, before.runs + 1, time, before.last, before.total, done, done, notices=before.notices)
        elif event == "blocks":
            found.total = integer(line.get("total"))
        elif event == "stage":
            found.stage = text(line.get("stage"))
        elif event == "block":
            found.done = (found.done or 0) + 1
            took = number(line.get("took_s"))
            found.took.extend([took] if took is not None else [])
            for step, value in mapping(line.get("seconds")).items():
                seconds = number(value)
                if seconds is not None:
                    found.steps.setdefault(text(step) or "", []).append(seconds)
        elif event == "task":
            retried = line.get("state") == "retried"
            found.n_failed += 1
            found.n_retried += retried
            task = {key: text(line.get(key)) for key in ("kind", "worker", "error")}
            numbers = {key: integer(line.get(key)) for key in ("block", "attempt")}
            found.tasks = [*found.tasks, {**task, **numbers, "retried": retried}][-recent:]
        elif event == "notice":
            notice = text(line.get("text"))
            found.notices = [*found.notices, notice][-recent:] if notice else found.notices
        elif event == "end":
            found.end, found.error = _end(line.get("state")), text(line.get("error"))
    return found


def _end(value: Any) -> str | None:
    return value if value in ("finished", "failed", "interrupted") else None


def snapshot_of(value: Any, run: str | None) -> Snapshot | None:
    """The snapshot in ``value``; None where it is not one of the run with number ``run``."""
    body = mapping(value)
    time, started = number(body.get("time")), number(body.get("started"))
    if run is None or body.get("run") != run or time is None or started is None:
        return None
    return Snapshot(
        time,
        started,
        stages=tuple(stage for each in items(body.get("stages")) if (stage := _stage(mapping(each)))),
        blocks=_blocks(mapping(body.get("blocks"))),
        workers=tuple(worker for each in items(body.get("workers")) if (worker := _worker(mapping(each)))),
        peak_memory_bytes=integer(body.get("peak_memory_bytes")),
    )


def _stage(body: Line) -> Stage | None:
    name, since = text(body.get("name")), number(body.get("since"))
    total, done, skipped = (integer(body.get(key)) for key in ("total", "done", "skipped"))
    if name is None or total is None or done is None or skipped is None or since is None:
        return None
    return Stage(name, total, done, skipped, since)


def _blocks(body: Line) -> Blocks | None:
    total, done, resumed = (integer(body.get(key)) for key in ("total", "done", "resumed"))
    began, last, here, left = (number(body.get(key)) for key in ("began", "last", "weights_here", "weights_left"))
    if total is None or done is None or resumed is None:
        return None
    if began is None or last is None or here is None or left is None:
        return None
    begun = tuple(time for each in items(body.get("begun")) if (time := number(each)) is not None)
    return Blocks(total, done, resumed, began, last, here, left, number(body.get("usual_s")), begun)


def _worker(body: Line) -> Worker | None:
    name, since, seen = text(body.get("name")), number(body.get("since")), number(body.get("seen"))
    if name is None or since is None or seen is None:
        return None
    return Worker(
        name,
        text(body.get("doing")),
        integer(body.get("block")),
        since,
        seen,
        body.get("alive") is True,
        integer(body.get("peak_memory_bytes")),
    )
