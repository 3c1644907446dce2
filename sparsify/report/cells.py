"""What tables of the report are made of: text with marks, which every output shows alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsify.report import wording

Row = dict[str, Any]
Mark = Literal["", "good", "bad", "quiet"]
# Words longer than this have to be broken, and lines shorter than this need not be.
_LONG, _SHORT = 20, 24


@dataclass(frozen=True)
class Line:
    """A line of a cell, and how it is to be seen; its text says by itself what the mark says by colour."""

    text: str
    mark: Mark = ""

    @property
    def short(self) -> bool:
        """Whether it fits on one line of a column."""
        return len(self.text) <= _SHORT

    @property
    def long(self) -> bool:
        """Whether it holds a word that has to be broken, such as a path."""
        return any(len(word) > _LONG for word in self.text.split())


Cell = Sequence[Line]


@dataclass(frozen=True)
class Table:
    """A table; the column ``row_head`` says what a row is about."""

    key: str
    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_head: int = 0


class Sources:
    """``file:line`` in a few characters: the file is named only where there are several."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self.files = list(dict.fromkeys(source.rsplit(":", 1)[0] for run in summary["runs"] for source in run["from"]))

    def cell(self, sources: Sequence[str]) -> Cell:
        """The lines that a row is from."""
        lines: dict[str, list[str]] = {}
        for source in sources:
            name, line = source.rsplit(":", 1)
            if line not in lines.setdefault(name, []):
                lines[name].append(line)
        several = len(self.files) > 1
        return [
            Line((f"file {self.files.index(name) + 1}: " if several else "") + ", ".join(found), "quiet")
            for name, found in lines.items()
        ]


def text(value: str, mark: Mark = "") -> Cell:
    """A cell of one line."""
    return [Line(value, mark)]


def none() -> Cell:
    """The cell of what there is no record of."""
    return text("not measured", "quiet")


def table(
    summary: dict[str, Any],
    about: tuple[str, str, str],
    head: Sequence[str],
    rows: Sequence[Row],
    cells: Callable[[Row], list[Cell]],
) -> Table:
    """A table of ``rows`` with the run in front where there are several, and what each row is from behind."""
    several, sources = len(summary["runs"]) > 1, Sources(summary)
    made = tuple(
        (*([text(f"run {row['run']}")] if several else []), *cells(row), sources.cell(row["from"])) for row in rows
    )
    return Table(*about, (*(["Run"] if several else []), *head, "From line"), made, int(several))


def part(row: Row, key: str) -> str:
    """The ratio of a row's bytes to its baseline's, in brackets."""
    ratio = (row["to_baseline"] or {}).get(key)
    return "" if ratio is None else f" ({ratio:.2f}x)"


def plus(value: float | None, show: str = ".3g") -> str:
    """A standard error behind its value."""
    return "" if value is None else f" ± {value:{show}}"


def state(row: Row) -> Cell:
    """What ran."""
    found = row["status"]
    mark: Mark = {"DENSE": "bad", "unknown": "bad", "unasked": "bad", "sparse": "good"}.get(found["state"], "")  # type: ignore[assignment]
    counts = [Line(wording.kernels(found["kernels"]), "quiet")] if found["kernels"] else []
    return [Line(("✖ " if mark == "bad" else "") + found["text"], mark), *counts]


def who(row: Row) -> list[Cell]:
    """Artifact and runtime."""
    return [text(row["artifact"]), [Line(row["runtime"]), Line(row["session"], "quiet")]]
