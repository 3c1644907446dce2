"""How the command line talks: progress with time left, tables, and one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Bars:
    """A ``sparsify.progress.Progress`` drawn by rich; only notices are printed where stderr is not a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:32}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def stage(self, name: str, total: int) -> None:
        """Start a bar; the one before it is filled."""
        self._finish()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def notice(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(f"notice: {text}", style="yellow", highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, completed=task.total)

    @contextmanager
    def running(self) -> Iterator[Bars]:
        """Draw while the context is open."""
        with self._bars:
            yield self
            self._finish()


def errors() -> Console:
    """The console of progress, notices and errors: stderr, so that stdout stays for results.

    Bound to today's stderr: exporters silence the stream while other people's code prints, and bars go on.
    """
    return Console(file=sys.stderr, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


# Cells that nobody should read past: red where the terminal has colours.
_ALARMING = frozenset(("DENSE", "UNKNOWN", "SPARSE", "FAIL"))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, *, lines: bool = True
) -> None:
    """A table on stdout; columns of figures are right-aligned; without ``lines`` more fits into a narrow terminal."""
    plain: dict[str, Any] = {} if lines else {"box": None, "pad_edge": False}
    table = Table(title=title, title_justify="left", title_style="bold", **plain)
    for i, name in enumerate(head):
        numeric = bool(rows) and all(row[i][:1].isdigit() or not row[i] for row in rows) and any(row[i] for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style="bold red") if cell in _ALARMING else cell for cell in row))
    Console(highlight=False, markup=False, emoji=False).print(table)


def print_line(text: str) -> None:
    """A line on stdout."""
    Console(highlight=False, markup=False, emoji=False).print(text, soft_wrap=True)


@contextmanager
def progress_bars(after: str = "the same command resumes") -> Iterator[Bars]:
    """Bars on stderr for the length of a command; an interruption says what comes ``after``."""
    try:
        with Bars(errors()).running() as bars:
            yield bars
    except KeyboardInterrupt:
        # typer ends the process with code 130 and says nothing.
        sys.stderr.write(f"interrupted; {after}\n")
        raise
