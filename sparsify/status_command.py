"""The command that looks at a job from outside, while it runs or after it died."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.errors import UsageError
from sparsify.options import Json

if TYPE_CHECKING:
    from sparsify.status import Status

# Longer than anybody waits for, and what time.sleep takes.
_LONGEST_S = 86_400


def status_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What was given as --out, or DIR.partial.")],
    watch: Annotated[
        float | None, typer.Option(help="Repeat every so many seconds for as long as it runs.", show_default="once")
    ] = None,
    json: Json = False,
) -> None:
    """Say how far the job in DIR is, whether it still runs, and what to type if it does not.

    Exit code 0 whatever its state, 2 if there is no job. Nothing in DIR is changed.
    """
    import sys
    import time
    from json import dumps

    from sparsify.console import print_json
    from sparsify.status import status

    if watch is not None and not 0 < watch <= _LONGEST_S:
        raise UsageError(f"--watch {watch:g}: give seconds, more than 0 and at most {_LONGEST_S}")
    while True:
        found = status(folder)
        if json and watch is not None:
            # One line each: what reads them need not find out where a document ends.
            sys.stdout.write(dumps(found.to_dict()) + "\n")
        elif json:
            print_json(found.to_dict())
        else:
            if watch is not None and sys.stdout.isatty():
                sys.stdout.write("\033[H\033[J")
            _show(found)
        sys.stdout.flush()
        if watch is None or found.state not in ("running", "unknown"):
            return
        time.sleep(watch)


def _show(found: Status) -> None:
    from sparsify.bench.report import size
    from sparsify.console import print_line, print_table

    print_line(f"{found.folder}: {found.detail}")
    lines = [
        ("model", found.model),
        ("method", " ".join(filter(None, (found.method, found.pattern))) or None),
        ("blocks", _blocks(found)),
        ("stage", _stage(found)),
        ("time", _times(found)),
        ("speed", _speed(found)),
        (
            "memory",
            None if found.peak_memory_bytes is None else f"{size(found.peak_memory_bytes)} at most, of the driver",
        ),
        ("disk", size(found.disk_bytes)),
        (
            "tasks",
            f"{found.tasks_failed} failed, {found.tasks_retried} retried" if found.tasks_failed else None,
        ),
        ("driver", _driver(found)),
    ]
    for name, value in lines:
        if value is not None:
            print_line(f"  {name:8}{value}")
    if found.workers:
        print_table(
            ("worker", "does", "block", "for", "heard of"),
            [
                (
                    each["name"],
                    "LOST" if not each["alive"] else each["doing"] or "waits",
                    "" if each["block"] is None else str(each["block"]),
                    duration(each["seconds"]),
                    f"{duration(each['seen_seconds'])} ago",
                )
                for each in found.workers
            ],
            lines=False,
        )
    for task in found.tasks:
        block = "" if task["block"] is None else f" of block {task['block']}"
        what = "given out again" if task["retried"] else "given up"
        print_line(f"failed: {task['kind']}{block} on {task['worker']}: {task['error']}; {what}")
    for notice in found.notices:
        print_line(f"notice: {notice}")
    for problem in found.problems:
        print_line(f"problem: {problem}")
    if found.resume is not None:
        print_line(f"to go on: {found.resume}")


def _blocks(found: Status) -> str | None:
    if found.blocks_done is None:
        return None
    before = f", {found.blocks_resumed} of them before this run" if found.blocks_resumed else ""
    total = "" if found.blocks_total is None else f" of {found.blocks_total}"
    return f"{found.blocks_done}{total} finished{before}"


def _stage(found: Status) -> str | None:
    if found.stage is None or found.state == "finished":
        return None
    return found.stage if found.percent is None else f"{found.stage}, {found.percent:.0f} %"


def _times(found: Status) -> str | None:
    if found.seconds is None:
        return None
    if found.state != "running":
        return duration(found.seconds)
    left = "time left not known yet" if found.seconds_left is None else f"about {duration(found.seconds_left)} left"
    return f"{duration(found.seconds)} so far, {left}"


def _speed(found: Status) -> str | None:
    if found.seconds_per_block is None:
        return None
    steps = ", ".join(f"{step} {value:.3g} s" for step, value in found.seconds_by_step.items())
    return f"{duration(found.seconds_per_block)} a block{f' ({steps})' if steps else ''}"


def _driver(found: Status) -> str | None:
    if found.state == "finished" or not found.process:
        return None
    seen = "" if found.silent_seconds is None else f", last heard of {duration(found.silent_seconds)} ago"
    return f"process {found.process['pid']} on {found.process['host'] or 'an unknown machine'}{seen}"


def duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
